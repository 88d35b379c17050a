"""Of stored M and r' the entries of dL/dz, of which the products make gradients: one elementwise pass, row by row.

With p_S, p_T and r as pair.py has them, in nats, and dL/dD = w, dL/dlog p = g of a row,

    reverse_kl  w p_S (r - D)    forward_kl  w (p_S - p_T)    jsd  w (1 - beta) p_S (u - Σ p_S u)

and g (1_y - p_S) beside it. A row's entries are stored over its ``size``, a bound of their magnitude, so that float16
holds them, in units of 2^-shift there; and times the softcap's 1 - tanh^2, from z = logsumexp + log2 p_S.

The error. An entry has the rounding of M and its own, 2^-8 each in bfloat16, and that of r', p_S 2^-11 |r'|. The first
two are 2.4e-3 of a row's norm over many entries. The last is small as long as |r'| is not much larger than |r - D|
where p is, which is what the offsets are chosen for. Where one entry has nearly all of p_S this fails: there r is near
D. Entries of a row sum to 0, so one that has more than ALONE of p_S is made of the others. Where the last error would
be more than TOLERANCE of a row's norm all the same, the chunk is done again with both logsumexps as offsets, whose r'
is r itself; the device decides. Together 3.5e-3 of a row's norm in the root mean square, whatever the target is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import LN2, ROW_TILE
from .sums import log_share

TILE = tl.constexpr(ROW_TILE)
SLOTS = 128
# No two entries have so much of p_S, rounded as they are.
ALONE = tl.constexpr(0.6)
BLOCK, WARPS = 2048, 8
# Of a row's norm, from the rounding of r'; float16 is off by 0.42 * 2^-11 in the root mean square.
TOLERANCE = 2.5e-3
LARGEST_RATIO = (TOLERANCE / (0.42 * 2.0**-11)) ** 2


@triton.jit
def damping(logsumexp, p, cap):
    """1 - tanh^2 of a logit, from its probability; 0 for a probability of 0, whose entry is 0 anyway."""
    t = (logsumexp + tl.log2(p)) / cap
    return tl.maximum(1.0 - t * t, 0.0)


@triton.jit
def entries_kernel(
    magnitudes, entries, ratios, values, of_divergence, of_logp, target, order, row_counts, retry, size,
    n_slots, width, unit, cap, beta, largest_ratio,
    KIND: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """entries (n_slots, width) = dL/dz (1 - tanh^2) unit / size, 0 in rows without; size (n_slots,) float32.

    In the memory of magnitudes. Grid: (n_slots,). values: as combine_pairs_kernel leaves them. of_divergence: w (N,)
    float32, or None for 1. of_logp: g (N,), beside target (n_slots,) int32; or None. cap: the softcap in units of ln 2.
    retry: becomes row_counts if a row's error may be beyond TOLERANCE; or None.
    """
    i = tl.program_id(0)
    n_active = tl.load(row_counts + 1)
    base = i.to(tl.int64) * width
    if i < tl.cdiv(n_active, TILE) * TILE:
        ours = i < n_active
        row = tl.load(order + i, mask=ours, other=0)
        if of_divergence is None:
            w = tl.full([], 1.0, tl.float32)
        else:
            w = tl.load(of_divergence + row, mask=ours, other=0.0)
        bound = tl.abs(w) * tl.load(values + 4 * n_slots + i, mask=ours, other=0.0)
        moving = ours & (w != 0)
        if of_logp is not None:
            g = tl.load(of_logp + row, mask=ours, other=0.0)
            bound = tl.where(w == 0, 0.0, bound) + tl.abs(g)
            moving = ours & ((w != 0) | (g != 0))
        if not moving:  # whatever the row holds, NaN included
            tl.store(size + i, 0.0)
            for start in range(0, width, BLOCK):
                v = start + tl.arange(0, BLOCK)
                tl.store(entries + base + v, tl.zeros([BLOCK], entries.dtype.element_ty), mask=v < width)
        else:
            tl.store(size + i, bound)
            of_p = tl.load(values + i)
            of_q = tl.load(values + n_slots + i)
            c = tl.load(values + 2 * n_slots + i)
            mean = tl.load(values + 3 * n_slots + i)
            logsumexp = tl.load(values + 5 * n_slots + i)
            scale = unit / bound
            w *= scale
            if of_logp is not None:
                y = tl.load(target + i)
                g *= scale
            total = tl.zeros([BLOCK], tl.float32)
            squares = tl.zeros([BLOCK], tl.float32)
            errors = tl.zeros([BLOCK], tl.float32)
            peak = tl.zeros([BLOCK], tl.float32)
            peak_at = tl.full([BLOCK], -1, tl.int32)
            for start in range(0, width, BLOCK):
                v = start + tl.arange(0, BLOCK)
                inside = v < width
                m = tl.load(magnitudes + base + v, mask=inside, other=0.0).to(tl.float32)
                ratio = tl.load(ratios + base + v, mask=inside, other=0.0).to(tl.float32)
                p = m * tl.exp2(tl.minimum(ratio, 0.0)) * of_p
                r = ratio - c
                if KIND == "reverse_kl":
                    e = w * p * ((r - mean) * LN2)
                    error = p
                else:
                    q = m * tl.exp2(tl.minimum(-ratio, 0.0)) * of_q
                    x = r * LN2
                    if KIND == "forward_kl":
                        # Near r = 0 a difference of the two would keep few digits.
                        near = x * (1.0 - x * (0.5 - x * (1.0 / 6.0 - x * (1.0 / 24.0 - x * (1.0 / 120.0)))))
                        e = w * tl.where(tl.abs(x) < 0.17, p * near, p - q)
                        error = q
                    else:
                        e = w * (1.0 - beta) * p * (log_share(x, beta) - mean)
                        mixed = (1.0 - beta) * p + beta * q
                        error = (1.0 - beta) * beta * p * q / tl.where(mixed > 0, mixed, 1.0)
                error *= w * ratio * LN2
                if of_logp is not None:
                    e = tl.where(v == y, e + g, e) - g * p
                alone = p > ALONE
                total += tl.where(alone, 0.0, e)
                squares += tl.where(alone, 0.0, e * e)
                errors += tl.where(alone, 0.0, error * error)
                peak = tl.where(alone, p, peak)
                peak_at = tl.where(alone, v, peak_at)
                if SOFTCAP:
                    e *= damping(logsumexp, p, cap)
                tl.store(entries + base + v, e.to(entries.dtype.element_ty), mask=inside & ~alone)
            at = tl.max(peak_at, 0)
            norm = tl.sum(squares, 0)
            if at >= 0:
                e = -tl.sum(total, 0)
                norm += e * e
                if SOFTCAP:
                    e *= damping(logsumexp, tl.max(peak, 0), cap)
                tl.store(entries + base + at, e.to(entries.dtype.element_ty))
            if retry is not None:
                again = tl.sum(errors, 0) > largest_ratio * norm
                tl.store(retry, tl.load(row_counts), mask=again)
                tl.store(retry + 1, n_active, mask=again)


@triton.jit
def row_factor_kernel(
    size, gradient, order, row_counts, factor, entry, head_factor, n_slots, temperature, unit, BLOCK: tl.constexpr
):
    """head_factor = size g / temperature, factor = head_factor / unit and entry = 0 of each slot, 0 past the n_active.

    Grid: (n_slots / BLOCK,). size: (n_slots,) float32, 0 where a row's entries are. gradient: g (N,) float32, or None
    for 1.
    """
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ours = slot < tl.load(row_counts + 1)
    f = tl.load(size + slot, mask=ours, other=0.0) / temperature
    if gradient is not None:
        t = tl.load(order + slot, mask=ours, other=0)
        g = tl.load(gradient + t, mask=ours, other=0.0)
        f = tl.where(g == 0, 0.0, f * g)
    inside = slot < n_slots
    tl.store(head_factor + slot, f, mask=inside)
    tl.store(factor + slot, f / unit, mask=inside)
    tl.store(entry + slot, tl.zeros([BLOCK], tl.float32), mask=inside)
