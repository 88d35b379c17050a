"""Rows taken by an index that repeats them, and the gradient of that: a sum over each row's copies, in one order.

``index_select`` adds gradients of copies by atomics on a GPU: in bfloat16, in another order each time. Here the copies
of a row are known beforehand, sorted, so one program adds them in float32 and rounds once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Copies(NamedTuple):
    """Where the copies of each row stand: those of row r are order[starts[r]], ..., order[starts[r + 1] - 1].

    order: (G,) int32. starts: (n + 1,) int32.
    """

    order: Tensor
    starts: Tensor


def copies_of(index: Tensor, rows: int) -> Copies:
    """Of (G,) ``index`` into ``rows`` rows."""
    inside, order = index.sort(stable=True)
    starts = torch.searchsorted(inside, torch.arange(rows + 1, device=index.device))
    return Copies(order.int(), starts.int())


def segment_sum(values: Tensor, copies: Copies, rows: int | None = None) -> Tensor:
    """(rows, ...): the sum of (G, ...) ``values`` over the copies of each row; 0 for rows beyond those of ``copies``.

    16-bit values are added in float32 and rounded once.
    """
    order, starts = copies
    count = len(starts) - 1
    rows = count if rows is None else rows
    values = values.contiguous()
    if values.is_cuda:
        return _on_gpu(values, order, starts, count, rows)
    wide = torch.promote_types(values.dtype, torch.float32)
    out = values.new_zeros(rows, *values.shape[1:], dtype=wide)
    which = torch.repeat_interleave(starts.diff().long())
    return out.index_add_(0, which, values.to(wide)[order.long()]).to(values.dtype)


def _on_gpu(values: Tensor, order: Tensor, starts: Tensor, count: int, rows: int) -> Tensor:
    from .segment_kernel import BLOCK, segment_sum_kernel

    out = values.new_empty(rows, *values.shape[1:])
    width = math.prod(values.shape[1:])
    if out.numel():
        with torch.cuda.device(values.device):
            segment_sum_kernel[rows, -(-width // BLOCK)](values, order, starts, out, count, width, BLOCK)
    return out


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, order: Tensor, starts: Tensor) -> Tensor:
        ctx.copies, ctx.rows = Copies(order, starts), len(values)
        return values.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return segment_sum(gradient, ctx.copies, ctx.rows), None, None, None


def take_rows(values: Tensor, index: Tensor, copies: Copies) -> Tensor:
    """``values.index_select(0, index)``, with the same gradient every time; ``copies``: of the index, on its device."""
    taken: Tensor = _Taken.apply(values, index, *copies)  # type: ignore[no-untyped-call]
    return taken
