"""Sparse gradients with a certified bound, from the statistics that the vocabulary pass leaves anyway.

That pass gives each (row, vocabulary tile) its maximum and its sum of exponentials: with logsumexp known, the exact
probability mass q of every tile of every row. Tiles that carry little of the gradient are dropped, and what they held
is known without another look. The logits of the tiles that are kept, a few in a row, are made again, grouped by tile,
as a small matrix product; of their probabilities p again the small ones are dropped. The entries that are left give
dhidden as a gather of rows of the head, and dW as a product over the rows that keep each tile.

Both thresholds are on the weighed mass a p, with a = |g| / max |g| and g = dL/dlogp: what is dropped from a row that
matters little may be large. Each is the largest budget · 2^-k under which everything together stays within the budget.
A row that keeps too many tiles or entries is dense: it is left to the exact kernels, and drops nothing.

**The bound.** Let δ_t be the probability mass that row t drops, its target never being dropped, and
M_t = ||p_t - e_y||_1 = 2 Σ_{v≠y} p_v. The target's entry stays 1 - p_y = Σ_{v≠y} p_v, dropped or not, so that dL/dz_t
is off by g_t p_v at the dropped v and by nothing elsewhere: its L1 error is |g_t| δ_t. (With a softcap each term is
damped by a factor 1 - tanh² <= 1, which only helps. dhidden is off by at most |g_t| δ_t max_v ||W_v|| / T.)

    Σ_t |g_t| δ_t <= tol Σ_t |g_t| M_t        on any input

*Proof.* ``certify_kernel`` adds up both sides over the rows of the chunk, and unless D (1 + 2 SLACK) <= tol M for the
two sums as computed, it makes every row of the chunk dense, whose δ is 0. So nothing hangs on how the thresholds were
found; it remains that the sums as computed are good for the sums. All their terms are nonnegative, so that m roundings
on the way from a term to the sum change it by a factor within 1 ± m u / (1 - m u), u = 2^-24. A tile's sum takes at
most COLS additions, a row's one for each tile, and the chunk's one for each row: m < 2^14 with room to spare, which is
a factor within 1 ± 2^-9.9 for either sum, and (1 + 2^-9.9) / (1 - 2^-9.9) < 1 + SLACK. Underflow is taken the safe
way: a weighed mass that is not 0 counts as at least the smallest normal number in D, and one below 2^-100 as 0 in M.
The M of a row whose tiles were not looked into leaves out the target's tile, which can only make it smaller. Chunks
each keep to their own budget, so the sums over all of them do. ∎

Each row's δ is given out times 1 + SLACK, so that it stands for the exact one over the exact M_t in any sum that is
made of it later; the other SLACK keeps such a sum within the tolerance, however it is rounded.

The probabilities are those that the kernels compute: e^(z - logsumexp) from float32 logits, which the two passes may
round differently. As in the exact kernels a p is off by the relative error 2 Δz where logits are off by Δz, and below
2^-126 it is 0. A mass is a sum of them: never a difference such as 1 - p_y, whose error would not shrink with it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import NEG, PRECISION, load_tile, logits_of
from .gather import Chunk
from .plan import PAIRS, SparsePlan
from .vocab import VocabPass

BINS = tl.constexpr(32)  # a budget · 2^-32 is below what even a whole chunk of equal entries could do with
SLACK = tl.constexpr(2.0**-8)
TINY = tl.constexpr(2.0**-126)
SMALL = tl.constexpr(2.0**-100)
ROW_BLOCK = 16  # rows of a program that goes through all tiles of its rows, TILE_BLOCK at a time
TILE_BLOCK = 64
SLOTS = 1024  # rows at a time of a program that goes through all rows


@triton.jit
def weighed(a, p):
    """a p, for the sum of what is dropped: not 0 unless p is. The same bits wherever it is computed."""
    return tl.where(p > 0, tl.maximum(a * p, TINY), 0.0)


@triton.jit
def gradient_mass(a, others):
    """a ||p - e_y||_1, never too large. others: the sum of all p but the target's."""
    mass = 2.0 * a * others
    return tl.where(mass < SMALL, 0.0, mass)


@triton.jit
def kept(a, p, cut):
    return weighed(a, p) > cut


@triton.jit
def add_below(below, x, cuts, BINS: tl.constexpr):
    """below[k] += the sum of all x (2D) that are at most cuts[k]."""
    k = tl.arange(0, BINS)
    for one in range(0, BINS):
        cut = tl.load(cuts + one)
        below += tl.where(k == one, tl.sum(tl.sum(tl.where(x <= cut, x, 0.0), 1), 0), 0.0)
    return below


@triton.jit
def product_gradient(p, v, y, a, cut, target_value, lse, softcap, scale, SOFTCAP: tl.constexpr):
    """T dlogp/d(product) of the vocabulary entries v where they are kept, else 0; target_value is the target's own."""
    x = tl.where(kept(a, p, cut), -p, 0.0)
    if SOFTCAP:  # the logit comes back from its probability, as precise as logsumexp is
        capped = (tl.log2(tl.maximum(p, TINY)) + lse) / (softcap * scale)
        x *= 1.0 - capped * capped
    return tl.where(v == y, target_value, x)


@triton.jit
def row_weight_kernel(gradient, order, live, lse, logit, weight, dense, top, ROWS: tl.constexpr):
    """weight = |g| / max |g|, 0 without gradient. What is not finite is for the exact kernels: dense, weight 0."""
    n = tl.load(live + 1)
    largest = tl.zeros([ROWS], tl.float32)
    for start in range(0, n, ROWS):
        r = start + tl.arange(0, ROWS)
        g = tl.abs(tl.load(gradient + tl.load(order + r, mask=r < n, other=0), mask=r < n, other=0.0))
        shift = tl.load(lse + r, mask=r < n, other=0.0)
        z = tl.load(logit + r, mask=r < n, other=0.0)
        sound = (g < float("inf")) & (tl.abs(shift) < -0.1 * NEG) & (z == z)
        largest = tl.maximum(largest, tl.where(sound, g, 0.0))
        # The weight is still to be divided by the largest.
        tl.store(weight + r, tl.where(sound, g, 0.0), mask=r < n)
        tl.store(dense + r, 1 - sound.to(tl.int32), mask=r < n)
    tl.store(top, tl.max(largest, 0))


@triton.jit
def tile_mass_kernel(
    partial, lse, target, live, top, weight, others, chunk, col_tiles,
    COLS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """q = S e^(m - logsumexp) of each tile, in the place of m; and each row's mass outside of the target's tile."""
    n = tl.load(live + 1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ours = r < n
    if tl.program_id(0) * ROWS < n:
        a = tl.load(weight + r, mask=ours, other=0.0)
        a = tl.where(a > 0, tl.maximum(a / tl.load(top), TINY), 0.0)
        shift = tl.load(lse + r, mask=ours, other=0.0)
        own = tl.load(target + r, mask=ours, other=0) // COLS
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, col_tiles, TILES):
            j = start + tl.arange(0, TILES)
            inside = (j < col_tiles)[:, None] & ours[None, :]
            at = partial + j[:, None] * chunk + r[None, :]
            s = tl.load(at + col_tiles * chunk, mask=inside, other=0.0)
            q = s * tl.exp2(tl.load(at, mask=inside, other=NEG) - shift[None, :])
            q = tl.where((a > 0)[None, :], q, 0.0)
            tl.store(at, q, mask=inside)
            total += tl.sum(tl.where(j[:, None] == own[None, :], 0.0, q), 0)
        tl.store(weight + r, a, mask=ours)
        tl.store(others + r, total, mask=ours)


@triton.jit
def budget_kernel(
    weight, others, dropped, live, cuts, tolerance, SPENT: tl.constexpr, ROWS: tl.constexpr, BINS: tl.constexpr
):
    """cuts[k] = budget · 2^-k: what may be dropped within the tolerance, less what is dropped already with SPENT."""
    n = tl.load(live + 1)
    mass = tl.zeros([ROWS], tl.float32)
    spent = tl.zeros([ROWS], tl.float32)
    for start in range(0, n, ROWS):
        r = start + tl.arange(0, ROWS)
        a = tl.load(weight + r, mask=r < n, other=0.0)
        mass += gradient_mass(a, tl.load(others + r, mask=r < n, other=0.0))
        if SPENT:
            spent += weighed(a, tl.load(dropped + r, mask=r < n, other=0.0))
    # A little less than certify_kernel allows: sums are rounded differently in between.
    budget = tl.sum(mass, 0) * tolerance / (1.0 + 4.0 * SLACK) - tl.sum(spent, 0)
    k = tl.arange(0, BINS)
    tl.store(cuts + k, tl.maximum(budget, 0.0) * tl.exp2(-k.to(tl.float32)))


@triton.jit
def tiles_below_kernel(
    mass, weight, target, live, cuts, below, chunk, col_tiles,
    COLS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """below (programs, BINS): how much weighed mass the tiles of these rows have under each cut."""
    n = tl.load(live + 1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([BINS], tl.float32)
    if tl.program_id(0) * ROWS < n:
        a = tl.load(weight + r, mask=r < n, other=0.0)
        own = tl.load(target + r, mask=r < n, other=0) // COLS
        for start in range(0, col_tiles, TILES):
            j = start + tl.arange(0, TILES)
            inside = (j < col_tiles)[:, None] & (r < n)[None, :]
            q = tl.load(mass + j[:, None] * chunk + r[None, :], mask=inside, other=0.0)
            w = weighed(a[None, :], tl.where(j[:, None] == own[None, :], 0.0, q))
            total = add_below(total, w, cuts, BINS)
    tl.store(below + tl.program_id(0) * BINS + tl.arange(0, BINS), total)


@triton.jit
def cut_kernel(below, blocks, cuts, out, BLOCKS: tl.constexpr, BINS: tl.constexpr):
    """The largest of the cuts under which all that is at most as large as it fits into the budget; 0 if none."""
    k = tl.arange(0, BINS)
    total = tl.zeros([BINS], tl.float32)
    for start in range(0, blocks, BLOCKS):
        i = start + tl.arange(0, BLOCKS)
        total += tl.sum(tl.load(below + i[:, None] * BINS + k[None, :], mask=(i < blocks)[:, None], other=0.0), 0)
    fits = total <= tl.load(cuts)
    tl.store(out, tl.max(tl.where(fits, tl.load(cuts + k), 0.0), 0))


@triton.jit
def select_tiles_kernel(
    mass, weight, target, live, cut, tile_of, n_tiles, dropped, dense, chunk, col_tiles,
    COLS: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The tiles that a row keeps, in order, its target's always; none where there are over MOST: it is dense then."""
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
            q = tl.load(mass + j[:, None] * chunk + r[None, :], mask=inside, other=0.0)
            keep = inside & (kept(a[None, :], q, limit) | (j[:, None] == own[None, :]))
            one = keep.to(tl.int32)
            k = count[None, :] + tl.cumsum(one, 0) - one
            tl.store(tile_of + r[None, :] * MOST + k, j[:, None] + tl.zeros_like(k), mask=keep & (k < MOST))
            count += tl.sum(one, 0)
            lost += tl.sum(tl.where(keep, 0.0, q), 0)
        full = count > MOST
        tl.store(n_tiles + r, tl.where(full, 0, count), mask=ours)
        tl.store(dropped + r, tl.where(full, 0.0, lost), mask=ours)
        tl.store(dense + r, tl.load(dense + r, mask=ours, other=0) | full.to(tl.int32), mask=ours)


@triton.jit
def tile_rows_kernel(
    mass, weight, target, live, cut, n_tiles, row_of, rank, n_rows, chunk, COLS: tl.constexpr, ROWS: tl.constexpr
):
    """The rows that keep a tile, in order: row_of (tiles, chunk); and the place of each among them: rank, likewise."""
    j = tl.program_id(0)
    n = tl.load(live + 1)
    limit = tl.load(cut)
    count = 0
    for start in range(0, n, ROWS):
        r = start + tl.arange(0, ROWS)
        ours = (r < n) & (tl.load(n_tiles + r, mask=r < n, other=0) > 0)
        a = tl.load(weight + r, mask=ours, other=0.0)
        own = tl.load(target + r, mask=ours, other=0) // COLS
        q = tl.load(mass + j * chunk + r, mask=ours, other=0.0)
        keep = ours & (kept(a, q, limit) | (own == j))
        one = keep.to(tl.int32)
        at = count + tl.cumsum(one, 0) - one
        tl.store(row_of + j * chunk + at, r, mask=keep)
        tl.store(rank + j * chunk + r, at, mask=keep)
        count += tl.sum(one, 0)
    tl.store(n_rows + j, count)


@triton.jit
def schedule_kernel(n_rows, first_block, col_tiles, PAIRS: tl.constexpr, SIZE: tl.constexpr):
    """first_block (tiles + 1,): where each tile's blocks of PAIRS pairs of a row and the tile begin."""
    j = tl.arange(0, SIZE)
    blocks = tl.cdiv(tl.load(n_rows + j, mask=j < col_tiles, other=0), PAIRS)
    end = tl.cumsum(blocks, 0)
    tl.store(first_block + j + 1, end, mask=j < col_tiles)
    tl.store(first_block + j, end - blocks, mask=j == 0)


@triton.jit
def tile_of_block(first_block, col_tiles, block, SIZE: tl.constexpr):
    j = tl.arange(0, SIZE)
    return tl.sum((tl.load(first_block + 1 + j, mask=j < col_tiles, other=block + 1) <= block).to(tl.int32), 0)


@triton.jit
def pair_kernel(
    hidden, weight, stride_wv, stride_wd, bias, target, lse, row_of, n_rows, first_block,
    probability, pair_others, chunk, V, col_tiles, softcap, scale,
    D: tl.constexpr, PAIRS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PROGRAMS: tl.constexpr,
    TMA: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p of the kept tiles, (pairs, COLS) float32, and each pair's sum without the target; 0 where there is no row."""
    for block in range(tl.program_id(0), tl.load(first_block + col_tiles), PROGRAMS):
        j = tile_of_block(first_block, col_tiles, block, SIZE)
        i = (block - tl.load(first_block + j)) * PAIRS + tl.arange(0, PAIRS)
        ours = i < tl.load(n_rows + j)
        r = tl.load(row_of + j * chunk + i, mask=ours, other=0)
        product = tl.zeros([PAIRS, COLS], tl.float32)
        for d in range(0, D, DEPTH):
            dd = d + tl.arange(0, DEPTH)
            h = tl.load(hidden + r.to(tl.int64)[:, None] * D + dd[None, :], mask=(dd < D)[None, :], other=0.0)
            w = load_tile(weight, j * COLS, d, V, D, stride_wv, stride_wd, COLS, DEPTH, TMA, False, D % DEPTH == 0)
            product = tl.dot(h, w.T, product, input_precision=PRECISION)
        v = j * COLS + tl.arange(0, COLS)
        if BIAS:
            product += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
        z, _ = logits_of(product, softcap, scale, SOFTCAP)
        if BIAS:
            z = tl.where(z == float("-inf"), NEG, z)
        p = tl.exp2(z - tl.load(lse + r, mask=ours, other=0.0)[:, None])
        p = tl.where(ours[:, None] & (v < V)[None, :], p, 0.0)
        place = block * PAIRS + tl.arange(0, PAIRS)
        tl.store(probability + place.to(tl.int64)[:, None] * COLS + tl.arange(0, COLS)[None, :], p)
        y = tl.load(target + r, mask=ours, other=0)
        tl.store(pair_others + place, tl.sum(tl.where(v[None, :] == y[:, None], 0.0, p), 1))


@triton.jit
def row_pairs_kernel(
    tile_of, n_tiles, rank, first_block, pair_others, dropped, live, pair_of, others, chunk,
    MOST: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Where a row's pairs are: pair_of (chunk, MOST); and its mass off target, without what its target's tile hid."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ours = r < tl.load(live + 1)
    n = tl.load(n_tiles + r, mask=ours, other=0)
    total = tl.load(dropped + r, mask=ours, other=0.0)
    for k in range(0, MOST):
        here = k < n
        j = tl.load(tile_of + r * MOST + k, mask=here, other=0)
        first = tl.load(first_block + j, mask=here, other=0)
        pair = first * PAIRS + tl.load(rank + j * chunk + r, mask=here, other=0)
        tl.store(pair_of + r * MOST + k, pair, mask=here)
        total += tl.load(pair_others + pair, mask=here, other=0.0)
    tl.store(others + r, total, mask=n > 0)


@triton.jit
def pairs_below_kernel(
    probability, weight, target, row_of, n_rows, first_block, cuts, below, chunk, col_tiles,
    PAIRS: tl.constexpr, COLS: tl.constexpr, PROGRAMS: tl.constexpr, SIZE: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """below (programs, BINS): how much weighed mass off target the kept tiles' entries have under each cut."""
    total = tl.zeros([BINS], tl.float32)
    for block in range(tl.program_id(0), tl.load(first_block + col_tiles), PROGRAMS):
        j = tile_of_block(first_block, col_tiles, block, SIZE)
        i = (block - tl.load(first_block + j)) * PAIRS + tl.arange(0, PAIRS)
        ours = i < tl.load(n_rows + j)
        r = tl.load(row_of + j * chunk + i, mask=ours, other=0)
        y = tl.load(target + r, mask=ours, other=0)
        c = tl.arange(0, COLS)
        place = block * PAIRS + tl.arange(0, PAIRS)
        p = tl.load(probability + place.to(tl.int64)[:, None] * COLS + c[None, :])
        p = tl.where((j * COLS + c)[None, :] == y[:, None], 0.0, p)
        w = weighed(tl.load(weight + r, mask=ours, other=0.0)[:, None], p)
        total = add_below(total, w, cuts, BINS)
    tl.store(below + tl.program_id(0) * BINS + tl.arange(0, BINS), total)


@triton.jit
def entries_kernel(
    probability, tile_of, n_tiles, pair_of, weight, target, logit, lse, others, live, cut,
    entry_of, value_of, n_entries, target_value, dropped, dense, softcap, scale,
    MOST: tl.constexpr, CAPACITY: tl.constexpr, COLS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A row's entries and their T dlogp/d(product), the target's last; a row with more than CAPACITY is dense."""
    r = tl.program_id(0)
    if r < tl.load(live + 1):
        n = tl.load(n_tiles + r)
        y = tl.load(target + r)
        a = tl.load(weight + r)
        shift = tl.load(lse + r)
        limit = tl.load(cut)
        own = tl.load(others + r)
        if SOFTCAP:
            capped = tl.load(logit + r) / (softcap * scale)
            own *= 1.0 - capped * capped
        lost = tl.load(dropped + r)
        count = 0
        for k in range(0, n):
            c = tl.arange(0, COLS)
            v = tl.load(tile_of + r * MOST + k) * COLS + c
            p = tl.load(probability + tl.load(pair_of + r * MOST + k).to(tl.int64) * COLS + c)
            keep = kept(a, p, limit) & (v != y)
            one = keep.to(tl.int32)
            at = count + tl.cumsum(one, 0) - one
            x = product_gradient(p, v, y, a, limit, own, shift, softcap, scale, SOFTCAP)
            inside = keep & (at < CAPACITY - 1)
            tl.store(entry_of + r * CAPACITY + at, v, mask=inside)
            tl.store(value_of + r * CAPACITY + at, x, mask=inside)
            count += tl.sum(one, 0)
            lost += tl.sum(tl.where(keep | (v == y), 0.0, p), 0)
        full = count >= CAPACITY
        last = tl.minimum(count, CAPACITY - 1)
        if n > 0:
            tl.store(entry_of + r * CAPACITY + last, y)
            tl.store(value_of + r * CAPACITY + last, own)
            tl.store(dense + r, full.to(tl.int32))
        tl.store(target_value + r, own)
        tl.store(n_entries + r, tl.where(full | (n == 0), 0, last + 1))
        tl.store(dropped + r, tl.where(full, 0.0, lost))


@triton.jit
def certify_kernel(
    gradient, order, live, weight, others, dropped, dense, signed, peak,
    token_dropped, token_mass, token_dense, counts, end, tolerance, most_dense,
    SCALED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Check the chunk's bound, and make all its rows dense if it does not hold; then say what each row drops.

    signed: g of the rows that are not dense, 0 for the others. peak: what entries are divided by before they are
    rounded to the operands' dtype: 1, or with SCALED the largest of them, some target's. ``counts``, of the rows that
    are worth an attempt, ends with this chunk where more than the share ``most_dense`` of it is dense.
    """
    n = tl.load(live + 1)
    mass = tl.zeros([ROWS], tl.float32)
    spent = tl.zeros([ROWS], tl.float32)
    for start in range(0, n, ROWS):
        r = start + tl.arange(0, ROWS)
        a = tl.load(weight + r, mask=r < n, other=0.0)
        mass += gradient_mass(a, tl.load(others + r, mask=r < n, other=0.0))
        spent += weighed(a, tl.load(dropped + r, mask=r < n, other=0.0))
    failed = 1 - (tl.sum(spent, 0) * (1.0 + 2.0 * SLACK) <= tolerance * tl.sum(mass, 0)).to(tl.int32)
    largest = tl.zeros([ROWS], tl.float32)
    left = tl.zeros([ROWS], tl.int32)
    for start in range(0, n, ROWS):
        r = start + tl.arange(0, ROWS)
        ours = r < n
        t = tl.load(order + r, mask=ours, other=0)
        active = tl.load(weight + r, mask=ours, other=0.0) > 0
        exact = tl.load(dense + r, mask=ours, other=0) | (failed & active.to(tl.int32))
        sparse = active & (exact == 0)
        g = tl.load(gradient + t, mask=ours, other=0.0)
        g = tl.where(sparse, g, 0.0)
        other = tl.load(others + r, mask=ours, other=0.0)
        largest = tl.maximum(largest, tl.abs(g) * other)
        tl.store(signed + r, g, mask=ours)
        tl.store(dense + r, exact, mask=ours)
        lost = tl.load(dropped + r, mask=ours, other=0.0) * (1.0 + SLACK)
        tl.store(token_dropped + t, tl.where(sparse, lost, 0.0), mask=ours)
        tl.store(token_mass + t, tl.where(active, 2.0 * other, 0.0), mask=ours)
        tl.store(token_dense + t, exact, mask=ours)
        left += exact
    if SCALED:  # within bounds in which neither it nor its inverse underflows
        tl.store(peak, tl.minimum(tl.maximum(tl.max(largest, 0), SMALL), 1.0 / SMALL))
    else:
        tl.store(peak, 1.0)
    worth = tl.sum(left, 0).to(tl.float32) <= most_dense * n.to(tl.float32)
    for which in range(0, 2):
        tl.store(counts + which, tl.where(worth, tl.load(counts + which), tl.minimum(tl.load(counts + which), end)))


@triton.jit
def gather_hidden_kernel(
    entry_of, value_of, n_entries, dense, signed, weight, stride_wv, stride_wd, order, live, out, temperature, D,
    CAPACITY: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """dhidden of a row: its entries' rows of the head, weighed. Rows without gradient and dense ones are left alone."""
    r = tl.program_id(0)
    if r < tl.load(live + 1):
        n = tl.load(n_entries + r)
        if (n > 0) & (tl.load(dense + r) == 0):
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
            total *= tl.load(signed + r) / temperature
            tl.store(out + t.to(tl.int64) * D + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def load_gradient(
    probability, row_of, signed, weight, target, target_value, lse, cut, j, first_pair, i, n, v, chunk, softcap, scale,
    unit, COLS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(rows, T dL/d(product) in units of ``unit``) of the pairs i of tile j, at its vocabulary entries v."""
    ours = i < n
    r = tl.load(row_of + j * chunk + i, mask=ours, other=0)
    at = probability + (first_pair + i).to(tl.int64)[:, None] * COLS + (v - j * COLS)[None, :]
    p = tl.load(at, mask=ours[:, None], other=0.0)
    y = tl.load(target + r, mask=ours, other=-1)[:, None]
    a = tl.load(weight + r, mask=ours, other=0.0)[:, None]
    own = tl.load(target_value + r, mask=ours, other=0.0)[:, None]
    shift = tl.load(lse + r, mask=ours, other=0.0)[:, None]
    x = product_gradient(p, v[None, :], y, a, tl.load(cut), own, shift, softcap, scale, SOFTCAP)
    return r, x * tl.load(signed + r, mask=ours, other=0.0)[:, None] * (1.0 / unit)


@triton.jit
def head_pairs_kernel(
    probability, row_of, n_rows, first_block, signed, weight, target, target_value, lse, cut, peak, hidden, out,
    chunk, D, V, col_tiles, softcap, scale, temperature, unit,
    COLS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PAIRS: tl.constexpr,
    PROGRAMS: tl.constexpr, SOFTCAP: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW (V, D) float32, in pieces of ROWS x WIDTH: dL/d(product)^T hidden, over the rows that keep the tile."""
    unit *= tl.load(peak)
    pieces = COLS // ROWS
    wide = tl.cdiv(D, WIDTH)
    for piece in range(tl.program_id(0), col_tiles * pieces * wide, PROGRAMS):
        j = piece // (pieces * wide)
        v = j * COLS + (piece // wide % pieces) * ROWS + tl.arange(0, ROWS)
        d = (piece % wide) * WIDTH + tl.arange(0, WIDTH)
        n = tl.load(n_rows + j)
        first_pair = tl.load(first_block + j) * PAIRS
        product = tl.zeros([ROWS, WIDTH], tl.float32)
        for start in range(0, n, DEPTH):
            i = start + tl.arange(0, DEPTH)
            r, x = load_gradient(
                probability, row_of, signed, weight, target, target_value, lse, cut, j, first_pair, i, n, v, chunk,
                softcap, scale, unit, COLS, SOFTCAP,
            )  # fmt: skip
            at = hidden + r.to(tl.int64)[:, None] * D + d[None, :]
            h = tl.load(at, mask=(i < n)[:, None] & (d < D)[None, :], other=0.0)
            product = tl.dot(x.to(h.dtype).T, h, product, input_precision=PRECISION)
        product *= unit / temperature
        at = out + v.to(tl.int64)[:, None] * D + d[None, :]
        inside = (v < V)[:, None] & (d < D)[None, :]
        if ACCUMULATE:
            if n > 0:
                tl.store(at, product + tl.load(at, mask=inside, other=0.0), mask=inside)
        else:
            tl.store(at, product, mask=inside)


@triton.jit
def bias_pairs_kernel(
    probability, row_of, n_rows, first_block, signed, weight, target, target_value, lse, cut, peak, out,
    chunk, V, softcap, scale, temperature, unit,
    COLS: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, SOFTCAP: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """dbias (V,) float32: the sum of dL/d(product) over the rows that keep the tile."""
    unit *= tl.load(peak)
    j = tl.program_id(0)
    v = j * COLS + tl.arange(0, COLS)
    n = tl.load(n_rows + j)
    first_pair = tl.load(first_block + j) * PAIRS
    total = tl.zeros([COLS], tl.float32)
    for start in range(0, n, ROWS):
        i = start + tl.arange(0, ROWS)
        _, x = load_gradient(
            probability, row_of, signed, weight, target, target_value, lse, cut, j, first_pair, i, n, v, chunk,
            softcap, scale, unit, COLS, SOFTCAP,
        )  # fmt: skip
        total += tl.sum(x, 0)
    total *= unit / temperature
    if ACCUMULATE:
        total += tl.load(out + v, mask=v < V, other=0.0)
    tl.store(out + v, total, mask=v < V)


class SparseGradients:
    """Log p and sparse gradients of one chunk after another, in order, like :class:`~.gradient.ChunkGradients`.

    plan: how many tiles and entries a row may keep.
    out_hidden: (N, D), zeros, filled at the rows with a gradient that are not dense; or None.
    sparse: has ``tolerance``; and, (N,) each, ``dropped`` and ``mass`` float32, ``dense`` int32, which take what each
        token drops, its ||p - e_y||_1, and whether its gradient is left to the exact kernels.
    counts: how many rows of the order are valid, and have a gradient; cut down to the rows seen so far once more than
        the share ``plan.most_dense`` of a chunk is dense. Later chunks then do nothing, and their rows are left over.
    """

    def __init__(self, chunk: Chunk, plan: SparsePlan, out_hidden, sparse, counts: torch.Tensor):
        self.chunk, self.plan, self.out_hidden, self.sparse, self.counts = chunk, plan, out_hidden, sparse, counts
        self.seen = 0
        c = self.config = chunk.configs.vocab
        self.vocab = VocabPass(chunk)
        tiles = self.vocab.col_tiles
        # float16 cannot hold small gradients: there they are in units of 2^-15 of the largest, taken back in float32.
        self.unit = 2.0**-15 if chunk.hidden.dtype == torch.float16 else 1.0
        # Maxima, sums, and sums for the entropy are done with once tile masses, rows of a tile and ranks are there.
        planes = self.vocab.partial.view(3, tiles, chunk.rows)
        self.mass, self.row_of, self.rank = planes[0], *planes[1:].view(torch.int32)
        self.weight, self.others, self.dropped, self.target_value, self.signed = chunk.floats(5, chunk.rows)
        self.dense, self.n_tiles, self.n_entries = self._ints(3, chunk.rows)
        self.tile_of, self.pair_of = self._ints(2, chunk.rows, plan.most_tiles)
        self.entry_of = self._ints(chunk.rows, plan.most_entries)
        self.value_of = chunk.floats(chunk.rows, plan.most_entries)
        self.n_rows, self.first_block = self._ints(tiles), self._ints(tiles + 1)
        pairs = plan.pairs(tiles)
        self.probability, self.pair_others = chunk.floats(pairs, c.cols), chunk.floats(pairs)
        self.row_blocks = triton.cdiv(chunk.rows, ROW_BLOCK)
        self.below = chunk.floats(max(chunk.programs, self.row_blocks), BINS.value)
        self.cuts = chunk.floats(BINS.value)
        # 16 bytes apart: Triton compiles a kernel again for a pointer that is less aligned.
        self.top, self.peak, self.tile_cut, self.entry_cut = chunk.floats(16).split(4)

    def _ints(self, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=self.chunk.hidden.device)

    def forward(self, order: torch.Tensor, logp: torch.Tensor) -> None:
        """Write log p (nats) of row i at order[i] of ``logp`` (N,), and leave logsumexp and tile sums behind."""
        self.seen += self.chunk.rows
        self.vocab.normalise(order, logp)

    def backward(self, order: torch.Tensor, gradient: torch.Tensor) -> None:
        """Turn dL/dlogp, ``gradient`` (N,) float32, into the chunk's hidden gradients, and pairs for the head's."""
        chunk, sparse = self.chunk, self.sparse
        row_weight_kernel[(1,)](
            gradient, order, chunk.live, chunk.offset, chunk.logit, self.weight, self.dense, self.top, ROWS=SLOTS
        )
        self._select_tiles()
        self._make_pairs()
        self._select_entries()
        certify_kernel[(1,)](
            gradient, order, chunk.live, self.weight, self.others, self.dropped, self.dense, self.signed, self.peak,
            sparse.dropped, sparse.mass, sparse.dense, self.counts, self.seen, sparse.tolerance,
            self.plan.most_dense, SCALED=self.unit != 1, ROWS=SLOTS,
        )  # fmt: skip
        if self.out_hidden is not None:
            weight, block = chunk.head.weight, min(1024, triton.next_power_of_2(chunk.D))
            gather_hidden_kernel[(chunk.rows, triton.cdiv(chunk.D, block))](
                self.entry_of, self.value_of, self.n_entries, self.dense, self.signed, weight, *weight.stride(),
                order, chunk.live, self.out_hidden, chunk.head.temperature, chunk.D,
                CAPACITY=self.plan.most_entries, BLOCK=block, AT_ONCE=4,
            )  # fmt: skip

    def _budget(self, tolerance: float, spent: bool) -> None:
        budget_kernel[(1,)](
            self.weight, self.others, self.dropped, self.chunk.live, self.cuts, tolerance,
            SPENT=spent, ROWS=SLOTS, BINS=BINS,
        )  # fmt: skip

    def _cut(self, blocks: int, out: torch.Tensor) -> None:
        cut_kernel[(1,)](self.below, blocks, self.cuts, out, BLOCKS=64, BINS=BINS)

    def _select_tiles(self) -> None:
        """Drop tiles, within half of the tolerance; group the rows by the tiles that they keep."""
        chunk, tiles = self.chunk, self.vocab.col_tiles
        grid = (self.row_blocks,)
        by_rows = {"COLS": self.config.cols, "ROWS": ROW_BLOCK, "TILES": TILE_BLOCK}
        tile_mass_kernel[grid](
            self.vocab.partial, chunk.offset, chunk.target, chunk.live, self.top, self.weight, self.others,
            chunk.rows, tiles, **by_rows,
        )  # fmt: skip
        self._budget(self.sparse.tolerance / 2, spent=False)
        tiles_below_kernel[grid](
            self.mass, self.weight, chunk.target, chunk.live, self.cuts, self.below, chunk.rows, tiles,
            BINS=BINS, **by_rows,
        )  # fmt: skip
        self._cut(self.row_blocks, self.tile_cut)
        select_tiles_kernel[grid](
            self.mass, self.weight, chunk.target, chunk.live, self.tile_cut, self.tile_of, self.n_tiles, self.dropped,
            self.dense, chunk.rows, tiles, MOST=self.plan.most_tiles, **by_rows,
        )  # fmt: skip
        tile_rows_kernel[(tiles,)](
            self.mass, self.weight, chunk.target, chunk.live, self.tile_cut, self.n_tiles, self.row_of, self.rank,
            self.n_rows, chunk.rows, COLS=self.config.cols, ROWS=SLOTS,
        )  # fmt: skip
        size = triton.next_power_of_2(tiles)
        schedule_kernel[(1,)](self.n_rows, self.first_block, tiles, PAIRS=PAIRS, SIZE=size)

    def _make_pairs(self) -> None:
        """Probabilities of the kept tiles, and with them each row's mass off target."""
        chunk, head, c, tiles = self.chunk, self.chunk.head, self.config, self.vocab.col_tiles
        pair_kernel[(chunk.programs,)](
            chunk.hidden, self.vocab.operands[1], *head.weight.stride(), head.bias, chunk.target, chunk.offset,
            self.row_of, self.n_rows, self.first_block, self.probability, self.pair_others, chunk.rows, chunk.V, tiles,
            head.softcap or 0.0, chunk.logit_scale, D=chunk.D, PAIRS=PAIRS, COLS=c.cols, DEPTH=c.depth,
            PROGRAMS=chunk.programs, TMA=chunk.tma, BIAS=head.bias is not None, SOFTCAP=head.softcap is not None,
            SIZE=triton.next_power_of_2(tiles), PRECISION=PRECISION, num_warps=4, num_stages=3,
        )  # fmt: skip
        row_pairs_kernel[(triton.cdiv(chunk.rows, 128),)](
            self.tile_of, self.n_tiles, self.rank, self.first_block, self.pair_others, self.dropped, chunk.live,
            self.pair_of, self.others, chunk.rows, MOST=self.plan.most_tiles, PAIRS=PAIRS, ROWS=128,
        )  # fmt: skip

    def _select_entries(self) -> None:
        """Drop entries of the kept tiles, within what is left of the tolerance."""
        chunk, head, c, tiles = self.chunk, self.chunk.head, self.config, self.vocab.col_tiles
        self._budget(self.sparse.tolerance, spent=True)
        pairs_below_kernel[(chunk.programs,)](
            self.probability, self.weight, chunk.target, self.row_of, self.n_rows, self.first_block, self.cuts,
            self.below, chunk.rows, tiles, PAIRS=PAIRS, COLS=c.cols, PROGRAMS=chunk.programs,
            SIZE=triton.next_power_of_2(tiles), BINS=BINS, num_warps=8,
        )  # fmt: skip
        self._cut(chunk.programs, self.entry_cut)
        entries_kernel[(chunk.rows,)](
            self.probability, self.tile_of, self.n_tiles, self.pair_of, self.weight, chunk.target, chunk.logit,
            chunk.offset, self.others, chunk.live, self.entry_cut, self.entry_of, self.value_of, self.n_entries,
            self.target_value, self.dropped, self.dense, head.softcap or 0.0, chunk.logit_scale,
            MOST=self.plan.most_tiles, CAPACITY=self.plan.most_entries, COLS=c.cols, SOFTCAP=head.softcap is not None,
        )  # fmt: skip

    @property
    def _pairs(self) -> tuple:
        """What the kernels of the head's gradients read dL/d(product) from."""
        chunk = self.chunk
        return (
            self.probability, self.row_of, self.n_rows, self.first_block, self.signed, self.weight, chunk.target,
            self.target_value, chunk.offset, self.entry_cut, self.peak,
        )  # fmt: skip

    def head_product(self, out: torch.Tensor, accumulate: bool) -> None:
        """out (V, D) float32 = the gradient of the head from the rows that are not dense, or add it."""
        chunk, head, cols = self.chunk, self.chunk.head, self.config.cols
        large = cols >= 128
        tile = {"ROWS": min(cols, 128), "WIDTH": 256 if large else 64, "DEPTH": 64 if large else 32}
        head_pairs_kernel[(chunk.programs,)](
            *self._pairs, chunk.hidden, out, chunk.rows, chunk.D, chunk.V, self.vocab.col_tiles,
            head.softcap or 0.0, chunk.logit_scale, head.temperature, self.unit,
            COLS=cols, PAIRS=PAIRS, PROGRAMS=chunk.programs, SOFTCAP=head.softcap is not None, ACCUMULATE=accumulate,
            PRECISION=PRECISION, num_warps=8 if large else 4, num_stages=2, **tile,
        )  # fmt: skip

    def bias(self, out: torch.Tensor, accumulate: bool) -> None:
        """out (V,) float32 = the gradient of the bias from the rows that are not dense, or add it."""
        chunk, head = self.chunk, self.chunk.head
        bias_pairs_kernel[(self.vocab.col_tiles,)](
            *self._pairs, out, chunk.rows, chunk.V, head.softcap or 0.0, chunk.logit_scale,
            head.temperature, self.unit, COLS=self.config.cols, ROWS=32, PAIRS=PAIRS,
            SOFTCAP=head.softcap is not None, ACCUMULATE=accumulate,
        )  # fmt: skip
