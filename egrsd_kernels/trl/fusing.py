"""One line for all of TRL's trainers: the head that they add to their models is :func:`.fused_head.fuse_head`'s."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import trl.trainer.utils

from egrsd_kernels.replacing import is_replacement, put_back, put_in_place

from .fused_head import OUTPUTS, fuse_head, is_trls


def fuse_heads() -> AbstractContextManager[Any]:
    """From now on TRL's trainers (GRPO, RLOO, DPO, KTO, SFT, asynchronous GRPO) take log p from our own pass.

    Each gives its models a forward at construction, by TRL's ``add_fused_lm_head``: that name becomes
    :func:`fuse_head`, in every module that has imported it or will. Models that have a head already keep theirs. A
    second call changes nothing. What ours does not do stays TRL's: ``cast_lm_head_to_fp32``, and what later versions of
    TRL ask for.

    Returns:
        A context whose end undoes what this call has done, as in ``with fuse_heads(): trainer = DPOTrainer(...)``; to
        call it alone is enough. :func:`unfuse_heads` is the way back from anywhere.

    Raises:
        RuntimeError: somebody else has replaced ``add_fused_lm_head``.
    """
    now = trl.trainer.utils.add_fused_lm_head
    if not (is_trls(now) or is_replacement(now)):
        raise RuntimeError(f"fuse_heads: expected TRL's own add_fused_lm_head, got {now.__module__}.{now.__qualname__}")
    return put_in_place(now, _in_place_of)


def unfuse_heads() -> None:
    """From now on TRL's trainers add TRL's own head. Models that were given ours keep it."""
    put_back(trl.trainer.utils.add_fused_lm_head)


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
