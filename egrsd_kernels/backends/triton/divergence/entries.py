"""Of stored M and r' the entries of dL/dz, of which the products make gradients: one elementwise pass, row by row.

With p_S, p_T and r as pair.py has them, in nats, and dL/dD = w, dL/dlog p = g of a row,

    reverse_kl  w p_S (r - D)    forward_kl  w (p_S - p_T)    jsd  w (1 - beta) p_S (u - Σ p_S u)

and g (1_y - p_S) beside it. A row's entries are stored over its ``size``, a bound of their magnitude, so that float16
holds them, in units of 2^-shift there; and times the softcap's 1 - tanh^2, from z = logsumexp + log2 p_S.

The error. An entry has the rounding of M, 7e-4 at most, and its own, 4e-3 in bfloat16 and 5e-4 in float16; and that of
r', p_S 2^-11 |r'|. This is small as long as |r'| is not much larger than |r - D| where p is, which is what the offsets
are chosen for. Where one entry has nearly all of p_S it is not: there r is near D. Entries of a row sum to 0, so one
that has more than ALONE of p_S is made of the others. Where the last error would be more than TOLERANCE of a row's norm
all the same, its tile of rows is done again with both logsumexps as offsets, whose r' is r itself; the device decides.
A row's hidden gradient, rounded to bfloat16, so is off by 2.5e-3 of its norm in the root mean square, and by 5e-3 where
a single entry makes it up, whatever the target is: sqrt(4^2 + 1.7^2 + 0.7^2 + 2^2) e-3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import LN2
from .pair import TILE, load_stored, rows_at
from .sums import both_of, log_shares

# No two entries have so much of p_S, rounded as they are.
ALONE = tl.constexpr(0.6)
# Of a row's norm, from the rounding of r'; float16 is off by 0.42 * 2^-11 in the root mean square.
TOLERANCE = 2e-3
LARGEST_RATIO = (TOLERANCE / (0.42 * 2.0**-11)) ** 2


@triton.jit
def damping(logsumexp, p, cap):
    """1 - tanh^2 of a logit, from its probability; 0 for a probability of 0, whose entry is 0 anyway."""
    t = (logsumexp + tl.log2(p)) / cap
    return tl.maximum(1.0 - t * t, 0.0)


@triton.jit(do_not_specialize=["of_divergence", "of_logp", "order"])
def entries_kernel(
    magnitudes, entries, ratios, values, of_divergence, of_logp, target, order, row_counts, tiles, again, size, parts,
    n_slots, width, unit, cap, beta, KIND: tl.constexpr, HALF: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """entries (n_slots, width) = dL/dz (1 - tanh^2) unit / size, 0 in rows without; size (n_slots,) float32.

    In the memory of magnitudes. Grid: (n_slots, blocks). again: becomes 0 for each tile; or None. values: as
    combine_pairs_kernel leaves them. of_divergence: w (N,) float32, or None for 1. of_logp: g (N,), beside target
    (n_slots,) int32; or None. cap: the softcap in units of ln 2. HALF: beta = 1/2. parts (5, blocks, n_slots) float32:
    of each BLOCK the sum of entries before the softcap, of their squares, and of squares of the errors that r' leaves;
    and the place of an entry that has more than ALONE of p_S, which is none of these and 0 for now, or -1, and the
    largest p_S.
    """
    i = tl.program_id(0)
    n_active = rows_at(i, row_counts + 1, tiles)
    if again is not None:
        tl.store(again + i // TILE, 0, mask=(tl.program_id(1) == 0) & (i % TILE == 0))
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = v < width
    at = i.to(tl.int64) * width + v
    ours = i < n_active
    row = tl.load(order + i, mask=ours, other=0)
    bound = tl.load(values + 3 * n_slots + i, mask=ours, other=0.0)
    w = tl.where(ours, 1.0, 0.0)
    if of_divergence is not None:
        w = tl.load(of_divergence + row, mask=ours, other=0.0)
        bound = tl.where(w == 0, 0.0, tl.abs(w) * bound)
    weight = tl.abs(w)
    if of_logp is not None:
        g = tl.load(of_logp + row, mask=ours, other=0.0)
        bound += tl.abs(g)
        weight += tl.abs(g)
    if weight != 0:
        exponent, ratio = load_stored(
            magnitudes, ratios, i.to(tl.int64) * width, tl.program_id(1) * BLOCK, width, tl.load(values + i), BLOCK
        )
        if tl.program_id(1) == 0:
            tl.store(size + i, bound)
        c = tl.load(values + n_slots + i)
        mean = tl.load(values + 2 * n_slots + i)
        w *= unit / bound
        slope = w * LN2
        if KIND == "reverse_kl":
            p = tl.exp2(exponent + tl.minimum(ratio, 0.0))
            e = (p * (w * LN2)) * (ratio - (c + mean))
            error = p * ratio
        else:
            larger, less, r = both_of(exponent, ratio, c)
            p = tl.where(r < 0, larger * less, larger)
            if KIND == "forward_kl":
                e = tl.where(r < 0, -w, w) * (larger * (1.0 - less))
            else:
                of_larger, of_smaller = log_shares(less, r, beta, HALF)
                e = (p * (w * (1.0 - beta) * LN2)) * (tl.where(r < 0, of_smaller, of_larger) - mean)
                slope *= beta * (1.0 - beta)  # at r = 0; beyond, the smaller of both is small
            error = larger * less * ratio
        if of_logp is not None:
            g *= unit / bound
            e = tl.where(v == tl.load(target + i), e + g, e) - g * p
        largest = tl.max(p, 0)
        place = tl.full([], -1.0, tl.float32)
        if largest > ALONE:
            place = tl.max(tl.where(p > ALONE, v, -1), 0).to(tl.float32)
            e = tl.where(p > ALONE, 0.0, e)
            error = tl.where(p > ALONE, 0.0, error)
        part = parts + tl.program_id(1) * n_slots + i
        plane = tl.num_programs(1) * n_slots
        tl.store(part, tl.sum(e, 0))
        tl.store(part + plane, tl.sum(e * e, 0))
        tl.store(part + 2 * plane, tl.sum(error * error, 0) * slope * slope)
        tl.store(part + 3 * plane, place)
        if SOFTCAP:
            tl.store(part + 4 * plane, largest)
            e *= damping(tl.load(values + 4 * n_slots + i), p, cap)
        tl.store(entries + at, e.to(entries.dtype.element_ty), mask=inside)
    elif i < tl.cdiv(n_active, TILE) * TILE:
        # Whatever the row holds, NaN included; and the products' tiles are whole.
        if tl.program_id(1) == 0:
            tl.store(size + i, 0.0)
        part = parts + tl.program_id(1) * n_slots + i
        plane = tl.num_programs(1) * n_slots
        for k in tl.static_range(5):
            tl.store(part + k * plane, -1.0 if k == 3 else 0.0)
        tl.store(entries + at, tl.zeros([BLOCK], entries.dtype.element_ty), mask=inside)


@triton.jit
def balance_kernel(
    entries, values, row_counts, tiles, again, parts, n_slots, blocks, width, cap, largest_ratio,
    SOFTCAP: tl.constexpr, ROW_BLOCK: tl.constexpr, TILE_BLOCK: tl.constexpr,
):  # fmt: skip
    """The entry that has more than ALONE of p_S, if a row has one: less the sum of the others, times 1 - tanh^2.

    Grid: (n_slots / ROW_BLOCK,). again: becomes 1 for a tile with a row whose error may be beyond TOLERANCE; or None.
    Others as entries_kernel has them.
    """
    r = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    n_active = rows_at(tl.program_id(0) * ROW_BLOCK, row_counts + 1, tiles)
    if tl.program_id(0) * ROW_BLOCK < n_active:
        ours = r < n_active
        plane = blocks * n_slots
        total = tl.zeros([ROW_BLOCK], tl.float32)
        squares = tl.zeros([ROW_BLOCK], tl.float32)
        errors = tl.zeros([ROW_BLOCK], tl.float32)
        alone = tl.full([ROW_BLOCK], -1.0, tl.float32)
        p = tl.zeros([ROW_BLOCK], tl.float32)
        for start in range(0, blocks, TILE_BLOCK):
            block = start + tl.arange(0, TILE_BLOCK)
            inside = (block < blocks)[:, None] & ours[None, :]
            at = parts + block[:, None] * n_slots + r[None, :]
            total += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
            squares += tl.sum(tl.load(at + plane, mask=inside, other=0.0), 0)
            errors += tl.sum(tl.load(at + 2 * plane, mask=inside, other=0.0), 0)
            alone = tl.maximum(alone, tl.max(tl.load(at + 3 * plane, mask=inside, other=-1.0), 0))
            if SOFTCAP:
                p = tl.maximum(p, tl.max(tl.load(at + 4 * plane, mask=inside, other=0.0), 0))
        has = ours & (alone >= 0)
        e = tl.where(has, -total, 0.0)
        if again is not None:
            coarse = tl.max((ours & (errors > largest_ratio * (squares + e * e))).to(tl.int32), 0)
            tl.store(again + tl.program_id(0) * ROW_BLOCK // TILE, 1, mask=coarse > 0)
        if SOFTCAP:
            e *= damping(tl.load(values + 4 * n_slots + r, mask=has, other=0.0), tl.where(has, p, 1.0), cap)
        at = r.to(tl.int64) * width + tl.where(has, alone, 0.0).to(tl.int32)
        tl.store(entries + at, e.to(entries.dtype.element_ty), mask=has)


@triton.jit(do_not_specialize=["gradient", "order"])
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
