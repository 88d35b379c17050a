"""The gradient of entropies beside that of log p.

With dL/dlogp_y = g, dL/dH = h and dH/dz = -p (log p + H), a row's gradient by its logits is

    dL/dz = g 1_y - p (g + h (log p + H))

and sums to 0. Divided by s = |g| + |h| (H + 1) no entry of it is beyond 1, since p |log p| <= 1/e. With x = z - offset
in units of ln 2, e = 2^x and S = sum e, an entry is 2^c e (a + b x) in units of s 2^-shift, where

    b = -ln 2 h / s    a = -(g + h H) / s - b log2 S    c = shift - log2 S

and the target's is what the others leave: near p_y = 1 nothing is lost to cancellation. Entries are stored by a pass
that knows offset = logsumexp - shift, so that log2 S = shift and c = 0, and sums them. Or they are made of logits x
that a forward pass has kept, whose sums R of e and U of e x add up to 2^c (a R + b U). Beside 16-bit operands these
logits are float16, off by 2^-11 |x| at most: p is off by less than of a bfloat16 e, 2^-8, for |x| up to 11. Beyond, the
entries are small, or the target is: from p_y = 2^-32 on the offset is logsumexp, so that no x is above 32. Near p = 1
that counts, since log p + H is small there: a bfloat16 e would leave no digit.
"""

from __future__ import annotations

import torch
import triton.language as tl

from ..protocol import EntropyGradient
from .common import LN2, LOG2E, ROW_TILE, block_of, ceil_div
from .gather import Chunk
from .launch import kernel

SLOTS = 128
TILE = tl.constexpr(ROW_TILE)


@kernel(do_not_specialize=["gradient", "entropy_gradient", "entropy", "logsumexp", "order"])
def slope_kernel(
    gradient, entropy_gradient, entropy, logsumexp, total, order, row_counts, offset, slope, n_slots, shift,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """slope (4, n_slots) float32 = a, b, c and s of each slot; a = b = s = 0 past the n_active.

    Grid: (n_slots / BLOCK,). gradient, entropy_gradient, entropy: g, h and H (N,) float32. total: S (n_slots,) float32;
    or None, to make offset (n_slots,) float32 = logsumexp - shift in units of ln 2, of logsumexp (N,) in nats.
    """
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < n_slots
    ours = slot < tl.load(row_counts + 1)
    t = tl.load(order + slot, mask=ours, other=0)
    g = tl.load(gradient + t, mask=ours, other=0.0)
    h = tl.load(entropy_gradient + t, mask=ours, other=0.0)
    H = tl.load(entropy + t, mask=ours & (h != 0), other=0.0)  # a row that is not to move may have a NaN
    if total is None:
        log_s = tl.zeros([BLOCK], tl.float32) + shift
        tl.store(offset + slot, tl.load(logsumexp + t, mask=ours, other=0.0) * LOG2E - shift, mask=inside)
    else:
        log_s = tl.log2(tl.load(total + slot, mask=ours, other=1.0))
    s = tl.abs(g) + tl.abs(h) * (H + 1.0)
    b = tl.where(s == 0, 0.0, -LN2 * h / s)
    a = tl.where(s == 0, 0.0, -(g + h * H) / s - b * log_s)
    tl.store(slope + slot, a, mask=inside)
    tl.store(slope + n_slots + slot, b, mask=inside)
    tl.store(slope + 2 * n_slots + slot, shift - log_s, mask=inside)
    tl.store(slope + 3 * n_slots + slot, s, mask=inside)


@kernel
def entries_kernel(
    logits, entries, slope, offset, row_counts, n_slots, width, cap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):
    """entries (n_slots, width) = 2^c e (a + b x) of logits x, times 1 - tanh^2; 0 where s is 0.

    They have one place in memory, and dtypes of one size. Grid: (n_slots, width / BLOCK). slope: (4, n_slots), offset:
    (n_slots,) float32. cap: the softcap in the units of x.
    """
    r = tl.program_id(0)
    if r < tl.cdiv(tl.load(row_counts + 1), TILE) * TILE:
        at = r.to(tl.int64) * width + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK) < width
        if tl.load(slope + 3 * n_slots + r) == 0:  # whatever the row holds, NaN included
            tl.store(entries + at, tl.zeros([BLOCK], entries.dtype.element_ty), mask=inside)
        else:
            x = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(slope + r) + tl.load(slope + n_slots + r) * x
            y *= tl.exp2(x + tl.load(slope + 2 * n_slots + r))
            if SOFTCAP:
                t = (x + tl.load(offset + r)) / cap
                y *= tl.maximum(1.0 - t * t, 0.0)
            tl.store(entries + at, y.to(entries.dtype.element_ty), mask=inside)


def make_slopes(gradient, entropy_gradient: EntropyGradient, total, order, row_counts, offset, slope, shift) -> None:
    """See the kernel."""
    n = slope.shape[1]
    slope_kernel[(ceil_div(n, SLOTS),)](
        gradient, *entropy_gradient, total, order, row_counts, offset, slope, n, shift, BLOCK=SLOTS
    )


def make_entries(logits: torch.Tensor, entries: torch.Tensor, slope, chunk: Chunk) -> None:
    """See the kernel. chunk: whose logits they are."""
    rows, width = logits.shape
    block = block_of(width, 4096)
    entries_kernel[(rows, ceil_div(width, block))](
        logits, entries, slope, chunk.offset, chunk.row_counts, rows, width,
        (chunk.softcap or 0.0) * chunk.logit_scale, SOFTCAP=chunk.softcap is not None, BLOCK=block, num_warps=8,
    )  # fmt: skip
