"""Sparse gradients with a certified bound, from the exponentials that the vocabulary pass stores.

That pass leaves a chunk's exponentials E and, in float32, their sum over each vocabulary tile of each row. With the
row's sum S known, the exact probability mass of every tile is known too, and tiles that carry little of the gradient
are never looked at again. In the others the entries that are small are dropped as well. What is left, mostly a few
entries, gives dhidden as a weighed sum of rows of the head and, sorted by vocabulary entry, dW as one of hidden states.
A row that would have to drop too much to fit into its list of entries is dense: it drops nothing, and its exponentials
are set aside until there are enough such rows for the exact kernels.

Below, x = T dlogp/d(product) is a row's gradient, for product = h W^T + b and the temperature T. Without a softcap
x = e_y - p; with one, the entries of e_y - p are each damped by a factor 1 - tanh^2 <= 1. The target's entry is
Σ_{v≠y} p_v, damped, whether or not these entries are dropped themselves. M is ||x||_1 without a softcap, twice that
sum; with one it is |x_y|, which is less.

What is small is decided on the weighed size a |x_v|, with a = |g| / max |g| and g = dL/dlogp: what is dropped from a
row that matters little may be large. The budget is tol Σ a M over the rows of the chunk. A share of it goes to tiles
of little mass. By a sample of the others it is estimated what a row has to drop to fit into its list; rows for which
that is far too much are dense, and the rest of the budget gives thresholds to look for entries with. Only then is every
entry looked at, once, and it is known what each row drops: the rows that drop least are sparse, as many as the budget
allows. Each time "least" is the largest of a series of thresholds under which everything that is at most as large
stays within its share, by a histogram of sizes: whole numbers, which add up in any order.

**The bound.** Let δ_t be what row t drops, Σ |x_v| over the entries dropped (or more, where a tile is dropped as a
whole: its undamped mass). T dL/d(product) of row t is off by g_t x_v at these entries and by nothing elsewhere, that
is by |g_t| δ_t in L1. (dhidden is off by at most |g_t| δ_t max_v ||W_v|| / T.)

    Σ_t |g_t| δ_t <= tol Σ_t |g_t| M_t <= tol Σ_t |g_t| ||x_t||_1        on any input

*Proof.* ``certify_kernel`` adds up both sides over the rows of the chunk, and unless D (1 + 2 SLACK) <= tol M for the
two sums as computed, it makes every row of the chunk dense, whose δ is 0. So nothing hangs on how the thresholds were
found; it remains that the sums as computed are good for the sums. All their terms are nonnegative. One is rounded to
the operands' dtype, by a factor within 1 ± 2^-9 (bfloat16; float16 and float32 are finer), and by m float32 roundings
on its way into the sum, a factor within 1 ± m 2^-24 / (1 - m 2^-24). A tile's sum takes at most COLS additions, a row's
one for each tile, and the chunk's one for every SLOTS rows and SLOTS more: m < 2^14 with room to spare. Together that
is within 1 ± (2^-9 + 2^-9.9) for either sum, and their quotient below 1 + SLACK. Underflow is taken the safe way: a
weighed mass that is not 0 counts as at least the smallest normal number in D, and one below 2^-100 as 0 in M; what
float16 cannot hold, at most 2^-25 an entry in units of its E, counts as dropped. Chunks each keep to their own budget,
so the sums over all of them do. ∎

Each row's δ is given out times 1 + SLACK, so that it stands for the exact one over the exact M_t in any sum that is
made of it later; the other SLACK keeps such a sum within the tolerance, however it is rounded.

The probabilities are those that the kernels compute, from float32 logits. As in the exact kernels a p is off by the
relative error 2 Δz where logits are off by Δz, and below 2^-126 it is 0. A mass is a sum of them, never a difference
such as 1 - p_y, whose error would not shrink with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from ..common import ROW_TILE
from ..gather import Chunk
from ..gradient import ChunkGradients
from ..plan import Plan, SparsePlan
from ..vocab import ROW_BLOCK, TILE_BLOCK

# Bins of a histogram. Of weighed sizes, four for a factor of 2: the first is what is above the budget, the last but one
# what is below 2^-31 of it, and the last what is 0. Of a row's entries, eight for a factor of 2 above its threshold.
BINS = tl.constexpr(128)
SIZE_BITS = tl.constexpr(21)  # of a float32, as a whole number, from one bin to the next
ENTRY_BITS = tl.constexpr(20)
SLACK = tl.constexpr(2.0**-7)
TINY = tl.constexpr(2.0**-126)
SMALL = tl.constexpr(2.0**-100)
# Of the budget: for whole tiles, of which more leaves fewer to look into; for what rows drop to fit into their lists,
# of which more leaves fewer dense rows; and for small entries, of which more leaves shorter lists.
TILE_SHARE, ROW_SHARE, ENTRY_SHARE = 0.125, 0.625, 0.25
SAMPLED = 1 << 22  # about so many entries at least are counted for a threshold, and of many one in SAMPLE_MOST
SAMPLE_MOST = 32
# Entries of a row that a program looks at together: in a sample of them, and in all, which are dealt to some programs.
SAMPLE_AT_ONCE = {"SIZE": 512, "num_warps": 4}
MARK_AT_ONCE = {"SIZE": 1024, "num_warps": 4}
MARK_SPLITS = 4
LIST_WORDS = 1024  # of 32 marks each, at a time
SLOTS = 1024  # rows at a time of a program that goes through all rows


@triton.jit
def weighed(a, x):
    """a x, for the sum of what is dropped: not 0 unless x is."""
    return tl.where(x > 0, tl.maximum(a * x, TINY), 0.0)


@triton.jit
def gradient_mass(a, mass):
    """a ||p - e_y||_1, never too large."""
    return tl.where(a * mass < SMALL, 0.0, a * mass)


@triton.jit
def bin_of(w, budget, BINS: tl.constexpr):
    """The bin of a weighed size: what is in one is at most as large as its edge. Positive floats order as integers."""
    k = 1 + ((budget.to(tl.int32, bitcast=True) - w.to(tl.int32, bitcast=True)) >> SIZE_BITS)
    return tl.where(w > budget, 0, tl.where(w > 0, tl.minimum(k, BINS - 2), BINS - 1))


@triton.jit
def edge_of(k, budget, BINS: tl.constexpr):
    """The largest size in a bin: infinite for the first, 0 for the last."""
    edge = tl.maximum(budget.to(tl.int32, bitcast=True) - ((k - 1) << SIZE_BITS), 0).to(tl.float32, bitcast=True)
    return tl.where(k == 0, float("inf"), tl.where(k == BINS - 1, 0.0, edge))


@triton.jit
def mass_of(counts, k, budget, BINS: tl.constexpr):
    """At most how much that many sizes in each bin k come to; those of the first are never dropped."""
    return tl.where(k == 0, 0.0, counts.to(tl.float32) * edge_of(tl.maximum(k, 1), budget, BINS))


@triton.jit
def weigh_kernel(
    gradient, order, live, total, logit, weight, dense, top, counts, ROWS: tl.constexpr, BINS: tl.constexpr
):
    """weight = |g|, 0 for what is not finite, which is for the exact kernels: dense. top: the largest of them.

    counts: becomes zeros.
    """
    n = tl.load(live + 1)
    for which in tl.static_range(4):
        tl.store(counts + which * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int64))
    largest = tl.zeros([ROWS], tl.float32)
    for start in range(0, n, ROWS):
        r = start + tl.arange(0, ROWS)
        g = tl.abs(tl.load(gradient + tl.load(order + r, mask=r < n, other=0), mask=r < n, other=0.0))
        s = tl.load(total + r, mask=r < n, other=1.0)
        z = tl.load(logit + r, mask=r < n, other=0.0)
        sound = (g < float("inf")) & (s > 0) & (s < float("inf")) & (z == z)
        largest = tl.maximum(largest, tl.where(sound, g, 0.0))
        tl.store(weight + r, tl.where(sound, g, 0.0), mask=r < n)
        tl.store(dense + r, 1 - sound.to(tl.int32), mask=r < n)
    tl.store(top, tl.max(largest, 0))


@triton.jit
def tile_mass_kernel(
    sums, total, damping, live, top, weight, inverse, target_value, mass, chunk, col_tiles,
    ROWS: tl.constexpr, TILES: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The probability mass of each tile in place of its sum; of each row a, 1/S, the target's x, and M <= ||x||_1."""
    n = tl.load(live + 1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ours = r < n
    if tl.program_id(0) * ROWS < n:
        a = tl.load(weight + r, mask=ours, other=0.0)
        a = tl.where(a > 0, tl.maximum(a / tl.load(top), TINY), 0.0)
        inv = tl.where(a > 0, 1.0 / tl.load(total + r, mask=ours, other=1.0), 0.0)
        others = tl.zeros([ROWS], tl.float32)
        for start in range(0, col_tiles, TILES):
            j = start + tl.arange(0, TILES)
            inside = (j < col_tiles)[:, None] & ours[None, :]
            at = sums + j[:, None] * chunk + r[None, :]
            # Chosen, not multiplied: without a weight a sum may be infinite, or NaN.
            q = tl.where((a > 0)[None, :], tl.load(at, mask=inside, other=0.0), 0.0) * inv[None, :]
            tl.store(at, q, mask=inside)
            others += tl.sum(q, 0)
        own_value = others * tl.load(damping + r, mask=ours, other=0.0)
        tl.store(weight + r, a, mask=ours)
        tl.store(inverse + r, inv, mask=ours)
        tl.store(target_value + r, tl.where(a > 0, own_value, 0.0), mask=ours)
        # Under a softcap the others are damped, too, and the target's entry alone is what is known to be there.
        tl.store(mass + r, tl.where(a > 0, own_value if SOFTCAP else others + others, 0.0), mask=ours)


@triton.jit
def budget_kernel(weight, mass, live, budget, tolerance, ROWS: tl.constexpr):
    """budget: what may be dropped within the tolerance."""
    n = tl.load(live + 1)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, n, ROWS):
        r = start + tl.arange(0, ROWS)
        a = tl.load(weight + r, mask=r < n, other=0.0)
        total += gradient_mass(a, tl.load(mass + r, mask=r < n, other=0.0))
    # A little less than certify_kernel allows: sums are rounded differently in between.
    tl.store(budget, tl.sum(total, 0) * tolerance / (1.0 + 4.0 * SLACK))


@triton.jit
def count_tiles_kernel(
    tile_mass, weight, target, live, budget, counts, chunk, col_tiles,
    COLS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """counts (BINS,) += the histogram of the weighed masses of tiles, but for the targets' own."""
    n = tl.load(live + 1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS < n:
        total = tl.zeros([BINS], tl.int32)
        a = tl.load(weight + r, mask=r < n, other=0.0)
        own = tl.load(target + r, mask=r < n, other=0) // COLS
        for start in range(0, col_tiles, TILES):
            j = start + tl.arange(0, TILES)
            inside = (j < col_tiles)[:, None] & (r < n)[None, :]
            q = tl.load(tile_mass + j[:, None] * chunk + r[None, :], mask=inside, other=0.0)
            w = weighed(a[None, :], tl.where(j[:, None] == own[None, :], 0.0, q))
            k = bin_of(tl.reshape(w, [TILES * ROWS]), tl.load(budget), BINS)
            total += tl.histogram(k, BINS)
        tl.atomic_add(counts + tl.arange(0, BINS), total.to(tl.int64), sem="relaxed")


@triton.jit
def cut_kernel(counts, budget, share, out, BINS: tl.constexpr):
    """The largest edge of a bin under which all that is at most as large is within a share of the budget; 0 if none."""
    k = tl.arange(0, BINS)
    most = mass_of(tl.load(counts + k), k, tl.load(budget), BINS)
    fits = (tl.cumsum(most, 0, reverse=True) <= share * tl.load(budget)) & (k > 0)
    tl.store(out, tl.max(tl.where(fits, edge_of(k, tl.load(budget), BINS), 0.0), 0))


@triton.jit
def select_tiles_kernel(
    tile_mass, weight, target, live, cut, tile_of, n_tiles, dropped, chunk, col_tiles,
    COLS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """tile_of (chunk, tiles): the tiles that a row keeps, in order, its target's always; what the others held."""
    n = tl.load(live + 1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ours = r < n
    if tl.program_id(0) * ROWS < n:
        a = tl.load(weight + r, mask=ours, other=0.0)
        own = tl.load(target + r, mask=ours, other=0) // COLS
        limit = tl.load(cut)
        count = tl.zeros([ROWS], tl.int32)
        lost = tl.zeros([ROWS], tl.float32)
        for start in range(0, col_tiles, TILES):
            j = start + tl.arange(0, TILES)
            inside = (j < col_tiles)[:, None] & (ours & (a > 0))[None, :]
            q = tl.load(tile_mass + j[:, None] * chunk + r[None, :], mask=inside, other=0.0)
            keep = inside & ((weighed(a[None, :], q) > limit) | (j[:, None] == own[None, :]))
            one = keep.to(tl.int32)
            k = count[None, :] + tl.cumsum(one, 0) - one
            tl.store(tile_of + r[None, :] * col_tiles + k, j[:, None] + tl.zeros_like(k), mask=keep)
            count += tl.sum(one, 0)
            lost += tl.sum(tl.where(keep, 0.0, q), 0)
        tl.store(n_tiles + r, count, mask=ours)
        tl.store(dropped + r, lost, mask=ours)


@triton.jit
def load_entries(
    exponentials, stride_e, tile_of, r, k, n, col_tiles, COLS: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr
):
    """E (SIZE,) float32 of row r in the ``k``-th of its ``n`` kept tiles, 0 where there are not so many.

    Of each tile these are COLS // PART entries, which take turns.
    """
    first = tl.load(tile_of + r * col_tiles + k, mask=k < n, other=0) * COLS + (k + r) % PART * (COLS // PART)
    at = r.to(tl.int64) * stride_e + first[:, None] + tl.arange(0, COLS // PART)[None, :]
    return tl.reshape(tl.load(exponentials + at, mask=(k < n)[:, None], other=0.0), [SIZE]).to(tl.float32)


@triton.jit
def entry_limit(cut, row_cut, total, weight):
    """The larger of the cuts for all rows and for this one, in units of the row's E."""
    return tl.maximum(cut, row_cut) * (total / weight)


@triton.jit
def sample_kernel(
    exponentials, stride_e, tile_of, n_tiles, weight, inverse, live, budget,
    row_counts, row_cut, excess, counts, col_tiles,
    COLS: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr, MOST: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """row_counts (chunk, BINS): the histogram of one in PART of a row's weighed entries in its kept tiles.

    By this sample, row_cut is what about MOST entries are above; excess, what the others come to; and counts (BINS,) +=
    the histogram of that.
    """
    r = tl.program_id(0)
    n = tl.load(n_tiles + r, mask=r < tl.load(live + 1), other=0)
    if n > 0:
        inv = tl.load(inverse + r)
        a = tl.load(weight + r)
        limit = tl.load(budget)
        total = tl.zeros([BINS], tl.int32)
        for start in range(0, n, SIZE * PART // COLS):
            tiles = start + tl.arange(0, SIZE * PART // COLS)
            e = load_entries(exponentials, stride_e, tile_of, r, tiles, n, col_tiles, COLS, SIZE, PART)
            total += tl.histogram(bin_of(weighed(a, e * inv), limit, BINS), BINS)
        k = tl.arange(0, BINS)
        first = tl.max(tl.where((tl.cumsum(total, 0) - total) * PART < MOST, k, 0), 0)
        lost = tl.sum(tl.where(k >= first, mass_of(total, k, limit, BINS), 0.0), 0) * PART
        lost = tl.where(first == 0, float("inf"), lost)
        tl.store(row_counts + r * BINS + k, total)
        tl.store(row_cut + r, edge_of(first, limit, BINS))
        tl.store(excess + r, lost)
        tl.atomic_add(counts + bin_of(lost, limit, BINS), 1, sem="relaxed")


@triton.jit
def select_rows_kernel(
    row_counts, row_cut, excess, n_tiles, live, budget, limit, dense, counts, ROWS: tl.constexpr, BINS: tl.constexpr
):
    """Rows far above the limit become dense, without tiles. counts (BINS,) += what those below could still drop."""
    n = tl.load(live + 1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS < n:
        ours = tl.load(n_tiles + r, mask=r < n, other=0) > 0
        most = tl.load(limit)
        lost = tl.load(excess + r, mask=ours, other=0.0)
        hopeless = ours & (lost > 2.0 * most)
        tl.store(dense + r, 1, mask=hopeless)
        tl.store(n_tiles + r, 0, mask=hopeless)
        k = tl.arange(0, BINS)[None, :]
        left = edge_of(k, tl.load(budget), BINS) > tl.load(row_cut + r, mask=ours, other=0.0)[:, None]
        mask = left & (ours & (lost <= most))[:, None]
        total = tl.sum(tl.load(row_counts + r[:, None] * BINS + k, mask=mask, other=0), 0)
        tl.atomic_add(counts + tl.arange(0, BINS), total.to(tl.int64), sem="relaxed")


@triton.jit
def mark_kernel(
    exponentials, stride_e, tile_of, n_tiles, weight, inverse, total, live, cut, row_cut, marks, lost,
    stride_m, col_tiles, unseen, COLS: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """marks: of each entry in a row's kept tiles, in order, a bit: whether it is above the cuts.

    lost (chunk, SPLITS): what the other entries of the tiles that are dealt to a program come to. unseen: what an entry
    may be off by because the dtype underflows, in units of E.
    """
    r = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    n = tl.load(n_tiles + r, mask=r < tl.load(live + 1), other=0)
    if n > 0:
        limit = entry_limit(tl.load(cut), tl.load(row_cut + r), tl.load(total + r), tl.load(weight + r))
        small = tl.zeros([SIZE], tl.float32)
        looked_at = 0
        AT_ONCE: tl.constexpr = SIZE // COLS
        for start in range(split * AT_ONCE, n, SPLITS * AT_ONCE):
            tiles = start + tl.arange(0, AT_ONCE)
            e = load_entries(exponentials, stride_e, tile_of, r, tiles, n, col_tiles, COLS, SIZE, 1)
            keep = e > limit
            small += tl.where(keep, 0.0, e)
            looked_at += tl.minimum(n - start, AT_ONCE) * COLS
            bits = tl.reshape(keep.to(tl.int32), [SIZE // 8, 8]) << tl.arange(0, 8)[None, :]
            at = start * (COLS // 8) + tl.arange(0, SIZE // 8)
            tl.store(marks + r.to(tl.int64) * stride_m + at, tl.sum(bits, 1).to(tl.uint8), mask=at < n * (COLS // 8))
        tl.store(lost + tl.program_id(0), (tl.sum(small, 0) + looked_at * unseen) * tl.load(inverse + r))


@triton.jit
def count_bits(word):
    """How many bits of a uint32 are 1."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word += word >> 8
    return ((word + (word >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def list_kernel(
    marks, tile_of, n_tiles, live, found, n_found, stride_m, col_tiles,
    COLS: tl.constexpr, FOUND: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """found (chunk, FOUND): the marked entries of a row, in order. n_found: how many, also if there is no room for all.

    marks: here in words of 32 bits.
    """
    r = tl.program_id(0)
    n = tl.load(n_tiles + r, mask=r < tl.load(live + 1), other=0) * (COLS // 32)
    if n > 0:
        count = 0
        for start in range(0, n, WORDS):
            i = start + tl.arange(0, WORDS)
            word = tl.load(marks + r.to(tl.int64) * stride_m + i, mask=i < n, other=0).to(tl.uint32, bitcast=True)
            bits = count_bits(word)
            k = count + tl.cumsum(bits, 0) - bits
            count += tl.sum(bits, 0)
            tile = tl.load(tile_of + r * col_tiles + i // (COLS // 32), mask=bits > 0, other=0)
            first = tile * COLS + i % (COLS // 32) * 32
            for _ in range(0, tl.max(bits, 0)):  # from each word its lowest bit
                # ^ all ones is ~, which Triton 3.3's interpreter lacks for unsigned integers.
                place = count_bits((word - 1) & (word ^ 0xFFFFFFFF))
                tl.store(found + r * FOUND + k, first + place, mask=(word != 0) & (k < FOUND))
                k += 1
                word &= word - 1
        tl.store(n_found + r, count)


@triton.jit
def fit_kernel(
    exponentials, stride_e, n_tiles, weight, inverse, total, live, cut, row_cut, found, n_found, lost,
    target, target_value, budget, entry_of, value_of, n_entries, dropped, dense, counts,
    FOUND: tl.constexpr, SPLITS: tl.constexpr, CAPACITY: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """A row's list: entries and their x, the target's last; the smallest found are dropped if there are too many.

    Dense is a row of which more than FOUND are marked, or that too many large entries are left of. counts (BINS,) +=
    the histogram of what other rows drop.
    """
    r = tl.program_id(0)
    if tl.load(n_tiles + r, mask=r < tl.load(live + 1), other=0) > 0:
        y = tl.load(target + r)
        a = tl.load(weight + r)
        i = tl.arange(0, FOUND)
        n = tl.load(n_found + r)
        ours = i < n
        v = tl.load(found + r * FOUND + i, mask=ours, other=0)
        e = tl.load(exponentials + r.to(tl.int64) * stride_e + v, mask=ours, other=0.0).to(tl.float32)
        # The list's last place is the target's. From the lowest bin on from which all fit, they stay.
        bottom = entry_limit(tl.load(cut), tl.load(row_cut + r), tl.load(total + r), a).to(tl.int32, bitcast=True)
        k = tl.minimum((e.to(tl.int32, bitcast=True) - bottom) >> ENTRY_BITS, BINS - 1)
        bins = tl.arange(0, BINS)
        in_bin = tl.histogram(tl.where(ours, k, 0), BINS) - tl.where(bins == 0, tl.maximum(FOUND - n, 0), 0)
        above = tl.sum(in_bin, 0) - tl.cumsum(in_bin, 0) + in_bin
        first = tl.min(tl.where(above < CAPACITY, bins, BINS), 0)
        too_many = (n > FOUND) | (first == BINS)
        inv = tl.load(inverse + r)
        keep = ours & (k >= first)
        others_lost = tl.sum(tl.load(lost + r * SPLITS + tl.arange(0, SPLITS)), 0)
        all_lost = tl.load(dropped + r) + others_lost + tl.sum(tl.where(keep, 0.0, e), 0) * inv
        one = keep.to(tl.int32)
        place = r * CAPACITY + tl.cumsum(one, 0) - one
        last = tl.sum(one, 0)
        tl.store(entry_of + place, v, mask=keep)
        tl.store(value_of + place, -e * inv, mask=keep)
        tl.store(entry_of + r * CAPACITY + last, y)
        tl.store(value_of + r * CAPACITY + last, tl.load(target_value + r))
        tl.store(n_entries + r, last + 1)
        tl.store(dropped + r, all_lost)
        tl.store(dense + r, too_many.to(tl.int32))
        if not too_many:
            tl.atomic_add(counts + bin_of(weighed(a, all_lost), tl.load(budget), BINS), 1, sem="relaxed")


@triton.jit
def flush_reserve(now, n, begun, flush, first, later):
    """Whether the exact kernels are to take the ``n`` rows of the reserve. begun: whether they did before.

    These are numbers of rows, twice each, like a chunk's ``live``. flush (2,): for all kernels but the head's product.
    first (2,): for that, as it stores the head's gradient: in the first flush, even of no rows; otherwise -1. later
    (2,): for that, as it adds to it.
    """
    for which in range(0, 2):
        tl.store(flush + which, tl.where(now, n, 0))
        tl.store(first + which, tl.where(now & (begun == 0), n, -1))
        tl.store(later + which, tl.where(now & (begun != 0), n, 0))


@triton.jit
def flush_kernel(stored, flush, first, later):
    n = tl.load(stored)
    begun = tl.load(stored + 1)
    flush_reserve(n >= 0, n, begun, flush, first, later)
    tl.store(stored, 0)
    tl.store(stored + 1, 1)


@triton.jit
def certify_kernel(
    gradient, order, live, weight, mass, dropped, limit, dense, signed,
    token_of, token_dropped, token_mass, token_dense, token_gradient, slot_of, stored, flush, first, later, room,
    tolerance, ROWS: tl.constexpr,
):  # fmt: skip
    """Make rows dense that would drop more than the limit, and all unless the chunk's bound then holds. Say what each
    row drops, and where the dense ones go.

    signed: g of the rows that are not dense, 0 for the others. token_of: which tokens the rows are. slot_of: a dense
    row's place in the reserve, else -1; it is flushed first where it has no room for all. stored (2,): how many rows it
    holds, and whether it has been flushed.
    """
    n = tl.load(live + 1)
    most = tl.load(limit)
    allowed = tl.zeros([ROWS], tl.float32)
    spent = tl.zeros([ROWS], tl.float32)
    for start in range(0, n, ROWS):
        r = start + tl.arange(0, ROWS)
        a = tl.load(weight + r, mask=r < n, other=0.0)
        allowed += gradient_mass(a, tl.load(mass + r, mask=r < n, other=0.0))
        lost = weighed(a, tl.load(dropped + r, mask=r < n, other=0.0))
        exact = (tl.load(dense + r, mask=r < n, other=0) > 0) | (lost > most)
        spent += tl.where(exact, 0.0, lost)
        tl.store(dense + r, exact.to(tl.int32), mask=r < n)
    failed = 1 - (tl.sum(spent, 0) * (1.0 + 2.0 * SLACK) <= tolerance * tl.sum(allowed, 0)).to(tl.int32)
    left = 0
    for start in range(0, n, ROWS):
        r = start + tl.arange(0, ROWS)
        active = (tl.load(weight + r, mask=r < n, other=0.0) > 0).to(tl.int32)
        left += tl.sum(tl.load(dense + r, mask=r < n, other=0) | (failed & active), 0)
    held = tl.load(stored)
    begun = tl.load(stored + 1)
    full = held + left > room
    base = tl.where(full, 0, held)
    for start in range(0, n, ROWS):
        r = start + tl.arange(0, ROWS)
        ours = r < n
        t = tl.load(order + r, mask=ours, other=0)
        active = tl.load(weight + r, mask=ours, other=0.0) > 0
        exact = tl.load(dense + r, mask=ours, other=0) | (failed & active.to(tl.int32))
        sparse = active & (exact == 0)
        g = tl.load(gradient + t, mask=ours, other=0.0)
        tl.store(token_gradient + t, g, mask=ours)
        tl.store(signed + r, tl.where(sparse, g, 0.0), mask=ours)
        tl.store(token_of + r, t, mask=ours)
        tl.store(slot_of + r, tl.where(exact > 0, base + tl.cumsum(exact, 0) - exact, -1), mask=ours)
        base += tl.sum(exact, 0)
        lost = tl.load(dropped + r, mask=ours, other=0.0) * (1.0 + SLACK)
        tl.store(token_dropped + t, tl.where(sparse, lost, 0.0), mask=ours)
        tl.store(token_mass + t, tl.load(mass + r, mask=ours, other=0.0), mask=ours)
        tl.store(token_dense + t, exact, mask=ours)
    flush_reserve(full, held, begun, flush, first, later)
    tl.store(stored, base)
    tl.store(stored + 1, tl.where(full, 1, begun))


@triton.jit
def gather_hidden_kernel(
    entry_of, value_of, n_entries, signed, weight, stride_wv, stride_wd, order, live, out, temperature, D,
    CAPACITY: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """dhidden of a row: its entries' rows of the head, weighed. Rows without gradient and dense ones are left alone."""
    r = tl.program_id(0)
    if r < tl.load(live + 1):
        n = tl.load(n_entries + r)
        g = tl.load(signed + r)
        if g != 0:
            t = tl.load(order + r)
            d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK], tl.float32)
            for start in range(0, n, AT_ONCE):
                i = start + tl.arange(0, AT_ONCE)
                v = tl.load(entry_of + r * CAPACITY + i, mask=i < n, other=0).to(tl.int64)
                x = tl.load(value_of + r * CAPACITY + i, mask=i < n, other=0.0)
                w = tl.load(
                    weight + v[:, None] * stride_wv + d.to(tl.int64)[None, :] * stride_wd,
                    mask=(i < n)[:, None] & (d < D)[None, :], other=0.0,
                )  # fmt: skip
                total += tl.sum(w.to(tl.float32) * x[:, None], 0)
            total *= g / temperature
            tl.store(out + t.to(tl.int64) * D + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def add_head_kernel(
    first_of, sorted_token, sorted_value, hidden, stride_hb, stride_ht, stride_hd, length, head, head_bias, out, factor,
    temperature, D,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, HEAD: tl.constexpr, BIAS: tl.constexpr, EVERY: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """out (V, D) = factor (head + Σ g x h) and head_bias (V,) += Σ g x, over the entries of v, which are those from
    first_of[v] to first_of[v + 1]; rows of ``out`` without any only if EVERY.
    """
    # The parts of a row side by side, which memory likes better.
    blocks = tl.cdiv(D, BLOCK) if HEAD else 1
    v = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    d = block * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(first_of + v)
    end = tl.load(first_of + v + 1)
    if True if EVERY else start < end:
        if HEAD:
            kept = tl.load(head + v.to(tl.int64) * D + d, mask=d < D, other=0.0)
        total = tl.zeros([BLOCK], tl.float32)
        bias = 0.0
        for k in range(start, end, AT_ONCE):
            i = k + tl.arange(0, AT_ONCE)
            x = tl.load(sorted_value + i, mask=i < end, other=0.0) / temperature
            bias += tl.sum(x, 0)
            if HEAD:
                t = tl.load(sorted_token + i, mask=i < end, other=0).to(tl.int64)
                row = hidden + (t // length) * stride_hb + (t % length) * stride_ht
                at = row[:, None] + d.to(tl.int64)[None, :] * stride_hd
                h = tl.load(at, mask=(i < end)[:, None] & (d < D)[None, :], other=0.0)
                total += tl.sum(h.to(tl.float32) * x[:, None], 0)
        if HEAD:
            total += kept
            if SCALED:
                total *= tl.load(factor)
            tl.store(out + v.to(tl.int64) * D + d, total.to(out.dtype.element_ty), mask=d < D)
        if BIAS:
            tl.store(head_bias + v, tl.load(head_bias + v) + bias, mask=block == 0)


@triton.jit
def set_aside_kernel(
    exponentials, stride_e, hidden, target, damping, others, total, order, slot_of, live, stored,
    to_exponentials, to_stride_e, to_hidden, to_target, to_damping, to_others, to_total, to_order, width, D,
    ROW_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The dense rows of the chunk go to the reserve; zeros after its last row, to the end of a tile of rows."""
    r = tl.program_id(0)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(stored)
    if end + r < tl.cdiv(end, ROW_TILE) * ROW_TILE:
        at = to_exponentials + (end + r).to(tl.int64) * to_stride_e + column
        tl.store(at, tl.zeros([BLOCK], to_exponentials.dtype.element_ty), mask=column < width)
    if r < tl.load(live + 1):
        slot = tl.load(slot_of + r).to(tl.int64)
        if slot >= 0:
            e = tl.load(exponentials + r.to(tl.int64) * stride_e + column, mask=column < width, other=0.0)
            tl.store(to_exponentials + slot * to_stride_e + column, e, mask=column < width)
            h = tl.load(hidden + r.to(tl.int64) * D + column, mask=column < D, other=0.0)
            tl.store(to_hidden + slot * D + column, h, mask=column < D)
            if block == 0:
                tl.store(to_target + slot, tl.load(target + r))
                tl.store(to_damping + slot, tl.load(damping + r))
                tl.store(to_others + slot, tl.load(others + r))
                tl.store(to_total + slot, tl.load(total + r))
                tl.store(to_order + slot, tl.load(order + r))


def add_entries(entries, hidden, head, head_bias, temperature, dtype=torch.float32, factor=None):
    """head + Σ g x h over sorted entries, times ``factor`` (0-d float32, or 1), in ``dtype``; head_bias += Σ g x.

    head: (V, D) float32, which the result takes the place of where it has that dtype; or None. head_bias: (V,) or None.
    """
    out = head if head is None or dtype == torch.float32 else torch.empty_like(head, dtype=dtype)
    V, D = len(entries[0]) - 1, hidden.shape[2]
    block = min(1024, triton.next_power_of_2(D))
    add_head_kernel[(V * (1 if head is None else triton.cdiv(D, block)),)](
        *entries, hidden, *hidden.stride(), hidden.shape[1], head, head_bias, out, factor, temperature, D,
        BLOCK=block, AT_ONCE=4, HEAD=head is not None, BIAS=head_bias is not None,
        EVERY=out is not head or factor is not None, SCALED=factor is not None,
    )  # fmt: skip
    return out


class SparseGradients:
    """Log p and gradients of one chunk after another, in order; the last rows with :meth:`finish`.

    plan: how many entries a row may keep, and the room for them and for parts of dhidden.
    hidden: all hidden states, (B, T, D), N = B T.
    outputs: the gradients of hidden, (N, D) zeros in its dtype, filled at the rows with a gradient; of the head, (V, D)
        float32 for sums; and of its bias, (V,) float32 zeros, which are added to. None where not needed.
    sparse: has ``tolerance``; and, (N,) each, ``dropped`` and ``mass`` float32, ``dense`` int32, which take what each
        token drops, its ||p - e_y||_1, and whether its gradient is left to the exact kernels.
    """

    def __init__(self, chunk: Chunk, plan: SparsePlan, hidden: torch.Tensor, outputs, sparse):
        self.chunk, self.plan, self.hidden, self.sparse = chunk, plan, hidden, sparse
        self.out_hidden, self.out_head, self.out_bias = outputs
        tiles = triton.cdiv(chunk.V, chunk.configs.vocab.cols)
        self.trained = self.out_head is not None or self.out_bias is not None
        self.sums = hidden, self.out_head, self.out_bias, chunk.temperature
        self.stored_pass = ChunkGradients(chunk, Plan(chunk.rows, tiles, 0), None, head=False)
        self.vocab = self.stored_pass.vocab
        self.unseen = 2.0**-25 if chunk.hidden.dtype == torch.float16 else 0.0
        self.weight, self.inverse, self.target_value, self.mass, self.dropped = chunk.floats(5, chunk.rows)
        self.dense, self.n_tiles, self.slot_of = self._ints(3, chunk.rows)
        self.tile_of, self.found = self._ints(chunk.rows, tiles), self._ints(chunk.rows, plan.found)
        self.n_found, self.lost = self._ints(chunk.rows), chunk.floats(chunk.rows, MARK_SPLITS)
        self.marks = self._ints(chunk.rows, tiles * chunk.configs.vocab.cols // 32)
        self.row_counts = self._ints(chunk.rows, BINS.value)
        self.row_cut, self.excess = chunk.floats(2, chunk.rows)
        # Of the rows of several chunks, for the gradient of the head: what they keep, and dL/dlogp of the sparse ones.
        tokens = hidden.shape[0] * hidden.shape[1]
        self.entries, self.values = self._ints(plan.listed, plan.entries), chunk.floats(plan.listed, plan.entries)
        self.n_entries, self.token_of = self._ints(2, plan.listed)
        self.signed = torch.zeros(plan.listed, dtype=torch.float32, device=hidden.device)
        self.listed = 0
        self.counts = torch.empty(4, BINS.value, dtype=torch.int64, device=self.dense.device)
        # 16 bytes apart: Triton compiles a kernel again for a pointer that is less aligned.
        self.top, self.budget, self.tile_cut, self.row_guess, self.entry_cut, self.row_limit = chunk.floats(24).split(4)
        # Dense rows, until the exact kernels take them.
        self.reserve = chunk.another(plan.reserve)
        whole = Plan(plan.reserve, tiles, plan.partial_tiles)
        self.exact = ChunkGradients(self.reserve, whole, self.out_hidden, head=self.trained)
        self.reserve_order, self.stored = self._ints(plan.reserve), torch.zeros_like(self.reserve.row_counts)
        self.first, self.later = self._ints(8).split(4)
        self.gradient = chunk.floats(tokens)

    def _ints(self, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=self.chunk.hidden.device)

    def forward(self, order: torch.Tensor, logp: torch.Tensor) -> None:
        """Write log p (nats) of row i at order[i] of ``logp`` (N,), and leave exponentials and their sums behind."""
        self.stored_pass.forward(order, logp)

    def backward(self, order: torch.Tensor, gradient: torch.Tensor) -> None:
        """Turn dL/dlogp, ``gradient`` (N,) float32, into the gradients of the chunk's sparse rows; keep the others."""
        if self.listed + self.chunk.rows > len(self.signed):
            if self.trained:
                self._flush()
                add_entries(self._sorted_entries(), *self.sums)
            self.listed = 0
        rows = slice(self.listed, self.listed + self.chunk.rows)
        lists = self.entries[rows], self.values[rows], self.n_entries[rows]
        signed = self.signed[rows]
        self._weigh(order, gradient)
        self._select_tiles()
        self._select_entries(lists)
        self._certify(order, gradient, signed, self.token_of[rows])
        if self.out_hidden is not None:
            self._gather_hidden(order, lists, signed)
        self.listed += self.chunk.rows
        self._make_reserve()
        self._set_aside(order)

    def finish(self) -> Callable[[torch.Tensor | None], torch.Tensor | None]:
        """Make the gradients of the rows that still wait, all but those of a trained head.

        Returns:
            What gives the head's gradient in its dtype, times a 0-d float32 tensor or 1, and completes its bias's. It
            holds no exponentials. It can be called once.
        """
        self._flush()
        if not self.trained:
            return lambda factor: None
        return partial(add_entries, self._sorted_entries(), *self.sums, self.chunk.head.weight.dtype)

    def _weigh(self, order, gradient) -> None:
        """Weights, tile masses and the budget."""
        chunk, total = self.chunk, self.stored_pass.total
        weigh_kernel[(1,)](
            gradient, order, chunk.row_counts, total, chunk.logit, self.weight, self.dense, self.top, self.counts,
            ROWS=SLOTS, BINS=BINS,
        )  # fmt: skip
        tile_mass_kernel[self._row_blocks](
            self.vocab.sums, total, chunk.softcap_grad, chunk.row_counts, self.top, self.weight, self.inverse,
            self.target_value, self.mass, chunk.rows, self.vocab.col_tiles, ROWS=ROW_BLOCK, TILES=TILE_BLOCK,
            SOFTCAP=chunk.softcap is not None,
        )  # fmt: skip
        budget_kernel[(1,)](self.weight, self.mass, chunk.row_counts, self.budget, self.sparse.tolerance, ROWS=SLOTS)

    @property
    def _row_blocks(self) -> tuple[int]:
        return (triton.cdiv(self.chunk.rows, ROW_BLOCK),)

    @property
    def _by_rows(self) -> dict[str, int]:
        return {"COLS": self.vocab.config.cols, "ROWS": ROW_BLOCK, "TILES": TILE_BLOCK}

    def _cut(self, counts: torch.Tensor, share: float, out: torch.Tensor) -> None:
        cut_kernel[(1,)](counts, self.budget, share, out, BINS=BINS, num_warps=1)

    def _select_tiles(self) -> None:
        """Drop tiles, within their share of the budget."""
        chunk, tiles = self.chunk, self.vocab.col_tiles
        known = self.vocab.sums, self.weight, chunk.target, chunk.row_counts
        count_tiles_kernel[self._row_blocks](
            *known, self.budget, self.counts[0], chunk.rows, tiles, BINS=BINS, **self._by_rows
        )
        self._cut(self.counts[0], TILE_SHARE, self.tile_cut)
        select_tiles_kernel[self._row_blocks](
            *known, self.tile_cut, self.tile_of, self.n_tiles, self.dropped, chunk.rows, tiles, **self._by_rows
        )

    def _select_entries(self, lists) -> None:
        """Drop entries of the kept tiles, list the others, and find out what rows may drop to be sparse."""
        chunk, tiles, cols, plan = self.chunk, self.vocab.col_tiles, self.vocab.config.cols, self.plan
        e = self.vocab.exponentials
        kept_tiles = e, e.stride(0), self.tile_of, self.n_tiles
        # Down to single entries of a tile: enough of them for a threshold, and no more than that.
        part = min(SAMPLE_MOST, 1 << max(0, (chunk.rows * chunk.V // SAMPLED).bit_length() - 1))
        sample_kernel[(chunk.rows,)](
            *kept_tiles, self.weight, self.inverse, chunk.row_counts, self.budget,
            self.row_counts, self.row_cut, self.excess, self.counts[1], tiles,
            COLS=cols, PART=part, MOST=plan.found // 2, BINS=BINS, **SAMPLE_AT_ONCE,
        )  # fmt: skip
        self._cut(self.counts[1], ROW_SHARE, self.row_guess)
        select_rows_kernel[self._row_blocks](
            self.row_counts, self.row_cut, self.excess, self.n_tiles, chunk.row_counts, self.budget, self.row_guess,
            self.dense, self.counts[2], ROWS=ROW_BLOCK, BINS=BINS,
        )  # fmt: skip
        self._cut(self.counts[2], ENTRY_SHARE / part, self.entry_cut)
        known = self.weight, self.inverse, self.stored_pass.total, chunk.row_counts, self.entry_cut, self.row_cut
        mark_kernel[(chunk.rows * MARK_SPLITS,)](
            *kept_tiles, *known, self.marks.view(torch.uint8), self.lost, 4 * self.marks.stride(0), tiles, self.unseen,
            COLS=cols, SPLITS=MARK_SPLITS, **MARK_AT_ONCE,
        )  # fmt: skip
        list_kernel[(chunk.rows,)](
            self.marks, self.tile_of, self.n_tiles, chunk.row_counts, self.found, self.n_found,
            self.marks.stride(0), tiles, COLS=cols, FOUND=plan.found, WORDS=LIST_WORDS,
        )  # fmt: skip
        fit_kernel[(chunk.rows,)](
            e, e.stride(0), self.n_tiles, *known, self.found, self.n_found, self.lost, chunk.target, self.target_value,
            self.budget, *lists, self.dropped, self.dense, self.counts[3],
            FOUND=plan.found, SPLITS=MARK_SPLITS, CAPACITY=plan.entries, BINS=BINS, num_warps=8,
        )  # fmt: skip
        self._cut(self.counts[3], 1.0, self.row_limit)

    def _certify(self, order, gradient, signed, token_of) -> None:
        chunk, sparse = self.chunk, self.sparse
        certify_kernel[(1,)](
            gradient, order, chunk.row_counts, self.weight, self.mass, self.dropped, self.row_limit, self.dense,
            signed, token_of, sparse.dropped, sparse.mass, sparse.dense, self.gradient, self.slot_of, self.stored,
            self.reserve.row_counts, self.first, self.later, self.reserve.rows, sparse.tolerance, ROWS=SLOTS,
        )  # fmt: skip

    def _gather_hidden(self, order, lists, signed) -> None:
        chunk, weight = self.chunk, self.chunk.head.weight
        block = min(1024, triton.next_power_of_2(chunk.D))
        gather_hidden_kernel[(chunk.rows, triton.cdiv(chunk.D, block))](
            *lists, signed, weight, *weight.stride(), order, chunk.row_counts,
            self.out_hidden, chunk.temperature, chunk.D, CAPACITY=self.plan.entries, BLOCK=block, AT_ONCE=4,
        )  # fmt: skip

    def _sorted_entries(self) -> tuple[torch.Tensor, ...]:
        """The listed entries by vocabulary entry: where each one's begin (V + 1,), their tokens, and g x. The lists may
        then be filled again.
        """
        rows, most, device = slice(self.listed), self.plan.entries, self.signed.device
        used = torch.arange(most, device=device) < torch.where(self.signed[rows] != 0, self.n_entries[rows], 0)[:, None]
        # What is not used goes to the end. Stable: of a vocabulary entry, rows come in order.
        keys, place = torch.where(used, self.entries[rows], self.chunk.V).view(-1).sort(stable=True)
        every = torch.arange(self.chunk.V + 1, dtype=torch.int32, device=device)
        values = (self.values[rows] * self.signed[rows, None]).view(-1)[place]
        self.signed.zero_()
        return torch.searchsorted(keys, every, out_int32=True), self.token_of[place // most], values

    def _flush(self) -> None:
        """Make the rows of the reserve exactly, if any. The head's gradient is there then, to be added to."""
        flush_kernel[(1,)](self.stored, self.reserve.row_counts, self.first, self.later, num_warps=1)
        self._make_reserve()

    def _make_reserve(self) -> None:
        """The exact gradients of as many rows of the reserve as its ``live`` says."""
        exact, live = self.exact, self.reserve.row_counts
        if self.out_hidden is not None:
            exact.hidden_product(live, 0)
        exact.backward(self.reserve_order, self.gradient)
        if self.out_head is not None:
            exact.head_product(self.out_head, row_counts=self.first)
            exact.head_product(self.out_head, row_counts=self.later, accumulate=True)
        if self.out_bias is not None:
            exact.bias(self.out_bias, accumulate=True)

    def _set_aside(self, order) -> None:
        chunk, reserve, seen, exact = self.chunk, self.reserve, self.stored_pass, self.exact
        e, to = seen.exponentials, exact.exponentials
        block = min(8192, triton.next_power_of_2(e.shape[1]))
        set_aside_kernel[(chunk.rows, triton.cdiv(max(e.shape[1], chunk.D), block))](
            e, e.stride(0), chunk.hidden, chunk.target, chunk.softcap_grad, seen.others, seen.total, order,
            self.slot_of, chunk.row_counts, self.stored, to, to.stride(0), reserve.hidden, reserve.target,
            reserve.softcap_grad, exact.others, exact.total, self.reserve_order, e.shape[1], chunk.D,
            ROW_TILE=ROW_TILE, BLOCK=block,
        )  # fmt: skip
