"""Gradients from stored exponentials.

A row's softmax gradient is dlogp_y/dz = 1_y - e/S with e = e^(z - offset) and S = sum e. The stored matrix E has a 0
for the target, whose entry is kept apart: it is R/S, with R the sum of the others, and not 1 - e_y/S, which would lose
p_y near 1 to cancellation. The rest is matrix products. With factor = -(dL/dlogp) / (S temperature):

    dhidden = factor * (E W - R W_y)
    dW = E^T (factor * hidden)    dbias = E^T factor     where E has -R for the target

Under a softcap each entry of E, and R here, is damped by dz/d(product) / scale <= 1.

entropy.py has what E is where entropies have a gradient as well; the products are the same.

dhidden needs factor, hence S, only at the end, so a slice of the vocabulary is stored, multiplied and forgotten: its
memory does not grow with the vocabulary. dW needs factor before the product, so all of a chunk's E has to be there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from egrsd_kernels.head import Head

from ..protocol import EntropyGradient, Finish, Gradients, Needs, VocabularyStatistics
from ..scaling import scaled
from .common import PRECISION, ROW_TILE, Machine, block_of, ceil_div, interpreted, load_tile, tiled
from .entropy import make_entries, make_slopes
from .gather import Chunk
from .launch import kernel
from .plan import MAX_SPLITS, PARTIAL_STEPS, Plan, chunk_plan
from .vocab import NOTHING, StoringPass, Wanted, logits_in

REDUCE_ROWS = 8
SLOTS = 128


@triton.jit
def split_count(tiles, steps, limit, PROGRAMS: tl.constexpr, MAX_SPLITS: tl.constexpr, PARTIAL_STEPS: tl.constexpr):
    """Into how many parts to cut a sum of ``steps`` steps, so that ``tiles`` output tiles fill the device.

    Time in steps: rounds of the persistent grid, and PARTIAL_STEPS for each part that is written and read.
    """
    best = 1
    best_cost = 1 << 30
    most = tl.maximum(limit, tiles)  # one part always fits
    for splits in range(1, MAX_SPLITS + 1):
        units = tiles * splits
        cost = tl.cdiv(units, PROGRAMS) * tl.cdiv(steps, splits) + units * PARTIAL_STEPS // PROGRAMS
        better = (cost < best_cost) & (units <= most)
        best = tl.where(better, splits, best)
        best_cost = tl.where(better, cost, best_cost)
    return best


@triton.jit
def part_tile(dhidden_parts, part, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where a part of dhidden begins: all parts may have more than 2^31 elements."""
    return dhidden_parts + part * tl.full([], ROWS * COLS, tl.int64)


@kernel(do_not_specialize=["first_col", "width", "limit"])
def hidden_kernel(
    exponentials, stride_e, weight, stride_wv, stride_wd, dhidden_parts, row_counts, first_col, width, n_slots, D, V,
    limit, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PROGRAMS: tl.constexpr,
    MAX_SPLITS: tl.constexpr, PARTIAL_STEPS: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dhidden_parts (splits, tiles, ROWS, COLS) float32 = E W, cut along the vocabulary into ``splits``; or add it.

    E: ``exponentials`` (n_slots, width), whose column 0 is entry ``first_col`` of the vocabulary. weight: (V, D).
    Grid: (PROGRAMS,), persistent over tiles of the n_active rows and splits.
    """
    row_tiles = tl.cdiv(tl.load(row_counts + 1), ROWS)
    tiles = row_tiles * tl.cdiv(D, COLS)
    # From the width that all slices but the last have, so that every slice adds to the same parts.
    splits = split_count(tiles, tl.cdiv(width, DEPTH), limit, PROGRAMS, MAX_SPLITS, PARTIAL_STEPS)
    width = tl.minimum(width, V - first_col)
    length = tl.cdiv(tl.cdiv(width, DEPTH), splits) * DEPTH
    # The programs of one round work on the same columns of E, in step, and share the head's tiles through L2.
    for part in tl.range(tl.program_id(0), tiles * splits, PROGRAMS):
        tile = part % tiles
        row = (tile % row_tiles) * ROWS
        col = (tile // row_tiles) * COLS
        first = (part // tiles) * length
        product = tl.zeros([ROWS, COLS], tl.float32)
        for v in range(first, tl.minimum(first + length, width), DEPTH):
            e = load_tile(exponentials, row, v, n_slots, V, stride_e, 1, ROWS, DEPTH, TMA, True, True)
            w = load_tile(weight, first_col + v, col, V, D, stride_wv, stride_wd, DEPTH, COLS, TMA, EVEN, False)
            product = tl.dot(e, w, product, input_precision=PRECISION)
        inner = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
        at = part_tile(dhidden_parts, part, ROWS, COLS) + inner
        if ACCUMULATE:
            product += tl.load(at)
        tl.store(at, product)


@kernel(do_not_specialize=["gradient", "order"])
def factor_kernel(
    exponentials, stride_e, softcap_grad, others, total, moment, slope, target, gradient, order, row_counts,
    factor, entry, head_factor, n_slots, temperature, e_unit, HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """factor = -g / (S temperature) and entry = -R (1 - tanh^2) of each slot, 0 past the n_active; (n_slots,) float32.

    Grid: (n_slots / BLOCK,). gradient: g = dL/dlogp (N,) float32. others, total: R and S (n_slots,) float32.
    slope: where E has entries of entropy.py instead, its (4, n_slots) float32; or None. ``others`` is then the sum of a
    row's entries, or R as before with moment, U (n_slots,) float32.
    HEAD: also E[slot, target] = entry, and head_factor = factor / e_unit, corrected for the rounding of that entry.
    """
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ours = slot < tl.load(row_counts + 1)
    t = tl.load(order + slot, mask=ours, other=0)
    s = tl.load(total + slot, mask=ours, other=1.0)
    g = tl.load(gradient + t, mask=ours, other=0.0)
    e = -tl.load(others + slot, mask=ours, other=0.0)
    if slope is None:
        f = -g / (s * temperature)
        moving = g != 0
    else:
        if moment is not None:
            a = tl.load(slope + slot, mask=ours, other=0.0)
            b = tl.load(slope + n_slots + slot, mask=ours, other=0.0)
            e = a * e - b * tl.load(moment + slot, mask=ours, other=0.0)
            e *= tl.exp2(tl.load(slope + 2 * n_slots + slot, mask=ours, other=0.0))
        size = tl.load(slope + 3 * n_slots + slot, mask=ours, other=0.0)
        # A target outside the vocabulary makes S a NaN, and log p with it.
        f = tl.where((s == s) | (g == 0), size * (e_unit / temperature), float("nan"))
        moving = size != 0
    e *= tl.load(softcap_grad + slot, mask=ours, other=0.0)
    # Chosen, not multiplied: a row that is not to move may hold anything, NaN included.
    e = tl.where(ours & moving, e, 0.0)
    f = tl.where(ours & moving, f, 0.0)
    inside = slot < n_slots
    tl.store(factor + slot, f, mask=inside)
    tl.store(entry + slot, e, mask=inside)
    if HEAD:
        y = tl.load(target + slot, mask=ours, other=-1)
        rounded = e.to(exponentials.dtype.element_ty)
        tl.store(exponentials + slot.to(tl.int64) * stride_e + y, rounded, mask=ours & (y >= 0))
        # The target's entry is the row's largest, unless a softcap damps it. A factor that undoes its rounding leaves
        # the others no worse than theirs, which holds for normal numbers.
        least: tl.constexpr = 2.0**-14 if exponentials.dtype.element_ty == tl.float16 else 2.0**-126
        undo = tl.where(tl.abs(rounded.to(tl.float32)) < least, 1.0, e / rounded.to(tl.float32))
        tl.store(head_factor + slot, f * undo / e_unit, mask=inside)


@kernel(do_not_specialize=["order", "width", "limit", "n_filled"])
def finish_hidden_kernel(
    dhidden_parts, factor, entry, target, weight, stride_wv, stride_wd, order, row_counts, out, n_filled, width, D,
    limit, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PROGRAMS: tl.constexpr,
    MAX_SPLITS: tl.constexpr, PARTIAL_STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dhidden[order[slot]] = factor * (the sum of its parts + entry * W_y), rounded once; 0 past the n_active, in the
    first ``n_filled`` slots.

    Grid: (n_slots / BLOCK, D / COLS). out: dhidden (N, D). The other names are hidden_kernel's and factor_kernel's.
    """
    n = tl.load(row_counts + 1)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    filled = tl.maximum(n, n_filled)
    if tl.program_id(0) * BLOCK < filled:
        row_tiles = tl.cdiv(n, ROWS)
        tiles = row_tiles * tl.cdiv(D, COLS)
        splits = split_count(tiles, tl.cdiv(width, DEPTH), limit, PROGRAMS, MAX_SPLITS, PARTIAL_STEPS)
        tile = tl.program_id(1) * row_tiles + tl.program_id(0) * BLOCK // ROWS
        inner = (slot % ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
        product = tl.zeros([BLOCK, COLS], tl.float32)
        for split in range(0, tl.where(tl.program_id(0) * BLOCK < n, splits, 0)):
            product += tl.load(part_tile(dhidden_parts, split * tiles + tile, ROWS, COLS) + inner)
        ours = slot < n
        y = tl.load(target + slot, mask=ours, other=-1).to(tl.int64)
        inside = ours[:, None] & (col < D)[None, :]
        w = tl.load(
            weight + y[:, None] * stride_wv + col.to(tl.int64)[None, :] * stride_wd,
            mask=inside & (y >= 0)[:, None], other=0.0,
        )  # fmt: skip
        product += tl.load(entry + slot, mask=ours, other=0.0)[:, None] * w.to(tl.float32)
        f = tl.load(factor + slot, mask=ours, other=0.0)[:, None]
        product = tl.where(f == 0, 0.0, product * f)  # chosen, not multiplied: a row that is not to move may hold a NaN
        ours = slot < filled
        row = tl.load(order + slot, mask=ours, other=0).to(tl.int64)
        inside = ours[:, None] & (col < D)[None, :]
        tl.store(out + row[:, None] * D + col[None, :], product.to(out.dtype.element_ty), mask=inside)


@kernel
def scale_rows_kernel(matrix, factor, row_counts, D, BLOCK: tl.constexpr):
    """matrix (n_slots, D) *= factor (n_slots,) float32, row by row, in place. Grid: (n_slots,)."""
    row = tl.program_id(0)
    if tl.load(row_counts + 1) > 0:  # with nothing to do, rows that wait for their turn stay as they are
        s = tl.load(factor + row)
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)
            at = matrix + row.to(tl.int64) * D + d
            scaled = tl.load(at, mask=d < D, other=0.0).to(tl.float32) * s
            # Chosen, not multiplied: a row past the last may hold anything, NaN included.
            tl.store(at, tl.where(s == 0, 0.0, scaled).to(matrix.dtype.element_ty), mask=d < D)


@triton.jit
def put_tile(out, row, col, tile, ADD: tl.constexpr, REDUCE: tl.constexpr):
    """Store a tile through its descriptor, or add it to what is there: each element once a launch, in launch order."""
    if not ADD:
        out.store([row, col], tile.to(out.dtype))
    elif REDUCE:
        out.atomic_add([row, col], tile)
    else:
        out.store([row, col], out.load([row, col]) + tile)


@kernel(do_not_specialize=["factor"])
def head_kernel(
    exponentials, stride_e, hidden, stride_h, out, factor, row_counts, n_slots, width, D, V, scale,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr, SCALED: tl.constexpr, ACCUMULATE: tl.constexpr, REDUCE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out (V, D) = scale * E^T hidden over the n_active rows, times ``factor`` (0-d) if SCALED; or add it.

    E: ``exponentials`` (n_slots, width). hidden: (n_slots, D). Grid: (PROGRAMS,), persistent over tiles of ROWS x COLS.
    """
    n = tl.load(row_counts + 1)
    if SCALED:
        scale *= tl.load(factor)
    row_tiles = tl.cdiv(V, ROWS)
    col_tiles = tl.cdiv(D, COLS)
    group_tiles = GROUP * col_tiles
    tiles = row_tiles * col_tiles
    if ACCUMULATE:  # without rows, there is nothing to add
        tiles = tl.where(n > 0, tiles, 0)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=TMA):
        group = tile // group_tiles
        group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
        row = (group * GROUP + (tile % group_tiles) % group_rows) * ROWS
        col = ((tile % group_tiles) // group_rows) * COLS
        product = tl.zeros([ROWS, COLS], tl.float32)
        # The chunk is whole tiles of rows; past the n that count, those of ``exponentials`` and ``hidden`` are zero.
        for r in range(0, n, DEPTH):
            e = load_tile(exponentials, r, row, n_slots, width, stride_e, 1, DEPTH, ROWS, TMA, True, EVEN)
            h = load_tile(hidden, r, col, n_slots, D, stride_h, 1, DEPTH, COLS, TMA, True, False)
            product = tl.dot(e.T, h, product, input_precision=PRECISION)
        product *= scale
        if TMA:
            # Two halves, so that the tile's way out fits into shared memory beside the operands of the next one.
            left, right = product.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1).split()
            put_tile(out, row, col, left, ACCUMULATE, REDUCE)
            put_tile(out, row, col + COLS // 2, right, ACCUMULATE, REDUCE)
        else:
            v = row + tl.arange(0, ROWS)
            d = col + tl.arange(0, COLS)
            at = out + v.to(tl.int64)[:, None] * D + d[None, :]
            inside = (v < V)[:, None] & (d < D)[None, :]
            if ACCUMULATE:
                product += tl.load(at, mask=inside, other=0.0)
            tl.store(at, product.to(out.dtype.element_ty), mask=inside)


@kernel
def bias_kernel(
    exponentials, stride_e, factor, out, row_counts, n_slots, V, scale,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """out (V,) float32 = scale * E^T factor over the n_active rows, or add it. Grid: (V / COLS,)."""
    n = tl.load(row_counts + 1)
    v = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.float32)
    for start in range(0, n, ROWS):
        r = start + tl.arange(0, ROWS)
        e = load_tile(exponentials, start, tl.program_id(0) * COLS, n, V, stride_e, 1, ROWS, COLS, False, False, False)
        total += tl.sum(e.to(tl.float32) * tl.load(factor + r, mask=r < n, other=0.0)[:, None], 0)
    total *= scale
    if ACCUMULATE:
        total += tl.load(out + v, mask=v < V, other=0.0)
    tl.store(out + v, total, mask=v < V)


@kernel(do_not_specialize=["factor", "rows"])
def multiply_kernel(source, factor, out, rows, width, BLOCK: tl.constexpr):
    """out = source (rows width,) * factor (0-d float32), in float32 and rounded once. Grid: (rows width / BLOCK,)."""
    n = rows.to(tl.int64) * width  # in two factors: the width alone says how loads are aligned
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + i, mask=i < n, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(out + i, x.to(out.dtype.element_ty), mask=i < n)


def multiply(source: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = source * factor (a 0-d float32 tensor), in float32 and rounded once; ``out`` may be ``source``."""
    width = source.shape[-1]
    rows = source.numel() // width
    multiply_kernel[(ceil_div(rows * width, 1024),)](source, factor, out, rows, width, BLOCK=1024)
    return out


@kernel
def clear_kernel(exponentials, factor, row_counts, width, BLOCK: tl.constexpr):
    """E (n_slots, width) = 0 in each of the n_active rows whose ``factor`` is 0. Grid: (n_slots, width / BLOCK)."""
    r = tl.program_id(0)
    if (r < tl.load(row_counts + 1)) & (tl.load(factor + r) == 0):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], exponentials.dtype.element_ty)
        tl.store(exponentials + r.to(tl.int64) * width + column, zeros, mask=column < width)


class HeadProduct:
    """dW = E^T (factor * hidden) of a chunk, from ``first_column`` on: of ``exponentials`` and of hidden states, which
    are scaled already. row_counts: how many of them are valid, and how many have a gradient."""

    def __init__(self, chunk: Chunk, exponentials: torch.Tensor, hidden: torch.Tensor, row_counts, first_column: int):
        self.programs, self.tma, self.V, self.row_counts = chunk.programs, chunk.tma, chunk.V, row_counts
        c = self.config = chunk.configs.head
        self.exponentials, self.hidden = exponentials, hidden[:, first_column:]
        self.operands = chunk.tiled(exponentials, c.depth, c.rows), chunk.tiled(self.hidden, c.depth, c.cols)
        self.e_unit = 2.0 ** -shift_of(hidden.dtype)

    def __call__(self, out: torch.Tensor, accumulate: bool = False, factor: torch.Tensor | None = None):
        """out (V, columns) = the product times ``factor`` (0-d float32, or 1), in its dtype; or add to float32."""
        c, e, (rows, columns) = self.config, self.exponentials, self.hidden.shape
        head_kernel[(self.programs,)](
            self.operands[0], e.stride(0), self.operands[1], self.hidden.stride(0),
            tiled(out, c.rows, c.cols // 2, self.tma), factor, self.row_counts, rows, e.shape[1], columns, self.V,
            self.e_unit, GROUP=8, PROGRAMS=self.programs, TMA=self.tma, EVEN=e.shape[1] % c.rows == 0,
            SCALED=factor is not None, ACCUMULATE=accumulate, REDUCE=not interpreted(head_kernel),
            PRECISION=PRECISION, **c.tile, **c.launch,
        )  # fmt: skip

    def rounded(self, factor: torch.Tensor | None) -> torch.Tensor:
        """The product times ``factor`` (V, columns), in the hidden states' dtype."""
        out = self.hidden.new_empty(self.V, self.hidden.shape[1])
        self(out, factor=factor)
        return out


def shift_of(dtype: torch.dtype) -> float:
    """float16 cannot hold small probabilities: there E is in units of 2^-15, taken back in float32 at the end."""
    return 15.0 if dtype == torch.float16 else 0.0


class ChunkGradients:
    """Log p and gradients of one chunk after another.

    plan: how much of the vocabulary is stored at a time, all of it for ``head``; and room for parts of dhidden.
    out_hidden: (N, D) in the hidden states' dtype, filled at the rows with a gradient, or None.
    head: whether the head's gradients are asked for. They come after each chunk's backward pass, from :meth:`head` or
        :attr:`head_product`; the weight's from ``first_column`` on.
    stored: what the pass stores, the exponentials without it.
    """

    def __init__(
        self, chunk: Chunk, plan: Plan, out_hidden: torch.Tensor | None, head: bool, first_column: int = 0,
        stored: StoringPass | None = None,
    ):  # fmt: skip
        self.chunk, self.configs = chunk, chunk.configs
        self.shift = shift_of(chunk.hidden.dtype)
        self.vocab = StoringPass(chunk, plan.slice_tiles) if stored is None else stored
        self.exponentials = e = self.vocab.exponentials
        self.others, self.total, self.factor, self.entry, self.head_factor = chunk.floats(5, chunk.rows).unbind()
        self.moment = chunk.floats(chunk.rows) if self.vocab.wanted.moment else None
        self.slope = None if self.vocab.what == "exponentials" else chunk.floats(4, chunk.rows)
        self.aim(out_hidden, plan.partial_tiles)
        self.head_product = HeadProduct(chunk, e, chunk.hidden, chunk.row_counts, first_column) if head else None

    def aim(self, out_hidden: torch.Tensor | None, limit: int, parts: torch.Tensor | None = None) -> None:
        """Where hidden gradients go, with room for so many tiles of them; ``parts`` is what has that room."""
        self.out_hidden, self.limit, c = out_hidden, limit, self.configs.hidden
        if out_hidden is not None:
            self.dhidden_parts = self.chunk.floats(limit * c.rows * c.cols) if parts is None else parts
            weight = self.chunk.head.weight
            self.hidden_operands = (
                self.chunk.tiled(self.exponentials, c.rows, c.depth), self.chunk.tiled(weight, c.depth, c.cols)
            )  # fmt: skip

    def forward(self, order: torch.Tensor, out: VocabularyStatistics) -> None:
        """Write ``out`` of row i at order[i], and leave E, S and the products E W behind.

        out: what the pass keeps sums for; a logsumexp only beside entropies.

        The target's logit is the first choice of offset, known before the pass: e^(z - z_y) sums to 1/p_y, which a
        sampled token keeps far from float32's and bfloat16's largest number. Should a row reach 2^100 all the same, the
        chunk is done again with the exact logsumexp as offset; whether that happens is decided on the device. float16
        has no room for 1/p_y, so there the stored value is always p * 2^shift, but for logits.
        """
        chunk = self.chunk
        exact = chunk.row_counts
        if chunk.hidden.dtype != torch.float16 or self.vocab.what == "logits":
            self._attempt(chunk.row_counts, order, out, retry=chunk.retry)
            exact = chunk.retry
        self.vocab.exact_offset(exact, self.shift)
        self._attempt(exact, order, out)

    def again(self, order: torch.Tensor, gradient: torch.Tensor, of_entropy: EntropyGradient) -> None:
        """The same of rows with known entropies, for dL/dlogp, ``gradient`` (N,): E holds the entries of dL/dz."""
        chunk = self.chunk
        make_slopes(gradient, of_entropy, None, order, chunk.row_counts, chunk.offset, self.slope, self.shift)
        self._attempt(chunk.row_counts, order, None)

    def turn(self, order: torch.Tensor, gradient: torch.Tensor, of_entropy: EntropyGradient) -> None:
        """Of stored logits make the entries of dL/dz in E."""
        chunk = self.chunk
        make_slopes(gradient, of_entropy, self.total, order, chunk.row_counts, None, self.slope, self.shift)
        make_entries(logits_in(self.exponentials), self.exponentials, self.slope, chunk)

    def _attempt(self, row_counts, order, out, retry=None) -> None:
        for first_tile in self.vocab.slices():
            self.vocab.store(row_counts, first_tile, self.slope)
            if self.out_hidden is not None:
                self.hidden_product(row_counts, first_tile * self.configs.vocab.cols)
        self.vocab.combine_sums(row_counts, order, self.others, self.total, self.moment, out, retry)

    def hidden_product(self, row_counts, first_col: int) -> None:
        """dhidden_parts += E W for the stored slice of the vocabulary, without the targets' entries."""
        chunk, e, weight = self.chunk, self.exponentials, self.chunk.head.weight
        c = self.configs.hidden
        hidden_kernel[(chunk.programs,)](
            self.hidden_operands[0], e.stride(0), self.hidden_operands[1], *weight.stride(), self.dhidden_parts,
            row_counts, first_col, e.shape[1], chunk.rows, chunk.D, chunk.V, self.limit, PROGRAMS=chunk.programs,
            MAX_SPLITS=MAX_SPLITS, PARTIAL_STEPS=PARTIAL_STEPS, TMA=chunk.tma, EVEN=chunk.V % c.depth == 0,
            ACCUMULATE=first_col > 0, PRECISION=PRECISION, **c.tile, **c.launch,
        )  # fmt: skip

    def backward(self, order: torch.Tensor, gradient: torch.Tensor | None, fill: bool = False) -> None:
        """Turn dL/dlogp, ``gradient`` (N,) float32, into the chunk's hidden gradients, and E into the head's.

        fill: whether all other tokens of the chunk get hidden gradients of 0.
        """
        self.factors(order, gradient)
        self.scale(order, fill)

    def factors(self, order: torch.Tensor, gradient: torch.Tensor | None) -> None:
        """What each row's products are multiplied by, and its target's entry."""
        chunk, e = self.chunk, self.exponentials
        factor_kernel[(ceil_div(chunk.rows, SLOTS),)](
            e, e.stride(0), chunk.softcap_grad, self.others, self.total, self.moment, self.slope, chunk.target,
            gradient, order, chunk.row_counts, self.factor, self.entry, self.head_factor, chunk.rows,
            chunk.temperature, 2.0**-self.shift, HEAD=self.head_product is not None, BLOCK=SLOTS,
        )  # fmt: skip

    def scale(self, order: torch.Tensor, fill: bool) -> None:
        """By :meth:`factors` make hidden gradients of E W, and of hidden states what the head's product takes."""
        chunk, e, weight = self.chunk, self.exponentials, self.chunk.head.weight
        if self.out_hidden is not None:
            c, n_filled = self.configs.hidden, min(chunk.rows, len(order)) if fill else 0
            finish_hidden_kernel[(ceil_div(chunk.rows, REDUCE_ROWS), ceil_div(chunk.D, c.cols))](
                self.dhidden_parts, self.factor, self.entry, chunk.target, weight, *weight.stride(), order,
                chunk.row_counts, self.out_hidden, n_filled, e.shape[1], chunk.D, self.limit, PROGRAMS=chunk.programs,
                MAX_SPLITS=MAX_SPLITS, PARTIAL_STEPS=PARTIAL_STEPS, BLOCK=REDUCE_ROWS, **c.tile,
            )  # fmt: skip
        if self.head_product is not None:
            block = block_of(chunk.D, 1024)
            scale_rows_kernel[(chunk.rows,)](chunk.hidden, self.head_factor, chunk.row_counts, chunk.D, BLOCK=block)

    def let_go(self) -> None:
        """After the forward pass: hold on to no head. It comes back as ``chunk.head``, before :meth:`aim`."""
        del self.vocab, self.chunk.head

    def clear(self) -> None:
        """After the backward pass: E = 0 in rows without gradient, whatever it was, NaN included."""
        rows, width = self.exponentials.shape
        block = block_of(width, 4096)
        grid = rows, ceil_div(width, block)
        clear_kernel[grid](self.exponentials, self.factor, self.chunk.row_counts, width, BLOCK=block)

    def head(self, out_weight: torch.Tensor | None, out_bias: torch.Tensor | None, accumulate: bool) -> None:
        """out_weight (V, columns) and out_bias (V,), float32: E^T (factor * hidden) and E^T factor, or add them."""
        chunk, e = self.chunk, self.exponentials
        if self.head_product is not None and out_weight is not None:
            self.head_product(out_weight, accumulate=accumulate)
        if out_bias is not None:
            bias_kernel[(ceil_div(chunk.V, 128),)](
                e, e.stride(0), self.head_factor, out_bias, chunk.row_counts, chunk.rows, chunk.V, 2.0**-self.shift,
                ROWS=32, COLS=128, ACCUMULATE=accumulate,
            )  # fmt: skip


class Outputs(NamedTuple):
    """Gradients of all rows: of hidden states (N, D), in their dtype; float32, of the head. None where not needed."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def of(cls, head: Head, hidden: torch.Tensor, needs: Needs, whole: bool, fill: bool = False) -> Outputs:
        """whole: whether the weight's gradient comes out of one product, and is not to be added up.

        fill: whether every token's hidden gradient will be written, 0 or not.
        """
        V, D = head.weight.shape
        new = hidden.new_empty if fill else hidden.new_zeros
        return cls(
            new(hidden.shape) if needs.hidden else None,
            hidden.new_empty(V, D - needs.first_column, dtype=torch.float32) if needs.weight and not whole else None,
            hidden.new_empty(V, dtype=torch.float32) if needs.bias else None,
        )


class ExactGradients:
    """Log p and gradients of ``n`` rows, one ``chunk`` after another, in the order that these are gathered in.

    hidden: all hidden states, (B, T, D). needs: which gradients will be asked for. wanted: what is beside log p.
    of_entropy: what the loss takes of entropies that are known; log p is not made then.
    begun: the gradients of other rows, to be added to.
    """

    def __init__(
        self, head: Head, temperature: float, hidden: torch.Tensor, how: Machine, chunk_bytes: int, needs: Needs,
        n: int, wanted: Wanted = NOTHING, of_entropy: EntropyGradient | None = None, begun: Outputs | None = None,
    ):  # fmt: skip
        V, D = head.weight.shape
        shape = ceil_div(n, ROW_TILE), V, D, hidden.dtype.itemsize
        plan = chunk_plan(*shape, how, chunk_bytes, needs, sums=wanted.stored, alone=begun is None)
        chunk = self.chunk = Chunk(head, temperature, plan.rows, how)
        # All rows in one chunk: its product is the whole gradient, so it waits for the factor and is rounded to the
        # head's dtype on its way out. That spares a float32 gradient, more memory than the chunk that waits.
        self.out = Outputs.of(head, hidden, needs, whole=n <= plan.rows, fill=True) if begun is None else begun
        self.fill = begun is None  # the rows are all there are, each in one chunk
        self.needs, self.of_entropy, self.begun = needs, of_entropy, begun is not None
        stored = StoringPass(chunk, plan.slice_tiles, "exponentials" if of_entropy is None else "gradient", wanted)
        self.gradients = ChunkGradients(chunk, plan, self.out.hidden, needs.head, needs.first_column, stored)

    def forward(self, order: torch.Tensor, out: VocabularyStatistics) -> None:
        """Write what is wanted of row i of the chunk at order[i] of ``out``."""
        if self.of_entropy is None:
            self.gradients.forward(order, out)

    def backward(self, order: torch.Tensor, gradient: torch.Tensor) -> None:
        """Make of dL/dlogp, ``gradient`` (N,) float32, the gradients of the chunk."""
        if self.of_entropy is not None:
            self.gradients.again(order, gradient, self.of_entropy)
        self.gradients.backward(order, gradient, self.fill)
        self.gradients.head(self.out.weight, self.out.bias, accumulate=self.begun)
        self.begun = True

    def finish(self) -> Finish:
        product = self.gradients.head_product
        if product is None or not self.needs.weight or self.out.weight is not None:
            return finishing(self.chunk.head, self.out)
        return finishing(self.chunk.head, self.out, product.rounded)


def finishing(
    head: Head, out: Outputs, d_weight: Callable[[torch.Tensor | None], torch.Tensor | None] | None = None
) -> Finish:
    """Gives the gradients times a factor; ``d_weight`` of it, where given, comes first: it may complete the bias's."""
    dtype, bias_dtype = head.weight.dtype, None if head.bias is None else head.bias.dtype

    def finish(factor: torch.Tensor | None) -> Gradients:
        weight = scaled(out.weight, factor, dtype, multiply) if d_weight is None else d_weight(factor)
        bias = None if bias_dtype is None else scaled(out.bias, factor, bias_dtype, multiply)
        return Gradients(scaled(out.hidden, factor, dtype, multiply), weight, bias)

    return finish
