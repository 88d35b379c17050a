"""A whole update of a Qwen3 model with LoRA, as users would measure it: each way in a cell of its own.

    python -m benchmarks.end_to_end --output benchmarks/results/end_to_end-h200.json --lanes 2 --seconds 1100
    python -m benchmarks.end_to_end --output FILE --cells '1.7b/trl*,4b/prefix*' --missing
    python -m benchmarks.end_to_end --output FILE --cells 'tiny/*' --device cpu

A cell is ``shape/way`` or ``shape/way/setting``. :mod:`benchmarks.updates` says what each way does, and
:mod:`benchmarks.rollouts` to what. Settings: ``grpo``, GRPO's loss without a teacher; ``groups-of-16``, half as many
groups of twice the size, whose solution has 1,000 tokens; ``one-group``; ``largest``, no time but the largest
number of rollouts that one forward pass takes in ``--gib`` where layers are computed again.

Each cell is a process of its own, so that a crash or want of memory is its result and no one else's. It has a budget of
seconds, and all together have ``--seconds``; cells come in order of worth, the file is written after each, and
``--missing`` goes on with those that have no figure there. ``--lanes`` cells run at once, each on a GPU of its own.

A way is cut up so that it is fastest in ``--gib``: activations are kept in as many rollouts or tokens at a time as fit,
and unless they fit whole, layers that are computed again are timed too; of TRL and of what is compared with it, always.
What counts is the fastest, the rest stands in ``tried``, also what is foreseen not to fit and so not run. Where the
allocator ran out of memory, freed its cache and asked again (``alloc_retries``), smaller plans are timed as well. Peaks
are what is allocated; of ways with CUDA graphs, whose pools that leaves out, what is reserved. Before a time counts,
log p of student and teacher is compared with float32 on the first rollouts: off by no more than four times what padded
rows in bfloat16 are (heads that round logits to 16 bits, by 0.1 nat more). ``products_ms``: the bare products of the
layers' frozen weights, none twice and no token twice (teacher forward; student forward and hidden gradient), in the
same process.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import command, environment, failure, write
from benchmarks.rollouts import SHAPES, SHARED_SHAPE, Rollouts
from benchmarks.timeline import profile
from benchmarks.updates import LEADS, OURS, WAYS, Plan, Task, Way, bare_products, exact_logp, fastest_again, rms

GIB = 2**30
LOGITS_IN_16_BITS = 0.1  # nat
PACKAGES = ["transformers", "peft", "accelerate", "trl", "liger-kernel", "unsloth"]
SETTINGS = ("", "grpo", "groups-of-16", "one-group", "largest")
PROFILED = ("trl", "packed-compiled", *OURS)
OUT_OF_MEMORY = "out of memory"
LARGEST_PACK = 16_384  # tokens
QUICK = 3_000.0  # ms of an update that may be tried in smaller parts, too
# What layers keep over the operands of products, attention and activations in 16 bits, as seen at 1.7B on an H200.
KEPT_OVER_OPERANDS = {"compiled": 1.3, "eager": 2.2}
TRIED = ("kept", "size", "ms", "peak_gib", "above_weights_gib", "alloc_retries", "error")  # of each plan

# ------------------------------------------------------------------------------------------------------------ the cells


@dataclass(frozen=True)
class Cell:
    shape: str
    way: str
    setting: str = ""

    @classmethod
    def of(cls, name: str) -> Cell:
        shape, way, *setting = name.split("/")
        cell = cls(shape, way, "/".join(setting))
        if shape not in SHAPES or way not in WAYS or cell.setting not in SETTINGS:
            known = (", ".join(filter(None, names)) for names in (SHAPES, WAYS, SETTINGS))
            raise ValueError("{}: expected one of {} / one of {} / nothing or one of {}".format(name, *known))
        return cell

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.shape, self.way, self.setting)))

    @property
    def objective(self) -> str:
        return "grpo" if self.setting == "grpo" else "egrsd"

    @property
    def seconds(self) -> int:
        """It is stopped after these."""
        if self.way in ("trl-compiled", "unsloth"):
            return 270
        once = 170 if WAYS[self.way].compiled or self.setting == "largest" else 110
        return once + 80 * self.always_both + 60 * (self.shape == "8b")

    @property
    def always_both(self) -> bool:
        """Whether layers that are computed again are timed even where activations fit whole."""
        return self.way in LEADS and not self.setting

    def rollouts(self, args: argparse.Namespace) -> Rollouts:
        groups, group, solution = args.groups, args.group, args.solution
        if self.setting == "groups-of-16":
            groups, group, solution = groups // 2, 2 * group, solution * 5 // 3
        elif self.setting == "one-group":
            groups = 1
        vocabulary = {**SHARED_SHAPE, **SHAPES[self.shape]}["vocab_size"]
        return Rollouts.random(vocabulary, groups, group, args.prompt, solution, args.response)


def _cells() -> Iterator[str]:
    """In order of worth: where time ends, the last are missing."""
    first = ("prefix-fused", "trl", "packed-compiled", "padded-compiled")
    others = ("prefix-compiled", "prefix-fused-graphs")
    yield from (f"1.7b/{way}" for way in (*first, *others, "prefix-fused-graphs/one-group"))
    yield from (f"4b/{way}" for way in first)
    yield from (f"{shape}/{way}" for shape in ("8b", "0.6b") for way in LEADS)
    yield from (f"1.7b/{way}/{setting}" for setting in ("groups-of-16", "grpo") for way in LEADS)
    yield from (f"4b/{way}" for way in others)
    yield "1.7b/trl/one-group"
    rest = ("prefix", "trl-liger", "trl-trie", "padded", "packed", "prefix-graphs")
    yield from (f"{shape}/{way}" for shape in ("1.7b", "4b") for way in rest)
    yield from (f"{shape}/{way}/largest" for shape in ("1.7b", "4b") for way in ("trl", "prefix", "padded", "packed"))
    yield from (f"{shape}/{way}" for way in ("trl-compiled", "unsloth") for shape in ("1.7b", "4b"))


CELLS = [Cell.of(name) for name in _cells()]


def chosen(patterns: str | None) -> list[Cell]:
    """Of :data:`CELLS`, in their order, what comma-separated patterns match; other cells by their names behind them."""
    if patterns is None:
        return CELLS
    known = [*CELLS, *(Cell("tiny", way) for way in WAYS)]
    names = patterns.split(",")
    matching = [cell for cell in known if any(fnmatch.fnmatchcase(cell.name, name) for name in names)]
    others = [name for name in names if not any(fnmatch.fnmatchcase(cell.name, name) for cell in known)]
    return [*matching, *map(Cell.of, others)]


# ------------------------------------------------------------------------------------------------------ one cell, timed


def plans(cell: Cell, task: Task, kept: bool) -> list[Plan]:
    """From whole to small."""
    if WAYS[cell.way].packs:
        return [Plan(kept, LARGEST_PACK >> halvings) for halvings in range(4 if kept else 2)]
    count = len(task.rollouts.responses)
    return [Plan(kept, size) for size in (count >> halvings for halvings in range(6)) if size and count % size == 0]


def foreseen_gib(way: Way, task: Task, size: int) -> float:
    """What an update that keeps its activations is likely to take: a compiled layer takes too long to just try it."""
    shape: dict[str, Any] = {**SHARED_SHAPE, **SHAPES[task.shape]}
    hidden, intermediate = shape["hidden_size"], shape["intermediate_size"]
    attention = 2 * shape["head_dim"] * (shape["num_attention_heads"] + shape["num_key_value_heads"])
    layers = task.layers or shape["num_hidden_layers"]
    heads = 1 if shape["tie_word_embeddings"] else 2
    weights = layers * hidden * (attention + 3 * intermediate) + heads * shape["vocab_size"] * hidden
    rows = [len(row) for row in task.rollouts.rows(teacher=False)]
    tokens = min(size, sum(rows)) if way.packs else size * max(rows)
    kept = tokens * layers * (2 * hidden + attention + 3 * intermediate)
    return 2 * (weights + KEPT_OVER_OPERANDS["compiled" if way.compiled else "eager"] * kept) / GIB


def measure(cell: Cell, args: argparse.Namespace, report: Callable[[dict[str, Any]], None]) -> None:
    """Report a row, and again whenever there is more in it."""
    device = torch.device(args.device)
    task = Task(cell.shape, cell.objective, cell.rollouts(args), device, args.layers)
    tokens = int(task.rollouts.lengths.sum())
    row: dict[str, Any] = {"rollouts": len(task.rollouts.responses), "tokens": tokens}
    if cell.setting == "largest":
        return report(row | largest(cell, task, args))
    layers, products = bare_products(task)
    row |= {"products_ms": layers * timed(products, 5, device)[1], "tried": []}
    del products
    release(device)
    exact, way = exact_logp(task), WAYS[cell.way]
    fastest: dict[str, Any] = {}
    for kept in (True, False):
        first = row["tried"][:1]
        if first and "ms" in first[0] and not first[0].get("alloc_retries") and not cell.always_both:
            break
        least = math.inf
        for plan in plans(cell, task, kept):
            if kept and (needed := foreseen_gib(way, task, plan.size)) > args.gib:
                row["tried"].append(plan._asdict() | {"error": f"foreseen to take {needed:.0f} GiB"})
                continue
            release(device)
            best = fastest.get("ms", math.inf)
            found = attempt(lambda plan=plan, best=best: time_plan(cell, task, plan, exact, best, args))
            found = plan._asdict() | found
            row["tried"].append({name: found[name] for name in TRIED if name in found})
            if found.get("ms", math.inf) <= best:
                fastest = found
            report(row | fastest)
            if found.get("error") == OUT_OF_MEMORY or found.get("alloc_retries"):
                continue
            # Of padded rows that nothing is compiled for it is soon known whether fewer at a time are faster.
            if way.packs or way.compiled or not found.get("ms", math.inf) < min(least, QUICK):
                break
            least = found["ms"]


def time_plan(
    cell: Cell, task: Task, plan: Plan, exact: tuple[list[Tensor], list[float]], best: float, args: argparse.Namespace
) -> dict[str, Any]:
    """ms (median, and quartiles), host's ms, GiB, and what log p is off by, in nats; profiled where faster than
    ``best``, ms."""
    way, device = WAYS[cell.way], task.device
    update: Any = way.make(task, plan)
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    start = time.perf_counter()
    seen = update()
    found: dict[str, Any] = {"loss": seen.loss.item(), "first_s": round(time.perf_counter() - start, 1)}
    for name, logp, wanted, rounding in zip(("student", "teacher"), seen[1:3], *exact, strict=True):
        if name == "student" or task.has_teacher:
            found[f"{name}_off"], found[f"{name}_rounding"] = rms(logp[: len(wanted)], wanted), rounding
            if not found[f"{name}_off"] <= 4 * rounding + way.rounded * LOGITS_IN_16_BITS:  # NaN, too
                return found | {"error": f"log p of the {name} is off by {found[f'{name}_off']:.2g} nat"}
    if way.graphs:
        update()  # the first one compiled, this one records
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what compiling took
    start = time.perf_counter()
    update()
    synchronize(device)
    once = time.perf_counter() - start
    retries = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        retries = torch.cuda.memory_stats()["num_alloc_retries"]
    hosts: list[float] = []

    def step() -> None:
        start = time.perf_counter()
        update()
        hosts.append((time.perf_counter() - start) * 1e3)

    repeats = max(2, min(args.repeats, int(10 / once)))
    found |= dict(zip(("low", "ms", "high"), timed(step, repeats, device, warm=True), strict=True))
    found |= {"host_ms": statistics.median(hosts), "tokens_per_second": len(task.targets) / found["ms"] * 1e3}
    if note := getattr(update, "note", None):
        found["note"] = note
    if device.type == "cuda":
        peak = peak_memory(way)
        found |= {"peak_gib": peak / GIB, "above_weights_gib": (peak - held) / GIB}
        found["alloc_retries"] = torch.cuda.memory_stats()["num_alloc_retries"] - retries
        if cell.way in PROFILED and not cell.setting and found["ms"] < best:
            found["profile"] = attempt(lambda: profile(update))  # a time stands without it
    return found


def peak_memory(way: Way) -> int:
    """Bytes. A graph's pool stays reserved between its launches, in which the allocator counts it as free."""
    return torch.cuda.max_memory_reserved() if way.graphs else torch.cuda.max_memory_allocated()


def timed(run: Callable[[], Any], repeats: int, device: torch.device, warm: bool = False) -> list[float]:
    """Quartiles of ms."""
    if not warm:
        run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.quantiles(times, n=4, method="inclusive")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def release(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        if trees := sys.modules.get("torch._inductor.cudagraph_trees"):
            trees.reset_cudagraph_trees()  # the pools of a plan's graphs; Dynamo does it in newer PyTorch alone
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it gives, or its error. The exception, whose frames hold tensors, is gone by then."""
    try:
        return run()
    except Exception as error:  # a plan that fails must not cost the others
        return {"error": OUT_OF_MEMORY if out_of_memory(error) else failure(error)}


def out_of_memory(error: BaseException | None) -> bool:
    """PyTorch's own error, also behind a compiler's, or the one of a library that asked for memory itself."""
    while error is not None:
        text = isinstance(error, RuntimeError) and any(x in str(error) for x in ("out of memory", "ALLOC_FAILED"))
        if isinstance(error, torch.OutOfMemoryError) or text:
            return True
        error = error.__cause__ or error.__context__
    return False


# ---------------------------------------------------------------------------------------------------- the largest batch


def largest(cell: Cell, task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """The largest number of rollouts of one forward pass whose layers are computed again."""
    way, start = WAYS[cell.way], time.perf_counter()
    peaks: dict[int, float] = {}

    def probe(size: int) -> float | None:
        release(task.device)
        groups = -(-size // args.group)
        rollouts = cell.rollouts(argparse.Namespace(**{**vars(args), "groups": groups})).part(0, size)
        some = Task(cell.shape, cell.objective, rollouts, task.device, args.layers)
        plan = Plan(False, 1 << 30 if way.packs else size)
        found = attempt(lambda: run_once(some, plan))
        if found.get("error") == OUT_OF_MEMORY:
            return None
        if "error" in found:
            raise RuntimeError(f"{size} rollouts: {found['error']}")
        peaks[size] = peak_memory(way)
        return peaks[size]

    def run_once(some: Task, plan: Plan) -> dict[str, Any]:
        update = way.make(some, plan)
        for _ in range(3 if way.graphs else 1):  # compiled, recorded, replayed
            loss = update().loss.item()
        return {"loss": loss}

    # Two in a hundred stay out: fragments, and what libraries take beside PyTorch.
    best, fails = largest_batch(probe, 0.98 * args.gib * GIB, args.group, args.largest_seconds)
    return {"largest_rollouts": best, "failing_rollouts": fails, "search_s": round(time.perf_counter() - start, 1),
            "peak_gib_of": {size: peak / GIB for size, peak in peaks.items()}}  # fmt: skip


def largest_batch(
    probe: Callable[[int], float | None],
    capacity: float,
    start: int,
    seconds: float,
    tolerance: float = 0.03,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[int, int | None]:
    """(the largest size that was seen to fit, or 0; the smallest that was seen not to, or None).

    ``probe(n)`` returns the peak memory of a step with n rollouts, or None where it does not fit. Memory grows in a
    straight line, so a few small sizes, quadrupled, say where the end is; one that fails after all is approached by
    bisection, from near the end. It stops within ``tolerance`` of the end, or when ``seconds`` are over.
    """
    fits: dict[int, float] = {}
    fails: int | None = None
    size: int | None = start
    stop = clock() + seconds
    while size is not None and clock() < stop:
        peak = probe(size)
        if peak is None:
            fails = size
        else:
            fits[size] = peak
        size = _next_size(fits, fails, capacity, tolerance)
    return max(fits, default=0), fails


def _next_size(fits: dict[int, float], fails: int | None, capacity: float, tolerance: float) -> int | None:
    *_, below, best = [0, 0, *sorted(fits)]
    end = 4 * best if fails is None else fails - 1
    if below:
        slope = max(fits[best] - fits[below], 1.0) / (best - below)
        end = min(end, best + int((capacity - fits[best]) / slope))
    if end - best <= tolerance * best:
        return None
    if fails is None:
        return end
    middle = (best + fails) // 2
    return max(middle, int(0.95 * end)) if below else max(middle, 1)


# -------------------------------------------------------------------------------------------- all cells, each a process


def run_one(cell: Cell, args: argparse.Namespace) -> None:
    """In a process of its own: the row, with what it was measured on, into ``args.row``."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # names that transformers and PEFT are about to change
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.gib * GIB / torch.cuda.mem_get_info()[1]))
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # a layer that falls back to eager is no compiled one
    machine = environment(device, PACKAGES, args.commit)
    measure(cell, args, lambda row: write(args.row, {"environment": machine, "row": row}))


# It changes what is imported after it, and wants to.
UNSLOTH_FIRST = "import unsloth, runpy; runpy.run_module('benchmarks.end_to_end', run_name='__main__')"


def run_cell(cell: Cell, args: argparse.Namespace, lane: int, seconds: float) -> dict[str, Any]:
    """A cell's process, stopped after ``seconds``; {"environment", "row"}, the former None where it came to nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder, "row.json"), Path(folder, "log")
        begin = ["-c", UNSLOTH_FIRST] if cell.way == "unsloth" else ["-m", "benchmarks.end_to_end"]
        words = [sys.executable, *begin, *args.given, "--one", cell.name, "--row", str(path)]
        variables = {"UNSLOTH_COMPILE_LOCATION": str(Path(folder, "unsloth")), **os.environ, "PYTHONUNBUFFERED": "1"}
        if args.device == "cuda":  # one alone, or Trainer would spread a batch over all
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(args.lanes)))).split(",")
            variables["CUDA_VISIBLE_DEVICES"] = visible[lane]
        start = time.monotonic()
        with log.open("w") as out:
            process = subprocess.Popen(words, stdout=out, stderr=out, env=variables, start_new_session=True)
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = None
        lines = log.read_text(errors="replace").strip().splitlines()
        found = json.loads(path.read_text()) if path.exists() else {"environment": None, "row": {}}
    row = found["row"]
    if status is None:
        row |= {"note" if "ms" in row else "error": f"stopped after {seconds:.0f} s", "stopped_s": seconds}
    elif status and not row.get("error"):
        row["error"] = f"status {status}: {lines[-1][:300] if lines else ''}"
    row = {"cell": cell.name, "shape": cell.shape, "way": cell.way, "setting": cell.setting} | row
    row["wall_s"] = round(time.monotonic() - start, 1)
    if args.verbose:
        print("\n".join(lines[-40:]), flush=True)
    return {"environment": found["environment"], "row": row}


def has_figure(row: dict[str, Any]) -> bool:
    """Whether there is one, and the cell was not stopped before its own time was over, when all the time was."""
    stopped = row.get("stopped_s", math.inf) < Cell.of(row["cell"]).seconds
    return ("ms" in row or "largest_rollouts" in row) and not stopped


def merged(report: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """``report`` with the row of a cell, which takes the place of an earlier one.

    Raises:
        ValueError: the report is of another machine or of other versions.
    """
    machine = {name: value for name, value in (found["environment"] or {}).items() if name != "commit"}
    packages = {**(own := machine.pop("packages", {})), **report.get("packages", {})}
    if other := {name: version for name, version in own.items() if packages[name] != version}:
        found["row"]["packages"] = other  # as Unsloth wants an older TRL
    differing = [name for name, value in machine.items() if report.get(name, value) != value]
    if differing:
        raise ValueError(f"rows measured with another {', '.join(differing)}: give another output file")
    order = {cell.name: number for number, cell in enumerate(CELLS)}
    rows = {row["cell"]: row for row in [*report.get("rows", []), found["row"]]}
    ordered = sorted(rows.values(), key=lambda row: order.get(row["cell"], len(order)))
    return {**report, **machine, "packages": packages, "rows": ordered}


def run_all(cells: Sequence[Cell], args: argparse.Namespace) -> None:
    report = json.loads(args.output.read_text()) if args.output.exists() else {}
    if report and report["settings"] != args.settings:
        raise ValueError(f"{args.output} has other settings, {report['settings']}: give another output file")
    report["settings"] = args.settings
    done = {row["cell"] for row in report.get("rows", []) if has_figure(row)} if args.missing else set()
    waiting = [cell for cell in cells if cell.name not in done]
    stop, lock = time.monotonic() + args.seconds, threading.Lock()
    failed: list[BaseException] = []

    def lane(number: int) -> None:
        nonlocal report
        while True:
            with lock:
                left = stop - time.monotonic()
                # A cell that cannot come to anything is left for the next time.
                if not waiting or left <= min(20, args.seconds / 2) or failed:
                    return
                cell = waiting.pop(0)
            found = run_cell(cell, args, number, min(left, args.cell_seconds or cell.seconds))
            found["row"] |= {"commit": (found["environment"] or {}).get("commit"), "command": args.command}
            with lock:
                try:
                    report = merged(report, found)
                    write(args.output, report)
                except Exception as error:
                    failed.append(error)
                print(show(found["row"]), flush=True)

    lanes = [threading.Thread(target=lane, args=(number,)) for number in range(args.lanes)]
    for one in lanes:
        one.start()
    for one in lanes:
        one.join()
    if failed:
        raise failed[0]
    if waiting:
        print("not begun, --missing goes on with them: " + ", ".join(cell.name for cell in waiting), flush=True)


def show(row: dict[str, Any]) -> str:
    """One line for people."""
    words = [f"{row['cell']:34s}"]
    if "ms" in row:
        over = row["ms"] / row["products_ms"]
        words.append(f"{row['ms']:9.1f} ms, {row['tokens_per_second']:7.0f} tokens/s, {over:5.2f} x products")
        words.append(f"{'kept' if row['kept'] else 'again'} {row['size']}")
    if row.get("peak_gib"):
        words.append(f"{row['above_weights_gib']:.1f} of {row['peak_gib']:.1f} GiB above the weights")
    if row.get("alloc_retries"):
        words.append(f"{row['alloc_retries']} allocations again")
    if again := fastest_again(row):
        words.append(f"again {again['size']}: {again['ms']:.1f} ms, {again.get('above_weights_gib', 0.0):.1f} GiB")
    if "largest_rollouts" in row:
        words.append(f"largest {row['largest_rollouts']} rollouts")
    words += [str(row[name]) for name in ("note", "error") if row.get(name)]
    return ", ".join([*words, f"{row['wall_s']:.0f} s"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON; rows of other cells in it are kept")
    parser.add_argument("--cells", default=None, help="comma-separated names or patterns; default: all that are listed")
    parser.add_argument("--list", action="store_true", help="print the cells, and end")
    parser.add_argument("--missing", action="store_true", help="only cells that have no figure in the file")
    parser.add_argument("--lanes", type=int, default=1, help="cells at once, each on a GPU of its own")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for all cells")
    parser.add_argument("--cell-seconds", type=float, default=None, help="for each; default: by what it compiles")
    parser.add_argument("--gib", type=float, default=78.0, help="GPU memory that a way may take")
    parser.add_argument("--largest-seconds", type=float, default=70.0, help="no new probe starts after them")
    parser.add_argument("--repeats", type=int, default=3, help="timed updates, after two that warm up; at least 2")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group", type=int, default=8, help="rollouts of a prompt")
    parser.add_argument("--prompt", type=int, default=300, help="tokens")
    parser.add_argument("--solution", type=int, default=600, help="tokens that the teacher alone reads")
    parser.add_argument("--response", type=int, default=1024, help="tokens of the longest")
    parser.add_argument("--layers", type=int, default=None, help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--verbose", action="store_true", help="print the end of what each cell says")
    parser.add_argument("--commit", default=None, help="recorded in the result; default: git's HEAD")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--row", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.given = sys.argv[1:] if argv is None else [*argv]
    beside = ("given", "missing", "verbose", "one", "row")
    asked = {name: value for name, value in vars(args).items() if name not in beside}
    args.command = command("benchmarks.end_to_end", parser, argparse.Namespace(**asked))
    names = ("groups", "group", "prompt", "solution", "response", "layers", "gib")
    args.settings = {name: getattr(args, name) for name in names}
    if args.repeats < 2:
        parser.error("--repeats: expected at least 2")
    try:
        args.chosen = chosen(args.cells)
    except ValueError as error:
        parser.error(f"--cells: {error}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.one is not None:
        run_one(Cell.of(args.one), args)
    elif args.list:
        print("\n".join(cell.name for cell in args.chosen))
    else:
        run_all(args.chosen, args)


if __name__ == "__main__":
    main()
