"""``egrsd inspect``: the token page of a run's rollouts."""

import argparse
import heapq
import math
from collections.abc import Sequence
from pathlib import Path

from egrsd_kernels.credit import REGIMES, TAU_HIGH, TAU_LOW
from egrsd_kernels.rollouts import Rollout, find_rollout_files, read_rollouts, write_token_report

from .command import CommandError

DESCRIPTION = """Write an HTML page that shows rollouts token by token: the teacher's entropy, its lookahead, the gate
and the token advantage, with a filter by regime. The page is one file that loads nothing."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("inspect", help="show rollouts token by token", description=DESCRIPTION)
    parser.add_argument(
        "rollouts",
        type=Path,
        metavar="RUN_OR_ROLLOUTS",
        help="a rollout file, or a folder that holds rollouts*.jsonl at any depth; "
        "`python -m pydoc egrsd_kernels.rollouts` defines the format",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PAGE.html",
        help="where the page goes (default: rollouts.html in the run's folder; beside a file, under its name)",
    )
    parser.add_argument(
        "--last",
        type=_at_least_one,
        default=200,
        metavar="N",
        help="show the N latest rollouts, by step, then by file and line (default: 200)",
    )
    parser.add_argument(
        "--regime",
        action="append",
        choices=REGIMES,
        default=[],
        help="open the page with this regime shown and the others faded; may be repeated (default: all shown)",
    )
    parser.add_argument("--title", help="heading of the page (default: the name of the run or file)")
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="V",
        help="entries of the vocabulary, for rollouts that do not say; the regimes look at H / log V",
    )
    help = "H / log V up to which a token counts as certain (default: %(default)s)"
    parser.add_argument("--tau-low", type=float, default=TAU_LOW, help=help)
    help = "and from which on it counts as uncertain (default: %(default)s)"
    parser.add_argument("--tau-high", type=float, default=TAU_HIGH, help=help)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Read the rollouts, write the page, say where it is. A :class:`CommandError` for bad arguments and files."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    except ImportError:
        raise CommandError("the progress bar needs rich: pip install rich") from None

    columns = TextColumn("{task.description:<8}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    try:
        # The bar is for a terminal, and goes when the page is written.
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            rollouts = _latest(find_rollout_files(args.rollouts), args.last, progress)
            if not rollouts:
                raise ValueError(f"{args.rollouts}: no rollouts")
            if args.vocab_size is None and any(rollout.vocab_size is None for rollout in rollouts):
                raise ValueError(f"{args.rollouts}: rollouts without the field vocab_size; give --vocab-size")
            page = write_token_report(
                args.output or _default_output(args.rollouts),
                rollouts,
                vocab_size=args.vocab_size,
                tau_low=args.tau_low,
                tau_high=args.tau_high,
                title=args.title or args.rollouts.resolve().name,
                regimes=args.regime,
                track=lambda sequence: progress.track(sequence, description="writing"),
            )
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    print(f"{page}: {len(rollouts)} rollout{'' if len(rollouts) == 1 else 's'}")


def _latest(files: Sequence[Path], count: int, progress) -> list[Rollout]:
    """The last ``count`` rollouts in the order of steps, files, lines; never more of them than that in memory.

    Rollouts that do not say their step come before those that do.
    """
    task = progress.add_task("reading", total=sum(file.stat().st_size for file in files))
    rollouts = (rollout for file in files for rollout in read_rollouts(file, lambda size: progress.advance(task, size)))

    def age(entry: tuple[int, Rollout]) -> tuple[float, int]:
        order, rollout = entry
        return (-math.inf if rollout.step is None else rollout.step, order)

    return [rollout for _, rollout in reversed(heapq.nlargest(count, enumerate(rollouts), key=age))]


def _default_output(rollouts: Path) -> Path:
    return rollouts / "rollouts.html" if rollouts.is_dir() else rollouts.with_suffix(".html")


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value
