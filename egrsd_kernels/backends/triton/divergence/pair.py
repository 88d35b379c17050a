"""Student's and teacher's tile of logits side by side in registers, so that ln p_S - ln p_T is a float32 difference.

With x_S = z_S - offset_S and x_T = z_T - offset_T of a row, in units of ln 2, a pass over the vocabulary stores

    M = max(x_S, x_T)    beside 16-bit operands rounded to 2^-9, as an int16, else float32
    r' = x_S - x_T       float16 beside 16-bit operands, else float32; 0 where both logits are -inf

and leaves the float32 sums of each row and tile, from the same registers: S_S = Σ 2^x_S and S_T = Σ 2^x_T, and of
Σ 2^x_S r', Σ 2^x_T r', Σ 2^x_S x_S and Σ 2^x_T x_T those that are asked for. The first two are infinite where one
model alone excludes an entry. Then r = r' - log2(S_S / S_T), and

    p_S = 2^(M + min(r', 0)) / S_S    p_T = 2^(M - max(r', 0)) / S_T

Neither underflows where the other does not, and both have the one rounding of M: their ratio has none of it. It is
7e-4 of them at most, where a bfloat16 2^M would have 4e-3; whatever is beyond 2^±64 of the offset has no place in it.
Student and teacher with one head of one D share its tiles; else the two products come one after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from egrsd_kernels.head import Head

from ..common import NEG, PRECISION, ROW_TILE, Config, ceil_div, load_tile, logits_of
from ..gather import Chunk
from ..plan import MOST_ROWS
from ..vocab import GROUP

# Two tiles of accumulators, so half as wide as one product's: the largest first that shared memory has room for.
HALF = (
    Config(ROW_TILE, 128, 64, 8, 4),
    Config(ROW_TILE, 128, 64, 8, 3),
    Config(ROW_TILE, 128, 32, 8, 3),
    Config(ROW_TILE, 64, 32, 4, 3),
    Config(ROW_TILE, 64, 32, 4, 2),
)
FLOAT32 = (Config(ROW_TILE, 64, 32, 8, 2), Config(ROW_TILE, 64, 16, 8, 2))
# Rows of a tile, and tiles of a chunk, at most: a kernel is told which of them it is to work on.
TILE = tl.constexpr(ROW_TILE)
TILES = tl.constexpr(triton.next_power_of_2(ceil_div(MOST_ROWS, ROW_TILE)))
# An int16 M counts these steps; LEAST stands for a probability of 0.
STEPS = tl.constexpr(512.0)
LEAST = tl.constexpr(-32768.0)
# A float32 of this size counts whole numbers, in its last bits: adding it rounds to them.
WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23
# Of |r'|, where float16 ends, some 20,800 nats: what is beyond has no gradient, so one model excludes the entry.
RATIO = tl.constexpr(30000.0)
# Of |r'| in float32, between all that finite logits make and what NEG does.
FORBIDDEN = tl.constexpr(1.0e20)


class Sums(NamedTuple):
    """Which sums a pass leaves beside S_S and S_T."""

    reverse: bool = False
    """Σ 2^x_S r'"""
    forward: bool = False
    """Σ 2^x_T r'"""
    student_entropy: bool = False
    """Σ 2^x_S x_S"""
    teacher_entropy: bool = False
    """Σ 2^x_T x_T"""

    @property
    def planes(self) -> int:
        return 2 + sum(self)


@triton.jit
def rows_at(row, row_counts, tiles):
    """How many rows there are, or 0 where the tile of ``row`` is not to be worked on."""
    return tl.where(tl.load(tiles + row // TILE) != 0, tl.load(row_counts), 0)


@triton.jit
def finite_logits(product, bias, v, V, softcap, scale, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """z of a tile in units of ln 2; NEG for -inf, so that the difference of two is 0."""
    if BIAS:
        product += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    z, _ = logits_of(product, softcap, scale, SOFTCAP)
    if BIAS:
        z = tl.where(z == float("-inf"), NEG, z)
    return z


@triton.jit
def whole_steps(x):
    """x in STEPS as int16, for x below 64."""
    return tl.fma(tl.maximum(x, LEAST / STEPS), STEPS, WHOLE).to(tl.int32, bitcast=True).to(tl.int16)


@triton.jit
def load_stored(magnitudes, ratios, first, start, width, log_p, BLOCK: tl.constexpr):
    """M + log_p and r' of BLOCK entries of a row that begins at ``first``, from ``start`` on.

    The former is far below all others, so that its power is 0, past the row's end and where M is LEAST.
    """
    v = start + tl.arange(0, BLOCK)
    stepped: tl.constexpr = magnitudes.dtype.element_ty == tl.int16
    unit: tl.constexpr = 1.0 / STEPS if stepped else 1.0
    if start + BLOCK <= width:
        exponent = tl.fma(tl.load(magnitudes + first + v).to(tl.float32), unit, log_p)
        ratio = tl.load(ratios + first + v)
    else:
        # Triton 3.6 compiles a negative 16-bit ``other`` to -1 in every second place.
        m = tl.load(magnitudes + first + v, mask=v < width, other=0).to(tl.float32)
        exponent = tl.where(v < width, tl.fma(m, unit, log_p), NEG)
        ratio = tl.load(ratios + first + v, mask=v < width, other=0.0)
    if stepped:
        exponent = tl.where(exponent > log_p + (LEAST + 0.5) / STEPS, exponent, NEG)
    return exponent, ratio.to(tl.float32)


@triton.jit
def put_halves(out, row, col, tile):
    """Two halves, so that a tile's way out fits into shared memory beside the next one's operands."""
    half: tl.constexpr = tile.shape[1] // 2
    left, right = tile.reshape(tile.shape[0], 2, half).permute(0, 2, 1).split()
    out.store([row, col], left)
    out.store([row, col + half], right)


@triton.jit
def pair_kernel(
    student, teacher, student_weight, student_sv, student_sd, teacher_weight, teacher_sv, teacher_sd,
    student_bias, teacher_bias, student_offset, teacher_offset, magnitudes, ratios, sums, row_counts, tiles, n_slots, V,
    student_cap, student_scale, teacher_cap, teacher_scale,
    D: tl.constexpr, TEACHER_D: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr, TMA: tl.constexpr, STORE: tl.constexpr,
    STEPPED: tl.constexpr, REVERSE: tl.constexpr, FORWARD: tl.constexpr, STUDENT_ENTROPY: tl.constexpr,
    TEACHER_ENTROPY: tl.constexpr,
    STUDENT_BIAS: tl.constexpr, TEACHER_BIAS: tl.constexpr, STUDENT_CAP: tl.constexpr, TEACHER_CAP: tl.constexpr,
    PLAIN: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M and r' (n_slots, tiles COLS) with STORE, in 16 bits if STEPPED, and sums (planes, tiles, n_slots) float32.

    Grid: (PROGRAMS,), persistent over tiles of ROWS x COLS of the n_valid rows; tiles: (TILES,) int32, 1 for each tile
    of rows that is worked on, else 0, as for all kernels of a pair. student: (n_slots, D), teacher:
    (n_slots, TEACHER_D), weights: (V, those), biases: (V,), offsets: (n_slots,) float32. SHARED: one weight for both.
    PLAIN: neither bias nor softcap, and one scale for both. EVEN: the vocabulary is whole tiles.
    """
    # The chunk's buffers are whole tiles of rows: what a tile holds past n_valid is computed and never used.
    number = tl.arange(0, TILES)
    wanted = tl.load(tiles + number, mask=number < tl.cdiv(tl.load(row_counts), ROWS), other=0)
    up_to = tl.cumsum(wanted, 0)
    row_tiles = tl.sum(wanted, 0)
    col_tiles = tl.cdiv(V, COLS)
    width = GROUP * col_tiles
    # A loop over D of one step is none to Triton: it would hold the operands of many tiles at once instead.
    ahead: tl.constexpr = 1 if D <= DEPTH and TEACHER_D <= DEPTH else None
    for tile in tl.range(tl.program_id(0), row_tiles * col_tiles, PROGRAMS, num_stages=ahead):
        group = tile // width
        group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
        nth = group * GROUP + (tile % width) % group_rows
        row = tl.sum((up_to <= nth).to(tl.int32), 0) * ROWS
        col_tile = (tile % width) // group_rows
        col = col_tile * COLS
        s = tl.zeros([ROWS, COLS], tl.float32)
        t = tl.zeros([ROWS, COLS], tl.float32)
        for d in range(0, D, DEPTH):
            w = load_tile(student_weight, col, d, V, D, student_sv, student_sd, COLS, DEPTH, TMA, False, D % DEPTH == 0)
            h = load_tile(student, row, d, n_slots, D, D, 1, ROWS, DEPTH, TMA, True, D % DEPTH == 0)
            s = tl.dot(h, w.T, s, input_precision=PRECISION)
            if SHARED:
                h = load_tile(teacher, row, d, n_slots, D, D, 1, ROWS, DEPTH, TMA, True, D % DEPTH == 0)
                t = tl.dot(h, w.T, t, input_precision=PRECISION)
        if not SHARED:
            even: tl.constexpr = TEACHER_D % DEPTH == 0
            for d in range(0, TEACHER_D, DEPTH):
                h = load_tile(teacher, row, d, n_slots, TEACHER_D, TEACHER_D, 1, ROWS, DEPTH, TMA, True, even)
                w = load_tile(
                    teacher_weight, col, d, V, TEACHER_D, teacher_sv, teacher_sd, COLS, DEPTH, TMA, False, even
                )
                t = tl.dot(h, w.T, t, input_precision=PRECISION)
        r = row + tl.arange(0, ROWS)
        v = col + tl.arange(0, COLS)
        student_base = tl.load(student_offset + r)
        teacher_base = tl.load(teacher_offset + r)
        shift = student_base - teacher_base
        # Logits that are near each other differ without a rounding; less their offsets each would have one.
        if PLAIN:
            ratio = tl.fma(s - t, student_scale, -shift[:, None])
            s = tl.fma(s, student_scale, -student_base[:, None])
            t = tl.fma(t, student_scale, -teacher_base[:, None])
        else:
            s = finite_logits(s, student_bias, v, V, student_cap, student_scale, STUDENT_BIAS, STUDENT_CAP)
            t = finite_logits(t, teacher_bias, v, V, teacher_cap, teacher_scale, TEACHER_BIAS, TEACHER_CAP)
            ratio = (s - t) - shift[:, None]
            s -= student_base[:, None]
            t -= teacher_base[:, None]
        if not EVEN:
            inside = (v < V)[None, :]
            s = tl.where(inside, s, NEG)
            t = tl.where(inside, t, NEG)
        p = tl.exp2(s)
        q = tl.exp2(t)
        at = sums + col_tile * n_slots + r
        plane = col_tiles * n_slots
        tl.store(at, tl.sum(p, 1))
        tl.store(at + plane, tl.sum(q, 1))
        by_p = p * ratio
        by_q = q * ratio
        if STUDENT_BIAS or TEACHER_BIAS:
            # -inf in one model alone makes a sum infinite, however small the other's probability: NEG would not.
            excluded: tl.constexpr = RATIO if STEPPED else FORBIDDEN
            infinite = tl.where(tl.abs(ratio) > excluded, ratio * float("inf"), ratio)
            by_p = tl.where(p > 0, p * infinite, 0.0)
            by_q = tl.where(q > 0, q * infinite, 0.0)
        if REVERSE:
            tl.store(at + 2 * plane, tl.sum(by_p, 1))
        if FORWARD:
            tl.store(at + (2 + REVERSE) * plane, tl.sum(by_q, 1))
        if STUDENT_ENTROPY:
            tl.store(at + (2 + REVERSE + FORWARD) * plane, tl.sum(p * s, 1))
        if TEACHER_ENTROPY:
            tl.store(at + (2 + REVERSE + FORWARD + STUDENT_ENTROPY) * plane, tl.sum(q * t, 1))
        if STORE:
            largest = tl.maximum(s, t)
            if STEPPED:
                largest = whole_steps(largest)
                ratio = tl.minimum(tl.maximum(ratio, -RATIO), RATIO).to(tl.float16)
            if TMA:
                put_halves(magnitudes, row, col, largest)
                put_halves(ratios, row, col, ratio)
            else:
                inner = r.to(tl.int64)[:, None] * (col_tiles * COLS) + v[None, :]
                tl.store(magnitudes + inner, largest)
                tl.store(ratios + inner, ratio)


def pair_config(student: Head, teacher: Head, shared: int) -> Config:
    """The tile for two heads on a device with so many bytes of shared memory for a program."""
    single = torch.float32 in (student.weight.dtype, teacher.weight.dtype)
    fitting, itemsize = (FLOAT32, 4) if single else (HALF, 2)
    matrices = 3 if one_head(student, teacher) else 2  # the second of two loops has the first one's memory

    def room(c: Config) -> int:
        """Operands, and a tile on its way out, in halves."""
        return c.stages * matrices * c.rows * c.depth * itemsize + itemsize * c.rows * c.cols + 1024

    return next((c for c in fitting if room(c) <= shared), fitting[-1])


def one_head(student: Head, teacher: Head) -> bool:
    """Whether both read the same matrix; what else a head has may differ."""
    a, b = student.weight, teacher.weight
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


class PairPass:
    """Passes over the vocabulary for the rows of two chunks of one size: the student's, and the teacher's.

    wanted: the sums. memory: what M is stored in, of the student's dtype (rows, whole tiles); r' has the same shape, in
    ``ratios``. None: nothing is stored.

    Attributes:
        magnitudes: M, in the memory of ``memory``. sums: (wanted.planes, tiles, rows) float32.
    """

    def __init__(
        self, student: Chunk, teacher: Chunk, config: Config, wanted: Sums,
        memory: torch.Tensor | None, ratios: torch.Tensor | None,
    ):  # fmt: skip
        self.student, self.teacher, self.config, self.wanted, c = student, teacher, config, wanted, config
        self.tma = student.tma and teacher.tma
        self.col_tiles = ceil_div(student.V, c.cols)
        self.sums = student.floats(wanted.planes, self.col_tiles, student.rows)
        self.magnitudes = memory if memory is None or memory.dtype == torch.float32 else memory.view(torch.int16)
        self.ratios = ratios
        self.stored = tuple(x if x is None else self._tiled(x, c.rows, c.cols // 2) for x in (self.magnitudes, ratios))
        self.operands = tuple(
            self._tiled(chunk.hidden, c.rows, c.depth) for chunk in (student, teacher)
        ), tuple(self._tiled(chunk.head.weight, c.cols, c.depth) for chunk in (student, teacher))  # fmt: skip

    def _tiled(self, matrix: torch.Tensor, rows: int, cols: int):
        return self.student.tiled(matrix, rows, cols) if self.tma else matrix

    def __call__(self, row_counts: torch.Tensor, tiles: torch.Tensor) -> None:
        student, teacher = self.student, self.teacher
        (student_hidden, teacher_hidden), (student_weight, teacher_weight) = self.operands
        heads = student.head, teacher.head
        parts = heads[0].bias, heads[1].bias, student.softcap, teacher.softcap
        plain = all(x is None for x in parts) and student.logit_scale == teacher.logit_scale
        pair_kernel[(student.programs,)](
            student_hidden, teacher_hidden, student_weight, *heads[0].weight.stride(), teacher_weight,
            *heads[1].weight.stride(), heads[0].bias, heads[1].bias, student.offset, teacher.offset, *self.stored,
            self.sums, row_counts, tiles, student.rows, student.V, student.softcap or 0.0, student.logit_scale,
            teacher.softcap or 0.0, teacher.logit_scale, D=student.D, TEACHER_D=teacher.D,
            SHARED=one_head(*heads), GROUP=GROUP, PROGRAMS=student.programs, TMA=self.tma,
            STORE=self.magnitudes is not None, STEPPED=student.hidden.dtype != torch.float32,
            REVERSE=self.wanted.reverse, FORWARD=self.wanted.forward,
            STUDENT_ENTROPY=self.wanted.student_entropy, TEACHER_ENTROPY=self.wanted.teacher_entropy,
            STUDENT_BIAS=heads[0].bias is not None, TEACHER_BIAS=heads[1].bias is not None,
            STUDENT_CAP=student.softcap is not None, TEACHER_CAP=teacher.softcap is not None, PLAIN=plain,
            EVEN=student.V % self.config.cols == 0,
            # Were the scaling of one logit fused with the difference, equal models would have unequal ones.
            PRECISION=PRECISION, enable_fp_fusion=plain, **self.config.tile, **self.config.launch,
        )  # fmt: skip
