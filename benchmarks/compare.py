"""An EGRSD step by every peer, beside the bare matrix products, on one GPU.

    python -m benchmarks.compare --output benchmarks/results/compare-h100.json

Results are merged into the output shape by shape. A run that is cut off keeps what it has; a run of some shapes or
some peers replaces these rows only. Ratios are against the bare products of the same run: 1 forward product for the
teacher's statistics, 2 forward and 1 backward for a step with a frozen head, and 1 more for a trained one. Accuracy is
checked against float64 before a time counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from benchmarks.data import GENERATORS, HIDDEN_SIZES, VOCABULARY
from benchmarks.measure import Timer, command, environment, failure, interleaved, timer_of, version, write
from benchmarks.peers import PEERS, Peer, packages
from benchmarks.problem import Exact, Problem, wrong

TOKENS = (1024, 4096, 16384, 65536)
# Bare products (forward, dhidden, dweight) in each figure of a row.
FLOORS = {"statistics": (1, 0, 0), "frozen": (2, 1, 0), "trained": (2, 1, 1)}
SHAPE = ("hidden_size", "tokens", "vocabulary", "dtype", "data")
# A step brings a GPU to its power limit if one product has as many multiply-adds as this, about 3 ms of them.
SUSTAINED = 1 << 40


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """(D, N) of "8b:16384,2560:4096,...": a model's size by name, or D itself."""
    pairs = (item.split(":") for item in text.split(","))
    return [(HIDDEN_SIZES.get(size) or int(size), int(n)) for size, n in pairs]


def run_options(parser: argparse.ArgumentParser, budget: float) -> None:
    """How long to measure and on what, and what is recorded of it."""
    parser.add_argument("--rounds", type=int, default=15, help="at most, for each subject")
    parser.add_argument("--budget", type=float, default=budget, help="seconds for each subject, three rounds at least")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--commit", default=None, help="recorded in the result; default: git's HEAD")


def shape_of(p: Problem, data: str) -> dict:
    vocabulary, size = p.weight.shape
    values = (size, len(p.hidden), vocabulary, str(p.weight.dtype).removeprefix("torch."), data)
    return dict(zip(SHAPE, values, strict=True))


def is_long(p: Problem) -> bool:
    """Whether a step brings a GPU to its power limit."""
    return p.weight.numel() * len(p.hidden) >= SUSTAINED


def over_floor(time: dict, products: dict[str, dict], counts: tuple[int, ...]) -> dict:
    """A time with its floor, so many of each of the bare products, and its ratio to that; a note stays as it is."""
    if "ms" not in time:
        return time
    floor = sum(count * product["ms"] for count, product in zip(counts, products.values(), strict=True))
    return time | {"floor_ms": floor, "ratio": time["ms"] / floor}


def check(peer: Peer, problem: Problem, exact: Exact, timer: Timer) -> tuple[dict, dict]:
    """A peer's row without times, and the subjects to time for it by figure."""
    row = {"peer": peer.key, "name": peer.name, "version": version(peer.package) if peer.package else torch.__version__}
    row |= {"cannot": peer.cannot, "per_token": peer.per_token, "error": {}}
    try:
        calls = peer.build(problem)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError)
        return row | {"note": f"missing: {error.name}" if missing else failure(error)}, {}
    subjects = {}
    for figure, trained in (("frozen", False), ("trained", True)):
        try:
            errors = exact.errors(calls.step(trained))
            row["error"] |= {name: max(value, row["error"].get(name, value)) for name, value in errors.items()}
            note = wrong(errors)
        except Exception as error:
            note = failure(error)
        timer.free()
        if note:
            row[figure] = {"note": note}
        else:
            subjects[figure] = partial(calls.step, trained)
    if calls.statistics and subjects:
        subjects["statistics"] = calls.statistics
    return row, subjects


def measure(
    size: int, n: int, peers: Iterable[Peer], device: torch.device, vocabulary: int, data: str, **effort
) -> dict:
    """One shape's entry in the result file. effort: ``rounds`` and ``budget`` of :func:`interleaved`."""
    timer = timer_of(device)
    problem = Problem.draw(size, n, vocabulary, data, device)
    exact = Exact(problem)
    timer.free()
    rows, subjects = [], {("gemm", name): run for name, run in problem.products().items()}
    for peer in peers:
        print(f"D = {size}, N = {n}: checking {peer.key}", file=sys.stderr, flush=True)
        row, figures = check(peer, problem, exact, timer)
        rows.append(row)
        subjects |= {(peer.key, figure): run for figure, run in figures.items()}
    times = interleaved(subjects, timer, sustained=is_long(problem), **effort)
    timer.free()  # a device that has died raises here, before its rows replace others
    products = {name: time for (key, name), time in times.items() if key == "gemm"}
    for row in rows:
        for figure, counts in FLOORS.items():
            if time := times.get((row["peer"], figure)):
                row[figure] = over_floor(time, products, counts)
    return {
        **shape_of(problem, data),
        "distribution": exact.distribution,
        "products": products,
        "rows": rows,
    }


def merge(report: dict, run: dict, entry: dict) -> dict:
    """The report with one more shape, whose rows replace those of the same peers; ``run`` says how they were made."""
    for old in report.get("runs", []):
        if old["device"] != run["device"]:
            raise ValueError(f"these results are of {old['device']}; write those of {run['device']} to another file")
    runs = {**{old["id"]: old for old in report.get("runs", [])}, run["id"]: run}
    shapes = {_key(shape): shape for shape in report.get("shapes", [])}
    rows = {row["peer"]: row for row in shapes.get(_key(entry), {}).get("rows", [])}
    # A package that is missing this time does not take away what was measured where it was there.
    new = [row for row in entry["rows"] if "note" not in row or row["peer"] not in rows]
    rows |= {row["peer"]: row | {"run": run["id"]} for row in new}
    order = [*PEERS, *rows]
    shapes[_key(entry)] = entry | {
        "run": run["id"],
        "rows": sorted(rows.values(), key=lambda r: order.index(r["peer"])),
    }
    used = {row["run"] for shape in shapes.values() for row in (shape, *shape["rows"])}
    return {
        "runs": [runs[name] for name in runs if name in used],
        "shapes": [shapes[key] for key in sorted(shapes)],
    }


def _key(shape: dict) -> tuple:
    return tuple(shape[name] for name in SHAPE)


def describe(entry: dict) -> str:
    """A shape's figures, to read as they come."""
    products = ", ".join(f"{name} {time.get('ms', float('nan')):.2f} ms" for name, time in entry["products"].items())
    lines = [f"D = {entry['hidden_size']}, N = {entry['tokens']}, {entry['data']}: bare products {products}"]
    lines.append(f"  {entry['distribution']}")
    for row in entry["rows"]:
        cells = [f"  {row['peer']:13s}"]
        for figure in FLOORS:
            time = row.get(figure, {})
            if "ms" in time:
                cells.append(f"{figure} {time['ms']:9.3f} ms {time['ratio']:6.3f} x {time['peak_mib'] or 0:7.0f} MiB")
            elif time:
                cells.append(f"{figure} {time['note']}")
        cells += [f"{name} {value:.1e}" for name, value in row["error"].items()]
        lines.append("  ".join([*cells, row.get("note", "")]).rstrip())
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    everything = ",".join(f"{size}:{n}" for n in TOKENS for size in HIDDEN_SIZES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON; what it holds already is kept")
    parser.add_argument("--shapes", default=everything, help="size:tokens,... with a model's size or D")
    parser.add_argument("--only", default=",".join(PEERS), help=f"comma-separated, of {', '.join(PEERS)}")
    parser.add_argument("--data", choices=GENERATORS, default="peaked")
    run_options(parser, budget=1.0)
    args = parser.parse_args(argv)
    unknown = set(args.only.split(",")) - PEERS.keys()
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}: expected some of {', '.join(PEERS)}")
    peers = [PEERS[key] for key in args.only.split(",")]
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    report = json.loads(args.output.read_text()) if args.output.exists() else {}
    run = {
        "id": 1 + max((old["id"] for old in report.get("runs", [])), default=0),
        "command": command("benchmarks.compare", parser, args),
    }
    run |= environment(device, packages(), args.commit)
    for size, n in parse_shapes(args.shapes):
        torch.compiler.reset()  # compiled code of earlier shapes counts against a limit
        try:
            entry = measure(size, n, peers, device, args.vocabulary, args.data, rounds=args.rounds, budget=args.budget)
        except torch.OutOfMemoryError:
            print(f"D = {size}, N = {n}: no memory for the operands and the float64 check", flush=True)
            continue
        report = merge(report, run, entry)
        write(args.output, report)
        print(describe(entry), flush=True)


if __name__ == "__main__":
    main()
