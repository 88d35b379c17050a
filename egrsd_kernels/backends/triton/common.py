"""What the kernels share: tile loads, the logit transform, launch configurations."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton older than the host-side descriptors: every GPU takes the pointer kernels
    TensorDescriptor = None

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Stands for a logit of -inf: far below any real logit, but finite, so that the difference of two is 0 and not NaN.
NEG = tl.constexpr(-1.0e30)


# Rows of a tile in every configuration; chunks are whole tiles.
ROW_TILE = 128


@dataclass(frozen=True)
class Config:
    """Tile shape and pipelining of one matrix kernel: ``rows`` x ``cols`` of output, ``depth`` of the inner product."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int

    @functools.cached_property
    def tile(self) -> dict[str, int]:
        """The tile's shape, as the kernels name it."""
        return {"ROWS": self.rows, "COLS": self.cols, "DEPTH": self.depth}

    @functools.cached_property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# float32 operands as three TF32 products: full float32 accuracy on tensor cores. Half-precision operands ignore it.
# AMD has no such mode and multiplies in float32.
PRECISION = "tf32x3" if torch.version.hip is None else "ieee"


class Configs(NamedTuple):
    """One configuration for each product: hidden x head, E x head, E^T x hidden."""

    vocab: Config
    hidden: Config
    head: Config


class Machine(NamedTuple):
    """How products with one head run on its device: programs of a persistent grid, loads by TMA, tiles."""

    programs: int
    tma: bool
    configs: Configs


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, shared memory of a block in bytes)."""
    if device.type != "cuda":
        return 4, 1 << 30  # the interpreter: any do
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 64 << 10)


def has_tma(device: torch.device) -> bool:
    """Whether the TMA kernels are taken: on Hopper and newer, and in the interpreter, unless EGRSD_KERNELS_TMA=0."""
    return os.environ.get("EGRSD_KERNELS_TMA") != "0" and _knows_tma(device)


@functools.cache
def _knows_tma(device: torch.device) -> bool:
    if TensorDescriptor is None:
        return False
    return device.type != "cuda" or (torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9)


def tma_ready(weight: torch.Tensor) -> bool:
    """Whether TMA can read this head and hidden states beside it: base and rows start on 16 bytes, rows contiguous."""
    itemsize = weight.element_size()
    starts = weight.data_ptr() | weight.stride(0) * itemsize | weight.shape[1] * itemsize
    return weight.stride(1) == 1 and starts % 16 == 0 and weight.numel() > 0


def tiled(matrix: torch.Tensor, rows: int, cols: int, tma: bool):
    """What the kernels read and write tiles of rows x cols through: a descriptor, or without TMA the matrix."""
    return TensorDescriptor.from_tensor(matrix, [rows, cols]) if tma else matrix


def ceil_div(a: int, b: int) -> int:
    """triton.cdiv without its wrapper, which costs 20 times as much: a plan divides thousands of times."""
    return -(-a // b)


def block_of(n: int, most: int) -> int:
    """The power of two that holds n, up to ``most``."""
    return min(most, 1 << (n - 1).bit_length())


def interpreted(kernel) -> bool:
    """Whether Triton runs this kernel in its CPU interpreter (TRITON_INTERPRET=1)."""
    return isinstance(kernel, InterpretedFunction)


@triton.jit
def load_tile(
    source, row, col, n_rows, n_cols, stride_row, stride_col,
    ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr, EVEN_ROWS: tl.constexpr, EVEN_COLS: tl.constexpr,
):  # fmt: skip
    """Tile [row : row + ROWS, col : col + COLS] of a matrix, zero outside it.

    With TMA ``source`` is a descriptor of that tile shape. Otherwise it is a pointer, read through the two strides;
    EVEN_ROWS and EVEN_COLS say that no tile crosses that edge, which spares the inner loop a mask.
    """
    if TMA:
        return source.load([row, col])
    else:
        r = row + tl.arange(0, ROWS)
        c = col + tl.arange(0, COLS)
        # 64-bit offsets: vocabulary x hidden size passes 2^31 elements.
        pointers = source + r.to(tl.int64)[:, None] * stride_row + c.to(tl.int64)[None, :] * stride_col
        if EVEN_ROWS and EVEN_COLS:
            return tl.load(pointers)
        elif EVEN_COLS:
            return tl.load(pointers, mask=(r < n_rows)[:, None], other=0.0)
        elif EVEN_ROWS:
            return tl.load(pointers, mask=(c < n_cols)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=(r < n_rows)[:, None] & (c < n_cols)[None, :], other=0.0)


@triton.jit
def rows_in_chunk(row_counts, which, first_row, n_slots):
    """How many of the ``row_counts[which]`` leading rows fall into the chunk [first_row, first_row + n_slots)."""
    return tl.minimum(tl.maximum(tl.load(row_counts + which) - first_row, 0), n_slots)


@triton.jit
def logits_of(product, softcap, scale, SOFTCAP: tl.constexpr):
    """(z, softcap_grad): logits in units of ln 2, and dz/d(product) over its constant factor.

    That factor is ``scale`` = log2(e)/temperature; ``product`` is h W^T + b. With w = 1/(1 + e^2x), tanh(x) = 1 - 2w
    and 1 - tanh^2 = 4w(1 - w), for x >= 0, e^2x = inf included. The first is off by 1e-7, too much below 1/4 for a
    softcap far above the logits: there the first terms of the series are good to 3e-7 of it.
    """
    if SOFTCAP:
        x = product / softcap
        w = 1.0 / (1.0 + tl.exp2(tl.abs(x) * (2.0 * LOG2E)))
        x2 = tl.minimum(x * x, 1.0)
        series = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 - x2 * (17.0 / 315.0))))
        t = tl.where(x2 < 0.0625, series, tl.where(x < 0, 2.0 * w - 1.0, 1.0 - 2.0 * w))
        return t * (softcap * scale), 4.0 * w * (1.0 - w)
    else:
        return product * scale, 1.0
