"""``fuse_head`` and ``fuse_heads``: the forward that TRL takes log p from, held against TRL's and the model's own."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import pickle
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("trl")

import trl
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from egrsd_kernels.models import ModelError
from egrsd_kernels.trl import fuse_head, fuse_heads, fused_head, unfuse_heads
from tests.support.trl_tiny import tiny_model
from tests.test_trl_models import MODELS, build

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def batch(seed: int = 1, padded: bool = True) -> dict[str, torch.Tensor]:
    """Two rows of ordinary tokens, the first without its last ones, and labels of which some say nothing."""
    ids = torch.randint(6, 70, (2, 11), generator=torch.Generator().manual_seed(seed))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :3] = labels[1, 6] = -100
    if padded:
        labels[0, 8:], mask[0, 8:] = -100, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(value: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    made = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(named.items(), made, strict=True)}


def check_gradients(ours: dict, theirs: dict) -> None:
    largest = max(g.abs().max().item() for g in theirs.values())
    assert largest > 1e-4
    for name, gradient in theirs.items():  # float32 sums of some hundred products, in another order
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)


def both(model: nn.Module, **options) -> tuple[nn.Module, nn.Module]:
    """The model with our head, and a copy with TRL's."""
    theirs = copy.deepcopy(model)
    add_fused_lm_head(theirs, **options)
    fuse_head(model, **options)
    return model, theirs


def check_outputs(ours: FusedCausalLMOutput, theirs: FusedCausalLMOutput) -> None:
    assert type(ours) is type(theirs) and list(ours) == list(theirs)
    for name, value in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype), name
        torch.testing.assert_close(ours[name], value, **CLOSE, msg=name)


# ------------------------------------------------------------------------------------------------------- the values


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["mixtral", "gemma2", "granite", "cohere", "qwen3", "falcon_h1"])
def test_it_is_trls_in_all_fields_and_gradients(kind):
    ours, theirs = both(build(kind, **MODELS[kind]), temperature=0.7, outputs=OUTPUTS)
    inputs = batch() | ({"output_router_logits": True} if kind == "mixtral" else {})
    with torch.no_grad():  # labels that are the most likely tokens, and others
        likely = theirs(inputs["input_ids"], inputs["attention_mask"]).logits.argmax(-1)
    inputs["labels"][:, 4:7] = likely[:, 3:6]
    one, other = (model(**inputs, fused_lm_head=True) for model in (ours, theirs))
    check_outputs(one, other)
    assert one.is_top1.sum() >= 6 and not one.is_top1.all()
    weights = torch.randn(one.log_probs.shape, generator=torch.Generator().manual_seed(0))

    def value(out):
        return out.loss + (weights * out.log_probs).sum() + (weights.flip(0) * out.entropy).sum()

    check_gradients(gradients(value(one), ours), gradients(value(other), theirs))


@pytest.mark.parametrize("kind", ["qwen3", "mixtral", "granitemoe"])  # TRL fails at the last one's aux_loss
@pytest.mark.parametrize("count", [None, 7, torch.tensor(9)])
def test_the_loss_is_the_models_own(kind, count):
    model = build(kind, **MODELS[kind])
    inputs = batch(padded=False) | ({"output_router_logits": True} if kind != "qwen3" else {})
    inputs |= {} if count is None else {"num_items_in_batch": count}
    own = model(**inputs).loss
    fuse_head(model)
    assert torch.equal(model(**inputs).loss, own)
    loss = model(**inputs, fused_lm_head=True).loss
    torch.testing.assert_close(loss, own, **CLOSE)
    check_gradients(gradients(loss, model), gradients(own, model))


def test_labels_that_are_shifted_already_are_scored_as_they_are():
    model = tiny_model()
    fuse_head(model, outputs=("entropy",))
    inputs = batch()
    labels = inputs.pop("labels")
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    expected = model(**inputs, labels=labels, fused_lm_head=True)
    for more in ({}, {"labels": labels}):  # sequence parallelism leaves the labels there
        found = model(**inputs, **more, shift_labels=shifted, fused_lm_head=True)
        assert found.log_probs.shape == (2, 11) and not found.log_probs[:, -1].any()
        torch.testing.assert_close(found.log_probs[:, :-1], expected.log_probs, **CLOSE)
        torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    with pytest.raises(
        ValueError, match=r"^labels: expected labels or shift_labels beside fused_lm_head=True, got nei"
    ):
        model(**inputs, fused_lm_head=True)


def test_packed_rows_as_asynchronous_grpo_scores_them():
    ours, theirs = both(tiny_model(), temperature=0.9, outputs=("log_probs", "entropy"))
    ids = batch()["input_ids"].reshape(1, 22)
    shifted = ids.roll(-1, 1)
    shifted[0, [0, 1, 10, 11, 21]] = -100
    packed = {"input_ids": ids, "position_ids": torch.arange(11).repeat(2)[None], "shift_labels": shifted}
    one, other = (model(**packed, fused_lm_head=True) for model in (ours, theirs))
    check_outputs(one, other)
    alone = ours(input_ids=ids[:, 11:], shift_labels=shifted[:, 11:], fused_lm_head=True)
    torch.testing.assert_close(one.log_probs[:, 11:], alone.log_probs, **CLOSE)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_entropys_gradient_is_prepared_for_once_it_is_asked_for(frozen, monkeypatch):
    model, asked = tiny_model(), []
    model.lm_head.requires_grad_(not frozen)
    linear_logp = fused_head.linear_logp
    monkeypatch.setattr(
        fused_head, "linear_logp", lambda *a, **o: asked.append(o["entropy_grad"]) or linear_logp(*a, **o)
    )
    fuse_head(model, outputs=("entropy",))
    made = []
    for bonus in (0, 0.5, 0.5):
        out = model(**batch(), fused_lm_head=True)
        made.append(gradients(out.loss - bonus * out.entropy.sum() if bonus else out.loss, model))
    assert asked == ["lazy", "lazy", True]
    check_gradients(made[1], made[2])
    fuse_head(model, outputs=("log_probs",))
    model(**batch(), fused_lm_head=True)
    fuse_head(model, outputs=("entropy",), entropy_grad=True)
    model(**batch(), fused_lm_head=True)
    assert asked[3:] == [False, True]


def test_fields_that_nobody_asked_for_are_none():
    model = tiny_model()
    fuse_head(model)
    out = model(**batch(), fused_lm_head=True)
    assert list(out) == ["loss", "log_probs", "label_mask"]


@pytest.mark.parametrize(
    "options, error, words",
    [
        (
            {"outputs": ("log_probs", "entropies")},
            ValueError,
            r"outputs: expected names out of log_.*, got \['entropies'\]",
        ),
        ({"outputs": "entropy"}, TypeError, r"outputs: expected a collection of names out of .*, got 'entropy'"),
        ({"temperature": 0}, ValueError, r"temperature: expected a finite number above 0, got 0"),
        ({"entropy_grad": "lazy"}, TypeError, r"entropy_grad: expected True or False, got 'lazy'"),
        ({"model": "gpt2"}, TypeError, r"model: expected a model, got 'gpt2'"),
    ],
)
def test_refused(options, error, words):
    model = tiny_model()
    with pytest.raises(error, match=f"^{words}$"):
        fuse_head(**{"model": model} | options)
    assert "forward" not in vars(model)


def test_labels_of_any_integer_dtype():
    """-100 is 156 in uint8, where that would be a label."""
    model, inputs = tiny_model(vocab_size=200), batch(padded=False)
    fuse_head(model)
    labels = inputs["labels"].clamp(min=0)
    labels[0, 4] = 156
    expected = model(**inputs | {"labels": labels}, fused_lm_head=True)
    assert expected.label_mask.all()
    check_outputs(model(**inputs | {"labels": labels.to(torch.uint8)}, fused_lm_head=True), expected)
    expected = model(**inputs, fused_lm_head=True)
    for dtype in (torch.int8, torch.int16, torch.int32):
        check_outputs(model(**inputs | {"labels": inputs["labels"].to(dtype)}, fused_lm_head=True), expected)
    with pytest.raises(TypeError, match="expected an integer tensor"):
        model(**inputs | {"labels": labels.float()}, fused_lm_head=True)


@pytest.mark.parametrize("frozen", [False, True])
def test_tokens_without_a_label_are_not_worked_on(frozen):
    model = tiny_model()
    fuse_head(model, outputs=OUTPUTS)
    model.lm_head.requires_grad_(not frozen)
    inputs = batch()
    expected = model(**inputs, fused_lm_head=True)
    wanted = gradients(expected.loss, model.lm_head if not frozen else model.model.layers[-1])
    beyond = (torch.cat([inputs["labels"][:, 1:], torch.full((2, 1), -100)], 1) == -100)[..., None]
    model.model.norm.register_forward_hook(lambda m, a, hidden: hidden.masked_fill(beyond, torch.nan))
    found = model(**inputs, fused_lm_head=True)
    check_outputs(found, expected)
    if not frozen:
        check_gradients(gradients(found.loss, model.lm_head), wanted)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_batch_without_labels_is_a_zero_that_has_a_gradient(frozen):
    model = tiny_model()
    model.lm_head.requires_grad_(not frozen)
    fuse_head(model, outputs=OUTPUTS)
    inputs = batch()
    out = model(**inputs | {"labels": torch.full_like(inputs["labels"], -100)}, fused_lm_head=True)
    assert not any(out[name].any() for name in ("loss", *OUTPUTS, "label_mask"))
    (out.loss + out.log_probs.sum() + out.entropy.sum()).backward()
    assert not any(weight.grad.any() for weight in model.parameters() if weight.requires_grad)


# ------------------------------------------------------------------------------------------------- what is around it


def test_without_the_keyword_the_forward_is_the_models_own():
    model = tiny_model()
    inputs = batch(padded=False)
    own, signature = model(**inputs), inspect.signature(model.forward)
    text = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False)
    fuse_head(model)
    for found in (model(**inputs), model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"])):
        assert torch.equal(found.logits, own.logits) and torch.equal(found.loss, own.loss)
    assert inspect.signature(model.forward) == signature
    assert inspect.signature(model.forward.__func__) == inspect.signature(type(model).forward)
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False), text)
    with pytest.raises(ValueError, match="pixels"):
        model.generate(inputs["input_ids"], max_new_tokens=4, pixels=1)
    by_place = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"], fused_lm_head=True)
    check_outputs(by_place, model(**inputs, fused_lm_head=True))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def as_prepared(model: nn.Module) -> nn.Module:
    """As Accelerate wraps a model's forward for mixed precision."""
    model.forward = convert_outputs_to_fp32(model.forward.__func__).__get__(model)
    return model


COPIES = {
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "file": saved,
    "copy of a prepared one": lambda model: copy.deepcopy(as_prepared(model)),
    "copy of a hooked one": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("times", [1, 2])
def test_copies_compute_with_weights_of_their_own(how, times):
    model, inputs = tiny_model(), batch()
    if "hooked" in how:
        add_hook_to_module(model, AlignDevicesHook("cpu", io_same_device=True))  # as a device_map's
    for _ in range(times):
        fuse_head(model)
        if "prepared" in how and times == 2:
            as_prepared(model)
    expected = model(**inputs, fused_lm_head=True)
    twin = COPIES[how](model)
    assert twin.forward.__self__ is twin if "prepared" in how else twin.forward.model is twin
    check_outputs(twin(**inputs, fused_lm_head=True), expected)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head.weight.zero_()
    check_outputs(twin(**inputs, fused_lm_head=True), expected)
    uniform = torch.where(expected.label_mask, -torch.tensor(float(model.config.vocab_size)).log(), 0)
    torch.testing.assert_close(model(**inputs, fused_lm_head=True).log_probs, uniform)


def test_it_comes_off_and_takes_the_place_of_trls():
    model = tiny_model()
    add_fused_lm_head(model, temperature=3.0)
    fuse_head(model, temperature=2.0)
    expected = model(**batch(), fused_lm_head=True)
    fused_head.take_off_fused_head(model)
    assert "forward" not in vars(model) and not model._fused_forwards
    fuse_head(model, temperature=2.0)
    check_outputs(model(**batch(), fused_lm_head=True), expected)
    model.forward = (before := lambda **inputs: type(model).forward(model, **inputs))
    fuse_head(model, temperature=2.0)
    fuse_head(model, temperature=2.0)
    check_outputs(model(**batch(), fused_lm_head=True), expected)
    fused_head.take_off_fused_head(model)
    assert model.forward is before


def test_copies_come_off_alone_where_trls_is_on_top():
    model, inputs = tiny_model(), batch()
    fuse_head(model)
    expected = model(**inputs, fused_lm_head=True)
    add_fused_lm_head(model)
    twin = copy.deepcopy(model)
    fused_head.take_off_fused_head(twin)
    assert "forward" not in vars(twin) and "forward" in vars(model)
    check_outputs(model(**inputs, fused_lm_head=True), expected)
    fused_head.take_off_fused_head(model)
    assert "forward" not in vars(model)


@pytest.mark.heavy
@pytest.mark.parametrize("what", ["layers", "model", "in place"])
def test_compiled(what):
    model, inputs = tiny_model(), batch()
    fuse_head(model, outputs=OUTPUTS)
    expected = copy.deepcopy(model)(**inputs, fused_lm_head=True)
    called, options = model, {"backend": "aot_eager"}
    if what == "model":
        called = torch.compile(model, **options)
    elif what == "in place":
        model.compile(**options)
    else:
        for layer in model.model.layers:
            layer.compile(**options)
    for _ in range(2):
        found = called(**inputs, fused_lm_head=True)
        check_outputs(found, expected)
        found.loss.backward()
        assert called(**inputs).logits.shape == (2, 11, model.config.vocab_size)


def test_gradient_checkpointing_and_mixed_precision():
    ours, theirs = both(tiny_model().train(), outputs=OUTPUTS)
    for model in (ours, theirs):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16):
        one, other = (model(**batch(), fused_lm_head=True) for model in (ours, theirs))
    # Two roundings of hidden states and weights to 8 bits; TRL's logits are rounded once more.
    torch.testing.assert_close(one.log_probs, other.log_probs, rtol=0.02, atol=0.05)
    found, expected = gradients(one.loss, ours), gradients(other.loss, theirs)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 0.05 * gradient.norm(), name


# ---------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("on_head", [False, True])
def test_adapters_that_come_afterwards(on_head):
    base = tiny_model()
    fuse_head(base, outputs=OUTPUTS)
    names = ["q_proj", *["lm_head"] * on_head]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    inputs = batch()
    found = model(**inputs, fused_lm_head=True)
    own = model(**inputs)  # TRL refuses adapters on the head, or reads past them
    torch.testing.assert_close(found.loss, own.loss, **CLOSE)
    check_gradients(gradients(found.loss, model), gradients(own.loss, model))
    with model.disable_adapter():
        reference = model(**inputs, fused_lm_head=True)
        torch.testing.assert_close(reference.loss, model(**inputs).loss, **CLOSE)
    assert (reference.loss - found.loss).abs() > 1e-2


def test_prompt_tuning_pads_the_labels():
    ours, theirs = both(tiny_model(), outputs=OUTPUTS)
    torch.manual_seed(0)
    ours = get_peft_model(ours, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    theirs = get_peft_model(theirs, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    one, other = (model(**batch(), fused_lm_head=True) for model in (ours, theirs))
    assert one.log_probs.shape == (2, 13)
    check_outputs(one, other)
    check_gradients(gradients(one.loss, ours), gradients(other.loss, theirs))


# ---------------------------------------------------------------------------------------------------------- refusals


class Biased(type(tiny_model())):
    """A model that masks a token's logit: no scale and softcap does that."""

    def forward(self, *args, **inputs):
        output = super().forward(*args, **inputs)
        output.logits = output.logits.index_fill(-1, torch.tensor([5]), -1e4)
        return output


def test_a_head_that_is_more_than_a_product_is_refused_in_one_line():
    model = tiny_model()
    model.__class__ = Biased
    fuse_head(model)
    with pytest.raises(ModelError, match=r"^model: Biased: .* nat.*; egrsd_kernels.trl.unfuse_heads\(\) leaves the he"):
        model(**batch(), fused_lm_head=True)
    assert model(**batch()).loss.isfinite()


def test_a_routers_loss_that_the_model_does_not_have():
    model = build("llama4_text", **MODELS["llama4_text"])
    fuse_head(model)
    assert model(**batch(), fused_lm_head=True).aux_loss is None
    with pytest.raises(ModelError, match=r"^model: Llama4ForCausalLM: it returns no load-balancing loss"):
        model(**batch(), output_router_logits=True, fused_lm_head=True)


def test_a_routers_loss_that_the_config_asks_for():
    model = build("mixtral", **MODELS["mixtral"], output_router_logits=True)
    fuse_head(model)
    inputs = batch(padded=False)
    torch.testing.assert_close(model(**inputs, fused_lm_head=True).loss, model(**inputs).loss, **CLOSE)
    with pytest.raises(ModelError, match=r"^model: MixtralForCausalLM: it returns no load-balancing loss"):
        model(**inputs, return_dict=False, fused_lm_head=True)  # a tuple has it under no name


# ------------------------------------------------------------------------------------------------------- fuse_heads


HOLDERS = (
    "trl.trainer.utils", "trl.trainer.grpo_trainer", "trl.trainer.dpo_trainer", "trl.trainer.sft_trainer",
    "trl.trainer.rloo_trainer", "trl.experimental.async_grpo.async_grpo_trainer",
)  # fmt: skip


def added(module: str = "trl.trainer.grpo_trainer", **options) -> nn.Module:
    """A model with the head that a trainer of this module adds."""
    model = tiny_model()
    importlib.import_module(module).add_fused_lm_head(model, **options)
    return model


def is_ours(model: nn.Module) -> bool:
    return isinstance(vars(model)["forward"], fused_head.FusedForward)


@pytest.fixture
def unfused():
    unfuse_heads()
    yield
    unfuse_heads()


def test_every_trainer_of_trl_adds_ours_until_it_is_undone(unfused, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    late = "trl.trainer.kto_trainer"
    for module in HOLDERS:
        importlib.import_module(module)
    sys.modules.pop(late, None)
    assert not any(is_ours(added(module)) for module in HOLDERS)
    with fuse_heads():
        assert all(is_ours(added(module)) for module in (*HOLDERS, late))
        assert trl.trainer.utils.add_fused_lm_head is sys.modules[late].add_fused_lm_head
        with fuse_heads():
            pass
        model = added()
        assert is_ours(model)
    assert not any(is_ours(added(module)) for module in (*HOLDERS, late))
    assert add_fused_lm_head is trl.trainer.utils.add_fused_lm_head
    check_outputs(model(**batch(), fused_lm_head=True), added()(**batch(), fused_lm_head=True))
    fuse_heads()
    fuse_heads()
    assert is_ours(added())
    unfuse_heads()
    unfuse_heads()
    assert not is_ours(added())


def test_what_ours_does_not_do_stays_trls(unfused):
    with fuse_heads():
        assert is_ours(added(outputs=OUTPUTS))
        for options in ({"cast_lm_head_to_fp32": True}, {"outputs": ("log_probs", "a_later_one")}):
            assert not is_ours(added(**options))
        with pytest.raises(TypeError, match="a_later_argument"):
            added(a_later_argument=1)
        assert inspect.signature(trl.trainer.utils.add_fused_lm_head) == inspect.signature(add_fused_lm_head)


def test_somebody_elses_head_is_not_replaced_in_silence(unfused, monkeypatch):
    monkeypatch.setattr("trl.trainer.utils.add_fused_lm_head", batch)
    with pytest.raises(RuntimeError, match=r"^fuse_heads: expected TRL's own add_fused_lm_head, got .*batch$"):
        fuse_heads()
