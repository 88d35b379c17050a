"""Which entries a row keeps: tiles of little mass are never looked at, the others' entries once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gradient import ChunkGradients
from ..vocab import ROW_BLOCK, TILE_BLOCK
from .certify import SLACK
from .planes import (
    DAMPING, DENSE, DROPPED, GRADIENT, MASS, N_ENTRIES, N_TILES, OTHERS, SLOTS, TARGET, TOKEN, TOTAL, WEIGHT, at,
)  # fmt: skip

# Shares of a row's budget: for tiles, dealt out evenly, so that most of it stays unused; for a full list's entries, of
# which rows keep far fewer; and what a row may be expected to drop if it is to be looked at.
TILE_SHARE, ENTRY_SHARE, HOPELESS = map(tl.constexpr, (1.0, 2.0, 16.0))
BINS, BITS = tl.constexpr(128), tl.constexpr(20)  # of a row's entries, by size: eight for a factor of 2
TINY, SMALL = tl.constexpr(2.0**-126), tl.constexpr(2.0**-100)  # where the proof's sums begin
SAMPLED = 8192  # of a row's entries about so many or more are sampled, but not fewer than one in 16


@triton.jit
def load_gradient(gradient, order, floats, rows, r, n):
    """(token, g, S, whether g is not 0, and both finite) of rows r."""
    t = tl.load(order + r, mask=r < n, other=0)
    g = tl.load(gradient + t, mask=r < n, other=0.0)
    s = tl.load(at(floats, TOTAL, rows, r), mask=r < n, other=1.0)
    return t, g, s, (tl.abs(g) < float("inf")) & (s > 0) & (s < float("inf"))


@triton.jit
def weigh_kernel(gradient, order, live, floats, ints, budget, rows, tolerance, SOFTCAP: tl.constexpr):
    """Grid (1,): TOKEN, GRADIENT, WEIGHT, MASS and DENSE of the n rows, with WEIGHT 0 after them; dense are those whose
    g or S is not finite. budget (2,) float32: tolerance Σ a M / (1 + 4 SLACK), and this over n.

    gradient: (N,) float32. order: the rows' tokens, int32.
    """
    n = tl.load(live + 1)
    largest = tl.zeros([SLOTS], tl.float32)
    for start in range(0, n, SLOTS):
        _, g, _, sound = load_gradient(gradient, order, floats, rows, start + tl.arange(0, SLOTS), n)
        largest = tl.maximum(largest, tl.where(sound, tl.abs(g), 0.0))
    top = tl.max(largest, 0)
    total = tl.zeros([SLOTS], tl.float32)
    for start in range(0, rows, SLOTS):
        r = start + tl.arange(0, SLOTS)
        t, g, s, sound = load_gradient(gradient, order, floats, rows, r, n)
        a = tl.where(sound & (g != 0), tl.maximum(tl.abs(g) / top, TINY), 0.0)
        mass = tl.load(at(floats, OTHERS, rows, r), mask=r < n, other=0.0) / s
        # Under a softcap the others are damped, too, and the target's entry alone is what is known to be there.
        mass *= tl.load(at(floats, DAMPING, rows, r), mask=r < n, other=0.0) if SOFTCAP else 2.0
        mass = tl.where(a > 0, mass, 0.0)
        total += tl.where(a * mass < SMALL, 0.0, a * mass)
        tl.store(at(floats, WEIGHT, rows, r), a, mask=r < rows)
        tl.store(at(floats, GRADIENT, rows, r), g, mask=r < n)
        tl.store(at(floats, MASS, rows, r), mass, mask=r < n)
        tl.store(at(ints, TOKEN, rows, r), t, mask=r < n)
        tl.store(at(ints, DENSE, rows, r), 1 - sound.to(tl.int32), mask=r < n)
    # A little less than the tolerance allows: sums are rounded differently in between.
    total = tl.sum(total, 0) * tolerance / (1.0 + 4.0 * SLACK)
    tl.store(budget, total)
    tl.store(budget + 1, total / tl.maximum(n, 1))


@triton.jit
def tiles_kernel(
    sums, floats, ints, budget, tile_of, rows, col_tiles, ROWS: tl.constexpr, TILES: tl.constexpr
):
    """Grid (rows / ROWS,): tile_of (rows, col_tiles) int32, the N_TILES tiles of a row, in order, whose Σ E is above its
    share of the row's budget. DROPPED: Σ E of the others. sums (col_tiles, rows) float32: Σ E, without damping.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    a = tl.load(at(floats, WEIGHT, rows, r))
    limit = tl.load(budget + 1) * (tl.load(at(floats, TOTAL, rows, r)) / a) * (TILE_SHARE / col_tiles)
    count = tl.zeros([ROWS], tl.int32)
    lost = tl.zeros([ROWS], tl.float32)
    for start in range(0, tl.where(tl.max(a, 0) > 0, col_tiles, 0), TILES):
        j = start + tl.arange(0, TILES)
        # Without a weight a sum may be infinite, or NaN.
        inside = (j < col_tiles)[:, None] & (a > 0)[None, :]
        q = tl.load(sums + j[:, None] * rows + r[None, :], mask=inside, other=0.0)
        one = (q > limit[None, :]).to(tl.int32)
        k = count[None, :] + tl.cumsum(one, 0) - one
        tl.store(tile_of + r[None, :] * col_tiles + k, j[:, None] + tl.zeros_like(k), mask=one > 0)
        count += tl.sum(one, 0)
        lost += tl.sum(tl.where(one > 0, 0.0, q), 0)
    tl.store(at(ints, N_TILES, rows, r), count)
    tl.store(at(floats, DROPPED, rows, r), lost)


@triton.jit
def load_entries(exponentials, tile_of, k, n, col_tiles, COLS: tl.constexpr, PART: tl.constexpr):
    """(v, e) (len(k), COLS / PART): one in PART entries, which take turns, of the row's ``k``-th tiles of n; 0 after."""
    r = tl.program_id(0)
    first = tl.load(tile_of + r * col_tiles + k, mask=k < n, other=0) * COLS + (k + r) % PART * (COLS // PART)
    v = first[:, None] + tl.arange(0, COLS // PART)[None, :]
    row = exponentials + r.to(tl.int64) * (col_tiles * COLS)
    return v, tl.load(row + v, mask=(k < n)[:, None], other=0.0).to(tl.float32)


@triton.jit
def select_kernel(
    exponentials, tile_of, floats, ints, budget, entry_of, value_of, rows, col_tiles, unseen,
    COLS: tl.constexpr, SAMPLE: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Grid (rows,): entry_of int32 and value_of float32 (rows, CAPACITY), the N_ENTRIES entries v that a row keeps and
    their x_v = -E / S, and last the target's x_y = damping Σ p; DROPPED = (Σ E of the others) / S.

    Dropped are entries below a share of the row's budget, in units of E, and below a size that fewer than CAPACITY are
    above by the histogram of one in PART; should there be more, the last of them. A row is DENSE if too much is below.

    exponentials: (rows, col_tiles · COLS), of which SAMPLE or SIZE are loaded together. unseen: what an E may be off by
    because the dtype underflows.
    """
    r = tl.program_id(0)
    a = tl.load(at(floats, WEIGHT, rows, r))
    if a > 0:
        n = tl.load(at(ints, N_TILES, rows, r))
        total = tl.load(at(floats, TOTAL, rows, r))
        unit = tl.load(budget + 1) * (total / a)
        limit = unit * (ENTRY_SHARE / CAPACITY)
        # Positive floats order as whole numbers. Bin 0 is up to the limit, the others above.
        bottom = limit.to(tl.int32, bitcast=True)
        bins = tl.arange(0, BINS)
        sizes = tl.zeros([BINS], tl.int32)
        small = tl.zeros([SAMPLE], tl.float32)
        for start in range(0, n, SAMPLE * PART // COLS):
            tiles = start + tl.arange(0, SAMPLE * PART // COLS)
            _, e = load_entries(exponentials, tile_of, tiles, n, col_tiles, COLS, PART)
            e = tl.reshape(e, [SAMPLE])
            k = 1 + ((e.to(tl.int32, bitcast=True) - bottom - 1) >> BITS)
            sizes += tl.histogram(tl.where(e > limit, tl.minimum(k, BINS - 1), 0), BINS)
            small += tl.where(e > limit, 0.0, e)
        above = tl.sum(sizes, 0) - tl.cumsum(sizes, 0) + sizes
        # A sample leaves some room for its error.
        fits = above * PART <= (CAPACITY - 1 if PART == 1 else CAPACITY * 3 // 4)
        first = tl.min(tl.where(fits & (bins > 0), bins, BINS), 0)
        edges = (bottom + (bins << BITS)).to(tl.float32, bitcast=True)
        below = tl.sum(small, 0) + tl.sum(tl.where((bins > 0) & (bins < first), sizes.to(tl.float32) * edges, 0.0), 0)
        hopeless = below * PART > HOPELESS * unit
        tl.store(at(ints, DENSE, rows, r), hopeless.to(tl.int32))
        if not hopeless:
            cut = (bottom + ((first - 1) << BITS)).to(tl.float32, bitcast=True)
            inverse = 1.0 / total
            lost = tl.zeros([SIZE // COLS, COLS], tl.float32)
            count = 0
            for start in range(0, n, SIZE // COLS):
                tiles = start + tl.arange(0, SIZE // COLS)
                v, e = load_entries(exponentials, tile_of, tiles, n, col_tiles, COLS, 1)
                one = (e > cut).to(tl.int32)
                in_tile = tl.sum(one, 1)
                k = (count + tl.cumsum(in_tile, 0) - in_tile)[:, None] + tl.cumsum(one, 1) - one
                keep = (e > cut) & (k < CAPACITY - 1)
                tl.store(entry_of + r * CAPACITY + k, v, mask=keep)
                tl.store(value_of + r * CAPACITY + k, -e * inverse, mask=keep)
                lost += tl.where(keep, 0.0, e)
                count += tl.sum(in_tile, 0)
            last = tl.minimum(count, CAPACITY - 1)
            own = tl.load(at(floats, OTHERS, rows, r)) / total * tl.load(at(floats, DAMPING, rows, r))
            tl.store(entry_of + r * CAPACITY + last, tl.load(at(ints, TARGET, rows, r)))
            tl.store(value_of + r * CAPACITY + last, own)
            tl.store(at(ints, N_ENTRIES, rows, r), last + 1)
            dropped = tl.load(at(floats, DROPPED, rows, r)) + tl.sum(tl.sum(lost, 1), 0) + n * COLS * unseen
            tl.store(at(floats, DROPPED, rows, r), dropped * inverse)


def list_entries(
    seen: ChunkGradients, floats, ints, budget, order, gradient, tolerance: float, tile_of, entry_of, value_of
) -> None:
    """Weigh the rows of the chunk of ``seen``, which has their exponentials, and list their entries."""
    chunk, e, (tiles, rows), cols = seen.chunk, seen.exponentials, seen.vocab.sums.shape, seen.vocab.config.cols
    known = floats, ints, budget
    weigh_kernel[(1,)](gradient, order, chunk.live, *known, rows, tolerance, SOFTCAP=chunk.softcap is not None)
    tiles_kernel[(rows // ROW_BLOCK,)](
        seen.vocab.sums, *known, tile_of, rows, tiles, ROWS=ROW_BLOCK, TILES=TILE_BLOCK
    )
    part = min(16, 1 << max(0, (chunk.V // SAMPLED).bit_length() - 1))
    select_kernel[(rows,)](
        e, tile_of, *known, entry_of, value_of, rows, tiles, 2.0**-25 if e.dtype == torch.float16 else 0.0,
        COLS=cols, SAMPLE=512, SIZE=2048, PART=part, CAPACITY=entry_of.shape[1],
    )  # fmt: skip
