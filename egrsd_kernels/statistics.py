"""``token_statistics``: log p of the targets, entropy and logsumexp, without full logits and without gradient."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import checks
from .backends import DEFAULT_CHUNK_BYTES, EXTRAS, VocabularyStatistics, choose, no_extras, no_statistics
from .eager import eager
from .head import Head


class TokenStatistics(NamedTuple):
    """float32 tensors shaped like ``target_ids`` (float64 for float64 input), in nats, 0 where masked.

    With extras, :func:`token_statistics` returns :class:`VocabularyStatistics` instead.
    """

    logp: Tensor
    entropy: Tensor
    logsumexp: Tensor


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
@eager
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
    ops = choose(backend, hidden)
    with torch.cuda.device_of(hidden):
        rows = ops.build_rows(valid, valid)
        states, head = head.joined(checks.batched(hidden), valid)
        found = no_statistics(valid.numel(), states)
        out = VocabularyStatistics(*found, **no_extras(found[0], names))
        ops.statistics(head, temperature, states, flat_targets, rows, out, chunk_bytes)
    return out.view(target_ids.shape) if names else TokenStatistics(*(x.view(target_ids.shape) for x in found))
