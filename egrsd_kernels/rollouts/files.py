"""Rollout files; :mod:`egrsd_kernels.rollouts` defines their format."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

from .record import NUMBERS, OPTIONAL_NUMBERS, Rollout

_FIELDS = [field.name for field in fields(Rollout)]
_REQUIRED = ("prompt", "tokens", *NUMBERS, "advantage")


def append_rollouts(path: str | Path, rollouts: Iterable[Rollout]) -> None:
    """Append ``rollouts`` to the file; it and its folder are created where missing.

    Numbers keep 7 significant digits. A last line that a killed process left unfinished is removed first. An OSError
    where the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = _lines(rollouts)
    with open(path, "a+b") as file:
        _finish_last_line(file)
        file.write(lines)


def write_rollouts(path: str | Path, rollouts: Iterable[Rollout]) -> None:
    """Write ``rollouts`` to the file, in the place of what it holds: readers see all of the old or all of the new.

    Its folder is created where missing; numbers keep 7 significant digits. An OSError where it cannot be written, with
    nothing left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    lines = _lines(rollouts)
    try:
        aside.write_bytes(lines)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def read_rollouts(path: str | Path, advance: Callable[[int], object] = lambda count: None) -> Iterator[Rollout]:
    """The rollouts of one file, in its order, one at a time.

    A last line without its line break is left out when it is no JSON: somebody is writing it. Blank lines are skipped.

    Args:
        path: the file.
        advance: called with the number of bytes of each line that was read, to show progress.

    Raises:
        ValueError: one line that names the file, the line and, where it is one field's fault, the field.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            advance(len(line))
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"{path}, line {number}: not JSON in UTF-8: {error}") from None
            try:
                rollout = _rollout(value)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            yield rollout


def find_rollout_files(path: str | Path) -> list[Path]:
    """``path`` itself if it is a file; else the files named rollouts*.jsonl in that folder and below it.

    Numbers in names sort as numbers. A ValueError where there is no such file or folder, or none in it.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    found = [file for file in path.rglob("rollouts*.jsonl") if file.is_file()]
    if not found:
        raise ValueError(f"{path}: no rollouts*.jsonl in this folder or below it")

    def with_numbers(file: Path) -> list[tuple[bool, int, str]]:
        parts = re.split(r"(\d+)", str(file.relative_to(path)))
        return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]

    return sorted(found, key=with_numbers)


def _lines(rollouts: Iterable[Rollout]) -> bytes:
    # ASCII: half of a split character, a lone surrogate, survives only as an escape.
    return "".join(json.dumps(_object(r), separators=(",", ":")) + "\n" for r in rollouts).encode("ascii")


def _object(rollout: Rollout) -> dict[str, object]:
    """What the file holds of a rollout: plain numbers, whatever sequences it was made of."""
    values = {name: getattr(rollout, name) for name in _FIELDS}
    values |= {name: [_rounded(number) for number in numbers] for name, numbers in rollout.numbers().items()}
    values |= {"tokens": list(rollout.tokens), "advantage": float(rollout.advantage)}
    values["reward"] = None if rollout.reward is None else float(rollout.reward)
    return {name: value for name, value in values.items() if value is not None or name == "reward"}


def _rounded(number: float) -> float:
    return float(f"{number:.7g}")  # what float32 holds; all digits would make the file twice as large


def _finish_last_line(file: BinaryIO) -> None:
    """End a last line that has no line break, or remove it where it is not whole."""
    size, tail = file.seek(0, os.SEEK_END), b""
    while b"\n" not in tail and len(tail) < size:
        file.seek(max(size - 2 * len(tail) - 65536, 0))
        tail = file.read()
    line = tail.rpartition(b"\n")[2]
    if not line:
        return
    try:
        json.loads(line)
    except ValueError:
        file.truncate(size - len(line))
    else:
        file.write(b"\n")


def _rollout(value: object) -> Rollout:
    """The rollout that a line's JSON stands for; a ValueError names the field that is wrong."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {_kind(value)}")
    for name in _REQUIRED:
        if value.get(name) is None:
            raise ValueError(f"{name}: missing")
    if "reward" not in value:  # null says that nothing could judge the rollout
        raise ValueError("reward: missing")
    given = {name: value[name] for name in _FIELDS if value.get(name) is not None}
    checked: dict[str, Any] = {name: _CHECKS[name](name, field) for name, field in given.items()}
    return Rollout(**{"reward": None} | checked)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, got {_kind(value)}")
    return value


def _texts(name: str, value: object) -> list[str]:
    texts = _array(name, value)
    for index, entry in enumerate(texts):
        if not isinstance(entry, str):
            raise ValueError(f"{name}[{index}]: expected a string, got {_kind(entry)}")
    return texts


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{name}: expected a number, got {_kind(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number, got an integer beyond any float") from None


def _numbers(name: str, value: object) -> list[float]:
    # Nearly all of a file is these floats: no name is made up for each.
    return [
        entry if type(entry) is float else _number(f"{name}[{index}]", entry)
        for index, entry in enumerate(_array(name, value))
    ]


def _array(name: str, value: object) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected an array, got {_kind(value)}")
    return value


def _count(least: int) -> Callable[[str, object], int]:
    def check(name: str, value: object) -> int:
        if type(value) is not int or value < least:
            got = value if type(value) is int else _kind(value)
            raise ValueError(f"{name}: expected an integer of at least {least}, got {got}")
        return value

    return check


def _kind(value: object) -> str:
    """JSON's name for what it is; a whole value may be long."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


_CHECKS: dict[str, Callable[[str, object], object]] = {
    "prompt": _text,
    "tokens": _texts,
    **dict.fromkeys((*NUMBERS, *OPTIONAL_NUMBERS), _numbers),
    "reward": _number,
    "advantage": _number,
    "reference": _text,
    "title": _text,
    "vocab_size": _count(2),
    "step": _count(0),
}
