"""Tables and figures as Markdown, as all pages have them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.data import HIDDEN_SIZES


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def number(value: float) -> str:
    """With three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def power(value: float | None) -> str:
    """1.4e-4, or nothing."""
    return "" if value is None else re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{value:.1e}").replace("e+", "e")


def model(size: int) -> str:
    names = [name.upper() for name, known in HIDDEN_SIZES.items() if known == size]
    return f"{names[0]} (D = {size})" if names else f"D = {size}"


def commits_of(runs: list[dict]) -> str:
    commits = dict.fromkeys(run["commit"][:7] for run in runs)
    return f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"


def commands_of(runs: list[dict], path: Path) -> str:
    commands = dict.fromkeys(f"{run['command']} --output benchmarks/results/{path.name}" for run in runs)
    return "```sh\n" + "\n".join(commands) + "\n```"
