"""What SDPO and SDFT take in the place of logits, in two gloo processes: values and gradients are those of one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("trl")
if not dist.is_available():
    pytest.skip("torch.distributed is not available", allow_module_level=True)

from egrsd_kernels.trl.self_distillation import Completion, _completion, _divergence
from tests.support.processes import in_processes
from tests.test_model_heads_distributed import IDS, WORLD, build, whole, wrap

LENGTH = 3
# (case, whether hidden states and head leave the forward, for a divergence)
CASES = [
    ("ddp", False), ("ddp", True), ("ddp, static graph", True), ("ddp, lora head, unused parameters", True),
    ("fsdp, head in the root", False), ("fsdp, head of its own", False),
]  # fmt: skip


def completion(model, rows: slice, keep: bool) -> Completion:
    inputs = {"input_ids": IDS[rows], "attention_mask": torch.ones_like(IDS[rows])}
    return _completion(model, inputs, LENGTH, 0.8, keep)


def value(student: Completion, teacher: Completion, keep: bool) -> torch.Tensor:
    found = -student.logp.mean() - student.logp.square().mean()
    return found + _divergence(student, teacher, 0.5).mean() if keep else found


def step(rank: int, case: str, keep: bool) -> tuple[list[str], float, float]:
    """(weights that have a gradient on one side alone, how far the values are off, and the gradients)."""
    model = build(case)
    plain = copy.deepcopy(model)
    teacher = copy.deepcopy(model).requires_grad_(False)
    for weight in teacher.parameters():
        weight.data *= 1.1
    wrapped = wrap(model, case)
    parts, off = [slice(2 * other, 2 * other + 2) for other in range(WORLD)], []
    with torch.no_grad():
        taught = [completion(teacher, rows, keep) for rows in parts]
    for _ in range(2):  # DDP's static graph and FSDP2's prefetching begin with the second
        plain.zero_grad()
        wrapped.zero_grad()
        values = [value(completion(plain, rows, keep), taught[i], keep) for i, rows in enumerate(parts)]
        got = value(completion(wrapped, parts[rank], keep), taught[rank], keep)
        off.append((got - values[rank]).abs().item())
        got.backward()
        (sum(values) / WORLD).backward()
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    gradients = [((found[name] - g).norm() / g.norm().clamp(min=1e-9)).item() for name, g in expected.items()]
    return sorted({*found} ^ {*expected}), max(off), max(gradients)


def worker(rank: int) -> list[tuple[list[str], float, float]]:
    return [step(rank, *case) for case in CASES]


@pytest.mark.slow
def test_two_processes_are_one():
    for results in in_processes(worker, world=WORLD):
        for case, (one_sided, off, gradients) in zip(CASES, results, strict=True):
            assert one_sided == [], case
            assert off <= 1e-5 and gradients <= 1e-5, case  # float32 sums in another order
