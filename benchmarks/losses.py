"""linear_logp behind any loss: entropies, their gradient, and a trained head, within keep_bytes and beyond it.

    python -m benchmarks.losses --output benchmarks/results/losses-h200.json

A row is a forward and a backward pass with random dL/dlogp and, where the entropy has a gradient, dL/dentropy, beside
the bare matrix products of the same run: 1 forward and 1 backward product for a frozen head, and 1 more for a trained
one. ``kept``: what the backward pass needs is kept, whatever it takes; ``1 GiB``: by as many rows as fit, keep_bytes'
default; ``again``: keep_bytes = 0, it is made again.
Memory is what is held above operands. Accuracy is checked against float64 before a time counts: log p, entropy and
hidden gradient of the first rows, and some rows of the head's gradient over all tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.compare import is_long, over_floor, parse_shapes, run_options, shape_of
from benchmarks.data import GENERATORS
from benchmarks.measure import command, environment, failure, interleaved, timer_of, write
from benchmarks.problem import CHECKED_ENTRIES, CHECKED_ROWS, Problem, relative
from egrsd_kernels import linear_logp

FLOORS = {
    False: (1, 1, 0),
    True: (1, 1, 1),
}  # bare products (forward, dhidden, dweight), by whether the head is trained
KEEP = {"kept": 1 << 40, "1 GiB": 1 << 30, "again": 0}
# |Δ log p| as the package promises; entropies and gradients as tests allow them.
LARGEST_ERROR = {"logp_max_nat": 2e-4, "entropy_max_nat": 1e-3, "dhidden_relative": 5e-3, "dweight_relative": 5e-3}


@dataclass(frozen=True)
class Subject:
    """A call of linear_logp. keep: a key of KEEP, or None where nothing is to be kept."""

    trained: bool
    entropy: bool
    entropy_grad: bool
    keep: str | None

    @property
    def name(self) -> str:
        what = "+ entropy's gradient" if self.entropy_grad else "+ entropy" if self.entropy else ""
        return " ".join(filter(None, ["trained" if self.trained else "frozen", what, self.keep]))

    def __call__(self, p: Problem, incoming: torch.Tensor):
        """(log p, entropy or None, hidden gradient, head's or None)"""
        hidden, weight = p.leaves(self.trained)
        options = {"keep_bytes": KEEP[self.keep or "again"]}
        if self.entropy:
            options |= {"return_entropy": True, "entropy_grad": self.entropy_grad}
        out = linear_logp(hidden, weight, p.targets, **options)
        logp, entropy = out if self.entropy else (out, None)
        outputs = [logp, entropy] if self.entropy_grad else [logp]
        torch.autograd.backward(outputs, list(incoming[: len(outputs)]))
        return logp.detach(), entropy, hidden.grad, weight.grad


SUBJECTS = [
    Subject(False, False, False, None),
    Subject(False, True, False, None),
    *(Subject(False, True, True, keep) for keep in KEEP),
    *(Subject(True, False, False, keep) for keep in KEEP),
    *(Subject(True, True, True, keep) for keep in KEEP),
]


class Exact:
    """The same in float64: the first rows in full, and some rows of the head's gradient over all tokens."""

    def __init__(self, p: Problem, incoming: torch.Tensor):
        self.rows = slice(0, min(CHECKED_ROWS, len(p.hidden)))
        generator = torch.Generator(p.weight.device).manual_seed(0)
        anywhere = torch.randint(len(p.weight), (CHECKED_ENTRIES // 2,), device=p.weight.device, generator=generator)
        self.entries = torch.cat([p.targets[: CHECKED_ENTRIES // 2], anywhere]).unique()
        self.d_hidden, self.d_weight = {}, {False: 0, True: 0}
        for start in range(0, len(p.hidden), CHECKED_ROWS):
            rows = slice(start, start + CHECKED_ROWS)
            h, y = p.hidden[rows].double(), p.targets[rows, None]
            log_p = (h @ p.weight.double().t()).log_softmax(-1)
            p_v = log_p.exp()
            entropy = -(p_v * log_p).sum(-1, keepdim=True)
            if start == 0:
                self.logp, self.entropy = log_p.gather(1, y).squeeze(1), entropy.squeeze(1)
            g, of_entropy = incoming[:, rows, None].double()
            for with_entropy in (False, True):
                slope = g + of_entropy * (log_p + entropy) * with_entropy
                dz = (-p_v * slope).scatter_add_(1, y, g)
                self.d_weight[with_entropy] += dz[:, self.entries].t() @ h
                if start == 0:
                    self.d_hidden[with_entropy] = dz @ p.weight.double()
            del log_p, p_v, slope, dz

    def errors(self, subject: Subject, result) -> dict[str, float]:
        logp, entropy, d_hidden, d_weight = result
        found = {"logp_max_nat": (logp[self.rows].double() - self.logp).abs().max().item()}
        if entropy is not None:
            found["entropy_max_nat"] = (entropy.detach()[self.rows].double() - self.entropy).abs().max().item()
        found["dhidden_relative"] = relative(d_hidden[self.rows], self.d_hidden[subject.entropy_grad])
        if d_weight is not None:
            found["dweight_relative"] = relative(d_weight[self.entries], self.d_weight[subject.entropy_grad])
        return found


def checked(row: dict, subject, p: Problem, incoming: torch.Tensor, exact: Exact, largest: dict[str, float]) -> bool:
    """Whether a subject's time counts. Its errors come into the row, and a note of what is wrong, if anything."""
    try:
        row["error"] = exact.errors(subject, subject(p, incoming))
        off = [f"{name} = {x:.2g}" for name, x in row["error"].items() if not x <= largest[name]]
        note = f"wrong result: {', '.join(off)}" if off else None
    except Exception as error:
        note = failure(error)
    if note:
        row["note"] = note
    return not note


def measure(p: Problem, device: torch.device, **effort) -> dict:
    """One shape's entry in the result file. effort: ``rounds`` and ``budget`` of :func:`interleaved`."""
    timer = timer_of(device)
    generator = torch.Generator(device).manual_seed(1)
    incoming = torch.randn(2, len(p.hidden), device=device, generator=generator) / len(p.hidden)
    exact = Exact(p, incoming)
    rows, subjects = [], {("product", name): run for name, run in p.products().items()}
    for subject in SUBJECTS:
        row = {"name": subject.name, "trained": subject.trained, "entropy": subject.entropy}
        row |= {"entropy_grad": subject.entropy_grad, "keep": subject.keep}
        timer.free()
        if checked(row, subject, p, incoming, exact, LARGEST_ERROR):
            subjects["row", subject.name] = partial(subject, p, incoming)
        rows.append(row)
    times = interleaved(subjects, timer, sustained=is_long(p), **effort)
    products = {name: time for (key, name), time in times.items() if key == "product"}
    for row in rows:
        if time := times.get(("row", row["name"])):
            row |= over_floor(time, products, FLOORS[row["trained"]])
    return {"products": products, "rows": rows}


def describe(entry: dict, title: Callable[[dict], str]) -> str:
    products = ", ".join(f"{name} {time.get('ms', float('nan')):.2f} ms" for name, time in entry["products"].items())
    lines = [f"D = {entry['hidden_size']}, N = {entry['tokens']}, {entry['data']}: bare products {products}"]
    for row in entry["rows"]:
        cells = [f"  {title(row)}".ljust(38)]
        if "ms" in row:
            cells.append(f"{row['ms']:9.3f} ms {row['ratio']:6.3f} x {row['peak_mib'] or 0:7.0f} MiB")
            cells += [f"{row['speedup']:.2f} x TRL's speed"] if "speedup" in row else []
        cells += [f"{name} {value:.1e}" for name, value in row.get("error", {}).items()]
        lines.append("  ".join([*cells, row.get("note", "")]).rstrip())
    return "\n".join(lines)


def run(
    module: str, about: str | None, packages: list[str], measure: Callable[..., dict], title: Callable[[dict], str],
    argv: list[str] | None,
) -> None:  # fmt: skip
    """The command ``python -m module``, which says ``about`` itself: ``measure`` at each shape, into a result file."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--shapes", default="4b:4096,8b:4096,4b:16384,8b:16384", help="size:tokens,... by name or D")
    parser.add_argument("--data", choices=GENERATORS, default="peaked")
    run_options(parser, budget=0.5)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    report = {"command": command(module, parser, args)} | environment(device, packages, args.commit)
    report["shapes"] = []
    for size, n in parse_shapes(args.shapes):
        p = Problem.draw(size, n, args.vocabulary, args.data, device)
        found = measure(p, device, rounds=args.rounds, budget=args.budget)
        report["shapes"].append(shape_of(p, args.data) | found)
        del p
        write(args.output, report)
        print(describe(report["shapes"][-1], title), flush=True)


def main(argv: list[str] | None = None) -> None:
    run("benchmarks.losses", __doc__, [], measure, lambda row: row["name"], argv)


if __name__ == "__main__":
    main()
