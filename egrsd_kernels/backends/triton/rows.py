"""Which tokens are worked on, in which order, and which sequence each belongs to: the twins of egrsd_kernels.rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from egrsd_kernels.rows import Rows, Sequences

from .common import ceil_div
from .launch import kernel

BLOCK = 1024


@triton.jit
def kinds(valid, active, t, n):
    """(1 where valid, 1 where active as well) of tokens t; int32."""
    v = tl.load(valid + t, mask=t < n, other=0) != 0
    a = v & (tl.load(active + t, mask=t < n, other=0) != 0)
    return v.to(tl.int32), a.to(tl.int32)


@triton.jit
def before(ones):
    """How many of the ones come before each place."""
    return tl.cumsum(ones, 0) - ones


@kernel(do_not_specialize=["valid", "active", "n"])
def rows_kernel(valid, active, order, counts, n, BLOCK: tl.constexpr):
    """order (n,) and counts (2,) int32 of egrsd_kernels.rows.Rows. Grid: (n / BLOCK,), at least one program.

    Each program counts all tokens, in the same order as the others, and puts BLOCK of them in their places.
    """
    own = tl.program_id(0) * BLOCK
    n_valid = tl.zeros([BLOCK], tl.int32)
    n_active = tl.zeros([BLOCK], tl.int32)
    valid_before = tl.zeros([BLOCK], tl.int32)
    active_before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        v, a = kinds(valid, active, start + tl.arange(0, BLOCK), n)
        n_valid += v
        n_active += a
        valid_before += tl.where(start < own, v, 0)
        active_before += tl.where(start < own, a, 0)
    total_valid = tl.sum(n_valid, 0)
    total_active = tl.sum(n_active, 0)
    first_valid = tl.sum(valid_before, 0)
    first_active = tl.sum(active_before, 0)
    t = own + tl.arange(0, BLOCK)
    v, a = kinds(valid, active, t, n)
    of_active = first_active + before(a)
    of_valid = total_active + first_valid - first_active + before(v - a)
    of_masked = total_valid + own - first_valid + before(1 - v)
    tl.store(order + tl.where(a > 0, of_active, tl.where(v > 0, of_valid, of_masked)), t, mask=t < n)
    if own == 0:
        tl.store(counts, total_valid)
        tl.store(counts + 1, total_active)


def build_rows(valid: Tensor, active: Tensor) -> Rows:
    """See :meth:`egrsd_kernels.rows.Rows.build`."""
    n = valid.numel()
    order = torch.empty(n, dtype=torch.int32, device=valid.device)
    counts = torch.empty(2, dtype=torch.int32, device=valid.device)
    rows_kernel[(max(1, ceil_div(n, BLOCK)),)](valid, active, order, counts, n, BLOCK=BLOCK)
    return Rows(order, counts)


@kernel(do_not_specialize=["values", "boundaries", "n", "length", "n_sequences", "steps"])
def by_token_kernel(
    values, boundaries, out, last, n, length, n_sequences, steps, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out (n,) float32: the value of each token, or of its sequence; last (n,) int32. Grid: (n / BLOCK,).

    boundaries: (n_sequences + 1,), looked through in so many steps; or None, for sequences of one length.
    """
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if boundaries is None:
        sequence = t // length
        end = sequence * length + length - 1
    else:
        low = tl.zeros([BLOCK], tl.int32)
        high = tl.zeros([BLOCK], tl.int32) + n_sequences
        for _ in range(0, steps):  # the first sequence that ends after t
            middle = (low + high) // 2
            after = tl.load(boundaries + 1 + middle, mask=middle < n_sequences, other=n + 1) > t
            high = tl.where(after, middle, high)
            low = tl.where(after, low, tl.minimum(middle + 1, high))
        sequence = tl.minimum(low, n_sequences - 1)
        end = tl.minimum(tl.load(boundaries + 1 + sequence).to(tl.int32), n) - 1
    at = t if PER_TOKEN else sequence
    tl.store(out + t, tl.load(values + at, mask=t < n, other=0.0).to(tl.float32), mask=t < n)
    tl.store(last + t, end, mask=t < n)


def by_token(values: Tensor, n: int, sequences: Sequences, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :func:`egrsd_kernels.rows.by_token`; ``dtype`` is float32."""
    out, last = (torch.empty(n, dtype=x, device=values.device) for x in (dtype, torch.int32))
    ends = sequences.boundaries
    n_sequences = 0 if ends is None else len(ends) - 1
    by_token_kernel[(ceil_div(n, BLOCK),)](
        values, ends, out, last, n, sequences.length, n_sequences, n_sequences.bit_length(),
        PER_TOKEN=values.numel() == n, BLOCK=BLOCK,
    )  # fmt: skip
    return out, last
