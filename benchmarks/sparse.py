"""Sparse gradients beside exact ones: time, dense tokens, error, and what looking for entries costs.

    python -m benchmarks.sparse --output benchmarks/results/sparse-h200.json

A step is the whole method (teacher, student, gate, gradients), as in ``benchmarks.compare``, on the same data, beside
the bare matrix products of the same rounds. ``dense_share``: of the tokens, those that were made exactly. ``bound``:
what is certified of dL/dlogits. ``error``: how far the gradients are from exact ones, relative in the Frobenius norm.
``collection``: the student's forward pass and the choice of entries and dense tokens, without any gradient, over the
bare product. ``kernels_ms``: the device time of each kernel in one step with a frozen head, profiled on a GPU that has
just been idle. The last two are for GPUs alone.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.compare import FLOORS, is_long, over_floor, parse_shapes, run_options, shape_of
from benchmarks.data import GENERATORS
from benchmarks.measure import command, environment, interleaved, timer_of, write
from benchmarks.peers import egrsd_step
from benchmarks.problem import Problem, relative
from egrsd_kernels.backends import DEFAULT_CHUNK_BYTES, Needs, Sparse, VocabularyStatistics
from egrsd_kernels.backends import triton as triton_backend
from egrsd_kernels.head import Head
from egrsd_kernels.rows import Rows

FIGURES = {"frozen": False, "trained": True}


def collect(p: Problem, tolerance: float) -> Sparse:
    """The student's pass as far as it goes without gradients, each token's dL/dlogp its credit; what it left out."""
    rows = Rows.build(torch.ones_like(p.targets, dtype=torch.bool), p.credit != 0)
    logp, sparse = torch.zeros_like(p.advantages), Sparse.of(tolerance, p.targets)
    triton_backend.student_pass(
        Head(p.weight), 1.0, p.hidden[None], p.targets, rows, VocabularyStatistics(logp), lambda *_: p.credit,
        Needs(False, False, False), DEFAULT_CHUNK_BYTES, sparse,
    )  # fmt: skip
    return sparse


def kernels_ms(p: Problem, tolerance: float) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        egrsd_step(p, False, grad_mode="sparse", sparse_tol=tolerance)
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / 1e3 for event in found.key_averages()}


def measure(p: Problem, tolerances: list[float], device: torch.device, **effort) -> dict:
    modes = {"exact": {}}
    modes |= {f"2^{math.log2(at):g}": {"grad_mode": "sparse", "sparse_tol": at} for at in tolerances}
    subjects = {("product", name): run for name, run in p.products().items()}
    rows = []
    for mode, options in modes.items():
        for figure, trained in FIGURES.items():
            subjects[mode, figure] = partial(egrsd_step, p, trained, **options)
        if options and device.type == "cuda":
            subjects[mode, "collection"] = partial(collect, p, options["sparse_tol"])
    want = {figure: subjects["exact", figure]()[:2] for figure in FIGURES}
    for mode, options in modes.items():
        for figure in FIGURES:
            *got, stats = subjects[mode, figure]()
            row = {"mode": mode, "head": figure}
            if options:
                row |= {"tolerance": options["sparse_tol"]}
                row |= {"dense_share": (stats.gradient_error_bound == 0).double().mean().item()}
                row |= {"bound": stats.gradient_error_bound.double().sum().item()}
                pairs = zip(got, want[figure], strict=True)
                row |= {"error": [relative(a, b) for a, b in pairs if a is not None]}
            rows.append(row)
    del want, got
    times = interleaved(subjects, timer_of(device), sustained=is_long(p), **effort)
    products = {name: time for (key, name), time in times.items() if key == "product"}
    for row in rows:
        time = over_floor(times[row["mode"], row["head"]], products, FLOORS[row["head"]])
        if "ms" in time:
            time["over_exact"] = time["ms"] / times["exact", row["head"]].get("ms", math.nan)
        row["time"] = time
    found = {
        mode: over_floor(time, products, FLOORS["statistics"])
        for (mode, figure), time in times.items()
        if figure == "collection"
    }
    profiled = modes.items() if device.type == "cuda" else ()
    kernels = {mode: kernels_ms(p, options["sparse_tol"]) for mode, options in profiled if options}
    return {"products": products, "rows": rows, "collection": found, "kernels_ms": kernels}


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
    for mode, time in entry["collection"].items():
        ratio = f"{time['ratio']:.3f} x the bare product" if "ms" in time else time["note"]
        lines.append(f"  {mode}, forward pass and collection: {ratio}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--shapes", default="8b:16384,4b:16384", help="size:tokens,... with a model's size or D")
    parser.add_argument("--data", default=",".join(GENERATORS))
    parser.add_argument("--tolerances", type=int, nargs="+", default=[-10, -8, -6], help="as powers of 2")
    run_options(parser, budget=0.5)
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
            found = measure(p, chosen, device, rounds=args.rounds, budget=args.budget)
            report["shapes"].append(shape_of(p, data) | found)
            del p
            write(args.output, report)
            print(describe(report["shapes"][-1]), flush=True)


if __name__ == "__main__":
    main()
