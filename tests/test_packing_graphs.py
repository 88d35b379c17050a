"""Compiled layers as CUDA graphs: what of them a CPU can show, and on a GPU that they change no bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import get_manager

from egrsd_kernels import linear_logp
from egrsd_kernels.models import ModelError
from egrsd_kernels.packing import Pack, layers, pack_rows, packed, read_packs, varlen
from tests.support.packing import counted_layers, gradients, group_rows, tiny

peft = pytest.importorskip("peft")


@pytest.fixture
def calls() -> Iterator[list[str]]:
    with counted_layers() as seen:
        yield seen


def with_lora(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj", "up_proj"], r=4, init_lora_weights=False, lora_dropout=dropout
    )
    return peft.get_peft_model(model, config).train()


def a_pack(seed: int = 0, repeats: int = 1) -> Pack:
    rows, targets = group_rows(seed)
    for more in range(1, repeats):
        others, asked = group_rows(seed + 100 * more)
        rows, targets = rows + others, targets + asked
    (pack,) = pack_rows(rows, budget=100_000, targets=targets)
    return pack


def logp(model: nn.Module, pack: Pack, compile_layers: Any) -> Tensor:
    backend = "auto" if next(model.parameters()).is_cuda else "torch"
    ids = pack.target_ids.to(next(model.parameters()).device)
    return packed(
        model, pack, lambda hidden, head: linear_logp(hidden, head, ids, backend=backend), compile_layers=compile_layers
    )[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_pack_begins_anew_and_runs_as_graphs(calls, checkpointing):
    model = with_lora(tiny("qwen3"))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    logp(model, a_pack(), False).sum().backward()
    expected = gradients(model)
    assert not calls
    logp(model, a_pack(), "cudagraphs").sum().backward()
    assert calls == ["begin", "graph", "graph"]  # what is computed again is within
    calls.clear()
    found = gradients(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    with torch.no_grad(), model.disable_adapter():
        logp(model, a_pack(1), "cudagraphs")
        logp(model, a_pack(1), True)
    assert calls == ["begin", "graph", "graph", "plain", "plain"]


def test_accumulated_gradients_are_none_of_the_graphs_buffers(calls):
    """Which the next pack writes to: here the buffers are tensors that each backward pass fills anew."""
    model = with_lora(tiny("qwen3"))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with contextlib.ExitStack() as stack:
        stack.enter_context(layers.compiled_layers(model.get_base_model(), True))
        stack.enter_context(layers.compiled_layers(model.get_base_model(), True))
    buffers = [torch.empty_like(weight) for weight in weights]

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: float, *weights: Tensor) -> Tensor:
            ctx.value = value
            return torch.zeros(())

        @staticmethod
        def backward(ctx: Any, _: Tensor) -> Any:
            return None, *(buffer.fill_(ctx.value) for buffer in buffers)

    for value in (1.0, 2.0):
        Replayed.apply(value, *weights).requires_grad_().backward()
    for weight, buffer in zip(weights, buffers, strict=True):
        assert weight.grad.eq(3.0).all() and weight.grad.data_ptr() != buffer.data_ptr()
        assert len(weight._backward_hooks) == 1


def test_what_a_graph_would_get_wrong_is_refused(calls, monkeypatch):
    model = with_lora(tiny("qwen3"), dropout=0.1)
    with pytest.raises(ModelError, match=r"^compile_layers: Qwen3ForCausalLM: CUDA graphs expect layers without dropo"):
        logp(model, a_pack(), "cudagraphs")
    with torch.no_grad():
        logp(model.eval(), a_pack(), "cudagraphs")
    model = tiny("opt", dropout=0.3, ffn_dim=64).train()  # it draws without a module
    with pytest.raises(ModelError, match=r"^compile_layers: OPTForCausalLM: CUDA graphs expect layers without dropout"):
        logp(model, a_pack(), "cudagraphs")
    logp(model.eval(), a_pack(), "cudagraphs")
    model = with_lora(tiny("qwen3"))
    with pytest.raises(ValueError, match=r"^compile_layers: 'cudagraphs' expects each pack's backward pass before the"):
        read_packs(model, pack_rows([[3, 4, 5], [6, 7, 8]], budget=3), linear_logp, compile_layers="cudagraphs")
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    weight.device_mesh = None
    with pytest.raises(ModelError, match=r"expect whole weights that stay where they are, got sharded ones$"):
        logp(model, a_pack(), "cudagraphs")
    monkeypatch.setattr(layers, "CUT", ())
    with pytest.raises(ModelError, match="expect operators that the compiler cuts a graph at, got torch"):
        logp(model, a_pack(), "cudagraphs")


def test_the_compiler_cuts_graphs_at_attention():
    for name in ("tree_attention", "tree_attention_backward"):
        assert {*varlen.CUT} <= {*getattr(torch.ops.egrsd_kernels, name).default.tags}


@pytest.mark.cuda
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu_graphs_change_no_bit(checkpointing, monkeypatch):
    """Trees of two sizes and new rows, the teacher between, gradients accumulated over packs, weights replaced.

    Beside layers that are compiled in the same way and launched one kernel at a time.
    """
    packs = [a_pack(seed, repeats) for seed in range(4) for repeats in (1, 14)]
    assert len({layers.padded_size(len(pack)) for pack in packs}) >= 2

    def a_model() -> nn.Module:
        model = with_lora(tiny("qwen3", hidden_size=64, head_dim=16)).to("cuda", torch.bfloat16)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        return model

    def steps(model: nn.Module) -> Iterator[dict[str, Tensor]]:
        for pack in packs:
            with torch.no_grad(), model.disable_adapter():
                teacher = logp(model, pack, "cudagraphs")
            found = logp(model, pack, "cudagraphs")
            (found - teacher).sum().backward()
            yield {"teacher": teacher, "student": found.detach(), **gradients_so_far(model)}
        model.zero_grad()

    layers._compiled.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(layers, "OPTIONS", {**layers.OPTIONS, "triton.cudagraphs": False})
        before = graphs_so_far()
        expected = [*steps(a_model())]
        assert graphs_so_far() == before + 1  # the number that it took
    layers._compiled.cache_clear()
    counters.clear()
    model, before = a_model(), graphs_so_far()
    for expected_of, found in zip(expected, steps(model), strict=True):
        for name, value in expected_of.items():
            assert torch.equal(found[name], value), name
    assert not counters["inductor"]["cudagraph_skips"]
    assert graphs_so_far() - before > 2 * 2 * 2  # sizes, layers, ways
    with torch.no_grad():
        for weight in model.parameters():
            weight.data = weight.data.clone()  # elsewhere
    for expected_of, found in zip(expected, steps(model), strict=True):
        for name, value in expected_of.items():
            assert torch.equal(found[name], value), name


def graphs_so_far() -> int:
    """The number of the next graph, which it takes."""
    manager = get_manager(torch.cuda.current_device())
    assert manager is not None
    number: int = manager.new_graph_id().id
    return number


def gradients_so_far(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}
