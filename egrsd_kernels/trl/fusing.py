"""One line for all of TRL's trainers: what they make of hidden states and a head is ours.

That is the forward which most add to their models (:func:`.fused_head.fuse_head`), and distillation's divergence
(:mod:`.fused_divergence`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import trl.kernels.chunked_divergence
import trl.trainer.utils

from egrsd_kernels.replacing import is_replacement, put_back, put_in_place

from .fused_divergence import fused_divergence
from .fused_head import OUTPUTS, fuse_head, is_trls


def fuse_heads() -> AbstractContextManager[Any]:
    """From now on TRL's trainers take log p and divergences from our own pass.

    GRPO, RLOO, DPO, KTO, SFT and asynchronous GRPO give their models a forward at construction, by TRL's
    ``add_fused_lm_head``: that name becomes :func:`fuse_head`, in every module that has imported it or will. Models
    that have a head already keep theirs. ``DistillationTrainer`` calls TRL's ``ChunkedDivergenceFunction`` at each
    step: that name becomes :func:`egrsd_kernels.linear_divergence`'s. A second call changes nothing. What ours does not
    do stays TRL's: ``cast_lm_head_to_fp32``, distillation under ZeRO-3, or of float64 on a GPU, and what later versions
    of TRL ask for.

    Returns:
        A context whose end undoes what this call has done, as in ``with fuse_heads(): trainer = DPOTrainer(...)``; to
        call it alone is enough. Distillation trains within it. :func:`unfuse_heads` is the way back from anywhere.

    Raises:
        RuntimeError: somebody else has replaced ``add_fused_lm_head`` or ``ChunkedDivergenceFunction``.
    """
    head, divergence = trl.trainer.utils.add_fused_lm_head, _divergence()
    for name, now, own in (
        ("add_fused_lm_head", head, is_trls(head)),
        ("ChunkedDivergenceFunction", divergence, divergence.__module__ == trl.kernels.chunked_divergence.__name__),
    ):
        if not (own or is_replacement(now)):
            raise RuntimeError(f"fuse_heads: expected TRL's own {name}, got {now.__module__}.{now.__qualname__}")
    undo = ExitStack()
    undo.enter_context(put_in_place(head, _in_place_of))
    undo.enter_context(put_in_place(divergence, fused_divergence))
    return undo


def unfuse_heads() -> None:
    """From now on TRL's trainers add TRL's own head, and distil by TRL's own divergence.

    Models that were given our head keep it.
    """
    put_back(trl.trainer.utils.add_fused_lm_head)
    put_back(_divergence())


def _divergence() -> Any:
    return trl.kernels.chunked_divergence.ChunkedDivergenceFunction


def _in_place_of(trls: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(trls)
    def add(
        model: Any,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
        **later: Any,
    ) -> None:
        if cast_lm_head_to_fp32 or later or not set(outputs) <= set(OUTPUTS):
            trls(model, temperature, cast_lm_head_to_fp32, outputs, **later)
        else:
            fuse_head(model, temperature, outputs)

    return add
