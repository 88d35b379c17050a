"""``fuse_heads()`` under TRL's distillation: divergences, gradients and logged metrics are those of TRL's own code."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import trl.kernels.chunked_divergence as kernels
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig
from trl import DistillationConfig, DistillationTrainer
from trl.trainer import distillation_trainer

from egrsd_kernels.trl import fuse_heads, fused_divergence, unfuse_heads
from tests.support.trl_tiny import tokenizer
from tests.test_trl_fuse_heads_trainers import COMMON, KINDS, Watch, check_same

KEPT = [kernels.ChunkedDivergenceFunction]  # as a name of this module it would be replaced, too


def trls() -> type:
    return KEPT[0]


@pytest.fixture(autouse=True)
def unfused():
    unfuse_heads()
    yield
    unfuse_heads()


# ------------------------------------------------------------------------------------------------------- the function


def operands(dtype=torch.float32, n=13, vocabulary=37, width=8, teacher_width=6) -> list:
    g = torch.Generator().manual_seed(0)
    shapes = (n, width), (vocabulary, width), (vocabulary,), (n, teacher_width), (vocabulary, teacher_width), None
    made = [None if shape is None else torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    return [x.requires_grad_() if x is not None and i < 3 else x for i, x in enumerate(made)]


def result(function: type, tensors: list, *options) -> list[torch.Tensor]:
    """Divergence, entropy, and the gradients under weights of tokens, one of them 0."""
    divergence, entropy = function.apply(*tensors, *options)
    assert not entropy.requires_grad
    weights = torch.linspace(0, 1, len(divergence))
    learned = [x for x in tensors[:3] if x is not None and x.requires_grad]
    return [divergence, entropy, *torch.autograd.grad((weights * divergence).sum(), learned)]


OPTIONS = {
    "": (),
    "temperature": (0.7,),
    "scale": (1.0, 0.5, None, 2.0),
    "caps": (1.3, 0.5, 3.0, 1.0, 5.0),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_function_is_trls(beta, options):
    ours, theirs = (result(f, operands(), beta, *options) for f in (fused_divergence.fused_divergence(trls()), trls()))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        # Both in float32: logits of at most 30, sums of 37 terms.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_heads_of_another_dtype_and_autocast_are_read_as_trl_reads_them():
    tensors = operands()
    ours = fused_divergence.fused_divergence(trls())
    mixed = [tensors[0].detach().bfloat16().requires_grad_(), *tensors[1:3], tensors[3].bfloat16(), *tensors[4:]]
    for one, other in zip(result(ours, mixed, 1.0), result(trls(), mixed, 1.0), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = result(ours, operands(), 1.0), result(trls(), operands(), 1.0)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    assert not torch.equal(got[0], result(ours, operands(), 1.0)[0])  # autocast did something


def test_no_token_is_no_divergence():
    tensors = operands(n=0)
    assert [x.shape for x in result(fused_divergence.fused_divergence(trls()), tensors, 1.0)][:2] == [(0,), (0,)]


def test_the_name_is_ours_until_it_is_undone(monkeypatch):
    holders = [module for module in (kernels, distillation_trainer) if hasattr(module, "ChunkedDivergenceFunction")]
    with fuse_heads():
        with fuse_heads():
            pass
        assert all(issubclass(module.ChunkedDivergenceFunction, trls()) for module in holders)
        assert all(module.ChunkedDivergenceFunction is not trls() for module in holders)
    assert all(module.ChunkedDivergenceFunction is trls() for module in holders)
    fuse_heads()
    assert kernels.ChunkedDivergenceFunction is not trls()
    unfuse_heads()
    assert all(module.ChunkedDivergenceFunction is trls() for module in holders)
    monkeypatch.setattr(kernels, "ChunkedDivergenceFunction", Path)
    with pytest.raises(RuntimeError, match=r"^fuse_heads: expected TRL's own ChunkedDivergenceFunction, got .*Path$"):
        fuse_heads()
    assert trl.trainer.utils.add_fused_lm_head.__module__ == "trl.trainer.utils"  # nothing was done by halves


def test_what_ours_does_not_do_stays_trls(monkeypatch):
    """Under ZeRO-3 a head is empty until TRL's function gathers it; a later argument is not dropped in silence."""
    calls = []
    stub = type("Stub", (trls(),), {"apply": staticmethod(lambda *given: calls.append(given))})
    ours = fused_divergence.fused_divergence(stub)
    tensors = operands()
    ours.apply(*tensors, 1.0, 1.0, 1.0, None, 1.0, None, "later")
    with monkeypatch.context() as patch:
        patch.setattr(fused_divergence, "is_deepspeed_zero3_enabled", lambda: True)
        ours.apply(*tensors, 0.5)
    monkeypatch.setattr(fused_divergence, "lacks_kernels", lambda pair: pair.divergence.kind == "reverse_kl")
    ours.apply(*tensors, 1.0, 0.7)
    ours.apply(*tensors, 0.0)
    plain = (1.0, None, 1.0, None)
    assert [given[6:] for given in calls] == [(1.0, 1.0, *plain, "later"), (0.5, 1.0, *plain), (1.0, 0.7, *plain)]
    assert all(a is b for given in calls for a, b in zip(given, tensors, strict=False))


# -------------------------------------------------------------------------------------------------------- the trainer


def train(path: Path, fused: bool, student: str = "dense", lora: bool = False, **settings) -> tuple[list, list]:
    """(logs, gradients) of two steps, from the same weights and random numbers every time."""
    prompts = [[{"role": "user", "content": f"{a}+{a % 7}?"}] for a in range(12)]
    torch.manual_seed(1)
    teacher = KINDS[student]()
    for weight in teacher.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    watch, calls, theirs = Watch(), [], trls().forward

    def seen(*arguments):
        calls.append(1)
        return theirs(*arguments)

    config = COMMON | {"max_completion_length": 8, "seed": 0} | settings
    peft_config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]) if lora else None
    run = DistillationTrainer(
        model=KINDS[student](), teacher_model=teacher, args=DistillationConfig(str(path), **config),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=copy.deepcopy(tokenizer()), peft_config=peft_config, callbacks=[watch],
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, fuse_heads() if fused else contextlib.nullcontext():
        patch.setattr(trls(), "forward", staticmethod(seen))
        run.train()
    assert bool(calls) != fused  # TRL's own function is called where ours is not
    return watch.logs, watch.gradients


@pytest.mark.heavy
@pytest.mark.parametrize(
    "options",
    [
        {"student": "scaled", "beta": 1.0},
        {"lora": True, "beta": 0.0, "temperature": 0.8},
        {"student": "capped", "lora": True, "beta": 0.4},
        {"beta": 1.0, "gradient_accumulation_steps": 1},
    ],
    ids=["reverse KL, scaled, full", "forward KL, LoRA", "JSD, capped, LoRA", "reverse KL, full"],
)
def test_two_steps_of_distillation_are_trls(tmp_path, options):
    ours, theirs = (train(tmp_path / str(fused), fused, **options) for fused in (True, False))
    assert theirs[0][0].keys() >= {"loss", "entropy"}
    check_same(ours, theirs)
