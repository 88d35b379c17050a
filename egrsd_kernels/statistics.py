"""``token_statistics``: log p of the targets, entropy and logsumexp, without full logits and without gradient."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import checks
from .backends import DEFAULT_CHUNK_BYTES, EXTRAS, VocabularyStatistics, choose, known
from .head import Head
from .operators import operator


class TokenStatistics(NamedTuple):
    """float32 tensors shaped like ``target_ids`` (float64 for float64 input), in nats, 0 where masked.

    With extras, :func:`token_statistics` returns :class:`VocabularyStatistics` instead.
    """

    logp: Tensor
    entropy: Tensor
    logsumexp: Tensor


def _names(extras: Collection[str]) -> tuple[str, ...]:
    return (*TokenStatistics._fields, *extras)


def _like(hidden: Tensor, *given: Any) -> list[Tensor]:
    target_ids, extras = given[5], given[7]
    return VocabularyStatistics.empty(_names(extras), target_ids.shape[0], hidden, hidden.new_empty)


@operator(
    "statistics(Tensor hidden, Tensor weight, Tensor? bias, float logit_scale, float? softcap, float temperature, "
    "Tensor target_ids, Tensor valid, str[] extras, str backend, SymInt chunk_bytes) -> Tensor[]",
    _like,
)
def _statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None,
    temperature: float, target_ids: Tensor, valid: Tensor, extras: list[str], backend: str, chunk_bytes: int,
) -> list[Tensor]:  # fmt: skip
    """The fields of :class:`VocabularyStatistics` that are asked for; hidden states (B, T, D) of any strides."""
    ops, names = choose(backend, hidden), _names(extras)
    with torch.cuda.device_of(hidden):
        found = VocabularyStatistics.empty(names, len(target_ids), hidden, hidden.new_zeros)
        rows, out = ops.build_rows(valid, valid), VocabularyStatistics.of(names, found)
        ops.statistics(
            Head(weight, bias, logit_scale, softcap), temperature, hidden, target_ids, rows, out, chunk_bytes
        )
    return found


@overload
def token_statistics(
    hidden: Tensor, weight: Tensor | Head, target_ids: Tensor, *, bias: Tensor | None = ..., mask: Tensor | None = ...,
    temperature: float = ..., softcap: float | None = ..., extras: tuple[()] = ...,
    backend: Literal["auto", "triton", "torch"] = ..., chunk_bytes: int = ...,
) -> TokenStatistics: ...  # fmt: skip
@overload
def token_statistics(
    hidden: Tensor, weight: Tensor | Head, target_ids: Tensor, *, bias: Tensor | None = ..., mask: Tensor | None = ...,
    temperature: float = ..., softcap: float | None = ..., extras: Collection[str],
    backend: Literal["auto", "triton", "torch"] = ..., chunk_bytes: int = ...,
) -> TokenStatistics | VocabularyStatistics: ...  # fmt: skip
@torch.no_grad()
def token_statistics(
    hidden: Tensor,
    weight: Tensor | Head,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    extras: Collection[str] = (),
    backend: Literal["auto", "triton", "torch"] = "auto",
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> TokenStatistics | VocabularyStatistics:
    """(logp, entropy, logsumexp) of softmax(z), z = softcap · tanh((h Wᵀ + b) / softcap) / temperature; no gradient.

    logp = z_y - logsumexp(z); entropy H = -Σ_v p_v log p_v over the full vocabulary.

    Args:
        hidden: (B, T, D) or (N, D); bfloat16, float16, float32, or float64 (torch backend). weight: (V, D), the dtype
            of hidden, or a :class:`egrsd_kernels.Head`, whose bias and softcap then take the place of bias and softcap.
            bias: (V,), any of those dtypes. All dense (not sparse, nested or quantised) and not on meta.
        target_ids: (B, T) or (N,), of any integer dtype, in [0, V); -100 masks a position. mask: the same shape, bool,
            or 0/1 in an integer or one of those dtypes.
        temperature, softcap, backend, chunk_bytes: as in :func:`egrsd_kernels.fused_egrsd_loss`.
        extras: names of more to be made by the same pass: "is_top1", "mean_logits", "log_sum_sq_probs", as
            :class:`egrsd_kernels.VocabularyStatistics` has them.

    Returns:
        TokenStatistics; with extras, VocabularyStatistics.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it expects. Values of target_ids and mask are
            checked where :func:`egrsd_kernels.fused_egrsd_loss` checks values.
    """
    operands = hidden, weight, target_ids, bias, mask, temperature, softcap
    hidden, head, temperature, flat_targets, valid = checks.operands(*operands)
    chunk_bytes = checks.integer("chunk_bytes", chunk_bytes, low=1)
    names = checks.names("extras", extras, EXTRAS)
    states, head = head.joined(checks.batched(hidden), valid)
    made = _statistics(
        states, head.weight, head.bias, head.logit_scale, head.softcap, temperature, flat_targets, valid, names,
        known(backend), chunk_bytes,
    )  # fmt: skip
    found = VocabularyStatistics.of(_names(names), made).view(target_ids.shape)
    if names:
        return found
    assert found.entropy is not None and found.logsumexp is not None
    return TokenStatistics(found.logp, found.entropy, found.logsumexp)
