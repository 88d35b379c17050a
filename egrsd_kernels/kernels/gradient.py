"""Gradients from stored exponentials.

A row's softmax gradient is dlogp_y/dz = 1_y - e/S with e = e^(z - offset) and S = sum e. Subtracting S from the
target's entry first makes it -1/S times (e - S 1_y), and the cancellation at p_y near 1 happens in float32. With
row_scale = -(dL/dlogp) / (S temperature) the rest is matrix products over the stored matrix E:

    dhidden = row_scale * (E W)      dW = E^T (row_scale * hidden)      dbias = E^T row_scale
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import LOG2E, PRECISION, chunk_rows, load_tile

REDUCE_ROWS = 8


@triton.jit
def prepare_kernel(
    exponentials, stride_e, logit, offset, total, gradient, target_ids, order, counts, row_scale,
    first_row, chunk, softcap, scale, temperature, unit, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = slot < chunk_rows(counts, 1, first_row, chunk)
    t = tl.load(order + first_row + slot, mask=live, other=0)
    target = tl.load(target_ids + t, mask=live, other=0).to(tl.int64)
    s = tl.load(total + slot, mask=live, other=1.0)
    z = tl.load(logit + slot, mask=live, other=0.0)
    entry = tl.exp2(z - tl.load(offset + slot, mask=live, other=0.0)) - s
    if SOFTCAP:
        capped = z / (softcap * scale)
        entry *= 1.0 - capped * capped
    # A NaN logit marks a target outside the vocabulary: nothing to subtract there.
    at = exponentials + slot.to(tl.int64) * stride_e + tl.where(z == z, target, 0)
    rounded = entry.to(exponentials.dtype.element_ty)
    tl.store(at, rounded, mask=live & (z == z))
    # The target's entry is the row's largest. A factor that undoes its rounding leaves the others no worse than theirs.
    undo = tl.where(rounded == 0, 1.0, entry / rounded.to(tl.float32))
    g = tl.load(gradient + t, mask=live, other=0.0)
    tl.store(row_scale + slot, tl.where(live, -g * undo / (s * unit * temperature), 0.0), mask=slot < chunk)


@triton.jit
def split_count(tiles, limit, PROGRAMS: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Into how many parts to cut the sum over the vocabulary, so that ``tiles`` output tiles fill the device.

    Time in units of one whole tile: rounds of the persistent grid, and 1/128 for each partial tile written and read.
    """
    best = 1
    best_cost = 1.0e30
    for splits in range(1, MAX_SPLITS + 1):
        units = tiles * splits
        cost = tl.cdiv(units, PROGRAMS).to(tl.float32) / splits + units.to(tl.float32) / (128 * PROGRAMS)
        better = (cost < best_cost) & ((units <= limit) | (splits == 1))
        best = tl.where(better, splits, best)
        best_cost = tl.where(better, cost, best_cost)
    return best


@triton.jit
def hidden_kernel(
    exponentials, stride_e, weight, stride_wv, stride_wd, partial, counts, first_row, chunk, D, V, limit,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PROGRAMS: tl.constexpr, MAX_SPLITS: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(chunk_rows(counts, 1, first_row, chunk), ROWS)
    tiles = row_tiles * tl.cdiv(D, COLS)
    splits = split_count(tiles, limit, PROGRAMS, MAX_SPLITS)
    length = tl.cdiv(tl.cdiv(V, DEPTH), splits) * DEPTH
    # The programs of one round work on the same part of the vocabulary, in step, and share its tiles through L2.
    for unit in tl.range(tl.program_id(0), tiles * splits, PROGRAMS):
        tile = unit % tiles
        row = (tile % row_tiles) * ROWS
        col = (tile // row_tiles) * COLS
        first = (unit // tiles) * length
        product = tl.zeros([ROWS, COLS], tl.float32)
        for v in range(first, tl.minimum(first + length, V), DEPTH):
            e = load_tile(exponentials, row, v, chunk, V, stride_e, 1, ROWS, DEPTH, TMA, True, EVEN)
            w = load_tile(weight, v, col, V, D, stride_wv, stride_wd, DEPTH, COLS, TMA, EVEN, False)
            product = tl.dot(e, w, product, input_precision=PRECISION)
        at = unit * (ROWS * COLS) + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
        tl.store(partial + at, product)


@triton.jit
def hidden_reduce_kernel(
    partial, row_scale, order, counts, out, first_row, chunk, D, limit, unit,
    ROWS: tl.constexpr, COLS: tl.constexpr, PROGRAMS: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = chunk_rows(counts, 1, first_row, chunk)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    if tl.program_id(0) * BLOCK < n:
        row_tiles = tl.cdiv(n, ROWS)
        tiles = row_tiles * tl.cdiv(D, COLS)
        splits = split_count(tiles, limit, PROGRAMS, MAX_SPLITS)
        tile = tl.program_id(1) * row_tiles + tl.program_id(0) * BLOCK // ROWS
        inner = (slot % ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
        product = tl.zeros([BLOCK, COLS], tl.float32)
        for split in range(0, splits):
            product += tl.load(partial + (split * tiles + tile) * (ROWS * COLS) + inner)
        live = slot < n
        product *= (tl.load(row_scale + slot, mask=live, other=0.0) * unit)[:, None]
        row = tl.load(order + first_row + slot, mask=live, other=0).to(tl.int64)
        tl.store(
            out + row[:, None] * D + col[None, :], product.to(out.dtype.element_ty),
            mask=live[:, None] & (col < D)[None, :],
        )  # fmt: skip


@triton.jit
def scale_rows_kernel(matrix, row_scale, D, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    s = tl.load(row_scale + row)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        at = matrix + row.to(tl.int64) * D + d
        scaled = tl.load(at, mask=d < D, other=0.0).to(tl.float32) * s
        # Chosen, not multiplied: a row past the last may hold anything, NaN included.
        tl.store(at, tl.where(s == 0, 0.0, scaled).to(matrix.dtype.element_ty), mask=d < D)


@triton.jit
def head_kernel(
    exponentials, stride_e, hidden, out, counts, first_row, chunk, D, V, unit,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    TMA: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = chunk_rows(counts, 1, first_row, chunk)
    row_tiles = tl.cdiv(V, ROWS)
    col_tiles = tl.cdiv(D, COLS)
    width = GROUP * col_tiles
    tiles = row_tiles * col_tiles
    if ACCUMULATE:  # a chunk without rows has nothing to add
        tiles = tl.where(n > 0, tiles, 0)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS):
        group = tile // width
        group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
        row = (group * GROUP + (tile % width) % group_rows) * ROWS
        col = ((tile % width) // group_rows) * COLS
        product = tl.zeros([ROWS, COLS], tl.float32)
        # The chunk is whole tiles of rows; past the n that count, those of ``exponentials`` and ``hidden`` are zero.
        for r in range(0, n, DEPTH):
            e = load_tile(exponentials, r, row, chunk, V, stride_e, 1, DEPTH, ROWS, TMA, True, False)
            h = load_tile(hidden, r, col, chunk, D, D, 1, DEPTH, COLS, TMA, True, False)
            product = tl.dot(e.T, h, product, input_precision=PRECISION)
        product *= unit
        v = row + tl.arange(0, ROWS)
        d = col + tl.arange(0, COLS)
        at = out + v.to(tl.int64)[:, None] * D + d[None, :]
        inside = (v < V)[:, None] & (d < D)[None, :]
        if ACCUMULATE:
            product += tl.load(at, mask=inside, other=0.0)
        tl.store(at, product, mask=inside)


@triton.jit
def bias_kernel(
    exponentials, stride_e, row_scale, out, counts, first_row, chunk, V, unit,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    n = chunk_rows(counts, 1, first_row, chunk)
    v = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.float32)
    for start in range(0, n, ROWS):
        r = start + tl.arange(0, ROWS)
        e = load_tile(exponentials, start, tl.program_id(0) * COLS, n, V, stride_e, 1, ROWS, COLS, False, False, False)
        total += tl.sum(e.to(tl.float32) * tl.load(row_scale + r, mask=r < n, other=0.0)[:, None], 0)
    total *= unit
    if ACCUMULATE:
        total += tl.load(out + v, mask=v < V, other=0.0)
    tl.store(out + v, total, mask=v < V)


@triton.jit
def multiply_kernel(source, factor, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + i, mask=i < n, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(out + i, x.to(out.dtype.element_ty), mask=i < n)


def multiply(source: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = source * factor (a 0-d float32 tensor), in float32 and rounded once; ``out`` may be ``source``."""
    n = source.numel()
    multiply_kernel[(triton.cdiv(n, 1024),)](source, factor, out, n, BLOCK=1024)
    return out


class ChunkGradients:
    """Gradients of one chunk after another, from the exponentials that a :class:`~.vocab.VocabPass` stored.

    out_hidden: (N, D) in the hidden states' dtype, filled at the rows with a gradient, or None.
    out_weight, out_bias: (V, D) and (V,) float32, accumulated over the chunks, or None.
    """

    MAX_SPLITS = 16

    def __init__(self, vocab, out_hidden, out_weight, out_bias):
        self.vocab = vocab
        self.out_hidden, self.out_weight, self.out_bias = out_hidden, out_weight, out_bias
        dtype, device = vocab.hidden.dtype, vocab.hidden.device
        # float16 cannot hold small probabilities: there E is in units of 2^-15, taken back in float32 at the end.
        self.shift = 15.0 if dtype == torch.float16 else 0.0
        self.unit = 2.0**-self.shift
        # Rows start on 16 bytes, as TMA wants; a kernel never reads the columns past V.
        self.exponentials = torch.empty(vocab.chunk, -(-vocab.V // 8) * 8, dtype=dtype, device=device)[:, : vocab.V]
        self.offset, self.total, self.row_scale = (
            torch.empty(vocab.chunk, dtype=torch.float32, device=device) for _ in range(3)
        )
        c = vocab.config
        if out_hidden is not None:
            tiles = triton.cdiv(vocab.chunk, c.rows) * triton.cdiv(vocab.D, c.cols)
            self.limit = max(tiles, 4 * vocab.programs)
            self.partial = torch.empty(self.limit * c.rows * c.cols, dtype=torch.float32, device=device)

    def forward(self, rows, first_row, logp) -> None:
        """The vocabulary pass of the chunk: stored exponentials, and log p of its targets."""
        self.vocab.exponentials(rows, first_row, self.exponentials, self.offset, self.total, logp, self.shift)

    def backward(self, rows, first_row, target_ids, gradient) -> None:
        """Turn dL/dlogp, ``gradient`` (N,) float32, into the chunk's part of the gradients."""
        vocab, c, head = self.vocab, self.vocab.config, self.vocab.head
        e, chunk, V, D = self.exponentials, vocab.chunk, vocab.V, vocab.D
        softcap, scale = head.softcap or 0.0, LOG2E.value / head.temperature
        prepare_kernel[(triton.cdiv(chunk, 128),)](
            e, e.stride(0), vocab.logit, self.offset, self.total, gradient, target_ids, rows.order, rows.counts,
            self.row_scale, first_row, chunk, softcap, scale, head.temperature, self.unit,
            SOFTCAP=head.softcap is not None, BLOCK=128,
        )  # fmt: skip
        product = dict(PROGRAMS=vocab.programs, TMA=vocab.tma, PRECISION=PRECISION, **c.tile, **c.launch)
        if self.out_hidden is not None:
            hidden_kernel[(vocab.programs,)](
                vocab.descriptor(e, c.rows, c.depth), e.stride(0), vocab.descriptor(head.weight, c.depth, c.cols),
                head.weight.stride(0), head.weight.stride(1), self.partial, rows.counts, first_row, chunk, D, V,
                self.limit, MAX_SPLITS=self.MAX_SPLITS, EVEN=V % c.depth == 0, **product,
            )  # fmt: skip
            hidden_reduce_kernel[(triton.cdiv(chunk, REDUCE_ROWS), triton.cdiv(D, c.cols))](
                self.partial, self.row_scale, rows.order, rows.counts, self.out_hidden, first_row, chunk, D,
                self.limit, self.unit, ROWS=c.rows, COLS=c.cols, PROGRAMS=vocab.programs, MAX_SPLITS=self.MAX_SPLITS,
                BLOCK=REDUCE_ROWS,
            )  # fmt: skip
        if self.out_weight is not None:
            scale_rows_kernel[(chunk,)](vocab.hidden, self.row_scale, D, BLOCK=min(1024, triton.next_power_of_2(D)))
            head_kernel[(vocab.programs,)](
                vocab.descriptor(e, c.depth, c.rows), e.stride(0), vocab.descriptor(vocab.hidden, c.depth, c.cols),
                self.out_weight, rows.counts, first_row, chunk, D, V, self.unit, GROUP=8, ACCUMULATE=first_row > 0,
                **product,
            )  # fmt: skip
        if self.out_bias is not None:
            bias_kernel[(triton.cdiv(V, 128),)](
                e, e.stride(0), self.row_scale, self.out_bias, rows.counts, first_row, chunk, V, self.unit,
                ROWS=32, COLS=128, ACCUMULATE=first_row > 0,
            )  # fmt: skip
