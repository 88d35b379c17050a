"""Where tests run: backends, devices and dtypes. Without a GPU, Triton's kernels run in its interpreter."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # conftest.py sets it


def interpreter_fault(triton: str, numpy: str) -> str | None:
    """Why Triton's interpreter cannot run with these versions: up to 3.6 it makes scalars of arrays with one entry."""
    old, new = (tuple(map(int, version.split(".")[:2])) for version in (triton, numpy))
    return f"triton {triton}'s interpreter needs numpy<2.4, got {numpy}" if old < (3, 7) and new >= (2, 4) else None


class Combo(NamedTuple):
    backend: str
    device: str
    dtype: torch.dtype

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and self.device == "cpu"

    @property
    def unit_roundoff(self) -> float:
        """Of the arithmetic, not of the operands."""
        return 2.0**-53 if self.dtype == torch.float64 else 2.0**-24

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def _parameter(backend: str, device: str, dtype: torch.dtype):
    where = "interpreter" if (backend, device) == ("triton", "cpu") else device
    marks = [pytest.mark.cuda] if device == "cuda" else []
    if where == "interpreter":
        reason = "a GPU is there: set TRITON_INTERPRET=1 to run Triton's interpreter instead"
        marks.append(pytest.mark.skipif(not INTERPRETED, reason=reason))
    return pytest.param(Combo(backend, device, dtype), marks=marks, id=f"{backend}-{where}-{str(dtype)[6:]}")


CPU_COMBOS = [
    _parameter("torch", "cpu", torch.float64),
    _parameter("torch", "cpu", torch.float32),
    _parameter("torch", "cpu", torch.bfloat16),
    _parameter("triton", "cpu", torch.float32),
    _parameter("triton", "cpu", torch.float16),
]
CUDA_COMBOS = [
    _parameter("triton", "cuda", torch.bfloat16),
    _parameter("triton", "cuda", torch.float16),
    _parameter("triton", "cuda", torch.float32),
    _parameter("torch", "cuda", torch.bfloat16),
    _parameter("torch", "cuda", torch.float32),
]
all_combos = pytest.mark.parametrize("combo", CPU_COMBOS + CUDA_COMBOS)
cuda_combos = pytest.mark.parametrize("combo", CUDA_COMBOS)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
# One dtype a backend, for what does not depend on the dtype.
few_combos = pytest.mark.parametrize("combo", [CPU_COMBOS[1], CPU_COMBOS[3], CUDA_COMBOS[0], CUDA_COMBOS[3]])


# Kernels in one dtype a device, for sparse gradients, which PyTorch's backend makes exactly.
sparse_combos = pytest.mark.parametrize("combo", [CPU_COMBOS[3], CUDA_COMBOS[0]])
