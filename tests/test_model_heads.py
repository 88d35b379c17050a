"""Heads that are read from the model itself, beside the model's own logits, and where they are refused."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from egrsd_kernels import Head, head_of, linear_logp, read_hidden, with_head
from egrsd_kernels.models.proof import TOKENS, behind_head, ladder
from tests.support.devices import two_gpus

DTYPES = [torch.float32, torch.bfloat16]
VOCABULARY, WIDTH = 90, 32
IDS = (torch.arange(24) * 7 % VOCABULARY).view(2, 12)
TARGETS = IDS.roll(-1, 1)


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """What a head says, in plain torch and the dtype of its operands."""
    out = functional.linear(hidden, head.weight, head.bias)
    if head.low_rank is not None:
        a, b, scale = head.low_rank
        out = out + scale * functional.linear(functional.linear(hidden.to(a.dtype), a), b)
    out = out * head.logit_scale
    return out if head.softcap is None else head.softcap * (out / head.softcap).tanh()


def logp_of(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, TARGETS[..., None])


def by_head(hidden: Tensor, head: Head) -> Tensor:
    return logp_of(logits_of(hidden, head)).mean()


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_same(model: nn.Module, called: nn.Module | None = None) -> None:
    """The loss and every gradient through ``with_head`` are those through the model's own logits."""
    called = model if called is None else called
    own = logp_of(logits_in(model(input_ids=IDS))).mean()
    expected = gradients(own, model)
    ours, _ = with_head(called, by_head, input_ids=IDS)
    found = gradients(ours, model)
    torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def logits_in(output) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


class Strange(nn.Module):
    """A causal model with names that nobody knows: a transform, a scale and a cap around its head."""

    def __init__(self, scale: float = 0.3, cap: float | None = 5.0, bias: bool = True, after=lambda z: z):
        super().__init__()
        torch.manual_seed(0)
        self.woof = nn.Embedding(VOCABULARY, WIDTH)
        self.meow = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.transform = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))
        self.quack = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        nn.init.normal_(self.quack.weight, std=0.5)
        self.scale, self.cap, self.after = scale, cap, after

    def forward(self, input_ids):
        hidden = self.transform(self.meow(self.woof(input_ids))[0])
        logits = self.quack(hidden) * self.scale
        logits = logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap
        return self.after(logits)


def masked(logits: Tensor) -> Tensor:
    return torch.cat([logits[..., :3], torch.full_like(logits[..., 3:4], -torch.inf), logits[..., 4:]], -1)


# ----------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.3, 4.0])
def test_a_model_that_nobody_knows(scale, cap, dtype):
    model = Strange(scale, cap).to(dtype)
    head = head_of(model)
    assert head.weight is model.quack.weight and head.bias is model.quack.bias
    assert head.logit_scale == pytest.approx(scale, rel=1e-6)
    assert head.softcap == (cap and pytest.approx(cap, rel=1e-6))
    if dtype == torch.float32:
        check_same(model)
    else:
        ours, output = with_head(model, by_head, input_ids=IDS)
        assert output is None
        # Some ten roundings to bfloat16 of logits of a few nats, averaged over 24 tokens.
        torch.testing.assert_close(ours, logp_of(model(input_ids=IDS)).mean(), rtol=0, atol=2e-2)


@pytest.mark.parametrize("size", [1, 2, 7, 90, 1001])
@pytest.mark.parametrize("factor", [1.0, 0.02, 16.0])
@pytest.mark.parametrize("cap", [None, 0.5, 30.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ladder_is_read_back(size, factor, cap, dtype):
    """To some roundings of the product, the quotient, its tanh and that product."""
    steps = factor * ladder(size, torch.device("cpu"), dtype)
    behind = behind_head((steps if cap is None else cap * (steps / cap).tanh())[None], size)
    if size > 2:
        near = 8 * torch.finfo(dtype).eps
        assert behind == (pytest.approx(factor, rel=near, abs=0), cap and pytest.approx(cap, rel=near, abs=0))


def test_a_difference_below_what_rounding_allows_passes_and_above_it_does_not():
    """In float32 logits of 1 to 10 are rounded by 6e-7: 1e-4 nat is a fault there, and noise in bfloat16."""

    def disturbed(dtype):
        model = Strange(scale=1.0, cap=None).to(dtype)
        inner = model.quack.forward
        noise = 2e-4 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1))
        model.quack.forward = lambda x: (inner(x).float() + noise).to(dtype)
        return model

    with pytest.raises(ValueError, match=r"off by 0\.000\d+ nat"):
        head_of(disturbed(torch.float32))
    assert head_of(disturbed(torch.bfloat16)).logit_scale == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: Strange(after=masked), "it masks or changes its logits behind the head by more than a scale"),
        (lambda: Strange(cap=None, after=masked), "it masks or changes its logits behind the head by more than"),
        (lambda: Strange(after=lambda z: z[..., :70]), "it makes 70 logits of the 90 that its head returns"),
        (lambda: Strange(scale=-0.5, cap=None), "it multiplies its logits by -0.5 behind the head"),
        (lambda: Strange(scale=0.0, cap=None), "it multiplies its logits by 0 behind the head"),
        (lambda: Strange(after=lambda z: z + 0.01 * torch.arange(VOCABULARY)), "it masks or changes its logits"),
    ],
)
def test_what_cannot_be_honoured_is_one_line_with_the_difference_in_nats(model, says, dtype):
    model = model().to(dtype)
    with pytest.raises(ValueError, match=rf"^model: Strange: {says}.*: log p would be off by (\S+) nat, [^\n]*$"):
        head_of(model)
    with pytest.raises(ValueError, match=f"^model: Strange: {says}"):
        with_head(model, by_head, input_ids=IDS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_that_is_more_than_a_product_is_refused_in_nats(dtype):
    model = Strange().to(dtype)
    inner = model.quack.forward
    model.quack.forward = lambda x: inner(x) + x[..., :1].sin() * torch.arange(VOCABULARY) / 50
    with pytest.raises(ValueError, match=r"^model: Strange: log p from its .* is off by [\d.]+ nat where rounding"):
        head_of(model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_that_looks_ahead_is_refused(dtype):
    model = Strange().to(dtype)
    model.transform.register_forward_hook(lambda module, arguments, out: out + 0.5 * out.roll(-1, 1))
    with pytest.raises(ValueError, match=r"^model: Strange: its hidden states depend on tokens that follow them"):
        head_of(model)


def test_what_float64_leaves_to_float32_is_no_look_ahead():
    """Sums in another order, as of experts that meet other tokens, differ where what is compared is rounded."""
    model = Strange().double()
    model.transform.register_forward_hook(lambda module, arguments, out: out + 1e-8 * out.roll(-1, 1))
    assert head_of(model).logit_scale == pytest.approx(0.3, rel=1e-12)


def test_a_trained_scale_behind_the_head_is_refused():
    """As a number it would have no gradient, and be an old one after the first step."""
    model = Strange(cap=None)
    model.learned = nn.Parameter(torch.tensor(0.7))
    model.after = lambda logits: logits * model.learned
    with pytest.raises(ValueError, match=r"^model: Strange: a parameter that is trained changes its logits behind the"):
        head_of(model)
    model.learned.requires_grad_(False)
    assert head_of(model).logit_scale == pytest.approx(0.21)
    assert torch.is_grad_enabled()


def test_a_model_without_a_head_of_its_own_is_refused():
    model = Strange()
    model.quack, head = nn.Identity(), model.quack.requires_grad_(False)
    model.quack.weight = head.weight
    model.after = lambda logits: functional.linear(logits, head.weight)
    with pytest.raises(ValueError, match=r"^model: Strange: its logits come from no module with a weight of its own"):
        head_of(model)


def test_a_head_that_is_called_twice_is_refused():
    model = Strange()
    model.after = lambda logits: logits + 0 * model.quack(torch.zeros(WIDTH))
    with pytest.raises(ValueError, match=r"^model: Strange: its forward calls its head 2 times"):
        head_of(model)


@pytest.mark.parametrize("shape", ["a tuple", "an object", "a mapping"])
def test_outputs_of_any_shape_lose_the_column(shape):
    model = Strange()
    model.after = {
        "a tuple": lambda z: (z, 7),
        "an object": lambda z: SimpleNamespace(logits=z, more=7),
        "a mapping": lambda z: {"logits": z, "more": 7},
    }[shape]
    _, output = with_head(model, by_head, input_ids=IDS)
    assert output == {
        "a tuple": (None, 7), "an object": SimpleNamespace(logits=None, more=7), "a mapping": {"more": 7},
    }[shape]  # fmt: skip


def test_what_a_function_returns():
    model = Strange()
    (loss, kept), _ = with_head(model, lambda h, head: (by_head(h, head), {"h": h, "n": 3}), input_ids=IDS)
    assert kept["n"] == 3 and kept["h"].shape == (2, 12, WIDTH) and loss.requires_grad
    with pytest.raises(TypeError, match=r"^function: expected tensors in tuples, lists and dicts, got Head$"):
        with_head(model, lambda h, head: head, input_ids=IDS)
    with pytest.raises(ValueError, match=r"^labels: expected none, a loss of the model's own would need logits$"):
        with_head(model, by_head, input_ids=IDS, labels=IDS)


@torch.no_grad()
def test_a_parameter_is_returned_without_gradients_too():
    model = Strange()
    weight, _ = with_head(model, lambda hidden, head: head.weight, input_ids=IDS)
    assert weight is model.quack.weight


def test_read_hidden_is_what_the_head_reads():
    model = Strange()
    seen = []
    model.quack.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    model(input_ids=IDS)
    hidden = read_hidden(model, input_ids=IDS)
    assert torch.equal(hidden, seen[0])
    loss = by_head(hidden, head_of(model))
    expected = gradients(logp_of(model(input_ids=IDS)).mean(), model)
    for name, gradient in gradients(loss, model).items():
        torch.testing.assert_close(gradient, expected[name])


def test_the_proof_costs_three_forwards_of_16_tokens_once():
    model, calls, logits = Strange(), [], []
    model.register_forward_pre_hook(lambda module, _, names: calls.append(names["input_ids"].shape), with_kwargs=True)
    model.quack.register_forward_hook(lambda module, arguments, out: logits.append(out.shape[:-1].numel()))
    model.train()
    model.transform.eval()
    modes = [module.training for module in model.modules()]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with_head(model, by_head, input_ids=IDS)
    assert calls == [(1, TOKENS)] * 3 + [IDS.shape]
    assert sum(logits[:3]) == 3 * TOKENS  # of which two make other numbers than logits
    with_head(model, by_head, input_ids=IDS)
    assert len(calls) == 5
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("scale", [0.02, 0.1, 0.5])
def test_weights_in_float32_under_autocast(scale):
    """The head's product is rounded to bfloat16 there, and ours is not."""
    model = Strange()
    nn.init.normal_(model.quack.weight, std=scale)
    with torch.autocast("cpu", torch.bfloat16):
        head = head_of(model)
    assert head.logit_scale == pytest.approx(0.3, rel=1e-6)


def test_without_gradients_and_in_inference_mode():
    for off in (torch.no_grad, torch.inference_mode):
        model = Strange()
        with off():
            ours, _ = with_head(model, logits_of, input_ids=IDS)
            torch.testing.assert_close(ours, model(input_ids=IDS))
        assert not ours.requires_grad
        check_same(model)


def test_a_frozen_head_and_a_frozen_backbone():
    for frozen in ("quack", "meow"):
        model = Strange()
        model.get_submodule(frozen).requires_grad_(False)
        check_same(model)


def test_results_may_be_differentiated_twice():
    model = Strange()
    loss, _ = with_head(model, by_head, input_ids=IDS)
    weights = [model.transform[0].weight, model.quack.weight]
    own = logp_of(model(input_ids=IDS)).mean()
    first, expected = (torch.autograd.grad(one, weights, create_graph=True) for one in (loss, own))
    second, wanted = (torch.autograd.grad(g[0].square().sum(), weights) for g in (first, expected))
    for one, two in zip((*first, *second), (*expected, *wanted), strict=True):
        torch.testing.assert_close(one, two)


# ------------------------------------------------------------------------------------------- one call, and no trace


def test_results_may_be_changed_in_place():
    model = Strange()
    loss, _ = with_head(model, by_head, input_ids=IDS)
    loss /= 4
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    (logp_of(model(input_ids=IDS)).mean() / 4).backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_the_proof_leaves_modules_in_their_mode():
    """Whatever a module's own train() does, such as to merge an adapter where it is told to evaluate."""

    class Merging(nn.Linear):
        merged = False

        def train(self, mode: bool = True):
            self.merged |= not mode
            return super().train(mode)

    model = Strange()
    model.transform[0] = Merging(WIDTH, WIDTH)
    model.meow.eval()
    head_of(model)
    modes = {name: module.training for name, module in model.named_modules()}
    assert not model.transform[0].merged and not modes.pop("meow") and all(modes.values())


def test_nothing_stays_after_an_exception():
    model = Strange()
    with pytest.raises(ZeroDivisionError):
        with_head(model, lambda hidden, head: 1 / 0, input_ids=IDS)
    assert "forward" not in vars(model.quack)
    check_same(model)


def test_a_forward_of_the_users_own_comes_back():
    model = Strange()
    mine = model.quack.forward = lambda x: functional.linear(x, model.quack.weight, model.quack.bias)
    check_same(model)
    assert vars(model.quack)["forward"] is mine


def test_the_heads_own_hooks_run():
    """As FSDP2's and DeepSpeed's do, which gather the weights before and release them after."""
    model, order = Strange(), []
    head_of(model)
    model.quack.register_forward_pre_hook(lambda module, arguments: order.append("before") or (arguments[0] * 2,))
    model.quack.register_forward_hook(lambda module, arguments, out: order.append("after"))
    doubled, _ = with_head(model, lambda hidden, head: order.append("function") or hidden, input_ids=IDS)
    assert order == ["before", "function", "after"]
    check_same(model)
    model.quack._forward_pre_hooks.clear()
    torch.testing.assert_close(doubled, 2 * read_hidden(model, input_ids=IDS))


def test_other_threads_see_the_head_as_it_is():
    model = Strange()
    expected = model(input_ids=IDS)
    inside, go = threading.Event(), threading.Event()
    found = {}

    def slowly(hidden: Tensor, head: Head) -> Tensor:
        inside.set()
        assert go.wait(300)
        return hidden

    threads = [threading.Thread(target=lambda: found.update(hidden=with_head(model, slowly, input_ids=IDS)[0]))]
    head_of(model)
    threads[0].start()
    assert inside.wait(300)
    assert torch.equal(model(input_ids=IDS), expected)
    threads.append(threading.Thread(target=lambda: found.update(loss=with_head(model, by_head, input_ids=IDS)[0])))
    threads[1].start()
    threads[1].join()
    assert "forward" in vars(model.quack)
    go.set()
    threads[0].join()
    assert "forward" not in vars(model.quack)
    torch.testing.assert_close(found["loss"], logp_of(expected).mean())
    assert found["hidden"].shape == (2, 12, WIDTH)


@pytest.mark.parametrize("when", ["between calls", "within a call"])
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_compute_with_weights_of_their_own(how, when):
    from tests.support.trl_tiny import tiny_model

    model, copies = tiny_model(), []
    inputs = {"input_ids": IDS % 70}
    with_head(model, lambda h, head: copies.append(how(model)) if when == "within a call" else None, **inputs)
    other = copies[0] if copies else how(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert torch.equal(*(read_hidden(one, **inputs) for one in (model, other)))
    ours, _ = with_head(other, logits_of, **inputs)
    torch.testing.assert_close(ours, 2 * model(**inputs).logits)
    torch.testing.assert_close(ours, other(**inputs).logits)


def test_a_pickle_asks_for_no_class_of_this_package():
    from tests.support.trl_tiny import tiny_model

    model = tiny_model()
    head_of(model)
    assert b"egrsd" not in pickle.dumps(model)


# ------------------------------------------------------------------------------------------------ what is around it


def tiny(**options):
    pytest.importorskip("transformers")
    from tests.support.trl_tiny import tiny_model

    model = tiny_model(VOCABULARY)
    return model


@pytest.mark.parametrize("what", ["model", "layers", "in place", "head", "forward"])
def test_compiled(what):
    model = tiny()
    called = model
    compiled = {"backend": "aot_eager"}
    if what == "model":
        called = torch.compile(model, **compiled)
    elif what == "layers":
        for layer in model.model.layers:
            layer.compile(**compiled)
    elif what == "in place":
        model.compile(**compiled)
    elif what == "head":
        model.lm_head = torch.compile(model.lm_head, **compiled)
    else:
        model.forward = torch.compile(model.forward, **compiled)
    assert called(input_ids=IDS).logits.shape[-1] == VOCABULARY  # compiled before, and not to be taken instead
    check_same(model, called)
    assert called(input_ids=IDS).logits.shape[-1] == VOCABULARY


def test_the_first_call_may_be_in_a_compiled_function():
    model = tiny()
    step = torch.compile(lambda ids: with_head(model, by_head, input_ids=ids)[0], backend="aot_eager")
    torch.testing.assert_close(step(IDS), logp_of(model(input_ids=IDS).logits).mean())


def test_compiled_frames_are_used_again():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model = torch.compile(tiny(), backend=counter)
    with_head(model, by_head, input_ids=IDS)
    model(input_ids=IDS)
    frames = counter.frame_count
    for _ in range(3):
        with_head(model, by_head, input_ids=IDS)
        model(input_ids=IDS)
    assert counter.frame_count == frames


def test_gradient_checkpointing():
    model = tiny()
    model.gradient_checkpointing_enable()
    check_same(model.train())


def test_with_head_can_be_checkpointed_itself():
    from torch.utils.checkpoint import checkpoint

    model = tiny()
    head_of(model)
    loss = checkpoint(lambda ids: with_head(model, by_head, input_ids=ids)[0], IDS, use_reentrant=False)
    found = gradients(loss, model)
    for name, gradient in gradients(logp_of(model(input_ids=IDS).logits).mean(), model).items():
        torch.testing.assert_close(found[name], gradient)


def test_the_models_own_words_for_rows_and_its_routers_loss():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    hidden, output = with_head(model, lambda h, head: h, input_ids=IDS, logits_to_keep=4, output_router_logits=True)
    assert hidden.shape == (2, 4, 32)
    assert output.logits is None and "logits" not in output and output.past_key_values is None
    own = model(input_ids=IDS, output_router_logits=True)
    torch.testing.assert_close(output.aux_loss, own.aux_loss)
    expected = gradients(own.aux_loss, model)
    for name, gradient in gradients(output.aux_loss, model).items():
        torch.testing.assert_close(gradient, expected[name])


def test_heads_on_another_device_than_the_backbone():
    """Accelerate's hooks are a forward on the instance that moves the input; meta stands for the second device."""
    accelerate = pytest.importorskip("accelerate")
    model = Strange()
    head_of(model)
    moved = []

    class Moves(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            moved.append("in")
            return args, kwargs

        def post_forward(self, module, output):
            moved.append("out")
            return output

    accelerate.hooks.add_hook_to_module(model.quack, Moves())
    check_same(model)
    assert moved == ["in", "out"] * 2
    accelerate.hooks.remove_hook_from_module(model.quack)
    check_same(model)


@pytest.mark.cuda
@two_gpus
@pytest.mark.parametrize("head_on", [0, 1])
def test_layers_and_head_on_two_gpus(head_on):
    """Spread by Accelerate, as a device_map spreads it, the model is what it is in one place."""
    accelerate = pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads, initializer_range=0.3))
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers": 0, "model.norm": 1, "lm_head": head_on}
    spread = accelerate.dispatch_model(copy.deepcopy(model), places)
    own = logp_of(model(input_ids=IDS).logits).mean()
    expected = gradients(own, model)
    ours, _ = with_head(
        spread, lambda hidden, head: linear_logp(hidden, head, TARGETS.to(hidden.device)).mean(), input_ids=IDS.cuda(0)
    )
    found = gradients(ours, spread)
    torch.testing.assert_close(ours.cpu(), own, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():  # sums of 24 rows and 90 entries, in another order
        torch.testing.assert_close(gradient.cpu(), expected[name], rtol=1e-4, atol=1e-6, msg=name)


# ------------------------------------------------------------------------------------------------------ LoRA heads


def adapted(dtype=torch.float32, seed: int = 1, **options):
    """A tiny model with a LoRA on its head that has learnt something."""
    peft = pytest.importorskip("peft")
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]} | options
    model = peft.get_peft_model(tiny().to(dtype), peft.LoraConfig(**options))
    learn(model, seed)
    return model


def learn(model: nn.Module, seed: int = 1) -> None:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"lora_bias": True}, 2.0),
        ({"lora_dropout": 0.1}, 2.0),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, None),
        ({"target_modules": ["q_proj"]}, None),
    ],
)
def test_a_lora_on_the_head(options, scale):
    model = adapted(**options).eval()
    check_same(model)
    head = head_of(model)
    if scale is None:
        assert head.low_rank is None
    else:
        assert head.low_rank[2] == scale
        assert head.low_rank[0].shape == (4, 32) and head.low_rank[1].shape == (VOCABULARY, 4)
    if "modules_to_save" in options:
        assert head.weight is model.base_model.model.lm_head.modules_to_save["default"].weight


@pytest.mark.parametrize("first", ["teacher", "student"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}])
def test_the_teacher_has_the_plain_head(options, first):
    model = adapted(**options).eval()
    plain = tiny()
    if first == "student":
        check_same(model)
    with torch.no_grad(), model.disable_adapter():
        ours, _ = with_head(model, logits_of, input_ids=IDS)
        head = head_of(model)
    torch.testing.assert_close(ours, plain(input_ids=IDS).logits)
    assert head.low_rank is None and torch.equal(head.weight, plain.lm_head.weight)
    check_same(model)


def test_the_first_call_in_a_region_of_autocast_has_the_adapters_own_values():
    """Autocast keeps 16-bit copies of parameters until its region ends: those of the proof's random adapters, too."""
    model = adapted().eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        first, _ = with_head(model, logits_of, input_ids=IDS)
        assert first.equal(with_head(model, logits_of, input_ids=IDS)[0])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert first.equal(with_head(model, logits_of, input_ids=IDS)[0])


def test_adapters_take_part_in_the_proof_and_come_back():
    """A fresh LoRA is the identity, and would show nothing."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj", "lm_head"])).train()
    before = copy.deepcopy(model.state_dict())
    seen, head = [], model.base_model.model.lm_head
    head.register_forward_pre_hook(lambda module, arguments: seen.append(head.lora_B["default"].weight.any().item()))
    head_of(model)
    assert seen == [True] * 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_several_active_adapters_and_merged_ones():
    peft = pytest.importorskip("peft")
    model = adapted().eval()
    model.add_adapter("more", peft.LoraConfig(r=2, lora_alpha=8, target_modules=["lm_head"], use_rslora=True))
    learn(model, 2)
    model.base_model.set_adapter(["default", "more"])
    check_same(model)
    assert head_of(model).low_rank[0].shape == (6, 32)
    model.base_model.merge_adapter()
    ours, _ = with_head(model, logits_of, input_ids=IDS)
    torch.testing.assert_close(ours, model(input_ids=IDS).logits)
    assert head_of(model).low_rank is None
    with model.disable_adapter():
        ours, _ = with_head(model, logits_of, input_ids=IDS)
    torch.testing.assert_close(ours, tiny()(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["base", "teacher", "student"])
def test_trained_tokens_of_a_tied_head(first):
    """PEFT's trainable_token_indices puts rows of its own into the embedding and into the head."""
    peft = pytest.importorskip("peft")
    base = tiny()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    plain = copy.deepcopy(base)
    if first == "base":
        check_same(base)
    options = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 8]}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, **options)).eval()
    (rows,) = (rows for name, rows in model.named_parameters() if "trainable_tokens_delta" in name)
    with torch.no_grad():
        rows.add_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)))
    for who in ("teacher", "student", "teacher") if first == "teacher" else ("student", "teacher"):
        with model.disable_adapter() if who == "teacher" else contextlib.nullcontext():
            ours, _ = with_head(model, logits_of, input_ids=IDS)
            own = model(input_ids=IDS).logits
        torch.testing.assert_close(ours, own)
        if who == "teacher":
            torch.testing.assert_close(ours, plain(input_ids=IDS).logits)
        else:
            assert (ours - plain(input_ids=IDS).logits).abs().max() > 0.1
            found, expected = (torch.autograd.grad(x.square().sum(), rows)[0] for x in (ours, own))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_lora_of_another_dtype_than_the_weight(autocast):
    """PEFT keeps adapters of a 16-bit model in float32."""
    model = adapted(torch.bfloat16).eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        head = head_of(model)
    assert (head.weight.dtype, head.low_rank[0].dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("options", "train", "says"),
    [
        ({"lora_dropout": 0.1}, True, "its head has a LoRA with lora_dropout 0.1: leave the head out, or set it to 0"),
        ({"use_dora": True}, False, "its head has a DoRA or another variant of LoRA"),
    ],
)
def test_adapters_that_are_more_than_a_product_are_refused(options, train, says):
    model = adapted(**options).train(train)
    for read in (lambda: with_head(model, by_head, input_ids=IDS), lambda: head_of(model)):
        with pytest.raises(ValueError, match=f"^model: Qwen3ForCausalLM: {says}"):
            read()


def test_prompt_tuning_puts_rows_before_those_of_the_tokens():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with torch.no_grad():
        ours, _ = with_head(model, logits_of, input_ids=IDS)
        torch.testing.assert_close(ours, model(input_ids=IDS).logits)
    assert ours.shape[:2] == (2, 4 + 12)


def test_other_adapters_than_lora_are_refused_by_name():
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    model = peft.get_peft_model(tiny(), config)
    with pytest.raises(
        ValueError, match=r"^model: Qwen3ForCausalLM: its head has an adapter that is no LoRA \(Linear\)"
    ):
        head_of(model)


def test_a_quantised_head_is_refused():
    model = Strange()
    model.quack.register_parameter("weight", nn.Parameter(torch.ones(VOCABULARY, WIDTH, dtype=torch.int8), False))
    model.quack.forward = lambda x: functional.linear(x, model.quack.weight.to(x.dtype), model.quack.bias)
    with pytest.raises(ValueError, match=r"^model: Strange: its head's weights are int8: leave the head out of the"):
        head_of(model)
