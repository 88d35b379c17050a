"""Who is trained and who teaches, and that copies of the trained model compute with their own weights."""

import copy
import functools
import pickle
import types

import pytest

pytest.importorskip("trl")

import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch.optim.swa_utils import AveragedModel
from trl.trainer.utils import add_fused_lm_head

from egrsd_kernels import read_hidden
from egrsd_kernels.trl.fused_head import take_off_fused_head
from egrsd_kernels.trl.starting import check_roles
from egrsd_kernels.trl.teacher import AdaptersOff, make_teacher
from tests.support.trl_tiny import LORA, make, tiny_model, tokenizer, weights

IDS = torch.arange(6, 15)[None]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@torch.no_grad()
def zeroed(model):
    for parameter in model.parameters():
        parameter.zero_()
    return model


@torch.no_grad()
def hidden(model):
    return read_hidden(model, input_ids=IDS)


# ------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.heavy
@pytest.mark.parametrize("peft", [True, False])
def test_a_deep_copy_computes_with_its_own_weights(tmp_path, peft):
    run, _ = make(tmp_path, peft=peft)
    before = logits(run.model)
    twin = zeroed(copy.deepcopy(run.model))
    assert not logits(twin).any() and not hidden(twin).any()
    assert torch.equal(logits(run.model), before) and hidden(run.model).any()


@pytest.mark.heavy
@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["float32", "autocast"])
def test_an_average_of_models_stays_where_training_began(tmp_path, options):
    run, _ = make(tmp_path, peft=False, learning_rate=0.05, **options)
    average, before = AveragedModel(run.model), logits(run.model)
    run.train()
    assert torch.equal(logits(average), before)
    trained = logits(run.model)
    assert not torch.equal(trained, before)
    assert torch.equal(logits(copy.deepcopy(run.model)), trained)
    assert not logits(zeroed(copy.deepcopy(run.model))).any()


def test_a_merged_copy_is_the_trained_model(tmp_path):
    run, _ = make(tmp_path / "run", learning_rate=0.05)
    run.train()
    merged = copy.deepcopy(run.model).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(run.model), atol=1e-4, rtol=0)
    assert torch.equal(logits(merged), logits(loaded))


@pytest.mark.heavy
@pytest.mark.parametrize("peft", [True, False])
def test_a_pickled_model_comes_back(tmp_path, peft):
    run, _ = make(tmp_path, peft=peft)
    torch.save(run.model, tmp_path / "model.pt")
    for twin in (pickle.loads(pickle.dumps(run.model)), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(logits(twin), logits(run.model))
        assert not logits(zeroed(twin)).any()


def test_trls_fused_head_is_taken_off_and_copies_of_it_are_set_right():
    model = tiny_model()
    for _ in range(2):
        add_fused_lm_head(model)
    assert hidden(model).any()  # a head that is proved: zeros would prove nothing
    twin = zeroed(copy.deepcopy(model))
    assert torch.equal(logits(twin), logits(model))  # TRL's copies compute with the original's
    for each in (model, twin):
        take_off_fused_head(each)
        assert "forward" not in vars(each)
    assert not logits(twin).any() and not hidden(twin).any()
    assert logits(model).any() and hidden(model).any()


class Counting(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        assert module is self.module
        self.calls += 1
        return args, kwargs

    def init_hook(self, module):
        self.module = module
        return module


def test_what_else_was_put_on_the_forward_stays():
    model = tiny_model()
    add_hook_to_module(model, Counting())
    add_fused_lm_head(model)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        take_off_fused_head(each)
    logits(zeroed(twin))
    assert (model._hf_hook.calls, twin._hf_hook.calls) == (0, 1)
    third = copy.deepcopy(twin)
    assert not logits(third).any()
    assert (twin._hf_hook.calls, third._hf_hook.calls) == (1, 2)

    model = tiny_model()
    model.forward = types.MethodType(lambda self, **inputs: type(self).forward(self, **inputs).logits, model)
    add_fused_lm_head(model)
    take_off_fused_head(model)
    assert isinstance(model(input_ids=IDS), torch.Tensor)


@pytest.mark.slow
def test_a_second_trainer_comes_on_top_of_what_the_first_run_wrapped():
    model = tiny_model()
    expected = logits(model)
    for _ in range(3):
        add_fused_lm_head(model)
        take_off_fused_head(model)
        # As Accelerate does for mixed precision.
        model.forward = types.MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
    assert torch.equal(logits(model), expected)
    assert hidden(model).shape == (1, 9, 32)
    assert not logits(zeroed(copy.deepcopy(model))).any()


# ----------------------------------------------------------------------------------------------------- who is trained


def refusal(tmp_path, **options) -> str:
    with pytest.raises(ValueError) as error:
        make(tmp_path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def loaded(tmp_path, **options) -> PeftModel:
    get_peft_model(tiny_model(), LORA).save_pretrained(tmp_path / "adapter")
    return PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter", **options)


def test_a_model_without_trainable_weights_is_refused(tmp_path):
    message = "model: expected trainable weights, got none; "
    assert refusal(tmp_path, peft=False, model=loaded(tmp_path)) == (
        message + "PeftModel.from_pretrained needs is_trainable=True"
    )
    assert refusal(tmp_path, peft=False, model=tiny_model().requires_grad_(False)) == (
        message + "unfreeze it, or pass a peft_config"
    )
    run, _ = make(tmp_path, peft=False, model=loaded(tmp_path, is_trainable=True))
    before = weights(run)
    run.train()
    assert all(not torch.equal(before[name], weight) for name, weight in weights(run).items())


def another_active(model):
    model.add_adapter("other", LORA)
    model.set_adapter("other")
    for name, weight in model.named_parameters():
        weight.requires_grad_(".default." in name)


def disabled(model):
    model.base_model.disable_adapter_layers()
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name)


def merged(model):
    model.merge_adapter()


@pytest.mark.heavy
@pytest.mark.parametrize("change", [another_active, disabled, merged])
def test_adapters_that_take_no_part_are_refused(tmp_path, change):
    model = get_peft_model(tiny_model(), LORA)
    change(model)
    assert refusal(tmp_path, peft=False, model=model) == (
        "model: expected trainable weights that its forward uses, got none; "
        "its adapters are disabled, merged, or others than the active one"
    )


def test_an_optimizer_of_other_weights_is_refused(tmp_path):
    model = tiny_model()
    optimizers = torch.optim.AdamW(model.parameters()), None
    assert refusal(tmp_path, model=model, optimizers=optimizers) == (
        "optimizers: expected an optimizer of the model's trainable weights, got one with none of them"
    )
    model = tiny_model()
    make(tmp_path, peft=False, model=model, optimizers=(torch.optim.AdamW(model.parameters()), None))


def test_a_trained_head_is_enough(tmp_path):
    model = tiny_model().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    run, _ = make(tmp_path, peft=False, model=model)
    before = weights(run)
    run.train()
    assert not torch.equal(before["lm_head.weight"], model.lm_head.weight)


@pytest.mark.heavy
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("others", [{}, {"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3, 4]}])
def test_the_teacher_leaves_what_is_frozen_and_what_is_trained(fails, others):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **others)
    model = get_peft_model(tiny_model(), config)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn
    layer.q_proj.lora_A["default"].requires_grad_(False)  # the user's choices
    layer.o_proj.lora_B["other"].requires_grad_(True)
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    teacher = AdaptersOff(model)
    try:
        with teacher.active():
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == flags


def test_loras_are_taken_off_without_a_report(monkeypatch):
    config = LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"], trainable_token_indices=[3, 7],
        init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(tiny_model(), config)
    with torch.no_grad():
        for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
            weight += 0.1
    with model.disable_adapter():
        base = logits(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.enable_adapters(False)  # the user's choice
    flags, before = [weight.requires_grad for weight in model.parameters()], logits(model)
    monkeypatch.setattr(PeftModel, "get_model_status", None)
    assert (before - base).abs().max() > 0.1
    with AdaptersOff(model).active():
        assert torch.equal(logits(model), base)
        assert [weight.requires_grad for weight in model.parameters()] == flags
    assert torch.equal(logits(model), before) and layer.disable_adapters


@pytest.mark.slow
def test_a_frozen_adapter_weight_stays_frozen_through_a_run(tmp_path):
    model = get_peft_model(tiny_model(), LORA)
    frozen = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)
    run, _ = make(tmp_path, peft=False, model=model)
    before = frozen.clone()
    run.train()
    assert not frozen.requires_grad and frozen.grad is None and torch.equal(frozen, before)


# -------------------------------------------------------------------------------------------------------- who teaches


def with_biases():
    torch.manual_seed(0)
    config = tiny_model().config
    config.attention_bias = True
    return transformers.Qwen3ForCausalLM(config)


def lora(bias):
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias=bias)


@pytest.mark.heavy
@pytest.mark.parametrize("bias, more", [("all", 7), ("lora_only", 3)])
def test_adapters_that_train_biases_cannot_be_taken_off(tmp_path, bias, more):
    model = get_peft_model(with_biases(), lora(bias))
    message = refusal(tmp_path, peft=False, model=model)
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"
    assert message == (
        "teacher_model_kind: 'adapters_off' expects that without its adapters the model is as it was before training, "
        f"but {name} and {more} more would be trained and stay; use bias=\"none\", freeze it, or take 'frozen'"
    )
    with pytest.raises(ValueError, match=r"would be trained and stay"):
        make_teacher(model, "base", sharded=True)
    run, _ = make(tmp_path, peft=False, model=model, teacher_model_kind="frozen")
    with run._as_teacher():
        before = logits(model)
    run.train()
    with run._as_teacher():
        assert torch.equal(logits(model), before)
    make(tmp_path, peft=False, model=get_peft_model(tiny_model(), lora(bias)))  # which has no biases


def test_a_base_weight_that_is_trained_beside_the_adapters_is_the_teachers_too(tmp_path):
    model = get_peft_model(tiny_model(), LORA)
    model.base_model.model.model.norm.requires_grad_(True)
    assert "but base_model.model.model.norm.weight would be trained" in refusal(tmp_path, peft=False, model=model)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, modules_to_save=["embed_tokens"]),
        LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, trainable_token_indices=[3, 4]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=["dora", "tokens", "prompt"],
)
def test_adapters_that_can_be_taken_off_still_are(tmp_path, config):
    model = get_peft_model(tiny_model(), config)
    assert isinstance(make_teacher(model, "base", sharded=True), AdaptersOff)
    run, _ = make(tmp_path, peft=False, model=model)
    before = weights(run)
    run.train()
    assert any(not torch.equal(before[name], weight) for name, weight in weights(run).items())


# ------------------------------------------------------------------------------------------------------------ padding

SMALL = {
    "vocab_size": len(tokenizer()),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "initializer_range": 0.3,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}


def small(architecture, kind="", **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}{kind}Config")(**SMALL | options)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases, as trained ones are not zero
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def recurrent():
    """A sum over all that went before, padding included."""
    model = tiny_model()
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output + (output + 0.1).cumsum(1) / 8)
    return model


# With older versions of transformers these cannot be read at all: they take no position_ids, or reuse their state.
SINCE_5 = {"RWKV", "RecurrentGemma", "Bart's decoder", "Mamba", "Gemma3"}
OLD = int(transformers.__version__.partition(".")[0]) < 5


def names(models):
    return [pytest.param(name, marks=pytest.mark.skipif(OLD and name in SINCE_5, reason="old")) for name in models]


READS_ITS_PADDING = {
    "a sum": recurrent,
    "RWKV": functools.partial(small, "Rwkv", attention_hidden_size=32),
    "RecurrentGemma": functools.partial(small, "RecurrentGemma", num_hidden_layers=3, lru_width=32),
    "Bart's decoder": functools.partial(
        small, "Bart", d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32
    ),
}
DOES_NOT = {
    "Llama": functools.partial(small, "Llama"),
    "Gemma2": functools.partial(small, "Gemma2", query_pre_attn_scalar=16, sliding_window=8),
    "Gemma3": functools.partial(small, "Gemma3", "Text", query_pre_attn_scalar=16, sliding_window=8),
    "Mamba": functools.partial(small, "Mamba", state_size=8, time_step_rank=4),
    "FalconH1": functools.partial(small, "FalconH1", mamba_d_ssm=64, **MAMBA),
    "Bamba": functools.partial(small, "Bamba", attn_layer_indices=[1], **MAMBA),
    "Mixtral": functools.partial(small, "Mixtral", num_local_experts=4),
}


def small_gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(tokenizer()), n_embd=32, n_layer=2, n_head=2, n_positions=512)
    return transformers.GPT2LMHeadModel(config)


DOES_NOT["GPT2"] = small_gpt2
REFUSED = (
    r"^model: reads a padded row differently from the same row alone \(hidden states off by \d+\.\d%\); generate for "
    r"one prompt at a time: per_device_train_batch_size \* steps_per_generation and per_device_eval_batch_size must "
    r"divide num_generations, without pad_to_multiple_of$"
)
ONE_PROMPT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 2}


@pytest.mark.heavy
@pytest.mark.parametrize("name", names(READS_ITS_PADDING))
def test_a_model_that_reads_its_padding_is_refused_where_rows_are_padded(tmp_path, name):
    with pytest.raises(ValueError, match=REFUSED):
        make(tmp_path, peft=False, model=READS_ITS_PADDING[name]())
    make(tmp_path, peft=False, model=READS_ITS_PADDING[name](), **ONE_PROMPT)
    with pytest.raises(ValueError, match=REFUSED):
        make(tmp_path, peft=False, model=READS_ITS_PADDING[name](), **ONE_PROMPT, pad_to_multiple_of=8)


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", names(DOES_NOT))
def test_others_are_taken(tmp_path, name, dtype):
    run, _ = make(tmp_path, peft=False, model=DOES_NOT[name]().to(dtype))
    assert run._proved


def test_what_cannot_be_read_at_construction_is_checked_before_the_first_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr("egrsd_kernels.trl.trainer.weights_at_hand", lambda *_: False)
    run, _ = make(tmp_path, peft=False, model=recurrent())
    with pytest.raises(ValueError, match=REFUSED):
        run.train()
    run, _ = make(tmp_path)
    run.train()
    assert run._proved


def test_the_check_leaves_no_trace(tmp_path):
    run, _ = make(tmp_path)
    model = run.model.train()
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    rng, before = torch.get_rng_state(), logits(copy.deepcopy(model))
    check_roles(run, run._vocab_size)
    assert torch.equal(torch.get_rng_state(), rng) and model.training
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == flags
    assert all(weight.grad is None for weight in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks
    assert torch.equal(logits(model), before)
