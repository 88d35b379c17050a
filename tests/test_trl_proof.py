"""The proof that a model's logits are what the loss computes from its hidden states."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

pytest.importorskip("trl")

from peft import LoraConfig, get_peft_model

from egrsd_kernels.models.proof import TOKENS, behind_head, ladder
from egrsd_kernels.trl.hidden import hand_out_hidden_states
from egrsd_kernels.trl.proof import prove_head
from tests.support.trl_tiny import LORA, make, tiny_model, tokenizer

SIZES = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]


def build(kind: str, dtype: torch.dtype = torch.float32, **more) -> nn.Module:
    torch.manual_seed(0)
    known = AutoConfig.for_model(kind).to_dict()
    config = AutoConfig.for_model(kind, **{k: v for k, v in SIZES.items() if k in known}, **more)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    hand_out_hidden_states(model)
    return model


class Scaled(nn.Module):
    """A head under a name of its own does not help: it is no nn.Linear."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


def altered(change, dtype=torch.float32):
    """A Qwen3 whose forward changes its logits as ``change`` says, which no config tells."""
    model = tiny_model().to(dtype).eval()
    plain = type(model)

    class Altered(plain):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = change(out.logits)
            return out

    model.__class__ = Altered
    hand_out_hidden_states(model)
    return model


def masked(logits):
    logits[..., 3] = -torch.inf
    return logits


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "softcap"), [("qwen3", None), ("gpt2", None), ("mixtral", None), ("gemma2", 30.0), ("opt", None)]
)
def test_what_is_right_is_proved(kind, softcap, dtype):
    assert prove_head(build(kind, dtype)) == softcap


@pytest.mark.parametrize("scale", [0.02, 0.1, 0.3])
def test_weights_in_float32_under_autocast_are_right(scale):
    """The head's product is rounded to bfloat16 there, and ours is not."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**SIZES, "vocab_size": 500, "initializer_range": scale})
    model = AutoModelForCausalLM.from_config(config).eval()
    hand_out_hidden_states(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert prove_head(model) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_softcap_is_found_whatever_its_name(dtype):
    assert prove_head(altered(lambda z: 7.5 * (z / 7.5).tanh(), dtype)) == 7.5


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logits_soft_cap", "logits_scaling"])
def test_a_setting_that_the_forward_ignores_is_ignored(name):
    model = tiny_model()
    setattr(model.config, name, 30.0)
    hand_out_hidden_states(model)
    assert prove_head(model) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda z: z * 0.125, "it multiplies its logits by 0.125 behind the head"),
        (lambda z: 0.5 * z.div(20).tanh() * 20, "it multiplies its logits by 0.5 behind the head"),
        (masked, "it masks or changes its logits behind the head by more than a scale and a softcap"),
        (lambda z: z + 1e-2 * torch.arange(z.shape[-1]), "it masks or changes its logits behind the head"),
        (lambda z: z[..., :70], r"it makes 70 logits of the \d+ that its head returns"),
        (lambda z: z.relu(), "it masks or changes its logits behind the head"),
    ],
)
def test_what_cannot_be_honoured_is_named(change, says, dtype):
    with pytest.raises(ValueError, match=f"^model: Altered: {says}.*[^\n]$"):
        prove_head(altered(change, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "more"), [("modernbert-decoder", {}), ("bert", {"is_decoder": True})])
def test_a_transform_before_the_head_is_refused_in_nats(kind, more, dtype):
    more |= {"cls_token_id": 1, "sep_token_id": 1} if kind == "modernbert-decoder" else {}
    with pytest.raises(ValueError, match=r"^model: \w+: log p from its last hidden states is off by [\d.]+ nat where"):
        prove_head(build(kind, dtype, **more))


def test_a_difference_below_what_rounding_allows_passes_and_above_it_does_not():
    """In float32 logits of 1 to 10 are rounded by 6e-7: 1e-4 nat is a fault there, and noise in bfloat16."""

    def disturbed(dtype):
        model = tiny_model().to(dtype).eval()
        inner = model.lm_head.forward
        noise = 2e-4 * torch.randn(model.lm_head.out_features, generator=torch.Generator().manual_seed(1))
        model.lm_head.forward = lambda x: (inner(x).float() + noise).to(dtype)
        hand_out_hidden_states(model)
        return model

    with pytest.raises(ValueError, match=r"off by 0\.000\d+ nat"):
        prove_head(disturbed(torch.float32))
    assert prove_head(disturbed(torch.bfloat16)) is None


def test_heads_that_are_more_than_a_weight_say_what_to_leave_out():
    for adapted in (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), None):
        model = tiny_model()
        if adapted is None:
            model.lm_head = Scaled(model.lm_head)
        else:
            model = get_peft_model(model, adapted)
        with pytest.raises(ValueError, match=r"^model: expected a plain nn.Linear as LM head, got \w+: leave the head"):
            prove_head(model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_that_looks_ahead_is_refused(dtype):
    model = tiny_model().to(dtype).eval()
    model.model.norm.register_forward_hook(lambda module, arguments, out: out + 0.5 * out.roll(-1, 1))
    hand_out_hidden_states(model)
    with pytest.raises(ValueError, match=r"^model: Qwen3ForCausalLM: its hidden states depend on tokens that follow"):
        prove_head(model)


def test_encoder_decoders_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=90, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=r"^model: T5ForConditionalGeneration is an encoder-decoder: "):
        prove_head(T5ForConditionalGeneration(config))


def test_a_model_that_is_its_own_backbone_is_refused_in_one_line():
    model = tiny_model()
    type(model).base_model_prefix, kept = "none", type(model).base_model_prefix
    try:
        hand_out_hidden_states(model)
        with pytest.raises(ValueError, match=r"^model: Qwen3ForCausalLM: its hidden states cannot be read: \w+: .*$"):
            prove_head(model)
    finally:
        type(model).base_model_prefix = kept


def test_adapters_take_part_in_the_proof_and_everything_is_as_before():
    base = tiny_model()
    hand_out_hidden_states(base)
    model = get_peft_model(base, LORA)
    model.train()
    base.model.layers[0].eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    calls = []
    base.model.register_forward_hook(
        lambda module, arguments, names, out: calls.append((names["input_ids"], out.last_hidden_state.clone())),
        with_kwargs=True,
    )
    assert prove_head(model) is None
    assert len(calls) == 3
    assert all(hidden.shape[:2] == (1, TOKENS) for _, hidden in calls)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not base.lm_head._forward_hooks
    model.eval()
    ids, seen = calls[-1]
    assert not torch.allclose(seen, base.model(input_ids=ids).last_hidden_state, atol=1e-3)


def test_adapters_that_only_the_models_own_forward_applies_are_refused():
    """A fresh LoRA of zeros would show nothing."""
    base = tiny_model()
    hand_out_hidden_states(base)
    model = get_peft_model(base, LORA)
    down = base.model.layers[1].mlp.down_proj
    added = lambda h: down.lora_B["default"](down.lora_A["default"](h.repeat(1, 1, 2)))  # noqa: E731
    base.lm_head.register_forward_pre_hook(lambda module, arguments: (arguments[0] + added(arguments[0]),))
    with pytest.raises(ValueError, match=r"off by [\d.]+ nat"):
        prove_head(model)


@pytest.mark.parametrize("size", [1, 2, 7, 90, 1001])
@pytest.mark.parametrize("cap", [None, 0.5, 30.0, 1000.0])
def test_the_ladder_is_read_back(size, cap):
    steps = ladder(size, torch.device("cpu"))
    seen = steps if cap is None else cap * (steps / cap).tanh()
    behind = behind_head(seen[None], size)
    assert behind.factor == pytest.approx(1, abs=1e-5)
    if size > 2:
        assert behind.softcap == (cap and pytest.approx(cap))


def test_the_trainer_asks_the_model(tmp_path):
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, arguments, out: out * 3)
    with pytest.raises(ValueError, match=r"^model: Qwen3ForCausalLM: "):
        make(tmp_path, model=model)
    assert make(tmp_path)[0]._softcap is None


def test_a_router_loss_of_the_models_own_says_the_remedy(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {**SIZES, "vocab_size": len(tokenizer()), "num_local_experts": 2, "router_aux_loss_coef": 0.02}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    with pytest.raises(ValueError, match=r"^router_aux_loss_coef: set it to 0 .*\(its own coefficient is 0\.02\)"):
        make(tmp_path, model=model, peft=False)
    run, logs = make(tmp_path, model=model, peft=False, router_aux_loss_coef=0.0, max_steps=1)
    run.train()
    assert logs.steps
