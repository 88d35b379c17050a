"""``without_logits``: TRL's SDPO and SDFT train as with full logits, and make none."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl import GRPOTrainer

from egrsd_kernels.trl import self_distillation, without_logits
from tests.support.trl_tiny import correct, tiny_model, tokenizer
from tests.test_trl_fuse_heads_trainers import COMMON, KINDS, Watch, check_same


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def classes(name: str) -> tuple[type, type]:
    if name == "SDPO":
        from trl.experimental.sdpo import SDPOConfig as Config
        from trl.experimental.sdpo import SDPOTrainer as Trainer
    else:
        from trl.experimental.sdft import SDFTConfig as Config
        from trl.experimental.sdft import SDFTTrainer as Trainer
    return Trainer, Config


class Logits(TorchDispatchMode):
    """Counts the tensors that hold a batch's logits. Those of a head's proof are one sequence's."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.seen = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            shape = leaf.shape if isinstance(leaf, torch.Tensor) else ()
            self.seen += len(shape) == 3 and shape[-1] == self.vocabulary and shape[0] > 1
        return out


def train(
    path: Path, name: str, ours: bool, kind: str = "dense", lora: bool = False, dtype=torch.float32, **settings
) -> tuple:
    """(logs, gradients, how many tensors of logits were made) of two steps."""
    trainer, config = classes(name)
    prompts = [{"prompt": [{"role": "user", "content": f"{a}+{a % 7}?"}], "answer": str(a + a % 7)} for a in range(12)]
    if name == "SDFT":
        prompts = [row | {"privileged_context": f"It is {row['answer']}."} for row in prompts]
    more = {"reward_funcs": correct} if name == "SDPO" else {}
    model = KINDS[kind]()
    model.save_pretrained(path / "model")
    model = type(model).from_pretrained(path / "model", torch_dtype=dtype)
    options = COMMON | {"max_completion_length": 8, "seed": 0, "temperature": 0.8} | settings
    if name == "SDPO":
        options = {"num_generations": 2, "success_reward_threshold": 0.2} | options
    watch = Watch()
    run = (without_logits(trainer) if ours else trainer)(
        model=model, args=config(str(path), **options), train_dataset=Dataset.from_list(prompts),
        processing_class=copy.deepcopy(tokenizer()), callbacks=[watch],
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]) if lora else None, **more,
    )  # fmt: skip
    counted = Logits(len(tokenizer()))
    loss = run.compute_loss

    def compute_loss(*args, **kwargs):
        with counted:
            return loss(*args, **kwargs)

    run.compute_loss = compute_loss
    run.train()
    return watch.logs, watch.gradients, counted.seen


CASES = {
    "SDPO sampled": ("SDPO", {}),
    "SDFT full, JSD": ("SDFT", {"distillation_mode": "full_logits", "distillation_alpha": 0.5}),
    "SDPO sampled, mixed, scaled": ("SDPO", {"distillation_weight": 0.4, "kind": "scaled"}),
    "SDPO full, reverse, LoRA": (
        "SDPO", {"distillation_mode": "full_logits", "distillation_alpha": 1.0, "lora": True, "num_iterations": 2},
    ),
    "SDPO full, mixed, capped": (
        "SDPO", {"distillation_mode": "full_logits", "distillation_weight": 0.5, "kind": "capped"},
    ),
    "SDFT full, forward, LoRA": ("SDFT", {"distillation_mode": "full_logits", "distillation_alpha": 0.0, "lora": True}),
    "SDFT sampled, EMA": (
        "SDFT",
        {"distillation_mode": "sampled_token", "distillation_alpha": 1.0, "teacher_model_kind": "ema", "lora": True},
    ),
}  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize("name, options", CASES.values(), ids=CASES)
def test_two_steps_are_trls_and_make_no_logits(tmp_path, name, options):
    """In float64, to float32's rounding of what is logged.

    In float32 the first step's update makes of roundings a second gradient that differs: of TRL's own code, between
    vector instructions of one CPU, by 3e-5 in norm. Gemma 2 stays in it: its attention has a float32 softmax, in which
    float64's mask makes NaN of rows that are all padding.
    """
    dtype, tolerance = (torch.float32, 1e-5) if options.get("kind") == "capped" else (torch.float64, 1e-7)
    ours, theirs = (train(tmp_path / str(own), name, own, dtype=dtype, **options) for own in (True, False))
    check_same(ours[:2], theirs[:2], tolerance)
    assert theirs[2] > 0 and ours[2] == 0


@pytest.mark.heavy
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("name", ["SDPO sampled", "SDPO full, reverse, LoRA"])
def test_mixed_precision(tmp_path, name, device):
    """Float32 weights under autocast, as TRL trains by default: a step's loss and gradients are TRL's.

    To the roundings of bfloat16, 2^-9 each, of which TRL's logits have more: a second step's weights differ by them.
    """
    trainer, options = CASES[name]
    options = options | {"bf16": True, "max_steps": 1, "use_cpu": device == "cpu"}
    ours, theirs = (train(tmp_path / str(own), trainer, own, **options) for own in (True, False))
    assert ours[0][0]["loss"] == pytest.approx(theirs[0][0]["loss"], rel=1e-2)
    assert ours[1][0].keys() == theirs[1][0].keys() and ours[2] == 0
    largest = max(gradient.norm() for gradient in theirs[1][0].values())
    for which, gradient in theirs[1][0].items():
        assert (ours[1][0][which] - gradient).norm() <= 0.03 * max(gradient.norm(), 0.01 * largest), which


def test_a_divergence_is_read_in_the_dtype_of_its_forward():
    """Of autocast's region its hidden states and head are kept, and there is none any more where it is made."""
    ids = torch.randint(3, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        made = self_distillation._completion(
            tiny_model(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 3, 0.8, True
        )
    hidden, head = made.states
    assert hidden.dtype == head.weight.dtype == torch.bfloat16 and head.weight.requires_grad


@pytest.mark.slow
def test_top_k_of_the_student_stays_trls(tmp_path):
    options = {"distillation_mode": "topk_logits", "distillation_topk": 5, "distillation_alpha": 0.5}
    ours, theirs = (train(tmp_path / str(own), "SDFT", own, **options) for own in (True, False))
    check_same(ours[:2], theirs[:2])
    assert ours[2] == theirs[2] > 0


def test_a_batch_without_anything_to_learn_is_a_loss_of_zero():
    """TRL makes it of a sum of the student's logits, so that every gradient is there, and 0."""
    model = tiny_model()
    ids = torch.randint(3, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    for keep in (False, True):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["attention_mask"][1, -3:] = 0
        made = self_distillation._completion(model, inputs, 3, 0.8, keep)
        (0.0 * made.sum()).backward()
        assert model.lm_head.weight.requires_grad and model.lm_head.weight is not model.model.embed_tokens.weight
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
        model.zero_grad()
        want = torch.log_softmax(model(**inputs).logits[:, -4:-1] / 0.8, -1)
        want = want.gather(-1, ids[:, -3:, None])[..., 0].masked_fill(made.ids < 0, 0)
        torch.testing.assert_close(made.logp, want, rtol=1e-5, atol=1e-5)
        assert (made.ids[1] == -100).all() and torch.equal(made.ids[0], ids[0, -3:])


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(
        TypeError, match=r"^trainer: expected TRL's SDPOTrainer or SDFTTrainer, got <class .*GRPOTrainer"
    ):
        without_logits(GRPOTrainer)
    trainer, config = classes("SDPO")
    assert without_logits(trainer).__name__ == "SDPOTrainer" and issubclass(without_logits(trainer), trainer)
    monkeypatch.setattr(self_distillation, "is_deepspeed_zero3_enabled", lambda: True)
    rows = Dataset.from_list([{"prompt": "1+1?", "answer": "2"}] * 4)
    for mode, alpha in (("sampled_token", 1.0), ("full_logits", 0.5)):
        options = {"num_generations": 2, "distillation_mode": mode, "distillation_alpha": alpha}
        options |= COMMON | {"teacher_model_kind": "live"}
        arguments = {
            "model": tiny_model(), "reward_funcs": correct, "args": config(str(tmp_path), **options),
            "train_dataset": rows, "processing_class": copy.deepcopy(tokenizer()),
        }  # fmt: skip
        if mode == "sampled_token":
            without_logits(trainer)(**arguments)
            continue
        with pytest.raises(ValueError, match=r"^distillation_mode: expected another mode than full_logits under FSDP"):
            without_logits(trainer)(**arguments)
