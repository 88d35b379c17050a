"""Sparse gradients beside exact ones: time, dense tokens, error, and what looking for entries costs.

    python -m benchmarks.sparse --output benchmarks/results/sparse-h100.json

A step is the whole method (teacher, student, gate, gradients), as in ``benchmarks.compare``, on the same data, beside
the bare matrix products of the same rounds. ``dense_share``: of the tokens, those that were made exactly. ``bound``:
what is certified of dL/dlogits. ``error``: how far the gradients are from exact ones, relative in the Frobenius norm.
``collection``: the device time of the student's forward pass and of finding the entries to keep, over the bare
product's: that of all kernels of a step with a frozen head, less those that make gradients of what was found, and less
the teacher's pass.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.compare import FLOORS, SHAPE, SUSTAINED, parse_shapes
from benchmarks.data import GENERATORS, VOCABULARY
from benchmarks.measure import command, environment, interleaved, timer_of, write
from benchmarks.problem import Problem, relative
from egrsd_kernels import TokenStats, fused_egrsd_loss, token_statistics

FIGURES = {"frozen": False, "trained": True}
# Kernels that make gradients of what was found; the others of a sparse step are passes over the vocabulary, or look.
GRADIENTS = ("hidden_kernel", "finish_hidden_kernel", "gather_hidden_kernel", "drop_target_kernel", "set_aside_kernel")
GRADIENTS += ("factor_kernel", "multiply_kernel")


def step(p: Problem, trained: bool, **options) -> tuple[list[torch.Tensor], TokenStats]:
    """The gradients that are asked for, and the statistics."""
    leaves = p.leaves(trained)
    loss, stats = fused_egrsd_loss(
        *leaves, p.teacher_hidden, p.targets, p.advantages, lookahead=3, return_stats=True, **options
    )
    loss.backward()
    return [leaf.grad for leaf in leaves if leaf.requires_grad], stats


def device_ms(run: Callable[[], object]) -> dict[str, float]:
    """The device time of each kernel of a run."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / 1e3 for event in found.key_averages()}


def collection(p: Problem, tolerance: float, rounds: int = 5) -> dict:
    """The forward pass with collection over the bare product, and each kernel's time in a step; medians."""
    subjects = {
        "product": partial(p.forward_product, p.hidden),
        "teacher": partial(token_statistics, p.teacher_hidden, p.weight, p.targets),
        "step": partial(step, p, False, grad_mode="sparse", sparse_tol=tolerance),
    }
    samples = [{name: device_ms(run) for name, run in subjects.items()} for _ in range(rounds)]
    ratios = []
    for sample in samples:
        forward = sum(ms for name, ms in sample["step"].items() if name not in GRADIENTS)
        ratios.append((forward - sum(sample["teacher"].values())) / sum(sample["product"].values()))
    names = sorted(samples[0]["step"])
    kernels = {name: statistics.median(sample["step"].get(name, 0.0) for sample in samples) for name in names}
    return {"ratio": statistics.median(ratios), "ratios": ratios, "kernels_ms": kernels}


def measure(p: Problem, tolerances: list[float], device: torch.device, sustained: bool, **effort) -> dict:
    modes = {"exact": {}}
    modes |= {f"2^{math.log2(at):g}": {"grad_mode": "sparse", "sparse_tol": at} for at in tolerances}
    subjects = {("product", name): run for name, run in p.products().items()}
    rows = []
    for mode, options in modes.items():
        for figure, trained in FIGURES.items():
            subjects[mode, figure] = partial(step, p, trained, **options)
    want = {figure: subjects["exact", figure]()[0] for figure in FIGURES}
    for mode, options in modes.items():
        for figure in FIGURES:
            got, stats = subjects[mode, figure]()
            row = {"mode": mode, "head": figure}
            if options:
                row |= {"tolerance": options["sparse_tol"]}
                row |= {"dense_share": (stats.gradient_error_bound == 0).double().mean().item()}
                row |= {"bound": stats.gradient_error_bound.double().sum().item()}
                row |= {"error": [relative(a, b) for a, b in zip(got, want[figure], strict=True)]}
            rows.append(row)
    del want, got
    times = interleaved(subjects, timer_of(device), sustained=sustained, **effort)
    products = {name: time for (key, name), time in times.items() if key == "product"}
    for row in rows:
        time = times[row["mode"], row["head"]]
        if "ms" in time:
            counts = FLOORS[row["head"]]
            floor = sum(count * product["ms"] for count, product in zip(counts, products.values(), strict=True))
            time |= {"floor_ms": floor, "ratio": time["ms"] / floor}
            time |= {"over_exact": time["ms"] / times["exact", row["head"]].get("ms", math.nan)}
        row["time"] = time
    return {"products": products, "rows": rows}


def describe(entry: dict) -> str:
    lines = [f"D = {entry['hidden_size']}, N = {entry['tokens']}, {entry['data']}"]
    for row in entry["rows"]:
        time = row["time"]
        cells = [f"  {row['mode']:6s} {row['head']:8s}"]
        if "ms" in time:
            cells.append(f"{time['ms']:8.2f} ms, {time['ratio']:.3f} x the floor, {time['over_exact']:.3f} x exact")
            cells.append(f"{time['peak_mib'] or 0:.0f} MiB")
        if "bound" in row:
            errors = ", ".join(f"{error:.1e}" for error in row["error"])
            cells.append(f"dense {row['dense_share']:.1%}, bound {row['bound']:.1e}, error {errors}")
        lines.append("  ".join([*cells, time.get("note", "")]).rstrip())
    for tolerance, found in entry["collection"].items():
        lines.append(f"  forward and collection at {tolerance}: {found['ratio']:.3f} x the bare product")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--shapes", default="8b:16384,4b:16384", help="size:tokens,... with a model's size or D")
    parser.add_argument("--data", default=",".join(GENERATORS))
    parser.add_argument("--tolerances", type=int, nargs="+", default=[-10, -8, -6], help="as powers of 2")
    parser.add_argument("--rounds", type=int, default=15, help="at most, for each subject")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds for each subject, three rounds at least")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--commit", default=None, help="recorded in the result; default: git's HEAD")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    tolerances = [2.0**power for power in args.tolerances]
    report = {"command": command("benchmarks.sparse", parser, args)} | environment(device, [], args.commit)
    report["shapes"] = []
    for data in args.data.split(","):
        for size, n in parse_shapes(args.shapes):
            p = Problem.draw(size, n, args.vocabulary, data, device)
            # On flat rows nothing is sparse at any tolerance that one would choose.
            chosen = tolerances if data == "peaked" else tolerances[:1]
            sustained = size * n * args.vocabulary >= SUSTAINED
            found = measure(p, chosen, device, sustained, rounds=args.rounds, budget=args.budget)
            at = {f"2^{math.log2(tolerance):g}": tolerance for tolerance in chosen} if device.type == "cuda" else {}
            found["collection"] = {name: collection(p, tolerance) for name, tolerance in at.items()}
            shape = (size, n, args.vocabulary, str(p.weight.dtype).removeprefix("torch."), data)
            report["shapes"].append(dict(zip(SHAPE, shape, strict=True)) | found)
            del p
            write(args.output, report)
            print(describe(report["shapes"][-1]), flush=True)


if __name__ == "__main__":
    main()
