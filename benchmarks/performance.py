"""docs/performance.md: whole updates by every way to do them, and where their time goes, from benchmarks.end_to_end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.markdown import commands_of, commits_of, number, table
from benchmarks.updates import OURS, WAYS, fastest_again

PERFORMANCE = (
    "# Where the time of a step goes",
    "An update of EGRSD is the teacher's forward pass, the student's forward and backward pass, and the loss: from "
    "token ids to gradients, without generation and optimizer. Every way below does it for the same rollouts, in a "
    "process of its own, with activations kept or made again, whichever is faster in the given memory, and is timed "
    "only if log p of student and teacher is right. What is not the package's own: TRL's EGRSD is a subclass of "
    "GRPOTrainer; its trie attends by PyTorch's FlashAttention, where TRL asks the Hub for FlashAttention 3; verl's "
    "way has our head. What is less: Unsloth's loss takes one advantage a rollout, and no entropies of the teacher. "
    "`benchmarks/updates.py` says what each way does, `benchmarks/end_to_end.py` how it is measured.",
)
SETTINGS = {
    "": "EGRSD",
    "grpo": "GRPO",
    "groups-of-16": "EGRSD, groups of 16, a solution of 1,000 tokens",
    "one-group": "EGRSD, one group",
}


def updates_section(path: Path) -> list[str]:
    report = json.loads(path.read_text(encoding="utf-8"))
    rows = {(row["shape"], row["way"], row["setting"]): row for row in report["rows"]}
    blocks = [about_updates(report)]
    compared = {key[::2] for key in rows if key[2] != "largest"}
    several = [key for key in compared if sum((key[0], way, key[1]) in rows for way in WAYS) > 2]
    for shape, setting in sorted(several):
        of_ways = {way: rows[shape, way, setting] for way in WAYS if (shape, way, setting) in rows}
        largest = {way: rows.get((shape, way, "largest"), {}).get("largest_rollouts") for way in of_ways}
        blocks += [f"## {shape.upper()}, {SETTINGS[setting]}", *ways_table(of_ways, largest)]
    best = {key: (rows.get((key[0], "trl", key[1])), fastest_of_ours(rows, key)) for key in sorted(compared)}
    if pairs := [lead(key, *pair) for key, pair in best.items() if all(pair)]:
        headings = ("", "TRL", "ours", "", "over the bare products", "ours is")
        blocks += ["## TRL and ours", f"Each as it is fastest in {report['settings']['gib']:g} GiB:",
                   table(headings, pairs)]  # fmt: skip
    again = {
        key: (fastest_again(pair[0] or {}), fastest_of_ours(rows, key, fastest_again)) for key, pair in best.items()
    }
    if pairs := [lead_again(key, *pair) for key, pair in again.items() if all(pair)]:
        headings = ("", "TRL", "ours", "", "GiB above the weights", "")
        blocks += ["Where both compute layers again:", table(headings, pairs)]
    if profiled := [row for row in report["rows"] if "kinds" in row.get("profile", {})]:
        blocks += ["## By kind of kernel", PROFILES, *map(profile_table, profiled)]
    versions = {name: report.get(name) for name in ("torch", "triton", "driver")} | report["packages"]
    listed = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    others = {(WAYS[row["way"]].title, *pair) for row in report["rows"] for pair in row.get("packages", {}).items()}
    listed += "".join(f"; {title} with {name} {found}" for title, name, found in sorted(others))
    return [
        *blocks, "## To rerun", f"{listed}; {commits_of([row for row in report['rows'] if row.get('commit')])}. "
        f"All figures: [{path.name}](../benchmarks/results/{path.name}).", commands_of(report["rows"], path),
    ]  # fmt: skip


PROFILES = (
    "One update under PyTorch's profiler: GPU time by kind of kernel, and what is left of the update's time, in which "
    "the GPU waits for the host."
)


def about_updates(report: dict) -> str:
    given = report["settings"]
    tokens = next((row["tokens"] for row in report["rows"] if row.get("tokens") and not row["setting"]), None)
    mean = f", {tokens / given['groups'] / given['group']:,.0f} tokens on average" if tokens else ""
    return (
        f"One {report['device']}, bfloat16, Qwen3's shapes with random weights and LoRA r = 64 on seven modules; "
        f"{given['groups']} groups of {given['group']} rollouts: prompts of {given['prompt']:,} tokens, solutions of "
        f"{given['solution']:,}, responses of up to {given['response']:,}{mean}; in {given['gib']:g} GiB. × is the "
        "time over the bare products of the layers' frozen weights in the same process, no token counted twice. "
        "*kept*: activations are kept; *again*: layers are computed again in the backward pass; behind it the rollouts "
        "or, in packs, tokens of a forward pass. GiB are the most that is allocated, and with CUDA graphs, whose "
        "buffers stay where they are between launches, the most that is *reserved*."
    )


def ways_table(rows: dict[str, dict], largest: dict[str, int | None]) -> list[str]:
    best = min((row["ms"] for row in rows.values() if "ms" in row), default=1.0)
    cells = []
    for way, row in rows.items():
        if "ms" not in row:
            continue
        name = f"**{WAYS[way].title}**" if way in OURS else WAYS[way].title
        memory = f"{row['above_weights_gib']:.1f} / {row['peak_gib']:.1f}" if row.get("peak_gib") else "–"
        memory += " reserved" if WAYS[way].graphs else ""
        plan = f"{'kept' if row['kept'] else 'again'}, {row['size']:,}"
        times = (f"{row['ms']:,.0f}", f"{row['ms'] / best:.2f}", f"{row['tokens_per_second']:,.0f}")
        most = f"{largest[way]:,}" if largest[way] else "–"
        cells.append([name, *times, f"{over_products(row):.2f} ×", memory, plan, most])
    headings = ("", "ms", "over the fastest", "response tokens / s", "over the bare products",
                "GiB above the weights / in all", "cut up", "rollouts in one pass")  # fmt: skip
    failed = [f"{WAYS[way].title} ({row['error'].replace('|', '/')})" for way, row in rows.items() if "ms" not in row]
    notes = [f"{WAYS[way].title}: {row['note']}." for way, row in rows.items() if "ms" in row and row.get("note")]
    notes += [f"{WAYS[way].title}: in the timed updates memory ran out {row['alloc_retries']} times, and was freed and "
              "asked for again." for way, row in rows.items() if row.get("alloc_retries")]  # fmt: skip
    return [table(headings, cells), *notes, *([f"Not measured: {'; '.join(failed)}."] if failed else [])]


def over_products(row: dict) -> float:
    return row["ms"] / row["products_ms"]


def fastest_of_ours(
    rows: dict[tuple[str, str, str], dict], key: tuple[str, str], part: Callable[[dict], dict | None] = dict
) -> dict | None:
    """Of a shape and a setting; or the fastest of what ``part`` takes from a way's row."""
    shape, setting = key
    found = [part(row) for way in OURS if (row := rows.get((shape, way, setting)))]
    return min((one for one in found if one and "ms" in one), key=lambda one: one["ms"], default=None)


def lead(key: tuple[str, str], trls: dict, ours: dict) -> list[str]:
    known = "ms" in trls
    time = f"{trls['ms']:,.0f} ms" if known else trls["error"].replace("|", "/")
    ratio = f"**{trls['ms'] / ours['ms']:.1f} ×**" if known else "–"
    products = f"{over_products(trls):.2f} × / " if known else "– / "
    title = WAYS[ours["way"]].title.removeprefix("ours, ")
    return [f"{key[0].upper()}, {SETTINGS[key[1]]}", time, f"{ours['ms']:,.0f} ms", ratio,
            f"{products}{over_products(ours):.2f} ×", title]  # fmt: skip


def lead_again(key: tuple[str, str], trls: dict, ours: dict) -> list[str]:
    memory = [one.get("above_weights_gib") for one in (trls, ours)]
    share = f"**{memory[1] / memory[0]:.2f}**" if all(memory) else "–"
    return [f"{key[0].upper()}, {SETTINGS[key[1]]}", f"{trls['ms']:,.0f} ms", f"{ours['ms']:,.0f} ms",
            f"**{trls['ms'] / ours['ms']:.1f} ×**", " / ".join("–" if x is None else f"{x:.1f}" for x in memory),
            share]  # fmt: skip


def profile_table(row: dict) -> str:
    busy, kinds = row["profile"]["busy_ms"], row["profile"]["kinds"]
    idle = max(0.0, row["ms"] - busy)
    lines = [[one["kind"], number(one["ms"]), f"{100 * one['ms'] / row['ms']:.0f} %", f"{one['launches']:,}"]
             for one in kinds]  # fmt: skip
    lines.append(["the GPU waits", number(idle), f"{100 * idle / row['ms']:.0f} %", ""])
    title = f"{row['shape'].upper()}, {WAYS[row['way']].title}: {row['ms']:,.0f} ms"
    return table([title, "ms", "of the update", "launches"], lines)


def performance(results: Path) -> str:
    """What docs/performance.md is: whole updates by every way, and where their time goes; "" where nothing is known."""
    blocks = [block for path in sorted(results.glob("end_to_end-*.json")) for block in updates_section(path)]
    return "\n\n".join([*PERFORMANCE, *blocks]) + "\n" if blocks else ""
