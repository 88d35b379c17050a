"""``egrsd sweep``: a training for each γ, W and seed, and what became of them."""

import argparse
import os
import queue
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from egrsd_kernels.extras import how_to_install

from .command import CommandError
from .train import add_config, find_config, read_config

DESCRIPTION = """Train every combination of γ, lookahead W and seed, each in a process and folder of its own, and write
sweep.json (every cell), sweep.png (heat maps of the metric and of the mean response length) and a table. Called again,
it trains only what is not finished, from the last checkpoint where there is one. γ = 0 leaves every gate open, so one
training serves its cells of all W."""

TRAIN = (sys.executable, "-u", "-m", "egrsd_kernels", "train")
KEYS = ("gamma", "lookahead", "seed")
LOG = "train.log"


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "sweep", help="train over a grid of gamma and lookahead", description=DESCRIPTION, allow_abbrev=False
    )
    add_config(parser)
    parser.add_argument("--gamma", type=float, nargs="+", required=True, metavar="γ", help="strengths of the gate")
    parser.add_argument("--lookahead", type=int, nargs="+", required=True, metavar="W", help="lookahead windows")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="default: the config's seed, or 42")
    parser.add_argument(
        "--metric",
        default="reward",
        help="a logged value: its mean over the last tenth of the logged steps, or the last evaluation's if the name "
        "begins with eval_ (default: %(default)s)",
    )
    help = "trainings at once (default: 1); each sees one of the visible GPUs, in turn"
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help=help)
    help = "folder of the sweep (default: the config's name and -sweep)"
    parser.add_argument("--output", type=Path, metavar="DIR", help=help)
    parser.set_defaults(run=run, overrides=[])


def run(args: argparse.Namespace) -> None:
    """Train what is not finished; write and print the results. A :class:`CommandError` if a cell has none."""
    for package in ("trl", "rich", "matplotlib"):
        if find_spec(package) is None:  # else a sweep would fail after its trainings
            raise CommandError(f"a sweep needs {package}: {how_to_install('trl')}")
    from rich.console import Console

    from .cells import Cell, draw, is_finished, read_cell, table, write_cells

    source = find_config(args.config)
    config = read_config(source)
    for option in args.overrides:
        if option.split("=")[0].replace("-", "_") in ("__seed", "__output_dir"):
            raise CommandError(f"{option}: a sweep sets it; see --seeds and --output")
    if args.jobs < 1:
        raise CommandError(f"jobs: expected at least 1, got {args.jobs}")
    seeds = args.seeds or [config.get("seed", 42)]
    _check_grid(args.gamma, args.lookahead, seeds)
    output = args.output or Path(f"{source.stem}-sweep")
    copy = _keep_config(output / "config.yaml", source, args.overrides)

    # With a schedule, gamma is where γ begins: gamma = 0 does not leave the gates open.
    constant = not any("gamma_schedule" in key.replace("-", "_") for key in (*config, *args.overrides))
    runs = {}
    for gamma, lookahead, seed in product(args.gamma, args.lookahead, seeds):
        runs[gamma, lookahead, seed] = (gamma, 0 if gamma == 0 and constant else lookahead, seed)
    folders = {run: output / "gamma{}-lookahead{}-seed{}".format(*run) for run in runs.values()}
    commands = {
        folder: [*TRAIN, str(copy), *args.overrides, f"--output_dir={folder}"]
        + [f"--{name}={value}" for name, value in zip(KEYS, run, strict=True)]
        # A run without a checkpoint begins anew and replaces what it has left.
        + ["--resume" if any(folder.glob("checkpoint-*")) else "--overwrite_output_dir=True"]
        for run, folder in folders.items()
        if not is_finished(folder)
    }
    statuses = train_all(commands, args.jobs)

    cells = []
    for key, run in runs.items():
        folder = folders[run]
        names = {**dict(zip(KEYS, key, strict=True)), "run": str(folder)}
        if statuses.get(folder):
            cells.append(Cell(**names, error=f"exit status {statuses[folder]}, see {folder / LOG}"))
        else:
            cells.append(read_cell(args.metric, **names))
    write_cells(output / "sweep.json", args.metric, cells)
    draw(output / "sweep.png", cells, args.metric)
    Console().print(table(cells, args.metric))
    print(f"{output}: sweep.json, sweep.png")
    failed = {cell.run: cell.error for cell in cells if cell.error}
    if failed:
        reasons = "; ".join(dict.fromkeys(failed.values()))
        raise CommandError(f"{len(failed)} of {len(folders)} runs failed: {reasons}")


def _check_grid(gammas: Sequence[float], lookaheads: Sequence[int], seeds: Sequence[int]) -> None:
    """A CommandError for what every training would refuse, half a minute after its start."""
    from egrsd_kernels.checks import integer, number

    try:
        for gamma in gammas:
            number("gamma", gamma, low=0)
        for lookahead in lookaheads:
            integer("lookahead", lookahead, low=0)
        for seed in seeds:
            integer("seed", int(seed) if str(seed).isdecimal() else seed, low=0)  # a YAML's may be text
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error


def _keep_config(copy: Path, source: Path, overrides: Sequence[str]) -> Path:
    """A copy of the config for all runs, or a CommandError if the folder's runs were trained with another one."""
    text = f"# egrsd train {shlex.join(['config.yaml', *overrides])}\n" + source.read_text(encoding="utf-8")
    try:
        if copy.is_file() and copy.read_text(encoding="utf-8") != text:
            raise CommandError(f"output: {copy.parent} holds runs of another config or with other options; see {copy}")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"output: {error}") from error
    return copy


def train_all(commands: Mapping[Path, Sequence[str]], jobs: int) -> dict[Path, int]:
    """The exit status of each command, by the folder that its log goes to."""
    from rich.console import Console
    from rich.progress import Progress

    gpus = _visible_gpus()
    slots: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for job in range(jobs):
        slots.put(gpus[job % len(gpus)] if gpus else None)

    def train(folder: Path) -> tuple[Path, int]:
        folder.mkdir(parents=True, exist_ok=True)
        gpu = slots.get()
        try:
            environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
            with (folder / LOG).open("a", encoding="utf-8") as log:
                finished = subprocess.run(
                    commands[folder], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
                )
        finally:
            slots.put(gpu)
        return folder, finished.returncode

    statuses = {}
    console = Console(stderr=True)
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(jobs) as pool,
    ):
        task = progress.add_task("training", total=len(commands))
        try:
            for future in as_completed([pool.submit(train, folder) for folder in commands]):
                folder, statuses[folder] = future.result()
                progress.advance(task)
        except BaseException:  # Ctrl-C: it ends the trainings too, and no further one shall begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return statuses


def _visible_gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]
