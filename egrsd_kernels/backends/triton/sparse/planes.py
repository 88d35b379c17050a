"""What is known of each row of a chunk: planes of two tensors, which kernels take as one argument each.

floats (8, rows) float32: the softcap's damping of the target; Σ e without the target, and S with it; g = dL/dlogp; the
weight a = |g| / max |g|, 0 without a finite gradient; M; the mass δ dropped; g / temperature of a sparse row, else 0.
ints (6, rows) int32: the target; the token that the row is; how many entries a sparse row keeps, else 0; how many tiles
are looked into; whether the row is dense; its slot in the reserve, or -1. docs/sparse.md has the symbols.
"""

import torch
import triton
import triton.language as tl

from ..gradient import ChunkGradients
from ..launch import kernel

SOFTCAP_GRAD, OTHERS, TOTAL, GRADIENT, WEIGHT, MASS, DROPPED, FACTOR = map(tl.constexpr, range(8))
TARGET, TOKEN, N_ENTRIES, N_TILES, DENSE, SLOT = map(tl.constexpr, range(6))
SLOTS = tl.constexpr(1024)  # rows at a time of a program that goes through all rows
SLACK = tl.constexpr(2.0**-7)  # covers the rounding of sums
TINY, SMALL = tl.constexpr(2.0**-126), tl.constexpr(2.0**-100)  # where the proof's sums begin


def planes_of(gradients: ChunkGradients) -> tuple[torch.Tensor, torch.Tensor]:
    """(floats, ints) of a chunk. What its other kernels know of rows moves there."""
    chunk = gradients.chunk
    floats = chunk.floats(8, chunk.rows)
    ints = torch.empty(6, chunk.rows, dtype=torch.int32, device=floats.device)
    chunk.softcap_grad, gradients.others, gradients.total = floats[:3]
    chunk.target = ints[TARGET.value]
    return floats, ints


@triton.jit
def at(planes, which: tl.constexpr, rows, r):
    """Where row r of a plane is."""
    return planes + rows * which + r


@triton.jit
def load_gradient(gradient, order, floats, rows, r, n):
    """(token, g, S, whether g is not 0, and both finite) of rows r."""
    t = tl.load(order + r, mask=r < n, other=0)
    g = tl.load(gradient + t, mask=r < n, other=0.0)
    s = tl.load(at(floats, TOTAL, rows, r), mask=r < n, other=1.0)
    return t, g, s, (tl.abs(g) < float("inf")) & (s > 0) & (s < float("inf"))


@kernel(do_not_specialize=["gradient", "order"])
def weigh_kernel(gradient, order, row_counts, floats, ints, budget, rows, tolerance, SOFTCAP: tl.constexpr):
    """Grid (1,): TOKEN, GRADIENT, WEIGHT, MASS and DENSE of the n rows, with WEIGHT 0 after them; dense are those whose
    g or S is not finite. budget (2,) float32: tolerance Σ a M / (1 + 4 SLACK), and this over n.

    gradient: (N,) float32. order: the rows' tokens, int32.
    """
    n = tl.load(row_counts + 1)
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
        mass *= tl.load(at(floats, SOFTCAP_GRAD, rows, r), mask=r < n, other=0.0) if SOFTCAP else 2.0
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
