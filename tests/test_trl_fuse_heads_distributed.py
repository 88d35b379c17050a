"""The fused head in two gloo processes, under DDP, FSDP2 and DeepSpeed: outputs and gradients are those of one."""

from __future__ import annotations

import copy
import importlib.util
import os

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("trl")
if not dist.is_available():
    pytest.skip("torch.distributed is not available", allow_module_level=True)

from egrsd_kernels.trl import fuse_head
from tests.support.processes import in_processes
from tests.test_model_heads_distributed import IDS, WORLD, build, whole, wrap

CASES = {
    "ddp": ["ddp", "ddp, static graph", "ddp, lora head, unused parameters"],
    "fsdp": [
        "fsdp, head in the root", "fsdp, head of its own", "fsdp, lora head",
        "fsdp, lora head in the base, head in the root, resharded",
    ],
    "deepspeed": ["zero 2", "zero 3"],
}  # fmt: skip
LABELS = IDS.masked_fill(IDS % 5 == 0, -100)


def value(out):
    return -out.log_probs.mean() + 0.3 * out.entropy.square().mean()


def call(model, rows):
    return model(input_ids=IDS[rows], labels=LABELS[rows], fused_lm_head=True)


class Sharded:
    """A model in DeepSpeed's engine: how it is called, and its gradients."""

    def __init__(self, model: torch.nn.Module, case: str):
        import deepspeed

        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        zero = {"stage": int(case[5]), "stage3_param_persistence_threshold": 0}
        config = {"zero_optimization": zero, "zero_allow_untested_optimizer": True, "train_batch_size": 2 * WORLD}
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(self.named.values(), lr=0.0), config=config,
            dist_init_required=False,
        )  # fmt: skip
        self.zero_grad = self.engine.zero_grad

    def __call__(self, **inputs):
        return self.engine(**inputs)

    def backward(self, loss) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_grad

        self.engine.backward(loss)
        found = {name: safe_get_full_grad(p).clone() for name, p in self.named.items()}
        self.engine.step()
        return found


def step(rank: int, case: str) -> tuple[list[str], float, float]:
    """(weights that have a gradient on one side alone, how far log p is off, and the gradients)."""
    model = build(case)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    fuse_head(base, outputs=("log_probs", "entropy"))
    plain = copy.deepcopy(model)
    zero = case.startswith("zero")
    wrapped = Sharded(model, case) if zero else wrap(base if "in the base" in case else model, case)
    if "resharded" in case:  # as Accelerate has it
        wrapped.set_reshard_after_forward(True)
    rows, off = slice(2 * rank, 2 * rank + 2), []
    for _ in range(3):  # DDP's static graph and FSDP2's prefetching begin with the second
        plain.zero_grad()
        wrapped.zero_grad()
        outputs = [call(plain, slice(2 * other, 2 * other + 2)) for other in range(WORLD)]
        with torch.no_grad():
            reference = call(wrapped, rows)
        out = call(wrapped, rows)
        off += [(found.log_probs - outputs[rank].log_probs).abs().max().item() for found in (out, reference)]
        found = wrapped.backward(value(out)) if zero else value(out).backward()
        (sum(map(value, outputs)) / WORLD).backward()
    if not zero:
        found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    one_sided = sorted({*found} ^ {*expected})
    gradients = [((found[name] - g).norm() / g.norm().clamp(min=1e-9)).item() for name, g in expected.items()]
    return one_sided, max(off), max(gradients)


def worker(rank: int, wrapper: str) -> list[tuple[list[str], float, float]]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    return [step(rank, case) for case in CASES[wrapper]]


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", CASES)
def test_two_processes_are_one(wrapper):
    if wrapper == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    for results in in_processes(worker, wrapper, world=WORLD):
        for case, (one_sided, off, gradients) in zip(CASES[wrapper], results, strict=True):
            assert one_sided == [], case
            assert off <= 1e-5 and gradients <= 1e-5, case  # float32 sums in another order
