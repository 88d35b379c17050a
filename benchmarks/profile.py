"""What limits the main kernels, by Nsight Compute, on one GPU.

    python -m benchmarks.profile --output benchmarks/results/profile-h100.json

A step with a frozen head, and one with a trained one, run under ``ncu``; every launch of a matrix kernel that does
work is recorded: its time, how busy the tensor cores were, and what memory and L2 carried. The clocks are left alone,
so times are those of a GPU that has just been idle; what counts here are the shares.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks.compare import parse_shapes
from benchmarks.data import VOCABULARY
from benchmarks.measure import command, environment, write
from benchmarks.peers import PEERS
from benchmarks.problem import Problem

KERNELS = ("vocab_kernel", "hidden_kernel", "head_kernel")
METRICS = {
    "gpu__time_duration.sum": "time",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor_pipe_percent",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2_percent",
    "smsp__cycles_active.avg": "cycles",
}
UNITS = {"ns": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "nsecond": 1e-9, "s": 1.0}
UNITS |= {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
IDLE = 20e-6  # s: a launch that finds nothing to do is shorter


def records(report: str) -> list[dict]:
    """One for each launch that did work, from ncu's CSV."""
    lines = report[report.index('"ID"') :].splitlines()
    launches: dict[str, dict] = defaultdict(dict)
    for row in csv.DictReader(lines):
        launch = launches[row["ID"]]
        launch["kernel"] = row["Kernel Name"]
        if row["Metric Value"] == "n/a":
            raise SystemExit(f"this GPU has no metric {row['Metric Name']}")
        value = float(row["Metric Value"].replace(",", "")) * UNITS.get(row["Metric Unit"], 1.0)
        launch[METRICS[row["Metric Name"]]] = value
    out = []
    for launch in launches.values():
        if (seconds := launch.pop("time")) > IDLE:
            moved = launch.pop("read", 0.0), launch.pop("written", 0.0)
            launch |= {"ms": seconds * 1e3, "read_gb_per_s": moved[0] / seconds / 1e9}
            launch |= {"written_gb_per_s": moved[1] / seconds / 1e9}
            if "cycles" in launch:
                launch["clock_mhz"] = launch.pop("cycles") / seconds / 1e6
            out.append(launch)
    return out


def profile(size: int, n: int, trained: bool) -> list[dict]:
    under_ncu = ["ncu", "--clock-control", "none", "--csv", "--print-units", "base"]
    under_ncu += ["--metrics", ",".join(METRICS), "--kernel-name", f"regex:^({'|'.join(KERNELS)})$"]
    under_ncu += [sys.executable, "-m", "benchmarks.profile", "--step", f"{size}:{n}:{int(trained)}"]
    done = subprocess.run(under_ncu, capture_output=True, text=True)
    if done.returncode or '"ID"' not in done.stdout:
        raise SystemExit(f"ncu failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return records(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="8b:4096,4b:4096", help="size:tokens,...")
    parser.add_argument("--commit", default=None, help="recorded in the result; default: git's HEAD")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--step", help=argparse.SUPPRESS)  # what ncu runs
    args = parser.parse_args()
    if args.step:
        size, n, trained = map(int, args.step.split(":"))
        problem = Problem.draw(size, n, VOCABULARY, "peaked", torch.device("cuda"))
        PEERS["ours"].build(problem).step(bool(trained))
        return torch.cuda.synchronize()
    report = {"command": command("benchmarks.profile", parser, args)}
    report |= environment(torch.device("cuda"), [], args.commit) | {"steps": []}
    for size, n in parse_shapes(args.shapes):
        for trained in (False, True):
            found = profile(size, n, trained)
            entry = {"hidden_size": size, "tokens": n, "head": "trained" if trained else "frozen"}
            report["steps"].append(entry | {"launches": found})
            print(entry)
            for launch in found:
                print("  ", {k: round(v, 3) if isinstance(v, float) else v for k, v in launch.items()}, flush=True)
    if args.output:
        write(args.output, report)


if __name__ == "__main__":
    main()
