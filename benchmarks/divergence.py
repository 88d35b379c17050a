"""Full-vocabulary divergences of student and teacher with one head: ours, TRL's, Liger's, and plain PyTorch's.

    python -m benchmarks.divergence --output benchmarks/results/divergence-h200.json

A row is a forward and a backward pass from hidden states and head with a random weight for each token, beside the bare
matrix products of the same run: 2 forward (student and teacher) and 1 backward product for a frozen head, and 1 more
for a trained one, whose divergences' gradients are kept by as many rows as fit into keep_bytes' default, 1 GiB; or all
of them (``kept``). Liger gives a mean over tokens alone, here with a frozen head. Memory is what is held above
operands.

Accuracy is checked against float64 before a time counts, over the first rows: ``divergence_of_bound`` is the largest
error over max(1e-3 of the divergence, 4e-6 nat), ``dhidden_worst_row`` that of the row that is most off. Plain
PyTorch's logits are rounded to 16 bits, by more than alike models differ; its times count whatever that does to the
gradient. ``accuracy`` has the same, without times, of teachers nearer and farther, and of one that moves every target's
log-ratio by 5 nats up or down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.compare import is_long, over_floor
from benchmarks.losses import run
from benchmarks.measure import failure, interleaved, timer_of
from benchmarks.problem import CHECKED_ENTRIES, CHECKED_ROWS, Problem, relative
from egrsd_kernels import linear_divergence

FLOORS = {
    False: (2, 1, 0),
    True: (2, 1, 1),
}  # bare products (forward, dhidden, dweight), by whether the head is trained
KINDS = ("reverse_kl", "forward_kl", "jsd")
BETA = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}  # as TRL and Liger name them
CHUNK = 1024  # tokens of torch.compile's
# Of ours as promised, of TRL's and Liger's kernels what tells another function, of plain PyTorch's whatever it is.
LARGEST_ERROR = {"divergence_of_bound": 1.0, "divergence_mean_nat": 1e-6, "dhidden_relative": 5e-3}
LARGEST_ERROR |= {"dhidden_worst_row": 2e-2, "dweight_relative": 5e-3}
LARGEST_OF_KERNELS = {"dhidden_relative": 0.5, "dweight_relative": 0.5}
LARGEST = {"ours": LARGEST_ERROR, "trl": LARGEST_OF_KERNELS, "liger": LARGEST_OF_KERNELS, "compile": {}, "eager": {}}
COMPARED = ("ours", "trl", "eager")  # by their accuracy
# The noise of the teacher's hidden states over that of benchmarks.data: about 3e-5, 2e-3 and 0.1 nat of divergence.
NOISE = {"near": 0.3, "apart": 2.5, "far": 18.0}


def of_rows(log_s: torch.Tensor, log_t: torch.Tensor, kind: str) -> torch.Tensor:
    """D (n,) by the definitions, in the dtype of log p."""
    p, q, r = log_s.exp(), log_t.exp(), log_s - log_t
    if kind == "reverse_kl":
        return (p * r).sum(-1)
    if kind == "forward_kl":
        return -(q * r).sum(-1)
    u = log_s - (0.5 * (p + q)).log()
    return 0.5 * (p * u).sum(-1) + 0.5 * (q * (u - r)).sum(-1)


def dz_of(log_s: torch.Tensor, log_t: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(D (n,), dD/dz (n, V)), the gradient by its own formula."""
    p, q = log_s.exp(), log_t.exp()
    d = of_rows(log_s, log_t, kind)
    if kind == "reverse_kl":
        return d, p * (log_s - log_t - d[:, None])
    if kind == "forward_kl":
        return d, p - q
    u = log_s - (0.5 * (p + q)).log()
    return d, 0.5 * p * (u - (p * u).sum(-1, keepdim=True))


class Exact:
    """In float64: the first rows in full, and some rows of the head's gradient over all tokens where ``trained``."""

    def __init__(self, p: Problem, incoming: torch.Tensor, trained: bool = True):
        self.rows, self.incoming = slice(0, min(CHECKED_ROWS, len(p.hidden))), incoming
        generator = torch.Generator(p.weight.device).manual_seed(0)
        anywhere = torch.randint(len(p.weight), (CHECKED_ENTRIES // 2,), device=p.weight.device, generator=generator)
        self.entries = torch.cat([p.targets[: CHECKED_ENTRIES // 2], anywhere]).unique()
        self.divergence, self.direction, self.d_weight = {}, {}, dict.fromkeys(KINDS, 0)
        weight = p.weight.double()
        for start in range(0, len(p.hidden) if trained else 1, CHECKED_ROWS):
            rows = slice(start, start + CHECKED_ROWS)
            h = p.hidden[rows].double()
            log_s, log_t = (x.double() @ weight.t() for x in (p.hidden[rows], p.teacher_hidden[rows]))
            log_s, log_t = log_s.log_softmax(-1), log_t.log_softmax(-1)
            for kind in KINDS:
                d, dz = dz_of(log_s, log_t, kind)
                self.d_weight[kind] += (dz[:, self.entries] * incoming[rows, None].double()).t() @ h
                if start == 0:
                    self.divergence[kind], self.direction[kind] = d, dz @ weight
                del dz

    def errors(self, kind: str, uniform: bool, divergence, d_hidden, d_weight) -> dict[str, float]:
        d, incoming = self.divergence[kind], self.incoming[self.rows].double()
        if uniform:
            incoming = torch.full_like(incoming, 1 / len(self.incoming))
        want, got = self.direction[kind] * incoming[:, None], d_hidden[self.rows].double()
        found = {}
        if divergence is not None:
            off = divergence[self.rows].double() - d
            found["divergence_of_bound"] = (off.abs() / (1e-3 * d).clamp(min=4e-6)).max().item()
            found["divergence_mean_nat"] = off.mean().abs().item()
        found["dhidden_relative"] = relative(got, want)
        found["dhidden_worst_row"] = ((got - want).norm(dim=1) / want.norm(dim=1)).max().item()
        if d_weight is not None:
            found["dweight_relative"] = relative(d_weight[self.entries], self.d_weight[kind])
        return found


@dataclass(frozen=True)
class Subject:
    """made_by: a key of MAKERS. kept: whether a trained head keeps all rows, whatever that takes."""

    kind: str
    trained: bool
    made_by: str
    kept: bool = False

    @property
    def uniform(self) -> bool:
        return self.made_by == "liger"

    def __call__(self, p: Problem, incoming: torch.Tensor):
        """(divergence or None, hidden gradient, head's or None)"""
        hidden, weight = p.leaves(self.trained)
        divergence = MAKERS[self.made_by](p, hidden, weight, self)
        divergence.backward(None if self.uniform else incoming)
        return None if self.uniform else divergence.detach(), hidden.grad, weight.grad


def ours(p: Problem, hidden: torch.Tensor, weight: torch.Tensor, subject: Subject) -> torch.Tensor:
    options = {"keep_bytes": 1 << 40} if subject.kept else {}
    options["backend"] = "triton" if hidden.is_cuda else "torch"
    return linear_divergence(
        hidden, weight, p.teacher_hidden, weight.detach(), kind=subject.kind, target_ids=p.targets, **options
    )


def trl(p: Problem, hidden: torch.Tensor, weight: torch.Tensor, subject: Subject) -> torch.Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(
        hidden, weight, None, p.teacher_hidden, weight.detach(), None, BETA[subject.kind]
    )[0]  # fmt: skip


def liger(p: Problem, hidden: torch.Tensor, weight: torch.Tensor, subject: Subject) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=BETA[subject.kind])
    return loss(hidden, weight, p.teacher_hidden, weight.detach(), None)


def _of_chunk(h: torch.Tensor, t: torch.Tensor, weight: torch.Tensor, kind: str) -> torch.Tensor:
    log_s, log_t = ((x @ weight.t()).float().log_softmax(-1) for x in (h, t))
    return of_rows(log_s, log_t, kind)


_compiled_chunk = torch.compile(_of_chunk, dynamic=False)


def eager(p: Problem, hidden: torch.Tensor, weight: torch.Tensor, subject: Subject) -> torch.Tensor:
    """Full logits of student and teacher."""
    return _of_chunk(hidden, p.teacher_hidden, weight, subject.kind)


def compiled(p: Problem, hidden: torch.Tensor, weight: torch.Tensor, subject: Subject) -> torch.Tensor:
    chunks = zip(hidden.split(CHUNK), p.teacher_hidden.split(CHUNK), strict=True)
    parts = [checkpoint(_compiled_chunk, h, t, weight, subject.kind, use_reentrant=False) for h, t in chunks]
    return torch.cat(parts)


MAKERS: dict[str, Callable[..., torch.Tensor]] = {"ours": ours, "trl": trl, "liger": liger, "compile": compiled,
                                                 "eager": eager}  # fmt: skip
SUBJECTS = [
    *(Subject(kind, False, made_by) for kind in KINDS for made_by in MAKERS),
    *(Subject(kind, True, "ours", kept) for kind in KINDS for kept in (False, True)),
    *(Subject(kind, True, "trl") for kind in KINDS),
]


def check(row: dict, subject: Subject, p: Problem, incoming: torch.Tensor, exact: Exact) -> bool:
    """Whether a time counts. Errors come into the row, and a note of what is wrong, if anything."""
    largest = LARGEST[subject.made_by]
    try:
        row["error"] = exact.errors(subject.kind, subject.uniform, *subject(p, incoming))
        off = [f"{name} = {x:.2g}" for name, x in row["error"].items() if not x <= largest.get(name, float("inf"))]
        note = f"wrong result: {', '.join(off)}" if off else None
    except ModuleNotFoundError as error:
        note = f"missing: {error.name}"
    except Exception as error:
        note = failure(error)
    if note:
        row["note"] = note
    return not note


def teachers(p: Problem) -> dict[str, Problem]:
    """The problem with other teachers: by NOISE, and with every target's log-ratio moved by 5 nats, up or down."""
    moved = p.teacher_hidden - p.hidden
    found = {name: replace(p, teacher_hidden=(p.hidden + factor * moved).to(p.hidden.dtype))
             for name, factor in NOISE.items()}  # fmt: skip
    target = p.weight[p.targets].float()
    sign = torch.where(torch.arange(len(target), device=target.device) % 2 == 0, 5.0, -5.0)[:, None]
    towards = sign * target / target.square().sum(1, keepdim=True)
    nearest = found["near"].teacher_hidden
    found["targets moved"] = replace(p, teacher_hidden=(nearest.float() + towards).to(nearest.dtype))
    return found


def accuracy(p: Problem, incoming: torch.Tensor) -> list[dict]:
    """Of ours, of TRL's and of plain PyTorch's, over the checked rows."""
    few = CHECKED_ROWS
    p = replace(
        p, hidden=p.hidden[:few], teacher_hidden=p.teacher_hidden[:few], targets=p.targets[:few], logits=p.logits[:few],
        out=p.out[:few],
    )  # fmt: skip
    rows = []
    for name, problem in teachers(p).items():
        exact = Exact(problem, incoming[:few], trained=False)
        for kind in KINDS:
            for made_by in COMPARED:
                row = {
                    "teacher": name,
                    "kind": kind,
                    "made_by": made_by,
                    "mean_nat": exact.divergence[kind].mean().item(),
                }
                check(row, Subject(kind, False, made_by), problem, incoming[:few], exact)
                rows.append(row)
    return rows


def measure(p: Problem, device: torch.device, **effort) -> dict:
    """One shape's entry in the result file. effort: ``rounds`` and ``budget`` of :func:`interleaved`."""
    timer = timer_of(device)
    generator = torch.Generator(device).manual_seed(1)
    incoming = torch.randn(len(p.hidden), device=device, generator=generator) / len(p.hidden)
    exact = Exact(p, incoming)
    rows, subjects = [], {("product", name): run for name, run in p.products().items()}
    for subject in SUBJECTS:
        row = {"kind": subject.kind, "trained": subject.trained, "made_by": subject.made_by, "kept": subject.kept}
        timer.free()
        if check(row, subject, p, incoming, exact):
            subjects[subject] = partial(subject, p, incoming)
        rows.append(row)
    del exact
    timer.free()
    times = interleaved(subjects, timer, sustained=is_long(p), **effort)
    products = {key[1]: time for key, time in times.items() if isinstance(key, tuple)}
    for subject, row in zip(SUBJECTS, rows, strict=True):
        if time := times.get(subject):
            row |= over_floor(time, products, FLOORS[subject.trained])
    for row in rows:
        trl = next(x for x in rows if (x["kind"], x["trained"], x["made_by"]) == (row["kind"], row["trained"], "trl"))
        if row["made_by"] == "ours" and "ms" in row and "ms" in trl:
            row["speedup"] = trl["ms"] / row["ms"]
    return {"products": products, "rows": rows, "accuracy": accuracy(p, incoming)}


def title(row: dict) -> str:
    head = "frozen" if not row["trained"] else "trained, kept" if row["kept"] else "trained"
    return f"{row['kind']}, {head}: {row['made_by']}"


def main(argv: list[str] | None = None) -> None:
    run("benchmarks.divergence", __doc__, ["trl", "liger-kernel"], measure, title, argv)


if __name__ == "__main__":
    main()
