"""Gradients from lists of entries: dhidden as a weighed sum of rows of the head, dW as one of hidden states."""

import math

import torch
import triton.language as tl

from ..common import block_of, ceil_div
from ..launch import kernel

AT_ONCE = tl.constexpr(4)  # rows that a program gathers together


@kernel(do_not_specialize=["to"])
def add_rows_kernel(
    first_of, end_of, row_of, value_of, source, stride_row, stride_d, base, bias, to, out, scale, D,
    BLOCK: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """Grid (lists · D / BLOCK,), or (lists,) without ``out``: out[to[i]] = scale (base[i] + Σ x source[row]) and
    bias[i] += Σ x, for the rows and the x that row_of and value_of, float32, have from first_of[i] to end_of[i].

    out: (., D). base: (lists, D) float32 or None for 0. bias: (lists,) float32 or None. scale: 0-d float32 or None for
    1. to: (lists,) or None for i. An empty list changes nothing, unless EVERY.
    """
    blocks = 1 if out is None else tl.cdiv(D, BLOCK)
    lists = tl.num_programs(0) // blocks
    # Where ``out`` is read and written as it stands, the parts of a row are side by side; what is gathered stays in L2.
    i = tl.program_id(0) // blocks if to is None else tl.program_id(0) % lists
    block = tl.program_id(0) % blocks if to is None else tl.program_id(0) // lists
    first = tl.load(first_of + i)
    end = tl.load(end_of + i)
    if EVERY or first < end:
        d = block * BLOCK + tl.arange(0, BLOCK)
        at = i.to(tl.int64) * D + d
        kept = tl.zeros([BLOCK], tl.float32) if base is None else tl.load(base + at, mask=d < D, other=0.0)
        total = tl.zeros([BLOCK], tl.float32)
        sum_of_x = 0.0
        for start in range(first, end, AT_ONCE):
            k = start + tl.arange(0, AT_ONCE)
            x = tl.load(value_of + k, mask=k < end, other=0.0)
            sum_of_x += tl.sum(x, 0)
            if out is not None:
                row = source + tl.load(row_of + k, mask=k < end, other=0).to(tl.int64) * stride_row
                inside = (k < end)[:, None] & (d < D)[None, :]
                s = tl.load(row[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0)
                total += tl.sum(s.to(tl.float32) * x[:, None], 0)
        if out is not None:
            total += kept
            if scale is not None:
                total *= tl.load(scale)
            if to is not None:
                at = tl.load(to + i).to(tl.int64) * D + d
            tl.store(out + at, total.to(out.dtype.element_ty), mask=d < D)
        if bias is not None:
            tl.store(bias + i, tl.load(bias + i) + sum_of_x, mask=block == 0)


def add_rows(lists, source, *strides, D, base=None, bias=None, to=None, out=None, scale=None, every=False) -> None:
    """See the kernel. lists: its first four arguments. D: the width of ``out``."""
    block = block_of(D, 1024)
    add_rows_kernel[(len(lists[1]) * (1 if out is None else ceil_div(D, block)),)](
        *lists, source, *strides, base, bias, to, out, scale, D, BLOCK=block, EVERY=every
    )


def add_to_head(lists, hidden, head, bias, dtype=torch.float32, scale=None):
    """scale (head + Σ x h) over lists of vocabulary entries (V, D), in ``dtype``; and bias (V,) += Σ x.

    head: float32, which the result takes the place of where it has that dtype. Head and bias are None if not needed.
    """
    out = head if head is None or dtype == head.dtype else torch.empty_like(head, dtype=dtype)
    every = head is not None and (out is not head or scale is not None)
    strides = math.gcd(*hidden.stride()[:2]) or 1, hidden.stride(2)
    add_rows(lists, hidden, *strides, D=hidden.shape[2], base=head, bias=bias, out=out, scale=scale, every=every)
    return out


def sort_entries(entry_of, value_of, n_entries, token_of, hidden, V: int):
    """Lists, one for each vocabulary entry, of what rows (R, CAPACITY) keep, with where their hidden states begin."""
    most = entry_of.shape[1]
    used = torch.arange(most, device=entry_of.device) < n_entries[:, None]
    # What is not used goes to the end. Stable: of a vocabulary entry, rows come in order.
    keys, place = torch.where(used, entry_of, V).view(-1).sort(stable=True)
    first_of = torch.searchsorted(keys, torch.arange(V + 1, dtype=torch.int32, device=keys.device), out_int32=True)
    token, length, (by_sequence, by_token, _) = token_of.long(), hidden.shape[1], hidden.stride()
    # In units that both strides are multiples of, mostly D: that keeps known to the kernel how loads are aligned.
    unit = math.gcd(by_sequence, by_token) or 1
    starts = token // length * (by_sequence // unit) + token % length * (by_token // unit)
    return first_of[:-1], first_of[1:], starts[place // most], value_of.view(-1)[place]
