"""LoRA layers as one step each: PEFT's own numbers and gradients, which layers go together, and what stays PEFT's."""

from __future__ import annotations

import copy
import functools
import pickle
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("peft")

import peft

from egrsd_kernels import adapters, head_of
from egrsd_kernels.adapters import fuse_adapters
from egrsd_kernels.models import ModelError
from egrsd_kernels.packing import layers, pack_rows, packed
from tests.support.packing import gradients, group_rows, logp_of, tiny
from tests.support.tree_attention import on_cpus

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


HERE = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


class Attention(nn.Module):
    """Three layers of other widths that read one tensor, of which one has a bias, and one that reads another."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, 18), nn.Linear(width, 6, bias=False), nn.Linear(width, 18)
        self.o = nn.Linear(18, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x).tanh() * self.v(x) * self.k(x).repeat_interleave(3, dim=-1))


def adapted(module: nn.Module | None = None, dtype: torch.dtype = torch.float64, **settings: object) -> nn.Module:
    torch.manual_seed(3)
    names = {"target_modules": ["q", "k", "v", "o"], "rank_pattern": {"k": 3}, "alpha_pattern": {"v": 5}}
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **names, **settings})
    model = peft.get_peft_model((module or Attention()).to(dtype), config, autocast_adapter_dtype=False)
    return model.eval()


def rows(dtype: torch.dtype = torch.float64, *shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 7)), 24, dtype=torch.float64).to(dtype)


def weighed(out: Tensor) -> Tensor:
    return (torch.linspace(-1, 1, out.numel()).to(out).view(out.shape) * out).sum()


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output for x, and the gradients of x and of the adapters."""
    x = x.detach().requires_grad_()
    out = model(x=x)
    weighed(out).backward()
    return [out.detach(), x.grad, *gradients(model).values()]


def fused(model: nn.Module, x: Tensor) -> list[Tensor]:
    with fuse_adapters(model, x=rows(x.dtype, 3).to(x.device)):
        return step(model, x)


def groups_of(model: nn.Module) -> set[tuple[str, ...]]:
    """The layers that run as one step, by the ends of their names."""
    names = {module: name for name, module in model.named_modules()}
    places = [vars(module).get(adapters._PLACE) for module in model.modules()]
    return {tuple(names[one].split(".", 3)[-1] for one in place.readers.layers) for place in places if place}


# ------------------------------------------------------------------------------------------------- PEFT's own numbers


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("shape", [(11,), (2, 7), (0,), (3, 0), (1,)])
def test_numbers_and_gradients_are_pefts(shape, device):
    model, x = adapted().to(device), rows(torch.float64, *shape).to(device)
    expected = step(model, x)
    found = fused(model, x)
    assert len(found) == len(expected) == 10
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_inputs_that_are_not_contiguous():
    model, x = adapted(), rows(torch.float64, 5, 4).transpose(0, 1)
    for one, other in zip(fused(model, x), step(model, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16),
     (torch.float16, torch.float16)],
)  # fmt: skip
@pytest.mark.parametrize("device", HERE)
def test_no_further_from_float64_than_pefts(dtype, autocast, device):
    """Over all entries of a result. Fewer roundings to 16 bits, of other sums; in float32 sums in another order."""
    model = adapted(dtype=dtype).to(device)
    for name, weight in model.named_parameters():
        weight.data = weight.data.float() if autocast and "lora" in name else weight.data
    x, given = (
        rows(dtype, 400).to(device),
        [torch.randn(400, width).to(device, autocast or dtype) for width in (18, 6, 18)],
    )

    def run(model: nn.Module, dtype: torch.dtype, of_outputs: torch.dtype) -> list[Tensor]:
        leaf, layer = x.to(dtype).requires_grad_(), model.base_model.model
        outputs = [layer.q(leaf), layer.v(leaf), layer.k(leaf)]
        torch.autograd.backward(outputs, [given[place].to(of_outputs) for place in (0, 2, 1)])
        return [*(one.detach() for one in outputs), leaf.grad, *gradients(model).values()]

    exact = run(copy.deepcopy(model).double(), torch.float64, torch.float64)
    with torch.autocast(device, autocast) if autocast else nullcontext():
        theirs = run(model, dtype, autocast or dtype)
        fuse_adapters(model, x=x[:3])
        ours = run(model, dtype, autocast or dtype)
    more = 1.5 if dtype == torch.float32 and not autocast else 1.05
    assert len(ours) == len(exact) == 10
    for one, other, reference in zip(ours, theirs, exact, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        off, allowed = ((value.double() - reference).norm() for value in (one, other))
        assert off <= more * allowed


def test_gradients_by_differences():
    torch.manual_seed(0)
    sizes = [(2, 3), (4, 3), (3, 3), None, (3,), (2, 3), (1, 3), (4, 2), (3, 1)]  # x, and W, bias, A and B of two
    tensors = [size and torch.randn(size, dtype=torch.float64) for size in sizes]
    learned = [0, 5, 6, 7, 8]

    def outputs(chosen: list[int], places: list[int], *leaves: Tensor) -> list[Tensor]:
        x, *others = (dict(zip(places, leaves, strict=True)).get(place, one) for place, one in enumerate(tensors))
        made = adapters._Adapted.apply(x, [1.5, 0.4], *others)
        return [made[place] for place in chosen]

    for chosen, places in (([0, 1], learned), ([1], learned), ([0, 1], [0]), ([0, 1], [5, 6]), ([0], [0, 7, 8])):
        leaves = [tensors[place].clone().requires_grad_() for place in places]
        assert torch.autograd.gradcheck(functools.partial(outputs, chosen, places), leaves)


def test_a_gradient_of_the_gradient_is_refused():
    model = adapted()
    fuse_adapters(model, x=rows())
    x = rows().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x=x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fuse_adapters is differentiable once only"):
        gradient.sum().backward()


def test_transforms_of_torch_func():
    model, x = adapted(), rows()
    weights = {name: one.detach() for name, one in model.named_parameters() if "lora" in name}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, kwargs={"x": x}).square().sum()

    expected = torch.func.grad(loss, argnums=(0, 1))(weights, x)
    with fuse_adapters(model, x=x):
        found = torch.func.grad(loss, argnums=(0, 1))(weights, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class InPlace(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, v, k = self.q(x), self.v(x), self.k(x)
        q.clamp_(-0.5, 0.5)  # as OLMo's attention does
        v += 1
        out = self.o(q * v * k.mul_(2).repeat_interleave(3, dim=-1))
        out += x
        return out


@pytest.mark.parametrize("shape", [(11,), (2, 7)])
def test_outputs_may_be_changed_in_place(shape):
    model, x = adapted(InPlace()), rows(torch.float64, *shape)
    expected = step(model, x)
    for one, other in zip(fused(model, x), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_an_output_that_takes_no_part_gives_its_adapter_no_gradient(monkeypatch):
    def forward(self: Attention, x: Tensor) -> Tensor:
        q, v, k = self.q(x), self.v(x), self.k(x)
        return self.o(q + k.repeat_interleave(3, dim=-1) if self.training else v)

    monkeypatch.setattr(Attention, "forward", forward)
    model, x = adapted(target_modules=[*"qkv"]), rows()
    for training, number in ((True, 1 + 4), (False, 1 + 2)):
        expected = step(model.train(training), x)
        found = fused(model, x)
        assert len(found) == len(expected) == 1 + number
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_devices_without_autocast():
    model = adapted()
    fuse_adapters(model, x=rows())
    assert model.to("meta")(x=rows().to("meta")).shape == (2, 7, 24)


def test_a_backward_pass_under_autocast_stays_in_the_forwards_dtype():
    model, x = adapted(dtype=torch.float32), rows(torch.float32).requires_grad_()
    fuse_adapters(model, x=x)
    loss = model.base_model.model.q(x).square().sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.autograd.grad(loss, x)[0].equal(expected)


# --------------------------------------------------------------------------------------------------- what goes together


def test_layers_that_read_one_tensor_are_one_step():
    model = adapted()
    with fuse_adapters(model, x=rows()):
        assert groups_of(model) == {("q", "v", "k"), ("o",)}  # as they are called
    assert groups_of(model) == set()


def test_a_tensor_that_is_changed_between_its_readers_is_another(monkeypatch):
    def forward(self: Attention, x: Tensor) -> Tensor:
        q, x = self.q(x), x.clone()
        k = self.k(x)
        return self.o(q * k.repeat_interleave(3, dim=-1) + self.v(x.mul_(2)))

    monkeypatch.setattr(Attention, "forward", forward)
    model = adapted()
    with torch.no_grad():
        x = rows()
        expected = model(x=x)
        with fuse_adapters(model, x=rows()):
            assert groups_of(model) == {("q",), ("k",), ("v",), ("o",)}
            torch.testing.assert_close(model(x=x), expected)


OTHERWISE: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "another tensor": lambda layer, x: x.clone(),
    "changed in place": lambda layer, x: x.mul_(2),
    "adapters off": lambda layer, x: layer.k.enable_adapters(False),
    "another scale": lambda layer, x: layer.k.set_scale("default", 3.0),
    "a step of the optimizer": lambda layer, x: layer.k.lora_B["default"].weight.data.copy_(torch.ones(6, 3)),
    "weights in another place": lambda layer, x: setattr(
        layer.k.lora_A["default"], "weight", nn.Parameter(torch.ones(3, 24, dtype=torch.float64))
    ),
    "a hook": lambda layer, x: layer.k.lora_A.default.register_forward_hook(lambda *given: 2 * given[2]),
}


@pytest.mark.parametrize("change", OTHERWISE)
def test_what_changes_between_two_calls_is_seen(change):
    """By layers called by hand; in a model they follow one another."""
    model, x = adapted(), rows()
    layer = model.base_model.model
    fuse_adapters(model, x=rows())
    with torch.no_grad():
        layer.q(x)
        assert slot_of(model).made is not None
        if change == "a step of the optimizer":
            layer.k.lora_B["default"].weight.add_(1)
        else:
            other = OTHERWISE[change](layer, x)
            x = other if change == "another tensor" else x
        expected = type(layer.k).__base__.forward(layer.k, x)
        torch.testing.assert_close(layer.k(x), expected, rtol=1e-12, atol=1e-12)
        assert slot_of(model).made is None


def test_what_was_made_without_a_graph_is_not_taken_with_one():
    model, leaf = adapted(), rows().requires_grad_()
    fuse_adapters(model, x=rows())
    with torch.no_grad():
        model.base_model.model.q(leaf)
    assert model.base_model.model.v(leaf).requires_grad


@torch.no_grad()
def test_each_output_is_handed_out_once():
    model, x = adapted(), rows()
    layer = model.base_model.model
    expected = layer.v(x)
    fuse_adapters(model, x=rows())
    layer.q(x)
    layer.v(x).mul_(2)
    torch.testing.assert_close(layer.v(x), expected, rtol=1e-12, atol=1e-13)


def slot_of(model: nn.Module) -> adapters._Slot:
    (slot,) = {vars(one)[adapters._PLACE].readers.slot for one in model.modules() if adapters._PLACE in vars(one)}
    return slot


def test_layers_of_real_models_go_together():
    expected = {
        "qwen3": {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)},
        "phi": {("q_proj", "k_proj", "v_proj"), ("dense",), ("fc1",), ("fc2",)},
        "phi3": {("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)},
    }
    for kind, wanted in expected.items():
        model = peft.get_peft_model(tiny(kind), peft.LoraConfig(target_modules="all-linear"))
        fuse_adapters(model)
        assert {tuple(name.rpartition(".")[2] for name in names) for names in groups_of(model)} == wanted


def test_a_head_is_proved_behind_fused_layers():
    """The proof looks on by hooks, where fused layers are PEFT's; its next forward has to round as that one."""
    model = tiny("qwen3", num_hidden_layers=4).bfloat16()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    with torch.autocast("cpu", torch.bfloat16):
        fuse_adapters(model)
        assert head_of(model).weight is model.get_output_embeddings().weight


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_half_of_a_step_is_kept_for_no_longer_than_the_layers_need_it():
    model = adapted(Two())
    fuse_adapters(model, x=rows())
    slot, (first, second) = slot_of(model), model.base_model.model.children()
    model(x=rows())
    assert slot.made is None
    with second.v.register_forward_pre_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
        model(x=rows())
    assert slot.made.readers is vars(second.q)[adapters._PLACE].readers
    first.o(rows(torch.float64, 2)[..., :18])  # a layer by itself may be between two others'
    assert slot.made is not None
    first.q(rows())
    assert slot.made.readers is vars(first.q)[adapters._PLACE].readers
    model(x=rows())
    assert slot.made is None


def test_layers_that_find_nothing_to_take_run_by_themselves(monkeypatch):
    model, x = adapted(), rows()
    expected = step(model, x)
    fuse_adapters(model, x=x)
    model(x=x)
    for one in parts(model)[:3]:
        one.register_full_backward_hook(lambda *_: None)  # gives each call a view of its own
    made, apply = [], adapters._apply
    monkeypatch.setattr(adapters, "_apply", lambda x, operands: made.append(len(operands)) or apply(x, operands))
    for counts in ([3, 1, 1, 1], [1, 1, 1, 1]):
        for one, other in zip(step(model, x), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
        assert made == counts and slot_of(model).made is None
        made.clear()


def test_another_adapter_on_one_of_the_layers(monkeypatch):
    model, x = adapted(), rows()
    fuse_adapters(model, x=x)
    second_adapter(model)
    model.set_adapter("default")
    parts(model)[1].set_adapter("more")  # k, which is called last
    expected = step(copy.deepcopy(model), x)
    made, apply = [], adapters._apply
    monkeypatch.setattr(adapters, "_apply", lambda x, operands: made.append(len(operands)) or apply(x, operands))
    for one, other in zip(step(model, x), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    assert made == [1, 1, 1] and slot_of(model).made is None


# ------------------------------------------------------------------------------------------------ the first look at it


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.q, self.k = nn.Embedding(9, 24), nn.Linear(24, 9), nn.Linear(24, 9)
        self.merged = False

    def eval(self) -> Tokens:
        self.merged = True
        return super().eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.q(x) + self.k(x)


def test_a_model_of_tokens_alone_whose_own_eval_is_not_called():
    model = peft.get_peft_model(Tokens(), peft.LoraConfig(target_modules=[*"qk"])).train()
    fuse_adapters(model)
    assert groups_of(model) == {("q", "k")} and not model.base_model.model.merged
    assert all(module.training for module in model.modules())


def test_fused_in_inference_mode():
    model = adapted()
    with torch.inference_mode():
        fuse_adapters(model, x=rows())
        assert groups_of(model) == {("q", "v", "k"), ("o",)}
        model(x=rows())
    assert len(step(model, rows())) == 10


# ---------------------------------------------------------------------------------------------------- what stays PEFT's


def parts(model: nn.Module) -> list[nn.Module]:
    return [*model.base_model.model.children()]


def second_adapter(model: nn.Module) -> None:
    torch.manual_seed(1)
    model.add_adapter("more", peft.LoraConfig(r=2, target_modules=[*"qkvo"], init_lora_weights=False))
    model.double().base_model.set_adapter(["default", "more"])


def another_adapter(model: nn.Module) -> None:
    second_adapter(model)
    model.set_adapter("more")


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


# By name: what is done to a model that is fused, after which none of its layers is plain.
LATER: dict[str, Callable[[nn.Module], object]] = {
    "two adapters": second_adapter,
    "an adapter that was not proved": another_adapter,
    "adapters off": lambda model: model.base_model.disable_adapter_layers(),
    "dropout": lambda model: model.train(),
    "merged": lambda model: model.merge_adapter(),
    "weights that train": lambda model: [one.base_layer.requires_grad_() for one in parts(model)],
    "another class": lambda model: [setattr(one.base_layer, "__class__", Doubled) for one in parts(model)],
    "a forward of its own": lambda model: [
        setattr(one.base_layer, "forward", functools.partial(nn.functional.linear, weight=2 * one.base_layer.weight))
        for one in parts(model)
    ],
    "hooks": lambda model: [
        one.lora_B.default.register_forward_hook(lambda *given: 2 * given[2]) for one in parts(model)
    ],
    "adapters in another dtype": lambda model: [(one.lora_A.float(), one.lora_B.float()) for one in parts(model)],
}


@pytest.mark.parametrize("name", LATER)
def test_a_layer_that_is_not_plain_is_pefts_own(name, monkeypatch):
    model, x = adapted(lora_dropout=0.3 if name == "dropout" else 0.0, target_modules=[*"qkvo"]), rows()
    fuse_adapters(model, x=x)
    plain = copy.deepcopy(model)
    assert not groups_of(plain)
    monkeypatch.setattr(adapters, "_apply", lambda *given: pytest.fail("fused"))
    found = []
    for one in (model, plain):
        LATER[name](one)
        torch.manual_seed(5)
        found.append(step(one, x))
    for one, other in zip(*found, strict=True):
        assert one.equal(other)


def test_layers_that_are_plain_are_fused_beside_others():
    model, x = adapted(bias="lora_only"), rows()  # the bias of q and v trains
    expected = step(model, x)
    with fuse_adapters(model, x=x):
        assert groups_of(model) == {("k",), ("o",)}
        for one, other in zip(step(model, x), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_bias": True}, {"target_modules": [*"qv"], "bias": "all"}]
)
def test_a_model_of_which_no_layer_is_plain_is_refused(settings):
    words = r"^model: Attention: fuse_adapters expects layers that are PEFT's lora.Linear .*, got none of \d$"
    with pytest.raises(ModelError, match=words):
        fuse_adapters(adapted(**settings), x=rows())
    model = adapted()
    fuse_adapters(model, x=rows())
    with pytest.raises(ModelError, match=r"got none of 0 \(4 more are fused already\)$"):
        fuse_adapters(model, x=rows())


def test_a_peft_that_computes_something_else_is_refused(monkeypatch):
    own = peft.tuners.lora.Linear.forward
    model, off = adapted(), 1 + 1e-9
    monkeypatch.setattr(peft.tuners.lora.Linear, "forward", lambda layer, x: off * own(layer, x))
    with pytest.raises(
        ModelError, match=r"^model: q: expected y = .* got a layer that is off from it by 1e-09 of its size$"
    ):
        fuse_adapters(model, x=rows())
    assert not groups_of(model)


# --------------------------------------------------------------------------------------------------- around the layers


def test_copies_and_checkpoints_are_pefts():
    model, x = adapted(), rows()
    before = [*model.state_dict()]
    expected = step(model, x)
    undo = fuse_adapters(model, x=x)
    assert [*model.state_dict()] == before
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not groups_of(other) and {type(one) for one in parts(other)} == {peft.tuners.lora.Linear}
        for one, wanted in zip(step(other, x), expected, strict=True):
            assert one.equal(wanted)
    undo.close()
    undo.close()
    assert {type(one) for one in parts(model)} == {peft.tuners.lora.Linear}
    fuse_adapters(model, x=x)


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_layers_that_are_computed_again(reentrant):
    model = peft.get_peft_model(
        tiny("qwen3").double(), peft.LoraConfig(target_modules=MODULES, init_lora_weights=False)
    )
    model.enable_input_require_grads()
    ids = torch.randint(10, 90, (2, 9))
    model(input_ids=ids).logits.square().mean().backward()
    expected = gradients(model)
    fuse_adapters(model)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(input_ids=ids).logits.square().mean().backward()
    for name, one in gradients(model).items():
        torch.testing.assert_close(one, expected.pop(name), rtol=1e-6, atol=1e-9)
    assert not expected


# Views, and memory that is asked for.
NO_KERNEL = {"view", "_unsafe_view", "t", "permute", "detach", "split_with_sizes", "empty_like", "new_empty"}


class Calls(TorchDispatchMode):
    """How often each kernel is begun."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        self.counts[name] += name not in NO_KERNEL
        return function(*args, **(kwargs or {}))


def test_launches_of_a_layer():
    """Of q, k and v in bfloat16 under autocast: forward 27 kernels with PEFT and 8 here, backward 35 and 13."""
    model = adapted(dtype=torch.bfloat16, target_modules=[*"qkv"])
    for name, weight in model.named_parameters():
        weight.data = weight.data.float() if "lora" in name else weight.data
    layer, x = model.base_model.model, rows(torch.bfloat16).requires_grad_()

    def counted() -> list[int]:
        with torch.autocast("cpu", torch.bfloat16):
            with Calls() as forward:
                outputs = [one(x) for one in (layer.q, layer.v, layer.k)]
            given = [torch.ones_like(one) for one in outputs]
        with Calls() as backward:
            torch.autograd.grad(outputs, [x, *(w for w in model.parameters() if w.requires_grad)], given)
        return [sum(one.counts.values()) for one in (forward, backward)]

    assert counted() == [27, 35]
    fuse_adapters(model, x=rows(torch.bfloat16, 3))
    assert counted() == [8, 13]


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_operators(dtype):
    model = adapted(dtype=torch.float32)
    found = [adapters._operands(one, rows(torch.float32)) for one in parts(model)[:2]]
    weights, biases, a, b = ([one[place] for one in found] for place in range(4))
    weights, biases = ([None if one is None else one.to(dtype) for one in some] for some in (weights, biases))
    a, b = ([one.detach() for one in some] for some in (a, b))
    x = rows(dtype, 5)
    stacked, *factors = adapters._casts_operator(a, b, dtype)
    assert stacked.dtype == dtype and stacked.equal(torch.cat(a).to(dtype)) and factors[1].equal(b[1].to(dtype))
    u = x @ stacked.T
    outputs = adapters._forward_operator(x, u, weights, biases, factors, [2.0, 0.5])
    for place, (output, part) in enumerate(zip(outputs, u.split([4, 3], 1), strict=True)):
        expected = nn.functional.linear(x, weights[place], biases[place]) + [2.0, 0.5][place] * part @ factors[place].T
        assert (output - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()
    torch.library.opcheck(adapters._casts_operator, (a, b, dtype))
    torch.library.opcheck(adapters._forward_operator, (x, u, weights, biases, factors, [2.0, 0.5]))
    for wanted in ([True] * 3, [False, True, False], [True, False, True]):
        given = outputs, x, u.split([4, 3], 1), weights, a, b, [2.0, 0.5], wanted
        torch.library.opcheck(adapters._backward_operator, given)


def test_compiled_whole_with_pefts_numbers():
    model, x = adapted(), rows()
    expected = step(model, x)
    model.base_model.disable_adapter_layers()
    off = model(x=x)
    model.base_model.enable_adapter_layers()
    fuse_adapters(model, x=x)
    made: list[torch.fx.GraphModule] = []

    def counted(graph, inputs):
        made.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, backend=counted, fullgraph=True, dynamic=False)
    x = x.requires_grad_()
    for _ in range(3):
        out = compiled(x)
        found = [out.detach(), *torch.autograd.grad(weighed(out), [x, *learned(model)])]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    assert len(made) == 1
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected[0], rtol=1e-12, atol=1e-13)
    model.base_model.disable_adapter_layers()
    torch.testing.assert_close(compiled(x), off)
    assert len(made) == 3


def learned(model: nn.Module) -> list[nn.Parameter]:
    return [one for one in model.parameters() if one.requires_grad]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_of_packs(monkeypatch, checkpointing):
    """As many graphs as with PEFT's layers, in which no layer is one of its own, and PEFT's numbers."""
    torch._dynamo.reset()
    layers._compiled.cache_clear()
    made: list[torch.fx.GraphModule] = []

    def counted(graph, inputs, **options):
        made.append(graph)
        return aot_eager(graph, inputs, **options)

    monkeypatch.setattr(layers.torch, "compile", functools.partial(torch.compile, backend=counted))
    lora = peft.LoraConfig(target_modules=MODULES, init_lora_weights=False)
    model = peft.get_peft_model(tiny("qwen3", num_hidden_layers=3), lora).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    asked, targets = group_rows()
    (pack,) = pack_rows(asked, budget=1000, targets=targets)

    def run() -> tuple[int, dict[str, Tensor]]:
        before = len(made)
        function = functools.partial(logp_of, pack=pack)
        with torch.no_grad(), model.disable_adapter():
            teacher, _ = packed(model, pack, function, compile_layers=True)
        logp, _ = packed(model, pack, function, compile_layers=True)
        logp.mean().backward()
        return len(made) - before, {"teacher": teacher, "student": logp.detach(), **gradients(model)}

    with on_cpus():
        graphs, expected = run()
        for _ in range(2):
            with fuse_adapters(model):
                found = run()
                assert found[0] == graphs
                graphs = 0
            for name, one in found[1].items():
                torch.testing.assert_close(one, expected[name], rtol=1e-4, atol=1e-5, msg=name)
