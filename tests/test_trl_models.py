"""Which models and heads the trainer takes, and that it learns from what each makes of its own logits."""

import pytest
import torch

pytest.importorskip("trl")

import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

import reference
from egrsd_kernels.models.proof import TOKENS
from tests.support.trl_tiny import OPTIONS, make, tiny_model, tokenizer

SIZES = {
    "vocab_size": len(tokenizer()), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
         "mamba_chunk_size": 8}  # fmt: skip
MODELS = {
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "falcon_h1": {"lm_head_multiplier": 0.5, **MAMBA},
    "modernbert-decoder": {"cls_token_id": 1, "sep_token_id": 1},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48},
    "mixtral": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4, "logits_scaling": 4.0, "router_aux_loss_coef": 0.5},
}
SETTINGS = {"llama4_text": {"router_aux_loss_coef": 0.0}, "mixtral": {"router_aux_loss_coef": 0.3}}
ON_HEAD = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]}
HEADS = {
    "a LoRA": ON_HEAD,
    "a copy": ON_HEAD | {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tied, a LoRA": ON_HEAD,
    "tied, a copy": ON_HEAD | {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def build(kind: str, **more) -> torch.nn.Module:
    torch.manual_seed(0)
    known = AutoConfig.for_model(kind).to_dict()
    config = AutoConfig.for_model(kind, **{k: v for k, v in SIZES.items() if k in known}, **more)
    return AutoModelForCausalLM.from_config(config)


def tied() -> torch.nn.Module:
    torch.manual_seed(0)
    config = tiny_model().config
    config.tie_word_embeddings = True
    return transformers.Qwen3ForCausalLM(config)


def adapted(name: str) -> torch.nn.Module:
    """A model with adapters on its head that have learned something."""
    model = get_peft_model(tied() if "tied" in name else tiny_model(), LoraConfig(**HEADS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class ByLogits:
    """Holds each statistic of the teacher and each gradient of a run against those by the model's own logits."""

    def __init__(self, run):
        self.run, self.statistics, self.compute_loss = run, run._statistics, run._compute_loss
        self.gradients, self.aux = 0, []
        run._statistics, run._compute_loss = self.checked_statistics, self.checked_loss

    def own(self, model, prompt_ids, prompt_mask, completion_ids, completion_mask, **more):
        ids, mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **more)
        return out.logits[:, -completion_ids.shape[1] - 1 : -1], out

    @torch.no_grad()
    def checked_statistics(self, model, *arguments):
        found = self.statistics(model, *arguments)
        logits = self.own(model, *arguments[:4])[0] / self.run.temperature
        expected = reference.log_prob(logits, arguments[2]), reference.entropy(logits)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other * arguments[4], rtol=1e-4, atol=1e-5)
        return found

    def checked_loss(self, model, inputs):
        loss, run = self.compute_loss(model, inputs), self.run
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

        def gradients(of):
            made = torch.autograd.grad(of, list(trained.values()), retain_graph=True, allow_unused=True)
            return {name: torch.zeros(()) if one is None else one for name, one in zip(trained, made, strict=True)}

        keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        more = {"output_router_logits": True} if run.aux_loss_enabled else {}
        logits, out = self.own(model, *(inputs[key] for key in keys), **more)
        names = ("teacher_logp", "teacher_entropy", "normalizer", "entropy_scale")
        expected = reference.egrsd_loss(
            logits, torch.eye(logits.shape[-1]), None, inputs["completion_ids"], inputs["advantages"],
            mask=inputs["completion_mask"], gamma=OPTIONS["gamma"], lookahead=OPTIONS["lookahead"],
            temperature=run.temperature, **{name: inputs[name] for name in names},
        )  # fmt: skip
        if more:
            expected = expected + run.router_aux_loss_coef * out.aux_loss / OPTIONS["gradient_accumulation_steps"]
            self.aux.append(out.aux_loss.item())
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        theirs, ours = gradients(expected), gradients(loss)
        largest = max(gradient.abs().max().item() for gradient in theirs.values())
        assert largest > 1e-3
        for name, gradient in theirs.items():
            # Float32 sums of some hundred products, in another order.
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)
        self.gradients += 1
        return loss


@pytest.mark.heavy
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_is_that_through_the_models_own_logits(tmp_path, kind):
    model = build(kind, **MODELS[kind])
    run, logs = make(tmp_path, model=model, peft=False, max_steps=1, temperature=0.8, **SETTINGS.get(kind, {}))
    check = ByLogits(run)
    run.train()
    assert check.gradients == 2
    if kind in ("mixtral", "granitemoe"):
        assert logs.steps[0]["aux_loss"] == pytest.approx(sum(check.aux) / 2, rel=1e-3)
        assert run.router_aux_loss_coef == {"mixtral": 0.3, "granitemoe": 0.5}[kind]
    else:
        assert "aux_loss" not in logs.steps[0] and not run.aux_loss_enabled


# ----------------------------------------------------------------------------------------------------- trained heads


@pytest.mark.heavy
@pytest.mark.parametrize("name", HEADS)
def test_adapters_on_the_head_learn_and_the_teacher_is_without_them(tmp_path, name):
    run, _ = make(tmp_path, model=adapted(name), peft=False, max_steps=1, temperature=0.8)
    plain, statistics = tied() if "tied" in name else tiny_model(), []
    check = ByLogits(run)
    inner = check.statistics

    def remembered(model, *arguments):
        statistics.append((arguments, inner(model, *arguments)))
        return statistics[-1][1]

    check.statistics = remembered
    head = {key: value.clone() for key, value in run.model.named_parameters() if "lm_head" in key}
    run.train()
    assert check.gradients == 2
    ((arguments, found),) = statistics
    logits = check.own(plain, *arguments[:4])[0] / 0.8
    torch.testing.assert_close(found[0], reference.log_prob(logits, arguments[2]) * arguments[4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], reference.entropy(logits) * arguments[4], rtol=1e-4, atol=1e-5)
    moved = [
        key for key, value in run.model.named_parameters() if "lm_head" in key and not torch.equal(value, head[key])
    ]
    assert len(moved) == (2 if "LoRA" in name else 1)


@pytest.mark.heavy
def test_a_tied_and_trained_embedding_gets_both_gradients(tmp_path):
    run, _ = make(tmp_path, model=tied(), peft=False, max_steps=1)
    check = ByLogits(run)
    run.train()
    assert check.gradients == 2 and run.model.lm_head.weight is run.model.model.embed_tokens.weight


@pytest.mark.parametrize("fails", [False, True])
def test_trls_own_trainer_still_refuses_adapters_on_the_head(tmp_path, fails):
    """It would never train them."""
    model = adapted("a LoRA")
    try:
        make(tmp_path, model=model, peft=False, **{"no_such_keyword": 1} if fails else {})
    except TypeError:
        assert fails
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        make(tmp_path, cls=GRPOTrainer, config=GRPOConfig, model=model, peft=False)


# ---------------------------------------------------------------------------------------------------- what is refused


def only_with_positions(model):
    """A model that changes its logits for the arguments of the trainer only."""
    plain = type(model)

    class Altered(plain):
        def forward(self, *args, position_ids=None, **kwargs):
            out = super().forward(*args, position_ids=position_ids, **kwargs)
            if position_ids is not None:
                out.logits[..., 3] = -torch.inf
            return out

    model.__class__ = Altered
    return model


def lora_head(**options):
    return get_peft_model(tiny_model(), LoraConfig(**ON_HEAD | options)).eval()


def encoder_decoder(name, **options):
    config = getattr(transformers, f"{name}Config")
    sizes = {"vocab_size": len(tokenizer()), "d_model": 16, "pad_token_id": 0, "eos_token_id": 1}
    return getattr(transformers, f"{name}ForConditionalGeneration")(config(**sizes, **options))


REFUSED = {
    "an encoder-decoder": (
        lambda: encoder_decoder("T5", d_kv=8, d_ff=16, num_layers=1, num_heads=2),
        "model: T5ForConditionalGeneration is an encoder-decoder: its encoder would read the answer that it is to",
    ),
    "one that makes its decoder's tokens itself": (
        lambda: encoder_decoder(
            "Bart", encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=16, decoder_ffn_dim=16, bos_token_id=2, forced_eos_token_id=None,
        ),
        "model: BartForConditionalGeneration is an encoder-decoder: ",
    ),
    "a masked token": (
        lambda: only_with_positions(tiny_model()),
        "model: Altered: it masks or changes its logits behind the head by more than a scale and a softcap: log p",
    ),
    "a router without a loss": (
        lambda: build("llama4_text", **MODELS["llama4_text"]),
        "model: Llama4ForCausalLM: it returns no load-balancing loss: set router_aux_loss_coef to 0 to train without",
    ),
    "dropout": (
        lambda: lora_head(lora_dropout=0.1),
        "model: Qwen3ForCausalLM: its head has a LoRA with lora_dropout 0.1: leave the head out, or set it to 0",
    ),
    "DoRA": (lambda: lora_head(use_dora=True), "model: Qwen3ForCausalLM: its head has a DoRA or another variant"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_one_line_at_construction(tmp_path, name):
    model, message = REFUSED[name]
    model = model()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError) as caught:
        make(tmp_path, model=model, peft=False)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert [module.training for module in model.modules()] == modes


def test_the_proof_is_of_the_trainers_own_call_and_costs_three_forwards(tmp_path):
    model = build("mixtral", **MODELS["mixtral"])
    calls, logits = [], 0

    def note(module, _, named):
        tensors = {name: value.dtype for name, value in named.items() if isinstance(value, torch.Tensor)}
        call = tensors, named.get("output_router_logits"), torch.is_autocast_enabled("cpu")
        calls.append((tuple(named["input_ids"].shape), call))

    def count(module, _, out):
        nonlocal logits
        logits += out.numel() if out.shape[-1] == len(tokenizer()) else 0

    model.register_forward_pre_hook(note, with_kwargs=True)
    handle = model.lm_head.register_forward_hook(count)
    run, _ = make(tmp_path, model=model, peft=False, bf16=True, max_steps=1)
    handle.remove()
    proof = [call for shape, call in calls if shape == (1, TOKENS)]
    assert len(proof) == 3 and logits <= 3 * TOKENS * len(tokenizer())
    calls.clear()
    compute_loss = run._compute_loss
    run._compute_loss = lambda *arguments: calls.clear() or compute_loss(*arguments)
    run.train()
    ((_, trained),) = calls
    assert proof == [trained] * 3
