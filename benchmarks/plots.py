"""Pictures of a result file: time and memory of the head's step against the number of tokens and the hidden size; the
time of a whole update by way; divergences over their bare products; what sparse gradients cost at each tolerance; or
how sparse a language model's softmax rows are, and how it trains with them.

    python -m benchmarks.plots benchmarks/results/compare-h100.json --output benchmarks/results
    python -m benchmarks.plots benchmarks/results/end_to_end-h200.json --output benchmarks/results
    python -m benchmarks.plots benchmarks/results/divergence-h200.json --output benchmarks/results
    python -m benchmarks.plots benchmarks/results/sparse-h200.json --output benchmarks/results
    python -m benchmarks.plots benchmarks/results/language_model-h100.json --output benchmarks/results

Time is per token, in µs, so that peers can be told apart over three decades of batch sizes. Scales are logarithmic.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.markdown import model
from benchmarks.updates import WAYS

# Okabe and Ito's palette, which the colour-blind can tell apart: one colour a package, one marker a peer,
# filled for the package's first.
# Dashed: it takes no weight for each token, so it does less.
COLOURS = {
    "ours": "#000000",
    "eager": "#999999",
    "compile": "#D55E00",
    "verl": "#0072B2",
    "cce": "#56B4E9",
    "liger": "#009E73",
    "quack": "#CC79A7",
    "flash-attn": "#E69F00",
}
MARKERS = "osD^v<>PXh*pd8"
AXES = {"tokens": "response tokens N", "hidden_size": "hidden size D"}
QUANTITIES = {"time": "time of a step, µs per token", "memory": "peak memory above the inputs, GiB"}


def value(row: dict, figure: str, quantity: str, tokens: int) -> float | None:
    time = row.get(figure, {})
    if "ms" not in time:
        return None
    if quantity == "time":
        return time["ms"] * 1e3 / tokens
    return time["peak_mib"] / 1024 if time["peak_mib"] else None


def draw_panel(axes: Axes, shapes: list[dict], peers: list[dict], figure: str, quantity: str, against: str) -> None:
    """One line a peer over ``shapes``, which differ in ``against`` alone."""
    shapes = sorted(shapes, key=lambda entry: entry[against])
    rows = {(entry[against], row["peer"]): (entry, row) for entry in shapes for row in entry["rows"]}
    positions = [entry[against] for entry in shapes]
    for i, peer in enumerate(peers):
        points = []
        for x in positions:
            entry, row = rows.get((x, peer["peer"]), ({}, {}))
            points.append((x, value(row, figure, quantity, entry.get("tokens", 0))))
        points = [point for point in points if point[1] is not None]
        if points:
            package = peer["peer"] if peer["peer"] in COLOURS else peer["peer"].split("-")[0]
            ours = peer["peer"] == "ours"
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[package],
                marker=MARKERS[i % len(MARKERS)],
                linestyle="-" if peer["per_token"] else "--",
                linewidth=2.4 if ours else 1.1,
                markersize=6 if ours else 4.5,
                markerfacecolor=None if peer["peer"] in COLOURS else "white",
                zorder=3 if ours else 2,
                label=peer["name"],
            )
    if quantity == "time":
        floors = [
            (entry[against], row[figure]["floor_ms"] * 1e3 / entry["tokens"])
            for entry in shapes
            for row in entry["rows"]
            if "ms" in row.get(figure, {})
        ]
        floors = sorted(dict(floors).items())
        if floors:
            axes.plot(*zip(*floors, strict=True), color="#000000", linestyle=":", label="floor: bare matrix products")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(positions))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, linewidth=0.6)


def draw(report: dict, figure: str, quantity: str, against: str, path: Path) -> None:
    """One picture: a panel for each value of the other axis that has at least two points."""
    other = "hidden_size" if against == "tokens" else "tokens"
    shapes = [entry for entry in report["shapes"] if entry["data"] == "peaked"]
    panels = {}
    for entry in shapes:
        panels.setdefault(entry[other], []).append(entry)
    panels = {key: panels[key] for key in sorted(panels) if len(panels[key]) > 1 or len(shapes) == 1}
    peers = list({row["peer"]: row for entry in shapes for row in entry["rows"]}.values())
    if not panels:
        return
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = -(-len(panels) // columns)
    # The legend takes a panel's place: the free one of the last line, or one more column.
    free = lines * columns - len(panels)
    columns += not free
    canvas, grid = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.6 * lines), squeeze=False, layout="constrained"
    )
    cells = list(grid.flat) if free else [axes for line in grid for axes in line[:-1]]
    for axes in grid.flat:
        axes.set_visible(False)
    for axes, (key, entries) in zip(cells, panels.items(), strict=False):
        axes.set_visible(True)
        draw_panel(axes, entries, peers, figure, quantity, against)
        axes.set_title(model(key) if other == "hidden_size" else f"N = {key:,}", fontsize=10)
        axes.set_xlabel(AXES[against], fontsize=9)
    for line in grid:
        line[0].set_ylabel(QUANTITIES[quantity], fontsize=9)
    handles = {}
    for axes in cells[: len(panels)]:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    legend = grid[-1, -1] if free else grid[0, -1]
    legend.set_visible(True)
    legend.axis("off")
    legend.legend(
        handles.values(),
        handles.keys(),
        loc="upper left",
        fontsize=8,
        frameon=False,
        title="dashed: one weight for all tokens",
        title_fontsize=8,
    )
    device = report["runs"][-1]["device"]
    canvas.suptitle(
        f"EGRSD step, {figure} head, {shapes[0]['dtype']}, V = {shapes[0]['vocabulary']:,}, {device}", fontsize=11
    )
    canvas.savefig(path, dpi=130)
    plt.close(canvas)


OURS, OTHERS = "#0072B2", "#999999"


def draw_updates(report: dict, path: Path, shapes: tuple[str, ...] = ("1.7b", "4b")) -> None:
    """The time of an update by way, one panel a shape; ways that came to nothing say why."""
    panels = {
        shape: {row["way"]: row for row in report["rows"] if (row["shape"], row["setting"]) == (shape, "")}
        for shape in shapes
    }
    panels = {shape: rows for shape, rows in panels.items() if rows}
    ways = [way for way in WAYS if any(way in rows for rows in panels.values())]
    height = 1.6 + 0.31 * len(ways)
    canvas, grid = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), height), squeeze=False, sharey=True,
                                layout="constrained")  # fmt: skip
    for axes, (shape, rows) in zip(grid[0], panels.items(), strict=True):
        times = [rows.get(way, {}).get("ms") for way in ways]
        colours = [OURS if WAYS[way].title.startswith("ours") else OTHERS for way in ways]
        axes.barh(range(len(ways)), [time or 0.0 for time in times], color=colours, height=0.7)
        largest = max((time for time in times if time), default=1.0)
        for place, (way, time) in enumerate(zip(ways, times, strict=True)):
            text = f"{time:,.0f}" if time else str(rows.get(way, {}).get("error", "not measured"))[:44]
            axes.text((time or 0.0) + 0.01 * largest, place, text, va="center", fontsize=8, color="#222222")
        products = [row["products_ms"] for row in rows.values() if "ms" in row]
        if products:
            label = "bare matrix products of the layers"
            axes.axvline(statistics.median(products), color="#D55E00", linestyle=":", linewidth=1.6, label=label)
        axes.set(xlim=(0, 1.14 * largest), title=shape.upper(), yticks=range(len(ways)))
        axes.set_yticklabels([WAYS[way].title for way in ways], fontsize=9)
        axes.set_xlabel("ms per update", fontsize=9)
        axes.title.set_fontsize(10)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", alpha=0.3, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].invert_yaxis()
    handles, labels = grid[0, 0].get_legend_handles_labels()
    canvas.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower right")
    given = report["settings"]
    rollouts = f"{given['groups']} groups of {given['group']} rollouts, {report['device']}"
    canvas.suptitle(f"An EGRSD update from token ids to gradients: LoRA, bfloat16,\n{rollouts}", fontsize=10)
    canvas.savefig(path, dpi=130)
    plt.close(canvas)


DIVERGENCES = {"ours": ("egrsd_kernels", OURS), "trl": ("TRL", "#D55E00"), "liger": ("Liger, mean", "#009E73"),
               "compile": ("torch.compile", "#E69F00"), "eager": ("eager", OTHERS)}  # fmt: skip
KINDS = {"reverse_kl": "reverse KL", "forward_kl": "forward KL", "jsd": "JSD"}


def draw_divergences(report: dict, path: Path) -> None:
    """Time over the bare products with a frozen head, one panel a shape."""
    shapes = report["shapes"]
    timed = {row["made_by"] for entry in shapes for row in entry["rows"] if "ms" in row and not row["trained"]}
    makers = {made_by: shown for made_by, shown in DIVERGENCES.items() if made_by in timed}
    canvas, grid = plt.subplots(1, len(shapes), figsize=(3.6 * len(shapes), 3.4), squeeze=False, sharey=True,
                                layout="constrained")  # fmt: skip
    width = 0.8 / max(1, len(makers))
    for axes, entry in zip(grid[0], shapes, strict=True):
        rows = {(row["kind"], row["made_by"]): row for row in entry["rows"] if not row["trained"]}
        for number, (made_by, (label, colour)) in enumerate(makers.items()):
            found = [rows.get((kind, made_by), {}).get("ratio", 0.0) for kind in KINDS]
            at = [place + (number - (len(makers) - 1) / 2) * width for place in range(len(KINDS))]
            axes.bar(at, found, width=width, color=colour, label=label)
            for x, ratio in zip(at, found, strict=True):
                text = f" {ratio:.2f}" if ratio else " –"
                axes.text(x, ratio, text, ha="center", va="bottom", fontsize=6, rotation=90)
        axes.axhline(1.0, color="#222222", linestyle=":", linewidth=1)
        axes.set_xticks(range(len(KINDS)), KINDS.values(), fontsize=8)
        axes.set_title(f"{model(entry['hidden_size'])}, N = {entry['tokens']:,}", fontsize=9)
        axes.margins(y=0.15)
    grid[0, 0].set_ylabel("forward and backward, over the bare products", fontsize=8)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    canvas.legend(handles, labels, fontsize=7, frameon=False, ncols=len(labels), loc="outside lower center")
    first = shapes[0]
    about = f"V = {first['vocabulary']:,}, {first['dtype']}, {report['device']}"
    canvas.suptitle(f"Divergences over the full vocabulary, frozen head,\n{about}", fontsize=10)
    canvas.savefig(path, dpi=130)
    plt.close(canvas)


def draw_sparse(report: dict, path: Path) -> None:
    """Sparse steps beside exact ones, and the tokens made exactly all the same, over the tolerance."""
    shapes = [entry for entry in report["shapes"] if entry["data"] == "peaked"]
    canvas, (steps, tokens) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    colours = dict(zip(("frozen", "trained"), ("#0072B2", "#D55E00"), strict=True))
    for entry, marker in zip(shapes, MARKERS, strict=False):
        for head, colour in colours.items():
            rows = [row for row in entry["rows"] if row["head"] == head and "ratio" in row["time"]]
            found = [row for row in rows if row["mode"] != "exact"]
            at, label = [row["tolerance"] for row in found], f"{model(entry['hidden_size'])}, {head} head"
            line = {"color": colour, "marker": marker, "markersize": 5}
            steps.plot(at, [row["time"]["ratio"] for row in found], label=label, **line)
            for row in rows:
                if row["mode"] == "exact":
                    steps.axhline(row["time"]["ratio"], color=colour, linestyle="--", linewidth=0.8)
            tokens.plot(at, [100 * row["dense_share"] for row in found], label=label, **line)
    steps.set(ylim=(0.45, None), title="Time of a step, over the bare matrix products of an exact one")
    steps.plot([], [], color="#555555", linestyle="--", linewidth=0.8, label="exact gradients")
    tokens.set(ylim=(0, None), title="Tokens that were made exactly, %")
    for axes in (steps, tokens):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("sparse_tol: dL/dlogits may be off by, of its L1 norm", fontsize=9)
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3, linewidth=0.6)
    steps.legend(fontsize=8, frameon=False, ncols=2, loc="lower left")
    first = shapes[0]
    about = f"N = {first['tokens']:,}, V = {first['vocabulary']:,}, {first['dtype']}, {report['device']}"
    canvas.suptitle(f"Sparse gradients, {about}", fontsize=11)
    canvas.savefig(path, dpi=130)
    plt.close(canvas)


def draw_sparsity(report: dict, path: Path) -> None:
    """What lies beyond the most probable entries, what is kept, and training with exact and with sparse gradients."""
    found = report["sparsity"]["own samples"]
    tenths = found["mass_beyond_rank_by_entropy"]
    entropies = [tenth["entropy"] for tenth in found["tolerances"][0]["by_entropy"]]
    canvas, (beyond, kept, training) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for i, (masses, entropy) in enumerate(zip(tenths, entropies, strict=True)):
        beyond.plot(found["ranks"], masses, color=plt.cm.viridis(i / 10), label=f"{entropy:.2g}")
    beyond.set(xscale="log", yscale="log", ylim=(1e-8, 1), xlabel="k", title="Probability beyond the k largest")
    beyond.legend(title="entropy, nats", fontsize=7, title_fontsize=8, frameon=False, ncols=2)
    for at, marker in zip(found["tolerances"], MARKERS, strict=False):
        entries = [tenth["kept_mean"] for tenth in at["by_entropy"]]
        kept.plot(entropies, entries, marker=marker, label=f"2^{math.log2(at['tolerance']):.0f}")
    kept.set(xscale="log", yscale="log", xlabel="entropy, nats", title="Entries that have to be kept")
    kept.legend(title="tolerance", fontsize=8, title_fontsize=8, frameon=False)
    exact = report["curves"]["exact"]
    for mode, losses in report["curves"].items():
        if mode != "exact":
            gaps = [abs(a - b) for a, b in zip(losses, exact, strict=True)]
            training.plot(range(1, len(gaps) + 1), gaps, linewidth=0.9, label=f"{mode}, less exact")
    training.plot(range(1, len(exact) + 1), exact, color="#999999", linewidth=0.9, label="exact: the loss itself")
    training.set(yscale="log", xlabel="step", title="Loss, nats a token")
    training.legend(fontsize=8, frameon=False)
    for axes in (beyond, kept, training):
        axes.grid(alpha=0.3, linewidth=0.6)
    rows = f"{found['rows']:,} sampled tokens, V = {report['vocabulary']:,}"
    canvas.suptitle(f"A language model of {report['parameters'] / 1e6:.0f} M parameters: {rows}", fontsize=11)
    canvas.savefig(path, dpi=130)
    plt.close(canvas)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON of a benchmark")
    parser.add_argument("--output", type=Path, required=True, help="folder of the PNGs")
    args = parser.parse_args(argv)
    report = json.loads(args.results.read_text(encoding="utf-8"))
    args.output.mkdir(parents=True, exist_ok=True)
    if "sparsity" in report:
        return draw_sparsity(report, args.output / "sparsity.png")
    if "rows" in report:
        return draw_updates(report, args.output / "end_to_end.png")
    if "accuracy" in report["shapes"][0]:
        return draw_divergences(report, args.output / "divergence.png")
    if "runs" not in report:
        return draw_sparse(report, args.output / "sparse.png")
    for figure in ("frozen", "trained"):
        for quantity in QUANTITIES:
            for against in AXES:
                draw(report, figure, quantity, against, args.output / f"{figure}-{quantity}-by-{against}.png")


if __name__ == "__main__":
    main()
