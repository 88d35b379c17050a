"""The figures in README.md, benchmarks/README.md and docs/, from the committed result files.

python -m benchmarks.table            # rewrites them between their performance markers
python -m benchmarks.table --check    # fails where that would change one
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.compare import FLOORS
from benchmarks.markdown import commands_of, commits_of, model, number, power, table
from benchmarks.performance import performance

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
OURS = "ours"
DETAILED = {(4096, 16384), (2560, 16384), (4096, 4096), (2560, 4096)}  # (D, N) with every peer
SUMMARY = (4096, 16384)  # (D, N) of the README's rows
HEADINGS = ("statistics", "frozen head", "trained head", "peak, MiB", "log p, nat", "gradient", "cannot")


def _time(row: dict, figure: str) -> str:
    time = row.get(figure)
    if time is None:
        return "–"
    return f"{number(time['ms'])} ms, {time['ratio']:.2f} ×" if "ms" in time else time["note"].replace("|", "/")


def _peaks(row: dict) -> str:
    peaks = [row.get(figure, {}).get("peak_mib") for figure in ("frozen", "trained")]
    return " / ".join("–" if peak is None else f"{peak:,.0f}" for peak in peaks)


def _measured(row: dict) -> bool:
    return any("ms" in row.get(figure, {}) for figure in FLOORS)


def _cells(first: str, row: dict) -> list[str]:
    errors = (power(row["error"].get(name)) for name in ("logp_max_nat", "dhidden_relative"))
    return [first, *(_time(row, figure) for figure in FLOORS), _peaks(row), *errors, row["cannot"] or ""]


def peer_tables(shapes: dict[tuple[int, int], dict]) -> list[str]:
    """One row a peer at the detailed shapes."""
    blocks = []
    for size, n in sorted(shapes.keys() & DETAILED, key=lambda shape: (-shape[1], -shape[0])):
        rows = shapes[size, n]["rows"]
        cells = [_cells(f"**{r['name']}**" if r["peer"] == OURS else r["name"], r) for r in rows if _measured(r)]
        blocks.append(table([f"{model(size)}, N = {n:,}", *HEADINGS], cells))
        failed = [f"{r['name']} ({r.get('note') or r['frozen']['note']})" for r in rows if not _measured(r)]
        blocks += [f"Not measured there: {'; '.join(failed)}."] if failed else []
    return blocks


def _fastest(rows: Iterable[dict], figure: str, per_token: bool) -> dict | None:
    """The fastest other package, among those that take a weight for each token, or that do not."""
    others = (row for row in rows if row["per_token"] == per_token and not row["peer"].startswith(OURS))
    return min((row for row in others if "ms" in row.get(figure, {})), key=lambda row: row[figure]["ms"], default=None)


def _lead(rows: dict[str, dict], figure: str, per_token: bool) -> str:
    """That package's time over ours."""
    fastest = _fastest(rows.values(), figure, per_token)
    return f"{fastest[figure]['ms'] / rows[OURS][figure]['ms']:.2f}" if fastest else "–"


def _overview_cell(entry: dict | None) -> str:
    rows = {row["peer"]: row for row in entry["rows"]} if entry else {}
    found = {figure: rows.get(OURS, {}).get(figure, {}) for figure in ("frozen", "trained")}
    if not all("ms" in time for time in found.values()):
        return "–"
    ratios = " / ".join(f"{time['ratio']:.2f}" for time in found.values())
    leads = [" / ".join(_lead(rows, figure, per_token) for figure in found) for per_token in (True, False)]
    return "; ".join([ratios, *leads])


def overview(shapes: dict[tuple[int, int], dict]) -> str:
    """Ours over all D × N."""
    sizes, tokens = (sorted({shape[i] for shape in shapes}) for i in range(2))
    rows = ([model(size), *(_overview_cell(shapes.get((size, n))) for n in tokens)] for size in sizes)
    return table(["", *(f"N = {n:,}" for n in tokens)], rows)


def provenance(report: dict, path: Path) -> list[str]:
    """The machine, the versions, the commits and the commands."""
    latest = report["runs"][-1]
    versions = {"torch": latest["torch"], "triton": latest["triton"], "CUDA": latest["cuda"]}
    versions["driver"] = latest["driver"]
    for run in report["runs"]:
        versions |= {name: found for name, found in run["packages"].items() if name != "egrsd-kernels"}
    listed = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    return [
        f"{listed}; {commits_of(report['runs'])}. All figures: [{path.name}](results/{path.name}). To rerun:",
        commands_of(report["runs"], path),
    ]


def compare_section(path: Path) -> list[str]:
    report = json.loads(path.read_text(encoding="utf-8"))
    if not report.get("shapes"):
        return []
    by_data: dict[str, dict] = {}
    for entry in report["shapes"]:
        by_data.setdefault(entry["data"], {})[entry["hidden_size"], entry["tokens"]] = entry
    shapes = by_data.get("peaked", {})
    entry = report["shapes"][-1]
    blocks = [
        f"One {report['runs'][-1]['device']}, {entry['dtype']}, V = {entry['vocabulary']:,}, medians of interleaved "
        "rounds. Statistics are the teacher's log p and entropy. A step is these and the student's log p, forward and "
        "backward, with a weight for each token; a frozen head has no gradient. × is the time over the bare cuBLAS "
        "products of the same run: 1 for statistics, 3 for a frozen head, 4 for a trained one. The peak is memory "
        "above the inputs, for a frozen / trained head. Errors are against float64: the largest of log p, and the "
        "relative one of the hidden gradient. In the last column stands what a package cannot do, and so was spared.",
        *peer_tables(shapes),
    ]
    if shapes:
        blocks += [
            "`fused_egrsd_loss` at every size, with a frozen / trained head: its step over the floor; the step of the "
            "fastest other package that takes a weight for each token, over ours; and that of the faster of Liger's "
            "and quack's losses with one weight for all tokens, the bare product as their teacher, over ours. "
            "[Where targets were missed, and why](#targets-that-were-missed).",
            overview(shapes),
        ]
    if flat := by_data.get("flat"):
        blocks += [
            "The same on nearly uniform softmax rows, the worst case for code that profits from sparse ones:",
            overview(flat),
        ]
    return blocks + provenance(report, path)


def losses_section(path: Path) -> list[str]:
    report = json.loads(path.read_text(encoding="utf-8"))
    shapes = report["shapes"]
    names = dict.fromkeys(row["name"] for shape in shapes for row in shape["rows"])
    found = [{row["name"]: row for row in shape["rows"]} for shape in shapes]

    def cell(row: dict) -> str:
        return (
            f"{row['ratio']:.2f} ×, {row['peak_mib'] or 0:,.0f} MiB" if "ms" in row else row["note"].replace("|", "/")
        )

    headings = (f"{model(shape['hidden_size'])}, N = {shape['tokens']:,}" for shape in shapes)
    return [
        "`linear_logp` behind any loss: a forward and a backward pass over the bare products, 2 for a frozen head and "
        f"3 for a trained one, and the peak, on one {report['device']}. What the backward pass needs is kept whole, "
        "kept as far as 1 GiB goes (the default of `keep_bytes`), or made again:",
        table(["", *headings], [[name, *(cell(rows[name]) for rows in found)] for name in names]),
        f"Commit {report['commit']}. All figures: [{path.name}](results/{path.name}). To rerun:",
        commands_of([report], path),
    ]


def trl_head_section(path: Path) -> list[str]:
    report = json.loads(path.read_text(encoding="utf-8"))
    shapes = report["shapes"]
    steps = [(row["trainer"], row["trained"]) for row in shapes[0]["rows"] if row["made_by"] == "ours"]

    def cell(shape: dict, step: tuple[str, bool]) -> str:
        ours, trls = (row for row in shape["rows"] if (row["trainer"], row["trained"]) == step)
        if "speedup" not in ours:
            return (ours.get("note") or trls.get("note") or "").replace("|", "/")
        off = " / ".join(power(row["error"]["logp_max_nat"]) for row in (ours, trls))
        return f"**{ours['speedup']:.2f} ×** ({ours['ratio']:.2f} / {trls['ratio']:.2f}), {off} nat"

    headings = (f"{model(shape['hidden_size'])}, N = {shape['tokens']:,}" for shape in shapes)
    rows = [
        [f"{step[0]}, {'trained' if step[1] else 'frozen'}", *(cell(shape, step) for shape in shapes)] for step in steps
    ]
    return [
        "The head's step of TRL's trainers with `fuse_heads()`, how many times as fast as with TRL's own head; in "
        "brackets ours / TRL's over the bare products, 2 for a frozen head and 3 for a trained one; and how far log p "
        f"is off, ours / TRL's. One {report['device']}, torch {report['torch']}, TRL {report['packages'].get('trl')}:",
        table(["", *headings], rows),
        f"Commit {report['commit']}. All figures: [{path.name}](results/{path.name}). To rerun:",
        commands_of([report], path),
    ]


KINDS_OF_DIVERGENCE = {"reverse_kl": "reverse KL", "forward_kl": "forward KL", "jsd": "JSD"}
MAKERS = {
    "ours": "**egrsd_kernels**", "trl": "TRL ChunkedDivergenceFunction", "liger": "Liger fused linear JSD, mean",
    "compile": "torch.compile, chunked and checkpointed", "eager": "PyTorch eager, full logits",
}  # fmt: skip


def divergence_table(shapes: list[dict], made_by: Iterable[str], trained: Iterable[bool]) -> str:
    """By kind, head and maker: ms, over the bare products, MiB, and the worst row's error."""

    def cell(row: dict) -> str:
        if "ms" not in row:
            return row["note"].replace("|", "/")
        off = power(row["error"]["dhidden_worst_row"])
        return f"{number(row['ms'])} ms, {row['ratio']:.2f} ×, {row['peak_mib'] or 0:,.0f} MiB, {off}"

    def name(row: dict) -> str:
        head = "frozen" if not row["trained"] else "trained, all kept" if row["kept"] else "trained"
        return f"{KINDS_OF_DIVERGENCE[row['kind']]}, {head}: {MAKERS[row['made_by']]}"

    makers, heads = set(made_by), set(trained)
    found = [
        {name(row): row for row in shape["rows"] if row["made_by"] in makers and row["trained"] in heads}
        for shape in shapes
    ]
    headings = [f"{model(shape['hidden_size'])}, N = {shape['tokens']:,}" for shape in shapes]
    return table(["", *headings], [[row, *(cell(rows[row]) for rows in found)] for row in found[0]])


def divergences(results: Path) -> str:
    """What stands in docs/divergences.md: ours and the two other packages', with a frozen head."""
    blocks = []
    for path in sorted(results.glob("divergence-*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        shapes = report["shapes"]
        blocks += [
            "Forward and backward pass with a frozen head; × is the time over the three bare products of the same run, "
            "MiB the peak above the operands, and the last figure the hidden gradient's error in the row that is most "
            f"off, relative, against float64. One {report['device']}, {shapes[0]['dtype']}, "
            f"V = {shapes[0]['vocabulary']:,}:",
            divergence_table(shapes, ("ours", "trl", "liger", "compile"), (False,)),
            "Liger gives a mean over the tokens alone; the others take a weight for each. torch.compile's logits are "
            "rounded to 16 bits, by more than these models differ. [Trained heads, teachers nearer and farther, and "
            "how to rerun them](../benchmarks/README.md#figures).",
        ]
    return "\n\n".join(blocks)


def divergence_section(path: Path) -> list[str]:
    report = json.loads(path.read_text(encoding="utf-8"))
    shapes = report["shapes"]
    headings = [f"{model(shape['hidden_size'])}, N = {shape['tokens']:,}" for shape in shapes]
    kinds = [(row["kind"], row["teacher"]) for row in shapes[0]["accuracy"] if row["made_by"] == "ours"]
    accuracy = []
    for kind, teacher in kinds:
        cells = [f"{KINDS_OF_DIVERGENCE[kind]}, {teacher}"]
        for shape in shapes:
            rows = [row for row in shape["accuracy"] if (row["kind"], row["teacher"]) == (kind, teacher)]
            errors = (row.get("error", {}) for row in rows)
            pairs = [(e.get("divergence_mean_nat"), e.get("dhidden_worst_row")) for e in errors]
            off = (" / ".join(power(pair[i]) or "–" for pair in pairs) for i in range(2))
            cells.append(f"{power(rows[0]['mean_nat'])} nat: {'; '.join(off)}")
        accuracy.append(cells)
    return [
        "A full-vocabulary divergence of student and teacher with one head, forward and backward, with a weight for "
        "each token (Liger: a mean), over the bare products of the same run, 3 for a frozen head and 4 for a trained "
        f"one; the peak above the operands; and the worst row's error of the hidden gradient. One {report['device']}, "
        f"{shapes[0]['dtype']}, V = {shapes[0]['vocabulary']:,}:",
        divergence_table(shapes, MAKERS, (False, True)),
        "How far it is from float64 by the distance of the teacher: the mean divergence, and off by, ours / TRL's / "
        "plain PyTorch's, its mean (nats) and the worst row of the hidden gradient (relative):",
        table(["", *headings], accuracy),
        f"Commit {report['commit']}. All figures: [{path.name}](results/{path.name}). To rerun:",
        commands_of([report], path),
    ]


def section(results: Path) -> str:
    """What stands in benchmarks/README.md; the same result files give the same text."""
    blocks = [block for path in sorted(results.glob("compare-*.json")) for block in compare_section(path)]
    blocks += [block for path in sorted(results.glob("losses-*.json")) for block in losses_section(path)]
    blocks += [block for path in sorted(results.glob("trl_head-*.json")) for block in trl_head_section(path)]
    blocks += [block for path in sorted(results.glob("divergence-*.json")) for block in divergence_section(path)]
    return "\n\n".join(blocks)


def summary(results: Path) -> str:
    """What stands in README.md: ours, the fastest other package that can do the same, and full logits."""
    for path in sorted(results.glob("compare-*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        for entry in report.get("shapes", ()):
            if (entry["hidden_size"], entry["tokens"], entry["data"]) != (*SUMMARY, "peaked"):
                continue
            rows = {row["peer"]: row for row in entry["rows"]}
            fastest = _fastest(rows.values(), "frozen", per_token=True)
            found = {row["peer"]: row for row in (rows.get(OURS), fastest, rows.get("eager")) if row}
            cells = [_cells(f"**{r['name']}**" if r["peer"] == OURS else r["name"], r)[:-1] for r in found.values()]
            return "\n\n".join(
                [
                    table([f"{model(SUMMARY[0])}, N = {SUMMARY[1]:,}", *HEADINGS[:-1]], cells),
                    f"One {report['runs'][-1]['device']}, {entry['dtype']}, V = {entry['vocabulary']:,}. "
                    "× is the time over the bare cuBLAS products of the same run; the peak is memory above the inputs, "
                    "for a frozen / trained head; errors are against float64. The second row is the fastest other "
                    "package that takes a weight for each token. [All peers and sizes, and how to rerun them]"
                    "(benchmarks/README.md#figures).",
                ]
            )
    return ""


KINDS = {"causal": "Causal", "vision-language": "Vision-language", "sequence-to-sequence": "Sequence-to-sequence"}


def models(results: Path) -> str:
    """What stands in docs/models.md."""
    path = results / "models.json"
    if not path.exists():
        return ""
    report = json.loads(path.read_text(encoding="utf-8"))
    packages = report["environment"]
    outcomes = ("right", "refused", "WRONG", "fails", "not built")
    counted = {kind: Counter(row["outcome"] for row in report["rows"] if row["kind"] == kind) for kind in KINDS}
    packs = Counter(row["kind"] for row in report["rows"] if row.get("packs"))
    shown = [outcome for outcome in outcomes if any(counted[kind][outcome] for kind in KINDS)]
    blocks = [
        f"transformers {packages['packages']['transformers']}, torch {packages['torch']}, on a CPU in float32:",
        table(
            ["", *shown, "packs"],
            [[name, *(str(counted[kind][o]) for o in shown), str(packs[kind])] for kind, name in KINDS.items()],
        ),
    ]
    for kind, name in KINDS.items():
        rows = [row for row in report["rows"] if row["kind"] == kind]
        blocks.append(f"## {name} models")
        if right := [row for row in rows if row["outcome"] == "right"]:
            headings = [
                "`model_type`",
                "scale",
                "softcap",
                "log p, nat",
                "entropy, nat",
                "gradient",
                "read with",
                "packs",
            ]
            blocks.append(table(headings, map(_right, right)))
        for outcome in shown[1:]:
            if others := [row for row in rows if row["outcome"] == outcome]:
                lines = [f"- `{row['model_type']}`: {_reason(row)}" for row in others]
                blocks += [f"### {outcome[0].upper()}{outcome[1:]}", "\n".join(lines)]
    return "\n\n".join(blocks)


def _right(row: dict) -> list[str]:
    scale, cap = (f"{x:.6g}" if x not in (None, 1) else "" for x in (row["scale"], row["softcap"]))
    off = [power(row[name]) for name in ("logp", "entropy", "gradient")]
    return [f"`{row['model_type']}`", scale, cap, *off, "an image" if row["image"] else "text", _packs(row)]


def _packs(row: dict) -> str:
    if not row.get("packs"):
        return "no" if "packs" in row else ""  # it was not asked
    return "yes" if row["row_limit"] is None else f"rows up to {row['row_limit']}"


def _reason(row: dict) -> str:
    return re.sub(r"([<>|_*\[\]`])", r"\\\1", row["reason"])


PLACES = {
    "README.md": summary, "benchmarks/README.md": section, "docs/models.md": models, "docs/divergences.md": divergences,
}  # fmt: skip
PAGES = {"docs/performance.md": performance}  # made as a whole, and only where there are results


def replaced(text: str, new: str, begin: str = BEGIN, end: str = END) -> str:
    """``text`` with ``new`` between its markers."""
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    if len(re.findall(pattern, text, re.DOTALL)) != 1:
        raise ValueError(f"expected one section between {begin} and {end}")
    return re.sub(pattern, lambda _: "\n\n".join(filter(None, (begin, new, end))), text, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder that holds " + " and ".join(PLACES))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a section is out of date")
    args = parser.parse_args(argv)
    for name, made in PLACES.items():
        text = (args.root / name).read_text(encoding="utf-8")
        found = made(args.results)
        try:
            new = replaced(text, found) if found or BEGIN in text else text  # without figures, markers are not needed
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if not args.check:
            (args.root / name).write_text(new, encoding="utf-8")
        elif new != text:
            sys.exit(f"{name} is out of date: run python -m benchmarks.table")
    for name, whole in PAGES.items():
        page, new = args.root / name, whole(args.results)
        if not args.check and new:
            page.write_text(new, encoding="utf-8")
        elif args.check and new != (page.read_text(encoding="utf-8") if page.exists() else ""):
            sys.exit(f"{name} is out of date: run python -m benchmarks.table")


if __name__ == "__main__":
    main()
