"""The work that every peer is given, and what float64 says about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.data import GENERATORS, head_weight, summary, teacher_hidden

GEMM_ROWS = 8192  # at a time: more logits than these fit no GPU at the largest shapes
CHECKED_ROWS = 1024
CHECKED_ENTRIES = 64  # rows of the head's gradient
LARGEST_ERROR = {"logp_max_nat": 0.5, "entropy_max_nat": 0.5, "dhidden_relative": 0.1, "dweight_relative": 0.1}


class Step(NamedTuple):
    """What one step gave; None where the peer does not show it. ``credit``: the dL/dlogp that its gradients carry."""

    teacher_logp: torch.Tensor | None
    entropy: torch.Tensor | None
    logp: torch.Tensor | None
    credit: torch.Tensor
    d_hidden: torch.Tensor
    d_weight: torch.Tensor | None


@dataclass(frozen=True)
class Problem:
    """N tokens of a student and of its teacher, who share the head; everything on one device."""

    hidden: torch.Tensor  # (N, D)
    teacher_hidden: torch.Tensor  # (N, D)
    weight: torch.Tensor  # (V, D)
    targets: torch.Tensor  # (N,)
    advantages: torch.Tensor  # (N,) float32
    logits: torch.Tensor  # (≤ GEMM_ROWS, V): room for the bare products, and operands for the backward ones
    out: torch.Tensor  # like logits

    @classmethod
    def draw(cls, size: int, n: int, vocabulary: int, data: str, device: torch.device) -> Problem:
        generator = torch.Generator(device).manual_seed(size + n)
        weight = head_weight(vocabulary, size, generator)
        hidden, targets = GENERATORS[data](weight, n, generator)
        logits = torch.empty(min(n, GEMM_ROWS), vocabulary, device=device, dtype=weight.dtype)
        return cls(
            hidden,
            teacher_hidden(hidden, generator),
            weight,
            targets,
            torch.randn(n, device=device, generator=generator),
            logits.normal_(generator=generator),
            torch.empty_like(logits),
        )

    @property
    def credit(self) -> torch.Tensor:
        """(N,) dL/dlogp for those who take any weight a token."""
        return -self.advantages / len(self.advantages)

    def leaves(self, trained: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(trained)

    def forward_product(self, hidden: torch.Tensor) -> None:
        for rows in hidden.split(len(self.out)):
            torch.mm(rows, self.weight.t(), out=self.out[: len(rows)])

    def products(self) -> dict[str, Callable[[], None]]:
        """The bare matrix products of a student's step."""
        d_hidden, d_weight = torch.empty_like(self.hidden[: len(self.out)]), torch.empty_like(self.weight)

        def dhidden() -> None:
            for rows in self.hidden.split(len(self.out)):
                torch.mm(self.logits[: len(rows)], self.weight, out=d_hidden[: len(rows)])

        def dweight() -> None:
            for rows in self.hidden.split(len(self.out)):
                torch.mm(self.logits[: len(rows)].t(), rows, out=d_weight)

        return {"forward": lambda: self.forward_product(self.hidden), "dhidden": dhidden, "dweight": dweight}


class Exact:
    """The same in float64: the first rows in full, and some rows of the head's gradient over all tokens."""

    def __init__(self, problem: Problem):
        self.rows = slice(0, min(CHECKED_ROWS, len(problem.hidden)))
        self.hidden, self.targets = problem.hidden, problem.targets
        weight, targets = problem.weight.double(), problem.targets[self.rows]

        log_p = (problem.teacher_hidden[self.rows].double() @ weight.t()).log_softmax(-1)
        self.teacher_logp, self.entropy = self._of(log_p, targets)
        log_p = (self.hidden[self.rows].double() @ weight.t()).log_softmax(-1)
        self.logp, entropy = self._of(log_p, targets)
        self.distribution = summary(log_p, targets)
        delta = (self.teacher_logp - self.logp).abs()
        self.distribution["abs_delta_mean"] = delta.mean().item()
        decided = entropy <= entropy.quantile(0.5)
        self.distribution["abs_delta_mean_of_lower_half_entropy"] = delta[decided].mean().item()
        self.d_logp = weight[targets] - log_p.exp() @ weight  # d logp / d hidden
        del log_p

        generator = torch.Generator(weight.device).manual_seed(0)
        anywhere = torch.randint(len(weight), (CHECKED_ENTRIES // 2,), device=weight.device, generator=generator)
        self.entries = torch.cat([problem.targets[: CHECKED_ENTRIES // 2], anywhere]).unique()
        self.p_of_entries = torch.cat([self._p(rows.double(), weight) for rows in self.hidden.split(CHECKED_ROWS)])

    @staticmethod
    def _of(log_p: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)

    def _p(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        z = hidden @ weight.t()
        return (z[:, self.entries] - z.logsumexp(-1, keepdim=True)).exp()

    def _d_weight(self, credit: torch.Tensor) -> torch.Tensor:
        coefficient = (self.targets[:, None] == self.entries).double() - self.p_of_entries
        coefficient *= credit.double()[:, None]
        parts = zip(coefficient.split(CHECKED_ROWS), self.hidden.split(CHECKED_ROWS), strict=True)
        return sum(c.t() @ h.double() for c, h in parts)

    def errors(self, step: Step) -> dict[str, float]:
        """How far a step's results are off, in nats or relative in the Frobenius norm."""
        logp = [(step.teacher_logp, self.teacher_logp), (step.logp, self.logp)]
        found = {
            "logp_max_nat": [_largest(got[self.rows], want) for got, want in logp if got is not None],
            "entropy_max_nat": [] if step.entropy is None else [_largest(step.entropy[self.rows], self.entropy)],
            "dhidden_relative": [
                relative(step.d_hidden[self.rows], step.credit[self.rows].double()[:, None] * self.d_logp)
            ],
        }
        if step.d_weight is not None:
            found["dweight_relative"] = [relative(step.d_weight[self.entries], self._d_weight(step.credit))]
        return {name: max(values) for name, values in found.items() if values}


def wrong(errors: dict[str, float]) -> str | None:
    """What is too far off for a time to count; None where nothing is."""
    off = [f"{name} = {value:.2g}" for name, value in errors.items() if not value <= LARGEST_ERROR[name]]
    return f"wrong result: {', '.join(off)}" if off else None


def _largest(got: torch.Tensor, want: torch.Tensor) -> float:
    return (got.double() - want).abs().max().item()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()
