"""What is known of each row of a chunk, as planes of two tensors that kernels take as one argument each.

floats (8, rows) float32: the softcap's damping of the target; Σ e without the target, and S with it; g = dL/dlogp; the
weight a = |g| / max |g|, 0 without a finite gradient; M; the mass δ that is dropped; g / temperature of a sparse row,
else 0. ints (6, rows) int32: the target; the token that the row is; how many entries a sparse row keeps, else 0;
how many tiles are looked into; whether it is dense; its slot in the reserve, or -1. docs/sparse.md has the symbols.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gradient import ChunkGradients

DAMPING, OTHERS, TOTAL, GRADIENT, WEIGHT, MASS, DROPPED, FACTOR = map(tl.constexpr, range(8))
TARGET, TOKEN, N_ENTRIES, N_TILES, DENSE, SLOT = map(tl.constexpr, range(6))
SLOTS = tl.constexpr(1024)  # rows at a time of a program that goes through all rows


def planes(gradients: ChunkGradients) -> tuple[torch.Tensor, torch.Tensor]:
    """(floats, ints) of a chunk. What its other kernels know of rows moves there."""
    chunk = gradients.chunk
    floats = chunk.floats(8, chunk.rows)
    ints = torch.empty(6, chunk.rows, dtype=torch.int32, device=floats.device)
    chunk.damping, gradients.others, gradients.total = floats[:3]
    chunk.target = ints[TARGET.value]
    return floats, ints


@triton.jit
def at(planes, which: tl.constexpr, rows, r):
    """Where row r of a plane is."""
    return planes + rows * which + r
