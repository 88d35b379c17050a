"""How everything here is timed, and what a result file says about the machine it was made on.

Every round times each subject in turn; reported are the median over the rounds and the quartiles. A subject takes part
in as many rounds as its time budget allows, in three at least. One that fails is reported as such and stops nothing.

A GPU at its power limit lowers its clock, within some tenths of a second and by a quarter, so what is timed after a
pause is not what training sees, and short subjects look better than long ones. Where the work is large enough to get
there (``sustained``), each subject runs back to back for a moment, and only the second half counts. Small work is timed
one run at a time, with the GPU kept busy before it so that the host's launches are queued ahead, as they are in
training; the host's own time is reported beside.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

MIN_ROUNDS = 3
HEAD_START = 8_000_000  # clock cycles, about 4 ms
WINDOW = 300.0  # ms of running back to back, half of it timed


class CudaTimer:
    """Times by CUDA events; memory by the caching allocator's own count."""

    def time(self, run: Callable[[], object], repeats: int = 1) -> tuple[float, float]:
        """(GPU time, host time) of a run in ms; of several, back to back, the second half counts."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        timed = repeats - repeats // 2
        if repeats == 1:
            torch.cuda._sleep(HEAD_START)
        for _ in range(repeats // 2):
            run()
        start.record()
        called = time.perf_counter()
        for _ in range(timed):
            run()
        host = time.perf_counter() - called
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / timed, host * 1e3 / timed

    def peak(self, run: Callable[[], object]) -> tuple[float, float]:
        """(the most memory held above what was allocated before, in MiB; the time in ms, roughly)."""
        self.free()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        called = time.perf_counter()
        run()
        torch.cuda.synchronize()
        ms = (time.perf_counter() - called) * 1e3
        return (torch.cuda.max_memory_allocated() - before) / 2**20, ms

    def free(self) -> None:
        """Give unused memory back; raises where the device no longer works."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class HostTimer:
    """For CPU tensors: the wall clock, and no memory figure."""

    def time(self, run: Callable[[], object], repeats: int = 1) -> tuple[float, float]:
        called = time.perf_counter()
        for _ in range(repeats):
            run()
        ms = (time.perf_counter() - called) * 1e3 / repeats
        return ms, ms

    def peak(self, run: Callable[[], object]) -> tuple[None, float]:
        return None, self.time(run)[0]

    def free(self) -> None:
        """Nothing to give back."""


Timer = CudaTimer | HostTimer


def timer_of(device: torch.device) -> Timer:
    return CudaTimer() if device.type == "cuda" else HostTimer()


class Stopwatch:
    """Named moments of a step: of the GPU's stream, which they do not hold up, or of the CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.moments: dict[str, object] = {}

    def mark(self, name: str) -> None:
        if self.device.type == "cuda":
            self.moments[name] = torch.cuda.Event(enable_timing=True)
            self.moments[name].record()
        else:
            self.moments[name] = time.perf_counter()

    def ms(self, start: str, end: str) -> float:
        first, last = self.moments[start], self.moments[end]
        if self.device.type == "cuda":
            last.synchronize()
            return first.elapsed_time(last)
        return (last - first) * 1e3


def failure(error: Exception) -> str:
    """What went wrong, in one short line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}"[:200]


def interleaved(
    subjects: dict[str, Callable[[], object]],
    timer: Timer,
    rounds: int = 15,
    budget: float = 1.0,
    sustained: bool = False,
) -> dict[str, dict]:
    """Time each subject in turn, in ``rounds`` rounds at most and in ``budget`` seconds each (three rounds at least).

    sustained: let each run back to back for a moment before its time counts.

    Returns:
        For each subject its time in ms (median ``ms``, quartiles ``low`` and ``high``), the host's (``host_ms``), the
        number of ``rounds`` and ``peak_mib``, the memory above what was allocated before; or a ``note`` on why not.
    """
    peaks, quota, repeats, failed = {}, {}, {}, {}

    def attempt(name: str, run: Callable[[], object]) -> object:
        try:
            return run()
        except Exception as error:
            failed[name] = failure(error)
        timer.free()

    for name, run in subjects.items():
        attempt(name, run)  # compilation
        measured = None if name in failed else attempt(name, lambda run=run: timer.peak(run))
        if measured is not None:
            peaks[name], cost = measured
            repeats[name] = max(2, round(WINDOW / cost)) if sustained else 1
            quota[name] = min(rounds, max(MIN_ROUNDS, int(budget * 1e3 / (cost * repeats[name]))))
    samples: dict[str, list] = {name: [] for name in quota}
    most = max(quota.values(), default=0)
    for i in range(most):
        for name, count in quota.items():
            due = (i + 1) * count // most > i * count // most  # its rounds are spread evenly over all
            if due and name not in failed:
                samples[name].append(attempt(name, lambda name=name: timer.time(subjects[name], repeats[name])))
    return {
        name: {"note": failed[name]} if name in failed else _summary(samples[name], peaks[name]) for name in subjects
    }


def _summary(samples: list[tuple[float, float]], peak: float | None) -> dict:
    times, host = zip(*samples, strict=True)
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {
        "ms": median,
        "low": low,
        "high": high,
        "host_ms": statistics.median(host),
        "peak_mib": peak,
        "rounds": len(times),
    }


def version(package: str) -> str | None:
    """Of an installed distribution; None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: torch.device, packages: list[str], commit: str | None = None) -> dict:
    """The machine and the software that a result was made with. commit: recorded instead of git's HEAD."""
    cuda = device.type == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "driver": driver.splitlines()[0] if driver else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "packages": {name: found for name in packages if (found := version(name))},
        "commit": commit or _output("git", "rev-parse", "HEAD") or "unknown",
    }


def command(module: str, parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """What gives a result again: the options that are not their defaults, but for those that do not change it."""
    words = [f"python -m {module}"]
    for name, value in vars(args).items():
        if value != parser.get_default(name) and name not in ("output", "commit"):
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def write(path: Path, report: dict) -> None:
    """As JSON, at once: what is interrupted leaves the file that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f"{path.name}.new")
    made.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    made.replace(path)
