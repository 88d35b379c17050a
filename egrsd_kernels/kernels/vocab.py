"""One pass over the vocabulary, hidden x head fused with the softmax: the logits of a tile stay on chip in float32.

Two uses of one kernel. ``statistics``: each (row, vocabulary tile) leaves its maximum m, S = sum e^(z-m) and
U = sum e^(z-m) (z-m); combined over the tiles they give logsumexp and entropy. ``exponentials``: the tile e^(z-offset)
is stored in the operands' dtype, and its float32 row sum kept, so that the gradient is a plain matrix product later.
All logits here are in units of ln 2, because exp2 and log2 are what the hardware has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    LN2,
    LOG2E,
    NEG,
    PRECISION,
    TensorDescriptor,
    chunk_rows,
    device_limits,
    has_tma,
    load_tile,
    logits_of,
    matmul_config,
    tma_ready,
)

# Row tiles that share their pass over the vocabulary, so that a tile of the head is read from L2 by all of them.
GROUP = 16
# Above this sum of exponentials the products with the head could leave float32; the row's offset is then unsuited.
SUM_LIMIT = tl.constexpr(2.0**100)
ROW_BLOCK = 32
TILE_BLOCK = 32


@triton.jit
def any_flag(flags, n_flags, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    return tl.max(tl.load(flags + i, mask=i < n_flags, other=0), 0) > 0


@triton.jit
def vocab_kernel(
    hidden, weight, stride_wv, stride_wd, bias, exponentials, stride_e, offset, partial, counts, flags, n_flags,
    first_row, chunk, V, softcap, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, TMA: tl.constexpr, STORE: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    FLAG_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The chunk's buffers are whole tiles of rows: what a tile holds past n_rows is computed and never used.
    n_rows = chunk_rows(counts, 0, first_row, chunk)
    n_active = chunk_rows(counts, 1, first_row, chunk)
    if FLAG_BLOCK > 0:  # a second attempt, needed only if a row of the chunk was flagged
        n_rows = tl.where(any_flag(flags, n_flags, FLAG_BLOCK), n_rows, 0)
    row_tiles = tl.cdiv(n_rows, ROWS)
    col_tiles = tl.cdiv(V, COLS)
    width = GROUP * col_tiles
    for tile in tl.range(tl.program_id(0), row_tiles * col_tiles, PROGRAMS, flatten=TMA):
        group = tile // width
        group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
        row_tile = group * GROUP + (tile % width) % group_rows
        col_tile = (tile % width) // group_rows
        product = tl.zeros([ROWS, COLS], tl.float32)
        for d in range(0, D, DEPTH):
            h = load_tile(hidden, row_tile * ROWS, d, chunk, D, D, 1, ROWS, DEPTH, TMA, True, D % DEPTH == 0)
            w = load_tile(
                weight, col_tile * COLS, d, V, D, stride_wv, stride_wd, COLS, DEPTH, TMA, False, D % DEPTH == 0
            )
            product = tl.dot(h, w.T, product, input_precision=PRECISION)
        r = row_tile * ROWS + tl.arange(0, ROWS)
        v = col_tile * COLS + tl.arange(0, COLS)
        if BIAS:
            product += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
        z, damping = logits_of(product, softcap, scale, SOFTCAP)
        if BIAS:  # -inf is a legitimate bias; as NEG it keeps 0 * -inf out of the sums
            z = tl.where(z == float("-inf"), NEG, z)
        z = tl.where((v < V)[None, :], z, NEG)
        if STORE:
            e = tl.exp2(z - tl.load(offset + r)[:, None])
            tl.store(partial + col_tile * chunk + r, tl.sum(e, 1))
            # Rows without gradient become zeros: the products that sum over rows then need no mask.
            e = tl.where((r < n_active)[:, None], e * damping, 0.0)
            if TMA:
                exponentials.store([row_tile * ROWS, col_tile * COLS], e.to(exponentials.dtype))
            else:
                pointers = exponentials + r.to(tl.int64)[:, None] * stride_e + v[None, :]
                tl.store(pointers, e.to(exponentials.dtype.element_ty), mask=(v < V)[None, :])
        else:
            m = tl.max(z, 1)
            z -= m[:, None]
            e = tl.exp2(z)
            at = partial + col_tile * chunk + r
            plane = col_tiles * chunk
            tl.store(at, m)
            tl.store(at + plane, tl.sum(e, 1))
            tl.store(at + 2 * plane, tl.sum(e * z, 1))


@triton.jit
def combine_statistics_kernel(
    partial, logit, order, counts, flags, n_flags, offset, logp, entropy, logsumexp, first_row, chunk, col_tiles, shift,
    OFFSET: tl.constexpr, FLAG_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, TILE_BLOCK: tl.constexpr,
):  # fmt: skip
    n_rows = chunk_rows(counts, 0, first_row, chunk)
    if FLAG_BLOCK > 0:
        n_rows = tl.where(any_flag(flags, n_flags, FLAG_BLOCK), n_rows, 0)
    r = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    live = r < n_rows
    if tl.program_id(0) * ROW_BLOCK < n_rows:
        plane = col_tiles * chunk
        top = tl.full([ROW_BLOCK], 2 * NEG, tl.float32)
        s = tl.zeros([ROW_BLOCK], tl.float32)
        u = tl.zeros([ROW_BLOCK], tl.float32)
        for start in range(0, col_tiles, TILE_BLOCK):
            tile = start + tl.arange(0, TILE_BLOCK)
            at = partial + tile[:, None] * chunk + r[None, :]
            inside = (tile < col_tiles)[:, None] & live[None, :]
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
        log_s = tl.log2(s)
        if OFFSET:
            tl.store(offset + r, top + log_s - shift, mask=live)
        else:
            row = tl.load(order + first_row + r, mask=live, other=0)
            z = tl.load(logit + r, mask=live, other=0.0)
            z = tl.where(z == NEG, float("-inf"), z)
            tl.store(logp + row, (z - top - log_s) * LN2, mask=live)
            tl.store(entropy + row, (log_s - u / s) * LN2, mask=live)
            tl.store(logsumexp + row, (top + log_s) * LN2, mask=live)


@triton.jit
def combine_sums_kernel(
    partial, logit, offset, order, counts, flags, n_flags, total, logp, first_row, chunk, col_tiles,
    SET_FLAGS: tl.constexpr, FLAG_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, TILE_BLOCK: tl.constexpr,
):  # fmt: skip
    n_rows = chunk_rows(counts, 0, first_row, chunk)
    pid = tl.program_id(0)
    if FLAG_BLOCK > 0:
        n_rows = tl.where(any_flag(flags, n_flags, FLAG_BLOCK), n_rows, 0)
    r = pid * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    live = r < n_rows
    s = tl.zeros([ROW_BLOCK], tl.float32)
    if pid * ROW_BLOCK < n_rows:
        for start in range(0, col_tiles, TILE_BLOCK):
            tile = start + tl.arange(0, TILE_BLOCK)
            inside = (tile < col_tiles)[:, None] & live[None, :]
            s += tl.sum(tl.load(partial + tile[:, None] * chunk + r[None, :], mask=inside, other=0.0), 0)
        z = tl.load(logit + r, mask=live, other=0.0)
        row = tl.load(order + first_row + r, mask=live, other=0)
        tl.store(total + r, s, mask=live)
        value = (z - tl.load(offset + r, mask=live, other=0.0) - tl.log2(s)) * LN2
        tl.store(logp + row, tl.where(z == NEG, float("-inf"), value), mask=live)
    if SET_FLAGS:  # a NaN target logit is a target outside the vocabulary: no offset would help
        z = tl.load(logit + r, mask=live, other=0.0)
        tl.store(flags + pid, tl.max((live & (z == z) & ~(s < SUM_LIMIT)).to(tl.int32), 0))


class VocabPass:
    """The vocabulary pass over chunks of up to ``chunk`` gathered rows: buffers, descriptors and launches.

    head: what has ``weight`` (V, D), ``bias`` (V,) or None, ``softcap``, ``temperature``.
    """

    def __init__(self, head, chunk: int, dtype: torch.dtype, device: torch.device):
        self.head, self.chunk = head, chunk
        self.V, self.D = head.weight.shape
        self.config = matmul_config(dtype, device)
        self.programs, _ = device_limits(device)
        self.hidden = torch.empty(chunk, self.D, dtype=dtype, device=device)
        self.logit = torch.empty(chunk, dtype=torch.float32, device=device)
        self.tma = has_tma(device) and tma_ready(self.hidden, head.weight)
        self.col_tiles = triton.cdiv(self.V, self.config.cols)
        self.n_flags = triton.cdiv(chunk, ROW_BLOCK)

    def _float(self, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.hidden.device)

    def _flag_block(self, flags: torch.Tensor | None) -> int:
        return 0 if flags is None else triton.next_power_of_2(self.n_flags)

    def descriptor(self, matrix: torch.Tensor, rows: int, cols: int):
        """What ``load_tile`` reads tiles of rows x cols from."""
        return TensorDescriptor.from_tensor(matrix, [rows, cols]) if self.tma else matrix

    def _launch(self, rows, first_row, partial, exponentials=None, offset=None, flags=None) -> None:
        c, head = self.config, self.head
        store = exponentials is not None
        vocab_kernel[(self.programs,)](
            self.descriptor(self.hidden, c.rows, c.depth), self.descriptor(head.weight, c.cols, c.depth),
            head.weight.stride(0), head.weight.stride(1), head.bias,
            self.descriptor(exponentials, c.rows, c.cols) if store else None, exponentials.stride(0) if store else 0,
            offset, partial, rows.counts, flags, self.n_flags,
            first_row, self.chunk, self.V, head.softcap or 0.0, LOG2E.value / head.temperature,
            D=self.D, GROUP=GROUP, PROGRAMS=self.programs, TMA=self.tma, STORE=store, BIAS=head.bias is not None,
            SOFTCAP=head.softcap is not None, FLAG_BLOCK=self._flag_block(flags), PRECISION=PRECISION,
            **c.tile, **c.launch,
        )  # fmt: skip

    def _combine_statistics(self, rows, first_row, partial, *, flags=None, offset=None, shift=0.0, out=(None,) * 3):
        combine_statistics_kernel[(self.n_flags,)](
            partial, self.logit, rows.order, rows.counts, flags, self.n_flags, offset, *out,
            first_row, self.chunk, self.col_tiles, shift,
            OFFSET=offset is not None, FLAG_BLOCK=self._flag_block(flags),
            ROW_BLOCK=ROW_BLOCK, TILE_BLOCK=TILE_BLOCK,
        )  # fmt: skip

    def _combine_sums(self, rows, first_row, partial, offset, total, logp, flags, set_flags=False):
        combine_sums_kernel[(self.n_flags,)](
            partial, self.logit, offset, rows.order, rows.counts, flags, self.n_flags, total, logp,
            first_row, self.chunk, self.col_tiles,
            SET_FLAGS=set_flags, FLAG_BLOCK=self._flag_block(None if set_flags else flags),
            ROW_BLOCK=ROW_BLOCK, TILE_BLOCK=TILE_BLOCK,
        )  # fmt: skip

    def statistics(self, rows, first_row, logp, entropy, logsumexp) -> None:
        """Write the chunk's log p(target), entropy and logsumexp (nats) into the full (N,) float32 tensors."""
        partial = self._float(3, self.col_tiles, self.chunk)
        self._launch(rows, first_row, partial)
        self._combine_statistics(rows, first_row, partial, out=(logp, entropy, logsumexp))

    def exponentials(self, rows, first_row, out, offset, total, logp, shift) -> None:
        """Store e^(z - offset) of the chunk in ``out`` (chunk, >= V); write offset, row sums ``total``, and ``logp``.

        offset and total are (chunk,) float32, in units of ln 2 and plain. The target's logit is the first choice of
        offset, known before the pass: e^(z - z_y) sums to 1/p_y, which a sampled token keeps far from float32's and
        bfloat16's largest number. Should a row reach 2^100 all the same, the chunk is done again with the exact
        logsumexp as offset; whether that happens is decided on the device. float16 has no room for 1/p_y, so there the
        stored value is always p * 2^shift.
        """
        flags = None
        if out.dtype != torch.float16:
            sums = self._float(self.col_tiles, self.chunk)
            flags = torch.empty(self.n_flags, dtype=torch.int32, device=out.device)
            offset.copy_(self.logit)
            self._launch(rows, first_row, sums, out, offset)
            self._combine_sums(rows, first_row, sums, offset, total, logp, flags, set_flags=True)
        partial = self._float(3, self.col_tiles, self.chunk)
        self._launch(rows, first_row, partial, flags=flags)
        self._combine_statistics(rows, first_row, partial, flags=flags, offset=offset, shift=shift)
        self._launch(rows, first_row, partial, out, offset, flags=flags)
        self._combine_sums(rows, first_row, partial, offset, total, logp, flags)
