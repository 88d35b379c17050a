"""The kernels against the bare matrix products, on one GPU.

    python -m benchmarks.core --output benchmarks/results/core.json

Every round times each subject once, in turn, so that all of them see the same clocks and temperature; reported are the
median over the rounds and the quartiles. The GPU is kept busy for a moment before each, as it is in training, so that
the host's launches are queued ahead; the host's own time is reported beside. Accuracy is checked in the same run,
against float64 on the first rows.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import triton

from benchmarks.data import HIDDEN_SIZES, VOCABULARY, head_weight, peaked_hidden
from egrsd_kernels import fused_egrsd_loss, token_statistics

CHECKED_ROWS = 1024
HEAD_START = 8_000_000  # clock cycles, about 4 ms


def interleaved(subjects: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Each subject's time in ms (median, quartiles), the host's, and peak memory above what was allocated, in MiB."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    host: dict[str, list[float]] = {name: [] for name in subjects}
    peaks = {}
    for name, run in subjects.items():  # warm-up: compilation, and the memory figure
        run()
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    for _ in range(rounds):
        for name, run in subjects.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            start.record()
            called = time.perf_counter()
            run()
            host[name].append((time.perf_counter() - called) * 1e3)
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    out = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        out[name] = {
            "ms": median,
            "low": low,
            "high": high,
            "host_ms": statistics.median(host[name]),
            "peak_mib": peaks[name],
        }
    return out


def exact(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor):
    """(logp, entropy, d logp / d hidden) of a few rows in float64."""
    z = hidden.double() @ weight.double().t()
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    logp = log_p.gather(1, targets[:, None]).squeeze(1)
    return logp, -(p * log_p).sum(-1), weight[targets].double() - p @ weight.double()


def measure(size: int, n: int, rounds: int) -> dict:
    generator = torch.Generator("cuda").manual_seed(size + n)
    weight = head_weight(VOCABULARY, size, generator)
    hidden, targets = peaked_hidden(weight, n, generator)
    teacher_hidden, _ = peaked_hidden(weight, n, generator)
    advantages = torch.randn(n, device="cuda", generator=generator)

    # The bare products, over as many rows at a time as memory allows, with operands like the real ones.
    rows = min(n, 8192)
    logits = torch.empty(rows, VOCABULARY, device="cuda", dtype=torch.bfloat16).normal_(generator=generator)
    out = torch.empty_like(logits)
    d_hidden, d_weight = torch.empty_like(hidden[:rows]), torch.empty_like(weight)

    def repeat(product: Callable[[], object]) -> Callable[[], None]:
        return lambda: [product() for _ in range(n // rows)] and None

    def step(trained: bool) -> Callable[[], None]:
        def run() -> None:
            h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained)
            fused_egrsd_loss(h, w, teacher_hidden, targets, advantages, lookahead=3).backward()

        return run

    def pointer(run: Callable[[], object]) -> Callable[[], object]:
        return mock.patch.dict(os.environ, EGRSD_KERNELS_TMA="0")(run)

    subjects = {
        "gemm forward": repeat(lambda: torch.mm(hidden[:rows], weight.t(), out=out)),
        "gemm dhidden": repeat(lambda: torch.mm(logits, weight, out=d_hidden)),
        "gemm dweight": repeat(lambda: torch.mm(logits.t(), hidden[:rows], out=d_weight)),
        "statistics": lambda: token_statistics(hidden, weight, targets),
        "statistics, pointer kernels": pointer(lambda: token_statistics(hidden, weight, targets)),
        "loss, frozen head": step(False),
        "loss, frozen head, pointer kernels": pointer(step(False)),
        "loss, trained head": step(True),
    }
    result = interleaved(subjects, rounds)
    forward, dh, dw = (result[f"gemm {name}"]["ms"] for name in ("forward", "dhidden", "dweight"))
    floors = {"statistics": forward, "loss, frozen": 2 * forward + dh, "loss, trained": 2 * forward + dh + dw}
    for name, row in result.items():
        for start, floor in floors.items():
            if name.startswith(start):
                row["floor_ms"], row["ratio"] = floor, row["ms"] / floor

    few = slice(0, min(n, CHECKED_ROWS))
    logp, entropy, gradient = exact(hidden[few], weight, targets[few])
    ours = token_statistics(hidden, weight, targets)
    rounded = (hidden[few] @ weight.t()).double().log_softmax(-1).gather(1, targets[few, None]).squeeze(1)
    h = hidden.detach().requires_grad_()
    loss, stats = fused_egrsd_loss(h, weight, teacher_hidden, targets, advantages, lookahead=3, return_stats=True)
    loss.backward()
    expected = gradient * (-stats.token_advantage[few].double() / n)[:, None]
    error = {
        "logp_max_nat": (ours.logp[few] - logp).abs().max().item(),
        "entropy_max_nat": (ours.entropy[few] - entropy).abs().max().item(),
        "logp_max_nat_of_bf16_logits": (rounded - logp).abs().max().item(),
        "dhidden_relative": ((h.grad[few].double() - expected).norm() / expected.norm()).item(),
    }
    shape = {"hidden_size": size, "tokens": n, "vocabulary": VOCABULARY, "dtype": "bfloat16"}
    return {**shape, "times": result, "error": error}


def small_batches(size: int, rounds: int) -> dict[str, float]:
    """Statistics of n rows, in ms: what two passes over the head cost beside one over the rows of both."""
    generator = torch.Generator("cuda").manual_seed(size)
    weight = head_weight(VOCABULARY, size, generator)
    subjects = {}
    for n in (64, 128, 256, 512, 1024, 2048):
        hidden, targets = peaked_hidden(weight, n, generator)
        subjects[str(n)] = lambda hidden=hidden, targets=targets: token_statistics(hidden, weight, targets)
    return {name: row["ms"] for name, row in interleaved(subjects, rounds).items()}


def commit() -> str:
    try:
        return subprocess.check_output(["git", "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="8b,4b", help=f"comma-separated, of {', '.join(HIDDEN_SIZES)}")
    parser.add_argument("--tokens", default="16384,4096")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--commit", default=None, help="recorded in the result; default: git's HEAD")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    report = {
        "command": f"python -m benchmarks.core --sizes {args.sizes} --tokens {args.tokens} --rounds {args.rounds}",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": args.commit or commit(),
        "shapes": [],
    }
    for name in args.sizes.split(","):
        for n in map(int, args.tokens.split(",")):
            entry = measure(HIDDEN_SIZES[name], n, args.rounds)
            report["shapes"].append(entry)
            print(f"D = {entry['hidden_size']}, N = {n}: {entry['error']}")
            for subject, row in entry["times"].items():
                times = f"{row['ms']:9.3f} ms (host {row['host_ms']:6.2f} ms)  {row['peak_mib']:6.0f} MiB"
                ratio = f"{row['ratio']:6.3f} x floor" if "ratio" in row else ""
                print(f"  {subject:36s} {times}  {ratio}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    report["statistics_ms_by_tokens"] = {"hidden_size": 4096, **small_batches(4096, args.rounds)}
    print(report["statistics_ms_by_tokens"])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
