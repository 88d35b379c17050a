"""The table of GRPOConfig's settings in docs/grpo-settings.md, from the classes of the installed TRL and package.

python -m benchmarks.settings            # rewrites it between its markers
python -m benchmarks.settings --check    # fails where that would change it, or where a setting is in no class

What is refused, and why, says EGRSDConfig itself: here stands a value for it to refuse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import GRPOConfig

from benchmarks.table import ROOT, replaced, table
from egrsd_kernels.trl import EGRSDConfig
from egrsd_kernels.trl.config import REFUSED
from egrsd_kernels.trl.grpo_settings import NEVER, SETTINGS, Here

PAGE = "docs/grpo-settings.md"
BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"
CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


def own_settings() -> dict[str, Any]:
    """TRL's own settings in the installed GRPOConfig, those that it takes over from TrainingArguments left out."""
    inherited = {field.name for field in fields(TrainingArguments)}
    return {field.name: field.default for field in fields(GRPOConfig) if field.name not in inherited}


def missing_and_gone() -> tuple[list[str], list[str]]:
    """(TRL's own settings that are in no class above, names above that GRPOConfig does not have)"""
    classified = {name for group in SETTINGS.values() for name in group}
    known = {field.name for field in fields(GRPOConfig)}
    return sorted(own_settings().keys() - classified), sorted(classified - known)


def refusal(name: str, contradiction: Mapping[str, Any]) -> str:
    """What EGRSDConfig says of ``contradiction``, without the setting's name and what it got."""
    try:
        EGRSDConfig("unused", **CPU | dict(contradiction))
    except (TypeError, ValueError) as error:
        setting, _, text = str(error).partition(": ")
        if setting != name:
            raise ValueError(f"{name}: expected to be refused in {dict(contradiction)}, got: {error}") from error
        return text.rpartition(", got ")[0] or text
    raise ValueError(f"{name}: expected to be refused in {dict(contradiction)}, which was taken")


def cell(name: str, here: Here) -> str:
    """The table's last column."""
    if here is NEVER:
        return f"refused: {REFUSED[name]}".replace("|", "\\|")
    text = [f"honoured, {here.note}" if here.note else "honoured"]
    for contradiction in here.contradictions:
        given = ", ".join(f"{key}={value!r}" for key, value in contradiction.items()).replace("'", '"')
        text.append(f"`{given}` is refused: {refusal(name, contradiction)}")
    return "; ".join(text).replace("|", "\\|")


def section() -> str:
    """What stands between the markers; the same versions give the same text."""
    missing, gone = missing_and_gone()
    if missing or gone:
        raise ValueError(
            f"SETTINGS: expected every setting of GRPOConfig and no other, missing {', '.join(missing) or 'none'}, "
            f"unknown {', '.join(gone) or 'none'}"
        )
    defaults = {field.name: field.default for field in fields(GRPOConfig)}
    rows = []
    for group, settings in SETTINGS.items():
        rows.append([f"**{group}**", "", ""])
        for name, here in settings.items():
            default = defaults[name]
            rows.append([f"`{name}`", "" if default is MISSING else f"`{default!r}`", cell(name, here)])
    return table(("setting", "default", "here"), rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help=f"the folder that holds {PAGE}")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the table is out of date")
    args = parser.parse_args(argv)
    page = args.root / PAGE
    text = page.read_text(encoding="utf-8")
    new = replaced(text, section(), BEGIN, END)
    if not args.check:
        page.write_text(new, encoding="utf-8")
    elif new != text:
        sys.exit(f"{PAGE} is out of date: run python -m benchmarks.settings")


if __name__ == "__main__":
    main()
