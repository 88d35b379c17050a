"""The kernel of :func:`segment_sum`."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def segment_sum_kernel(values, order, starts, out, count, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[row] = Σ values[order[i]] over starts[row] ≤ i < starts[row + 1], in that order; 0 from row ``count`` on."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    start = tl.load(starts + row, mask=row < count, other=0)
    stop = tl.load(starts + row + 1, mask=row < count, other=0)
    total = tl.zeros([BLOCK], dtype=tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32)
    for i in range(start, stop):
        copy = tl.load(order + i).to(tl.int64)
        total += tl.load(values + copy * width + column, mask=inside, other=0.0).to(total.dtype)
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=inside)
