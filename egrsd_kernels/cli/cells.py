"""What a sweep over γ and W came to: its cells, their table and their picture."""

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

LENGTH = "completions/mean_length"


@dataclass(frozen=True)
class Cell:
    """One (γ, W, seed). ``value`` and ``response_length`` are None where ``error`` says why."""

    gamma: float
    lookahead: int
    seed: int
    run: str
    value: float | None = None
    response_length: float | None = None
    error: str | None = None


def final_value(history: Sequence[dict[str, Any]], metric: str) -> float:
    """A metric at the end of a run: the last evaluation's, or the mean over the last tenth of the logged steps.

    Raises:
        ValueError: it was not logged, is no number, or is not finite.
    """
    values = [row[metric] for row in history if metric in row]
    if not values:
        near = difflib.get_close_matches(metric, {key for row in history for key in row}, n=1)
        raise ValueError(f"{metric}: not in the log" + (f"; did you mean {near[0]}?" if near else ""))
    if not all(isinstance(value, (int, float)) for value in values):
        raise ValueError(f"{metric}: expected numbers in the log")
    value = values[-1] if metric.startswith("eval_") else fmean(values[-math.ceil(len(values) / 10) :])
    if not math.isfinite(value):
        raise ValueError(f"{metric}: {value}")
    return value


def read_history(run: str | Path) -> list[dict[str, Any]]:
    """What a finished run has logged, from its trainer_state.json. A ValueError or OSError where that is damaged."""
    path = Path(run, "trainer_state.json")
    state = json.loads(path.read_text(encoding="utf-8"))
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise ValueError(f"{path}: expected an object with log_history, a list of objects")
    return history


def is_finished(run: str | Path) -> bool:
    """Whether a run has written its trainer_state.json, the last that `egrsd train` writes, to the end."""
    try:
        read_history(run)
    except (OSError, ValueError):
        return False
    return True


def read_cell(metric: str, gamma: float, lookahead: int, seed: int, run: str) -> Cell:
    """The cell of a finished run, from what its trainer_state.json says was logged."""
    length = f"eval_{LENGTH}" if metric.startswith("eval_") else LENGTH
    try:
        history = read_history(run)
        return Cell(gamma, lookahead, seed, run, final_value(history, metric), final_value(history, length))
    except (OSError, ValueError) as error:
        return Cell(gamma, lookahead, seed, run, error=str(error))


def write_cells(path: Path, metric: str, cells: Sequence[Cell]) -> None:
    content = {"metric": metric, "cells": [asdict(cell) for cell in cells]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def table(cells: Sequence[Cell], metric: str) -> Any:
    """A rich Table with a row for each γ and W."""
    from rich.table import Table

    result = Table("γ", "W", metric, "response length")
    gammas, lookaheads = _axes(cells)
    for gamma in gammas:
        for lookahead in lookaheads:
            at = _at(cells, gamma, lookahead)
            texts = (_text(at, name, between=" ") for name in ("value", "response_length"))
            result.add_row(f"{gamma:g}", str(lookahead), *texts)
    return result


def draw(path: Path, cells: Sequence[Cell], metric: str) -> None:
    """Heat maps γ × W of the metric and of the mean response length: mean ± standard deviation over the seeds."""
    from matplotlib.figure import Figure

    gammas, lookaheads = _axes(cells)
    figure = Figure(figsize=(4 + 2.6 * len(lookaheads), 1.5 + 0.9 * len(gammas)), layout="constrained")
    panels = {"value": metric, "response_length": "mean response length, tokens"}
    for axes, (name, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        rows = [[_at(cells, gamma, lookahead) for lookahead in lookaheads] for gamma in gammas]
        means = [[fmean(_values(at, name) or [math.nan]) for at in row] for row in rows]
        figure.colorbar(axes.imshow(means, cmap="viridis", aspect="auto", origin="lower"), ax=axes)
        for y, row in enumerate(rows):
            for x, at in enumerate(row):
                box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none"}
                axes.text(x, y, _text(at, name, between="\n"), ha="center", va="center", bbox=box)
        axes.set_xticks(range(len(lookaheads)), lookaheads)
        axes.set_yticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
        axes.set(xlabel="lookahead W, tokens", ylabel="γ", title=title)
    figure.savefig(path, dpi=150)


def _axes(cells: Sequence[Cell]) -> tuple[list[float], list[int]]:
    return sorted({cell.gamma for cell in cells}), sorted({cell.lookahead for cell in cells})


def _at(cells: Sequence[Cell], gamma: float, lookahead: int) -> list[Cell]:
    return [cell for cell in cells if (cell.gamma, cell.lookahead) == (gamma, lookahead)]


def _values(cells: Sequence[Cell], name: str) -> list[float]:
    return [getattr(cell, name) for cell in cells if cell.error is None]


def _text(cells: Sequence[Cell], name: str, between: str) -> str:
    """Mean and standard deviation of a field over the seeds that finished."""
    values = _values(cells, name)
    if not values:
        return "failed"
    parts = [f"{fmean(values):.4g}"]
    if len(values) > 1:
        parts.append(f"± {stdev(values):.2g}")
    if len(values) < len(cells):
        parts.append(f"({len(values)} of {len(cells)})")
    return between.join(parts)
