"""One pass over the vocabulary, hidden x head fused with the softmax: the logits of a tile stay on chip in float32.

Two uses of one kernel. Statistics: each (row, vocabulary tile) leaves its maximum m, S = sum e^(z-m) and
U = sum e^(z-m) (z-m); combined over the tiles they give logsumexp and entropy. Or a tile is stored, and its float32 row
sums kept. With x = z - offset, what is stored is one of

    "exponentials"  e^x in the operands' dtype, so that the gradient of log p is a plain matrix product later
    "logits"        x, in a dtype as wide: the gradient of an entropy needs log p and p
    "gradient"      e^x (a + b x): that gradient, where dL/dlogp and dL/dentropy are known before the pass

and the sums are those of what is stored, but S = sum e^x beside logits; and perhaps U = sum e^x x.

Either use may leave more, where it is asked for: the largest logit, the sum of all, and that of squares, of e^(z-m) or
e^x.

All leave the target out, whose logit the gather has made: a sum is then what 1 - p_y is made of, without a difference,
and log p compares the target with the others by the same two numbers in all, so that teacher and student of the same
weights agree to the last bits.
All logits here are in units of ln 2, because exp2 and log2 are what the hardware has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..protocol import VocabularyStatistics
from .common import LN2, NEG, PRECISION, ceil_div, load_tile, logits_of
from .gather import Chunk
from .launch import kernel

# Row tiles that share their pass over the vocabulary, so that a tile of the head is read from L2 by all of them.
GROUP = 16
# Above this sum of exponentials a row's offset is unsuited. The products with the head could leave float32, and of
# stored logits the largest would have few digits behind the point.
SUM_LIMIT = {"exponentials": 2.0**100, "logits": 2.0**32, "gradient": 2.0**100}
# Of e^x before it is squared. The sum of e^x is below 2^100 where it is good for anything, and that of its squares at
# least 1/V, the target's included: so neither these nor their larger terms leave float32.
SQUARED = tl.constexpr(2.0**-40)
# Stands for all smaller x, whose e^x is 0: float16 holds it.
LEAST = tl.constexpr(-30000.0)
# Rows of a program that goes through all tiles of its rows, so many at a time.
ROW_BLOCK = 8
TILE_BLOCK = 128
# Arguments that have an entry a token, and so begin anywhere.
BY_TOKEN = ["order", *VocabularyStatistics._fields]


@kernel(do_not_specialize=["first_tile", "n_tiles"])
def vocab_kernel(
    hidden, weight, stride_wv, stride_wd, bias, stored, stride_e, offset, slope, target, tile_stats, row_counts,
    first_tile, n_tiles, n_slots, V, softcap, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, TMA: tl.constexpr, STORE: tl.constexpr, MOMENT: tl.constexpr, TOP1: tl.constexpr,
    MEAN: tl.constexpr, SQUARES: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z = h W^T + b of ``n_tiles`` vocabulary tiles from ``first_tile`` on, softcapped and scaled, on chip; then

    STORE: stored (n_slots, n_tiles COLS) = what it names, but for logits times 1 - tanh^2 and 0 for the target, in its
        dtype; and tile_stats (1 or 2, tiles, n_slots) float32 = the sum of each row and tile, and U with MOMENT;
    else: tile_stats (3, tiles, n_slots) float32 = m, S, U.
    After these a plane each for TOP1, the largest z, the target's included, or inf where the target is in the tile and
        not its first maximum; for MEAN, the sum of z; for SQUARES, that of e^(2(z - m)), or of (SQUARED e^x)^2.

    offset: (n_slots,) float32. slope: (2 or more, n_slots) float32, a and b of each row, for "gradient".
    Grid: (PROGRAMS,), persistent over tiles of ROWS x COLS. hidden: (n_slots, D). weight: (V, D). row_counts: (2,).
    """
    # The chunk's buffers are whole tiles of rows: what a tile holds past n_valid is computed and never used.
    n_valid = tl.load(row_counts)
    n_active = tl.load(row_counts + 1)
    row_tiles = tl.cdiv(n_valid, ROWS)
    width = GROUP * n_tiles
    for tile in tl.range(tl.program_id(0), row_tiles * n_tiles, PROGRAMS, flatten=TMA):
        group = tile // width
        group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
        row_tile = group * GROUP + (tile % width) % group_rows
        slice_tile = (tile % width) // group_rows
        col_tile = first_tile + slice_tile
        product = tl.zeros([ROWS, COLS], tl.float32)
        for d in range(0, D, DEPTH):
            h = load_tile(hidden, row_tile * ROWS, d, n_slots, D, D, 1, ROWS, DEPTH, TMA, True, D % DEPTH == 0)
            w = load_tile(
                weight, col_tile * COLS, d, V, D, stride_wv, stride_wd, COLS, DEPTH, TMA, False, D % DEPTH == 0
            )
            product = tl.dot(h, w.T, product, input_precision=PRECISION)
        r = row_tile * ROWS + tl.arange(0, ROWS)
        v = col_tile * COLS + tl.arange(0, COLS)
        if BIAS:
            product += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
        z, softcap_grad = logits_of(product, softcap, scale, SOFTCAP)
        if MEAN:
            sum_z = tl.sum(tl.where((v < V)[None, :], z, 0.0), 1)
        if BIAS:  # -inf is a legitimate bias; as NEG it keeps 0 * -inf out of the sums
            z = tl.where(z == float("-inf"), NEG, z)
        weighted = (v < V)[None, :] & (v[None, :] != tl.load(target + r)[:, None])
        at = tile_stats + col_tile * n_slots + r
        plane = tl.cdiv(V, COLS) * n_slots
        more = at + (3 if STORE is None else 1 + MOMENT) * plane
        if MEAN:
            tl.store(more + TOP1 * plane, sum_z)
        if TOP1:
            # Of the logits as they are here: the gather's sums are rounded differently, and ties would be none.
            y = tl.load(target + r)
            best = tl.max(tl.where((v < V)[None, :], z, 2 * NEG), 1)
            first = tl.min(tl.where((v < V)[None, :] & (z == best[:, None]), v[None, :], V), 1)
            tl.store(more, tl.where((y // COLS == col_tile) & (y != first), float("inf"), best))
        if STORE is not None:
            z -= tl.load(offset + r)[:, None]
            e = tl.where(weighted, tl.exp2(z), 0.0)
            if SQUARES:
                tl.store(more + (TOP1 + MEAN) * plane, tl.sum((e * SQUARED) * (e * SQUARED), 1))
            if STORE == "gradient":
                e *= tl.load(slope + r)[:, None] + tl.load(slope + n_slots + r)[:, None] * z
            tl.store(at, tl.sum(e, 1))
            if MOMENT:
                tl.store(at + plane, tl.sum(e * z, 1))
            if STORE == "logits":
                e = tl.where(weighted, tl.maximum(z, LEAST), LEAST)
            else:
                # Rows without gradient become zeros: the products that sum over rows then need no mask.
                e = tl.where((r < n_active)[:, None], e * softcap_grad, 0.0)
            if TMA:
                stored.store([row_tile * ROWS, slice_tile * COLS], e.to(stored.dtype))
            else:
                column = slice_tile * COLS + tl.arange(0, COLS)
                pointers = stored + r.to(tl.int64)[:, None] * stride_e + column[None, :]
                tl.store(pointers, e.to(stored.dtype.element_ty))
        else:
            z = tl.where(weighted, z, NEG)
            m = tl.max(z, 1)
            z -= m[:, None]
            e = tl.exp2(z)
            tl.store(at, m)
            tl.store(at + plane, tl.sum(e, 1))
            tl.store(at + 2 * plane, tl.sum(e * z, 1))
            if SQUARES:
                tl.store(more + (TOP1 + MEAN) * plane, tl.sum(e * e, 1))


@triton.jit
def own_best(best, target, r, ours, n_slots, COLS: tl.constexpr):
    """(y's tile, what TOP1 has of it) of rows r; inf for a target outside the vocabulary."""
    y = tl.load(target + r, mask=ours, other=-1)
    return y // COLS, tl.load(best + y // COLS * n_slots + r, mask=ours & (y >= 0), other=float("inf"))


@triton.jit
def beaten_by(best, inside, tile, own_tile, own):
    """Whether one of these tiles (TILE_BLOCK,) has a larger logit than the target, or as large a one before it; int32.

    best, inside: (TILE_BLOCK, ROW_BLOCK). own_tile, own: (ROW_BLOCK,).
    """
    z = tl.load(best, mask=inside, other=2 * NEG)
    before = tile[:, None] < own_tile[None, :]
    return tl.max((inside & ((z > own[None, :]) | ((z == own[None, :]) & before))).to(tl.int32), 0)


@triton.jit
def store_top1(out, beaten, own_top, log_s, ours):
    """Whether no tile has beaten the target's, which has it as its first maximum; not where log p is NaN."""
    is_top = (beaten == 0) & (own_top < float("inf")) & (log_s == log_s)
    tl.store(out, is_top.to(tl.uint8), mask=ours)


@triton.jit
def store_squares(out, squares, s, ours):
    """log Σ p^2 in nats, of the sum of squares and that of the same terms as they are."""
    tl.store(out, tl.log2(squares / s / s) * LN2, mask=ours)


@kernel(do_not_specialize=BY_TOKEN)
def combine_statistics_kernel(
    tile_stats, logit, target, order, row_counts, offset, logp, entropy, logsumexp, is_top1, mean_logits,
    log_sum_sq_probs, n_slots, col_tiles, shift, V,
    OFFSET: tl.constexpr, COLS: tl.constexpr, ROW_BLOCK: tl.constexpr, TILE_BLOCK: tl.constexpr,
):  # fmt: skip
    """logsumexp = M + log S and H = log S - U / S over all tiles and the target, M their common maximum.

    Grid: (n_slots / ROW_BLOCK,). tile_stats: (3 or more, col_tiles, n_slots) float32. OFFSET: offset (n_slots,) =
    logsumexp - shift, in units of ln 2; else logp and the others (N,) float32, in nats, is_top1 uint8, at each row's
    place in ``order``; all but logp may be None. For the last three ``tile_stats`` has a plane more where not None.
    """
    n_valid = tl.load(row_counts)
    r = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    ours = r < n_valid
    if tl.program_id(0) * ROW_BLOCK < n_valid:
        plane = col_tiles * n_slots
        more: tl.constexpr = 3
        of_mean: tl.constexpr = more + (is_top1 is not None)
        of_squares: tl.constexpr = of_mean + (mean_logits is not None)
        top = tl.full([ROW_BLOCK], 2 * NEG, tl.float32)
        s = tl.zeros([ROW_BLOCK], tl.float32)
        u = tl.zeros([ROW_BLOCK], tl.float32)
        if is_top1 is not None:
            own_tile, own_top = own_best(tile_stats + more * plane, target, r, ours, n_slots, COLS)
            beaten = tl.zeros([ROW_BLOCK], tl.int32)
        if mean_logits is not None:
            total = tl.zeros([ROW_BLOCK], tl.float32)
        if log_sum_sq_probs is not None:
            squares = tl.zeros([ROW_BLOCK], tl.float32)
        for start in range(0, col_tiles, TILE_BLOCK):
            tile = start + tl.arange(0, TILE_BLOCK)
            at = tile_stats + tile[:, None] * n_slots + r[None, :]
            inside = (tile < col_tiles)[:, None] & ours[None, :]
            m = tl.load(at, mask=inside, other=2 * NEG)
            peak = tl.maximum(top, tl.max(m, 0))
            # U is about each tile's own maximum; moving it to the common one keeps every term a difference of logits.
            drop = m - peak[None, :]
            factor = tl.exp2(drop)
            old = top - peak
            tile_s = tl.load(at + plane, mask=inside, other=0.0)
            tile_u = tl.load(at + 2 * plane, mask=inside, other=0.0)
            u = tl.exp2(old) * (u + old * s) + tl.sum(factor * (tile_u + drop * tile_s), 0)
            s = tl.exp2(old) * s + tl.sum(factor * tile_s, 0)
            top = peak
            if is_top1 is not None:
                beaten |= beaten_by(at + more * plane, inside, tile, own_tile, own_top)
            if mean_logits is not None:
                total += tl.sum(tl.load(at + of_mean * plane, mask=inside, other=0.0), 0)
            if log_sum_sq_probs is not None:
                tile_squares = tl.load(at + of_squares * plane, mask=inside, other=0.0)
                squares = tl.exp2(2.0 * old) * squares + tl.sum(factor * factor * tile_squares, 0)
        z = tl.load(logit + r, mask=ours, other=0.0)
        own = tl.where(z == z, z, 2 * NEG)  # a NaN is a target outside the vocabulary
        peak = tl.maximum(top, own)
        old, drop = top - peak, own - peak
        u = tl.exp2(old) * (u + old * s) + tl.exp2(drop) * drop
        s = tl.exp2(old) * s + tl.exp2(drop)
        if log_sum_sq_probs is not None:
            squares = tl.exp2(2.0 * old) * squares + tl.exp2(2.0 * drop)
        top = peak
        log_s = tl.log2(s)
        if OFFSET:
            tl.store(offset + r, top + log_s - shift, mask=ours)
        else:
            row = tl.load(order + r, mask=ours, other=0)
            z = tl.where(z == NEG, float("-inf"), z)
            tl.store(logp + row, (z - top - log_s) * LN2, mask=ours)
            if entropy is not None:
                tl.store(entropy + row, (log_s - u / s) * LN2, mask=ours)
            if logsumexp is not None:
                tl.store(logsumexp + row, (top + log_s) * LN2, mask=ours)
            if is_top1 is not None:
                store_top1(is_top1 + row, beaten, own_top, log_s, ours)
            if mean_logits is not None:
                tl.store(mean_logits + row, total * (LN2 / V), mask=ours)
            if log_sum_sq_probs is not None:
                store_squares(log_sum_sq_probs + row, squares, s, ours)


@kernel(do_not_specialize=BY_TOKEN)
def combine_sums_kernel(
    tile_stats, logit, offset, target, order, row_counts, retry, others, total, moment, logp, entropy, logsumexp,
    is_top1, mean_logits, log_sum_sq_probs, n_slots, col_tiles, limit, V,
    COLS: tl.constexpr, ROW_BLOCK: tl.constexpr, TILE_BLOCK: tl.constexpr,
):  # fmt: skip
    """others = the sum of a row's sums, total = others + e^(z_y - offset), log p = z_y - offset - log total, in nats.

    Grid: (n_slots / ROW_BLOCK,). tile_stats: (1 or more, col_tiles, n_slots) float32. others, total: (n_slots,)
    float32. moment: (n_slots,) float32 = the sum of a row's U, or None. logp and the others (N,) float32, in nats,
    is_top1 uint8, or None; entropy and logsumexp with ``moment`` only. For that and the last three ``tile_stats`` has a
    plane more where not None. retry: becomes row_counts if any total reaches ``limit``; or None.
    """
    n_valid = tl.load(row_counts)
    r = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    ours = r < n_valid
    if tl.program_id(0) * ROW_BLOCK < n_valid:
        plane = col_tiles * n_slots
        more: tl.constexpr = 1 + (moment is not None)
        of_mean: tl.constexpr = more + (is_top1 is not None)
        of_squares: tl.constexpr = of_mean + (mean_logits is not None)
        s = tl.zeros([ROW_BLOCK], tl.float32)
        u = tl.zeros([ROW_BLOCK], tl.float32)
        if is_top1 is not None:
            own_tile, own_top = own_best(tile_stats + more * plane, target, r, ours, n_slots, COLS)
            beaten = tl.zeros([ROW_BLOCK], tl.int32)
        if mean_logits is not None:
            logits = tl.zeros([ROW_BLOCK], tl.float32)
        if log_sum_sq_probs is not None:
            squares = tl.zeros([ROW_BLOCK], tl.float32)
        for start in range(0, col_tiles, TILE_BLOCK):
            tile = start + tl.arange(0, TILE_BLOCK)
            inside = (tile < col_tiles)[:, None] & ours[None, :]
            at = tile_stats + tile[:, None] * n_slots + r[None, :]
            s += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
            if moment is not None:
                u += tl.sum(tl.load(at + plane, mask=inside, other=0.0), 0)
            if is_top1 is not None:
                beaten |= beaten_by(at + more * plane, inside, tile, own_tile, own_top)
            if mean_logits is not None:
                logits += tl.sum(tl.load(at + of_mean * plane, mask=inside, other=0.0), 0)
            if log_sum_sq_probs is not None:
                squares += tl.sum(tl.load(at + of_squares * plane, mask=inside, other=0.0), 0)
        tl.store(others + r, s, mask=ours)
        z = tl.load(logit + r, mask=ours, other=0.0)
        base = tl.load(offset + r, mask=ours, other=0.0)
        own = tl.exp2(z - base)
        s += own
        tl.store(total + r, s, mask=ours)
        log_s = tl.log2(s)
        row = tl.load(order + r, mask=ours, other=0)
        if logp is not None:
            value = (z - base - log_s) * LN2
            tl.store(logp + row, tl.where(z == NEG, float("-inf"), value), mask=ours)
        if moment is not None:
            tl.store(moment + r, u, mask=ours)
        if entropy is not None:
            u += own * (z - base)
            tl.store(entropy + row, (log_s - u / s) * LN2, mask=ours)
        if logsumexp is not None:
            tl.store(logsumexp + row, (base + log_s) * LN2, mask=ours)
        if is_top1 is not None:
            store_top1(is_top1 + row, beaten, own_top, log_s, ours)
        if mean_logits is not None:
            tl.store(mean_logits + row, logits * (LN2 / V), mask=ours)
        if log_sum_sq_probs is not None:
            squares += (own * SQUARED) * (own * SQUARED)
            store_squares(log_sum_sq_probs + row, squares, s * SQUARED, ours)
        if retry is not None:  # a NaN target logit is a target outside the vocabulary: no offset would help
            unsuited = tl.max(tl.where(s < limit, 0, (ours & (z == z)).to(tl.int32)), 0)
            # Every program that has such a row stores the same two numbers.
            tl.store(retry, n_valid, mask=unsuited > 0)
            tl.store(retry + 1, tl.load(row_counts + 1), mask=unsuited > 0)


class Wanted(NamedTuple):
    """What a pass keeps planes for, beside those that log p takes: entropies, and each of the extras."""

    moment: bool = False
    top1: bool = False
    mean: bool = False
    squares: bool = False

    @classmethod
    def of(cls, out: VocabularyStatistics) -> Wanted:
        wanted = out.entropy, out.is_top1, out.mean_logits, out.log_sum_sq_probs
        return cls(*(x is not None for x in wanted))

    @property
    def extras(self) -> int:
        """How many planes these take."""
        return sum(self[1:])

    @property
    def stored(self) -> int:
        """How many planes a pass that stores has, with the sums of what it stores."""
        return 1 + sum(self)


NOTHING = Wanted()


class VocabPass:
    """Statistics of the rows of a :class:`~.gather.Chunk`, by a pass over the vocabulary.

    memory: what tiles' maxima and sums may share, uint8; their own where it is None.
    """

    def __init__(self, chunk: Chunk, wanted: Wanted = NOTHING, memory: torch.Tensor | None = None):
        self.chunk, self.wanted = chunk, wanted
        c = self.config = chunk.configs.vocab
        self.col_tiles = ceil_div(chunk.V, c.cols)
        self.operands = chunk.tiled(chunk.hidden, c.rows, c.depth), chunk.tiled(chunk.head.weight, c.cols, c.depth)
        floats = (3 + wanted.extras) * self.col_tiles * chunk.rows
        self.tile_stats = chunk.floats(floats) if memory is None else memory[: 4 * floats].view(torch.float32)

    def _launch(
        self, wanted: Wanted, row_counts, first_tile: int, n_tiles: int, tile_stats, store=None,
        stored=(None, 0, None, None),
    ):  # fmt: skip
        chunk, head = self.chunk, self.chunk.head
        vocab_kernel[(chunk.programs,)](
            *self.operands, *head.weight.stride(), head.bias, *stored, chunk.target, tile_stats,
            row_counts, first_tile, n_tiles, chunk.rows, chunk.V, chunk.softcap or 0.0, chunk.logit_scale,
            D=chunk.D, GROUP=GROUP, PROGRAMS=chunk.programs, TMA=chunk.tma, STORE=store,
            MOMENT=store is not None and wanted.moment, TOP1=wanted.top1, MEAN=wanted.mean, SQUARES=wanted.squares,
            BIAS=head.bias is not None, SOFTCAP=chunk.softcap is not None, PRECISION=PRECISION,
            **self.config.tile, **self.config.launch,
        )  # fmt: skip

    def _statistics(self, wanted: Wanted, row_counts, order=None, offset=None, shift=0.0, out=None) -> None:
        chunk = self.chunk
        self._launch(wanted, row_counts, 0, self.col_tiles, self.tile_stats)
        combine_statistics_kernel[(ceil_div(chunk.rows, ROW_BLOCK),)](
            self.tile_stats, chunk.logit, chunk.target, order, row_counts, offset, *pointers(out),
            chunk.rows, self.col_tiles, shift, chunk.V,
            OFFSET=offset is not None, COLS=self.config.cols, ROW_BLOCK=ROW_BLOCK, TILE_BLOCK=TILE_BLOCK,
        )  # fmt: skip

    def statistics(self, order, out: VocabularyStatistics) -> None:
        """Write what is wanted of row i at order[i] of ``out``."""
        self._statistics(self.wanted, self.chunk.row_counts, order=order, out=out)

    def exact_offset(self, row_counts, shift: float) -> None:
        """Make the chunk's offset logsumexp - shift, in units of ln 2."""
        self._statistics(NOTHING, row_counts, offset=self.chunk.offset, shift=shift)


def pointers(out: VocabularyStatistics | None) -> tuple[torch.Tensor | None, ...]:
    """What kernels write of ``out``: a bool as uint8."""
    if out is None:
        return (None,) * len(VocabularyStatistics._fields)
    return tuple(x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x for x in out)


def logits_in(exponentials: torch.Tensor) -> torch.Tensor:
    """Logits in that memory: float16 where that is as wide."""
    return exponentials.view(torch.float32 if exponentials.dtype == torch.float32 else torch.float16)


class StoringPass(VocabPass):
    """A pass that stores a matrix, a slice of the vocabulary of ``slice_tiles`` tiles at a time.

    store: what: "exponentials", "logits" or "gradient". wanted: for entropies U is kept, the sums of e^x x.
    memory: uint8, for the matrix; its own where it is None.

    Attributes:
        exponentials: (chunk.rows, whole tiles), in the operands' dtype. sums: (wanted.stored, tiles, chunk.rows)
            float32.
    """

    def __init__(
        self, chunk: Chunk, slice_tiles: int, store: str = "exponentials", wanted: Wanted = NOTHING,
        memory: torch.Tensor | None = None,
    ):  # fmt: skip
        self.slice_tiles, self.what, c, dtype = slice_tiles, store, chunk.configs.vocab, chunk.hidden.dtype
        # Maxima and sums of the tiles are combined before anything is stored, so they share that memory.
        width = slice_tiles * c.cols
        room, stats = chunk.rows * width * dtype.itemsize, 12 * ceil_div(chunk.V, c.cols) * chunk.rows
        if memory is None:
            memory = torch.empty(max(stats, room), dtype=torch.uint8, device=chunk.hidden.device)
        super().__init__(chunk, memory=memory)
        self.wanted = wanted
        self.exponentials = memory[:room].view(dtype).view(chunk.rows, width)
        stored = logits_in(self.exponentials) if store == "logits" else self.exponentials
        self.stored = chunk.tiled(stored, c.rows, c.cols)
        self.sums = chunk.floats(wanted.stored, self.col_tiles, chunk.rows)

    def slices(self) -> range:
        """The first tile of each slice of the vocabulary."""
        return range(0, self.col_tiles, self.slice_tiles)

    def store(self, row_counts, first_tile: int, slope: torch.Tensor | None = None) -> None:
        """Store the slice from ``first_tile`` on, and keep its row sums. slope: (2 or more, rows), for "gradient"."""
        n_tiles = min(self.slice_tiles, self.col_tiles - first_tile)
        stored = self.stored, self.exponentials.stride(0), self.chunk.offset, slope
        self._launch(self.wanted, row_counts, first_tile, n_tiles, self.sums, self.what, stored)

    def combine_sums(self, row_counts, order, others, total, moment=None, out=None, retry=None) -> None:
        """After the last slice: total (rows,) = Σ e^x, others (rows,) the same without the target, ``moment`` (rows,)
        Σ e^x x without it; and what is wanted of row i at order[i] of ``out``, where that is given.

        A row whose total reaches its limit sets ``retry``, where that is given.
        """
        chunk = self.chunk
        combine_sums_kernel[(ceil_div(chunk.rows, ROW_BLOCK),)](
            self.sums, chunk.logit, chunk.offset, chunk.target, order, row_counts, retry, others, total, moment,
            *pointers(out), chunk.rows, self.col_tiles, SUM_LIMIT[self.what], chunk.V,
            COLS=self.config.cols, ROW_BLOCK=ROW_BLOCK, TILE_BLOCK=TILE_BLOCK,
        )  # fmt: skip
