"""A GPU that does nothing: launches go all the way from the loss to Triton's driver, on tensors of the CPU.

    python -m tests.support.fake_gpu              what a step takes the host, launch by launch
    python -m tests.support.fake_gpu --trained    the same with a trained head

What no kernel has written is anything. So this shows what the host does, and what that costs but for CUDA itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from egrsd_kernels import checks, fused_egrsd_loss
from egrsd_kernels.backends import triton as kernels
from egrsd_kernels.backends.triton import tuning
from egrsd_kernels.backends.triton.launch import Kernel


class Launch(NamedTuple):
    kernel: str
    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


class Compiled:
    """Stands for what Triton compiles; a launch is noted where there are ``notes``."""

    notes: list[Launch] | None = None

    function, packed_metadata = 0, ()

    def __init__(self, source: Any, target: Any = None, options: Any = None, **_: Any):
        self.name = source.fn.fn.__name__

    def launch_metadata(self, grid: Any, stream: Any, *arguments: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *more: Any) -> None:
        # stream, function, metadata of two kinds, and two hooks come before the kernel's arguments.
        self.note((x, y, z), more[6:])

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, stream=None: self.note(grid, arguments)

    def note(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        if self.notes is not None:
            self.notes.append(Launch(self.name, self, tuple(grid), arguments))


class Driver:
    """An H100, as far as Triton asks."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def install() -> None:
    """For the rest of the process, whose kernels are not interpreted."""
    driver.set_active(Driver())
    triton.compiler.compile = Compiled
    kernels.takes = lambda hidden: hidden.dtype in kernels.DTYPES
    tuning.device_limits = lambda device: (132, 227 << 10)
    checks.values_checked = lambda tensor: False


def operands(n: int, vocabulary: int, width: int, dtype: torch.dtype = torch.bfloat16, trained: bool = False) -> dict:
    """Arguments of the loss, of n tokens in two sequences, without values but for ids."""
    return {
        "student_hidden": torch.empty(n, width, dtype=dtype).requires_grad_(),
        "student_weight": torch.empty(vocabulary, width, dtype=dtype).requires_grad_(trained),
        "teacher_hidden": torch.empty(n, width, dtype=dtype),
        "target_ids": torch.randint(vocabulary, (n,)),
        "advantages": torch.randn(n),
        "mask": torch.rand(n) < 0.9,
        "cu_seqlens": torch.tensor([0, n // 3, n], dtype=torch.int32),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    given = operands(args.rows, 151_936, 2560, trained=args.trained)
    spent: dict[str, list[float]] = defaultdict(list)

    def timed(launch: Callable[..., None], name: str) -> Callable[..., None]:
        def call(*arguments: Any, **constants: Any) -> None:
            start = time.perf_counter()
            launch(*arguments, **constants)
            spent[name].append(time.perf_counter() - start)

        return call

    def step() -> tuple[float, float]:
        """Seconds of the forward and the backward pass."""
        start = time.perf_counter()
        loss = fused_egrsd_loss(**given, lookahead=3, backend="triton")
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        for x in ("student_hidden", "student_weight"):
            given[x].grad = None
        return middle - start, end - middle

    install()
    step(), step()
    # The least of many: whatever else the machine does only adds.
    forward, backward = (min(times) * 1e6 for times in zip(*(step() for _ in range(args.steps)), strict=True))
    whole = Kernel.__getitem__
    with mock.patch.object(Kernel, "__getitem__", lambda self, grid: timed(whole(self, grid), self.jit.__name__)):
        for _ in range(args.steps):
            step()
    print(f"torch {torch.__version__}, triton {triton.__version__}: {args.rows} rows, microseconds of the host")
    print(f"forward {forward:.0f}, backward {backward:.0f}")
    launches = 0
    for name, times in sorted(spent.items(), key=lambda one: -sum(one[1])):
        count = len(times) // args.steps
        launches += count
        print(f"{name:28s} {count} x {statistics.quantiles(times, n=10)[0] * 1e6:5.1f}")
    print(f"{launches} launches")


if __name__ == "__main__":
    main()
