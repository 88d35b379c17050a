"""Where a GPU's time goes in one update: its kernels by kind, the longest of them, and the gaps between them."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

LONGEST = 10
# The first that matches counts: PyTorch's FlashAttention has CUTLASS's numbers among its template's arguments.
KINDS = {
    "compiled elementwise": r"^triton_(?!tem_)",  # tem: the compiler's templates of products and attention
    "attention": r"flash|fmha|attention",
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|splitk|^triton_tem_",
    "gathers and sums by index": r"index|scatter|gather|segment",
    "copies and casts": r"memcpy|memset|copy",
    "eager elementwise": r"elementwise|reduce_kernel|at::native",
}


class Launch(NamedTuple):
    """A kernel that ran, or a copy; start and end in µs."""

    name: str
    start: float
    end: float


def profile(update: Callable[[], Any]) -> dict[str, Any]:
    """:func:`summary` of one update on a GPU under PyTorch's profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        update()
        torch.cuda.synchronize()
    # The host's calls of CUDA stand among the events, too.
    on_gpu = [event for event in recorded.events() if event.device_type == DeviceType.CUDA]
    return summary([Launch(one.name, one.time_range.start, one.time_range.end) for one in on_gpu], head_kernels())


def head_kernels() -> set[str]:
    """The names of the Triton kernels that belong to a head: ours and TRL's, not the compiler's."""
    from egrsd_kernels.backends.triton.launch import Kernel

    homes = ("egrsd_kernels.backends", "trl.kernels")
    found = [one for name, module in sys.modules.items() if name.startswith(homes) for one in vars(module).values()]
    functions = [one.jit if isinstance(one, Kernel) else one for one in found]
    return {
        one.fn.__name__ for one in functions if type(one).__module__.startswith("triton.run") and hasattr(one, "fn")
    }


def summary(launches: Iterable[Launch], head: set[str]) -> dict[str, Any]:
    """``busy_ms``, in which something runs; ``idle_ms``, between the first and the last in which nothing does;
    ``launches``; by ``kinds`` and of the ``longest`` kernels ms and launches, the largest first. Where streams overlap,
    kinds add up to more than ``busy_ms``."""
    ordered = sorted(launches, key=lambda one: one.start)
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    busy, begin = 0.0, ordered[0].start if ordered else 0.0
    end = begin
    for name, start, stop in ordered:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
        for total in (kinds["head's kernels" if name in head else kind_of(name)], kernels[name]):
            total[0] += (stop - start) / 1e3
            total[1] += 1

    def rows(title: str, totals: dict[str, list[float]], count: int | None) -> list[dict[str, Any]]:
        largest = sorted(totals.items(), key=lambda one: -one[1][0])[:count]
        return [{title: name[:100], "ms": round(ms, 3), "launches": number} for name, (ms, number) in largest]

    return {
        "busy_ms": round(busy / 1e3, 3),
        "idle_ms": round((end - begin - busy) / 1e3, 3),
        "launches": len(ordered),
        "kinds": rows("kind", kinds, None),
        "longest": rows("name", kernels, LONGEST),
    }


def kind_of(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, marks in KINDS.items() if re.search(marks, lower)), "other")
