"""The head's step of TRL's trainers, by TRL's ChunkedLogProbFunction and by linear_logp, as fuse_head calls it.

    python -m benchmarks.trl_head --output benchmarks/results/trl_head-h100.json

A row is a forward and a backward pass from hidden states and head to what a trainer asks for, with random dL/dlogp
(and dL/dentropy under a bonus), beside the bare matrix products of the same run: 1 forward and 1 backward product for a
frozen head, and 1 more for a trained one. Ours and TRL's are timed in turn. ``speedup``: TRL's time over ours.
Memory is what is held above operands. Accuracy is checked against float64 before a time counts, as benchmarks.losses
does; TRL may be off by what 16-bit logits are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.compare import is_long, over_floor
from benchmarks.losses import FLOORS, LARGEST_ERROR, Exact, checked, run
from benchmarks.measure import interleaved, timer_of
from benchmarks.problem import LARGEST_ERROR as LARGEST_IN_16_BITS
from benchmarks.problem import Problem
from egrsd_kernels import linear_logp

OUTPUTS = {
    "GRPO": ("entropy",),
    "GRPO, entropy bonus": ("entropy",),
    "DPO": ("entropy", "mean_logits", "is_top1"),
    "SFT": ("entropy", "is_top1"),
}  # what TRL 1.16's trainers ask for beside log p


@dataclass(frozen=True)
class Subject:
    """A trainer's step at its head. made_by: "ours" or "trl"."""

    trainer: str
    trained: bool
    made_by: str

    @property
    def entropy_grad(self) -> bool:
        return "bonus" in self.trainer

    def __call__(self, p: Problem, incoming: torch.Tensor):
        """(log p, entropy, hidden gradient, head's or None)"""
        hidden, weight = p.leaves(self.trained)
        logp, entropy = MAKERS[self.made_by](hidden, weight, p.targets, OUTPUTS[self.trainer], self.entropy_grad)
        outputs = [logp, entropy] if self.entropy_grad else [logp]
        torch.autograd.backward(outputs, list(incoming[: len(outputs)]))
        return logp.detach(), entropy.detach(), hidden.grad, weight.grad


def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, outputs: tuple[str, ...], bonus: bool):
    extras = [name for name in outputs if name != "entropy"]
    return linear_logp(
        hidden, weight, targets, return_entropy=True, entropy_grad=bonus or "lazy", extras=extras
    )[:2]  # fmt: skip


def trl(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, outputs: tuple[str, ...], bonus: bool):
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as WIDTH

    bias, temperature, softcap, logit_scale = None, 1.0, None, 1.0
    return ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, temperature, WIDTH, softcap, logit_scale, ("log_probs", *outputs)
    )[:2]


MAKERS: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {"ours": ours, "trl": trl}
STEPS = [("GRPO", False), ("GRPO", True), ("GRPO, entropy bonus", False), ("DPO", False), ("SFT", True)]


def measure(p: Problem, device: torch.device, **effort) -> dict:
    """One shape's entry in the result file. effort: ``rounds`` and ``budget`` of :func:`interleaved`."""
    timer = timer_of(device)
    generator = torch.Generator(device).manual_seed(1)
    incoming = torch.randn(2, len(p.hidden), device=device, generator=generator) / len(p.hidden)
    exact = Exact(p, incoming)
    rows, subjects = [], {("product", name): run for name, run in p.products().items()}
    for trainer, trained in STEPS:
        for made_by in MAKERS:
            subject = Subject(trainer, trained, made_by)
            row = {"trainer": trainer, "trained": trained, "made_by": made_by}
            timer.free()
            largest = LARGEST_ERROR if made_by == "ours" else LARGEST_IN_16_BITS
            if checked(row, subject, p, incoming, exact, largest):
                subjects[subject] = partial(subject, p, incoming)
            rows.append(row)
    times = interleaved(subjects, timer, sustained=is_long(p), **effort)
    products = {key[1]: time for key, time in times.items() if isinstance(key, tuple)}
    for row in rows:
        if time := times.get(Subject(row["trainer"], row["trained"], row["made_by"])):
            row |= over_floor(time, products, FLOORS[row["trained"]])
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        if "ms" in one and "ms" in other:
            one["speedup"] = other["ms"] / one["ms"]
    return {"products": products, "rows": rows}


def title(row: dict) -> str:
    return f"{row['trainer']}, {'trained' if row['trained'] else 'frozen'}: {row['made_by']}"


def main(argv: list[str] | None = None) -> None:
    run("benchmarks.trl_head", __doc__, ["trl"], measure, title, argv)


if __name__ == "__main__":
    main()
