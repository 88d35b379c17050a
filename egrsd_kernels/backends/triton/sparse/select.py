"""Which entries a row keeps: tiles of little mass are never looked at, the others' entries once."""

import torch
import triton.language as tl

from ..gradient import ChunkGradients
from ..launch import kernel
from ..vocab import ROW_BLOCK, TILE_BLOCK
from .planes import DENSE, DROPPED, N_ENTRIES, N_TILES, OTHERS, SOFTCAP_GRAD, TARGET, TOTAL, WEIGHT, at, weigh_kernel

# Parts of a row's share of the budget. Below the first, over the number of tiles, a tile is dropped; that leaves most
# of it unused. Below the second, over the room in a list, an entry is; rows keep far fewer than there is room for.
TILE_PART, ENTRY_PART = tl.constexpr(1.0), tl.constexpr(4.0)


@kernel
def tiles_kernel(sums, floats, ints, budget, tile_of, rows, col_tiles, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Grid (rows / ROWS,): tile_of (rows, col_tiles) int32, the N_TILES tiles of a row, in order, whose Σ E is above a
    part of the row's budget, in units of E. DROPPED: Σ E of the others. sums: (col_tiles, rows) float32, undamped Σ E.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    a = tl.load(at(floats, WEIGHT, rows, r))
    limit = tl.load(budget + 1) * (tl.load(at(floats, TOTAL, rows, r)) / a) * (TILE_PART / col_tiles)
    count = tl.zeros([ROWS], tl.int32)
    lost = tl.zeros([ROWS], tl.float32)
    for start in range(0, tl.where(tl.max(a, 0) > 0, col_tiles, 0), TILES):
        j = start + tl.arange(0, TILES)
        # Without a weight a sum may be infinite, or NaN.
        inside = (j < col_tiles)[:, None] & (a > 0)[None, :]
        q = tl.load(sums + j[:, None] * rows + r[None, :], mask=inside, other=0.0)
        one = (inside & (q > limit[None, :])).to(tl.int32)  # a limit without a weight may be anything
        k = count[None, :] + tl.cumsum(one, 0) - one
        tl.store(tile_of + r[None, :] * col_tiles + k, j[:, None] + tl.zeros_like(k), mask=one > 0)
        count += tl.sum(one, 0)
        lost += tl.sum(tl.where(one > 0, 0.0, q), 0)
    tl.store(at(ints, N_TILES, rows, r), count)
    tl.store(at(floats, DROPPED, rows, r), lost)


@kernel
def select_kernel(
    exponentials, tile_of, floats, ints, budget, entry_of, value_of, rows, col_tiles, unseen,
    COLS: tl.constexpr, AT_ONCE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Grid (rows,): entry_of int32 and value_of float32 (rows, CAPACITY), the N_ENTRIES entries v of a row's tiles with
    x_v = -E / S whose E is above a part of its budget, and last the target, with x_y = damping Σ p. DROPPED: Σ E / S of
    all others. A row with more entries is DENSE.

    exponentials: (rows, col_tiles · COLS), of which AT_ONCE tiles are loaded together. unseen: what an E may be off by
    because the dtype underflows.
    """
    r = tl.program_id(0)
    a = tl.load(at(floats, WEIGHT, rows, r))
    if a > 0:
        n = tl.load(at(ints, N_TILES, rows, r))
        total = tl.load(at(floats, TOTAL, rows, r))
        inverse = 1.0 / total
        limit = tl.load(budget + 1) * (total / a) * (ENTRY_PART / CAPACITY)
        lost = tl.zeros([AT_ONCE, COLS], tl.float32)
        start = 0
        count = 0
        while (start < n) & (count < CAPACITY):
            k = start + tl.arange(0, AT_ONCE)
            v = tl.load(tile_of + r * col_tiles + k, mask=k < n, other=0)[:, None] * COLS + tl.arange(0, COLS)[None, :]
            row = exponentials + r.to(tl.int64) * (col_tiles * COLS)
            e = tl.load(row + v, mask=(k < n)[:, None], other=0.0).to(tl.float32)
            one = (e > limit).to(tl.int32)
            in_tile = tl.sum(one, 1)
            found = tl.sum(in_tile, 0)
            if found > 0:
                place = (count + tl.cumsum(in_tile, 0) - in_tile)[:, None] + tl.cumsum(one, 1) - one
                keep = (e > limit) & (place < CAPACITY - 1)
                tl.store(entry_of + r * CAPACITY + place, v, mask=keep)
                tl.store(value_of + r * CAPACITY + place, -e * inverse, mask=keep)
            lost += tl.where(e > limit, 0.0, e)
            count += found
            start += AT_ONCE
        tl.store(at(ints, DENSE, rows, r), (count >= CAPACITY).to(tl.int32))
        if count < CAPACITY:
            own = tl.load(at(floats, OTHERS, rows, r)) / total * tl.load(at(floats, SOFTCAP_GRAD, rows, r))
            tl.store(entry_of + r * CAPACITY + count, tl.load(at(ints, TARGET, rows, r)))
            tl.store(value_of + r * CAPACITY + count, own)
            tl.store(at(ints, N_ENTRIES, rows, r), count + 1)
            dropped = tl.load(at(floats, DROPPED, rows, r)) + tl.sum(tl.sum(lost, 1), 0) + n * COLS * unseen
            tl.store(at(floats, DROPPED, rows, r), dropped * inverse)


def list_entries(seen: ChunkGradients, floats, ints, budget, order, gradient, tolerance, tile_of, entry_of, value_of):
    """Weigh the rows of the chunk of ``seen``, which has their exponentials, and list their entries."""
    chunk, e, cols, sums = seen.chunk, seen.exponentials, seen.vocab.config.cols, seen.vocab.sums[0]
    tiles, rows = sums.shape
    known = floats, ints, budget
    weigh_kernel[(1,)](gradient, order, chunk.row_counts, *known, rows, tolerance, SOFTCAP=chunk.softcap is not None)
    tiles_kernel[(rows // ROW_BLOCK,)](sums, *known, tile_of, rows, tiles, ROWS=ROW_BLOCK, TILES=TILE_BLOCK)
    select_kernel[(rows,)](
        e, tile_of, *known, entry_of, value_of, rows, tiles, 2.0**-25 if e.dtype == torch.float16 else 0.0,
        COLS=cols, AT_ONCE=2048 // cols, CAPACITY=entry_of.shape[1],
    )  # fmt: skip
