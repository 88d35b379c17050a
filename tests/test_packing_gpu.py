"""Packs on a GPU: attention by segments and by blocks, compiled layers, and what of them a CPU can show.

On a CPU plain tensors stand for the GPU's kernel (tests/support/tree_attention.py), so all that is around it is the
same code in float64: the table, the operator and its gradient, windows, layers that are computed again or compiled.
"""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from egrsd_kernels import linear_logp
from egrsd_kernels.models import ModelError
from egrsd_kernels.packing import Pack, attention, layers, pack_rows, packed, varlen
from egrsd_kernels.packing.layers import padded_size
from egrsd_kernels.packing.proof import fast_road, row_limit
from egrsd_kernels.packing.segments import copies_of, segment_sum, take_rows
from tests.support.packing import (
    Float64,
    check_same_in_float64,
    gradients,
    group_rows,
    logp_alone,
    logp_of,
    logp_packed,
    tiny,
)
from tests.support.tree_attention import dense, on_cpus, seen_in

HERE = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.cuda),
]


@pytest.fixture(autouse=True)
def segments() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with on_cpus():
        yield
    torch.set_num_threads(before)


def random_pack(seed: int, rows: int, longest: int) -> Pack:
    """A tree of some depth: each row goes on from a prefix of an earlier one, or is of a tree of its own."""
    random = torch.Generator().manual_seed(seed)
    made: list[list[int]] = []
    for _ in range(rows):
        draw = torch.randint(0, 2**31, (3,), generator=random).tolist()
        above = made[draw[0] % len(made)] if made and draw[0] % 4 else []
        start = above[: draw[1] % (len(above) + 1)]
        new = torch.randint(0, 50_000, (1 + draw[2] % longest,), generator=random).tolist()
        made.append(start + new)
    (pack,) = pack_rows(made, budget=sum(map(len, made)))
    return pack


# ------------------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize(("seed", "window", "size"), [(0, 0, None), (1, 7, 4096), (2, 129, None), (3, 0, 3072)])
def test_attention_by_segments_is_that_of_a_dense_mask(device, seed, window, size):
    """And its gradients; against float64, on the same operands."""
    on_gpu = device == "cuda"
    pack = random_pack(seed, rows=11 if on_gpu else 7, longest=300 if on_gpu else 40)
    size, dtype = (size if on_gpu else size and 400) or len(pack), torch.bfloat16 if on_gpu else torch.float64
    random = torch.Generator().manual_seed(seed)
    query, key, value, go = (
        torch.randn(size, heads, 64, generator=random, dtype=torch.float64).to(dtype) for heads in (4, 2, 2, 4)
    )
    table = varlen.table(pack, window, torch.device(device), dtype, True)
    leaves = [one.to(device).requires_grad_() for one in (query, key, value)]
    out, _ = torch.ops.egrsd_kernels.tree_attention(*leaves, table.entries, table.sizes, 0.2)
    found = [out, *torch.autograd.grad(out, leaves, go.to(device))]

    tokens = len(pack)
    wide = [one[:tokens].double().requires_grad_() for one in (query, key, value)]
    expected = dense(*wide, seen_in(pack.position_ids, pack.ends, window), 0.2)
    expected = [expected, *torch.autograd.grad(expected, wide, go[:tokens].double())]
    # The kernel rounds the softmax's weights, their gradient and the result once each, to 8 bits in bfloat16.
    allowed = 4 * torch.finfo(dtype).eps
    for one, other in zip(found, expected, strict=True):
        assert one.shape[0] == size and one.is_contiguous() and not one[tokens:].any()
        assert (one[:tokens].cpu().double() - other).norm() <= allowed * other.norm()


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 520)])
def test_gradients_of_copies_are_added_in_float32_and_rounded_once(device, dtype, shape):
    random = torch.Generator().manual_seed(0)
    index = torch.randint(0, 40, (300,), generator=random)
    index[:100] = 7  # and rows that nothing takes
    values = torch.randn(300, *shape, generator=random, dtype=torch.float64).to(dtype)
    copies = copies_of(index, 50)
    found = segment_sum(values.to(device), type(copies)(*(one.to(device) for one in copies)), 64).cpu()
    exact = torch.zeros(64, *shape, dtype=torch.float64).index_add_(0, index, values.double())
    size = torch.zeros(64, *shape, dtype=torch.float64).index_add_(0, index, values.double().abs())
    assert found.dtype == dtype and not found[40:].any()
    wide = torch.promote_types(dtype, torch.float32)
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 100 * torch.finfo(wide).eps * size
    assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("device", HERE)
def test_rows_that_are_taken_get_the_same_gradient_every_time(device):
    random = torch.Generator().manual_seed(0)
    index = torch.randint(0, 30, (4000,), generator=random).to(device)
    values = torch.randn(31, 24, generator=random).to(device, torch.bfloat16).requires_grad_()
    weights = torch.randn(4000, 24, generator=random).to(device, torch.bfloat16)
    taken = take_rows(values, index, copies_of(index, 31))
    assert taken.equal(values.index_select(0, index))
    first, second = (torch.autograd.grad(taken, values, weights, retain_graph=True)[0] for _ in range(2))
    assert first.equal(second)
    exact = torch.zeros(31, 24, dtype=torch.float64, device=device).index_add_(0, index, weights.double())
    torch.testing.assert_close(first.double(), exact, rtol=2**-8, atol=1e-3)


def test_windows_are_read_off_what_layers_say():
    masks = pytest.importorskip("transformers.masking_utils")
    window, chunks = masks.sliding_window_causal_mask_function, masks.chunked_causal_mask_function
    for positions in (1, 2, 6, 7, 12, 13, 400):
        assert varlen.window_of(masks.causal_mask_function, positions) == 0
        assert varlen.window_of(window(6), positions) == (6 if positions > 6 else 0)
    chunked = chunks(7, torch.zeros(1, dtype=torch.int64))
    assert varlen.window_of(chunked, 7) == 0  # within the first
    for other in (chunked, lambda batch, head, query, key: query >= 0):
        with pytest.raises(varlen.Unserved, match=r"^its layers see no window: attention by segments expects one$"):
            varlen.window_of(other, 40)


@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_those_of_which_something_is_seen(seed):
    pack = random_pack(seed, rows=9, longest=300)
    counts, order = attention._seen_blocks(pack.ends)
    seen = seen_in(pack.position_ids, pack.ends, 0)
    padding = -len(pack) % attention.BLOCK
    blocks = nn.functional.pad(seen, (0, padding, 0, padding)).unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    some = blocks.any(3).any(1)
    for row, (count, which) in enumerate(zip(counts[0, 0].tolist(), order[0, 0].tolist(), strict=True)):
        assert sorted(which[:count]) == some[row].nonzero()[:, 0].tolist()


# ------------------------------------------------------------------------------------------------------ over a model

# By name: models that attend by segments.
MODELS = {
    "llama": ("llama", {}),
    "adapters' q and k norms": ("qwen3", {}),
    "a window in each layer": ("mistral", {"sliding_window": 6}),
    "a window in some layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "two ropes": ("gemma3_text", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "learned positions": ("gpt2", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_attend_by_segments_are_what_each_is_alone(name):
    model_type, settings = MODELS[name]
    model = tiny(model_type, **settings).double()
    row_limit(model)
    assert fast_road(model) is attention.by_segments
    with Float64():
        check_same_in_float64(model)


def test_the_proof_sees_a_window_that_is_left_out(monkeypatch):
    own = varlen.window_of
    monkeypatch.setattr(attention, "window_of", lambda *asked: 0 * own(*asked))
    model = tiny("mistral", sliding_window=6)
    words = r"^model: MistralForCausalLM: log p of rows in a pack is off by \S+ nat on cpu in torch.float32 where that"
    with pytest.raises(ModelError, match=words):
        fast_road(model)


@pytest.mark.parametrize(
    ("model_type", "settings", "words"),
    [
        ("llama4_text", {"attention_chunk_size": 7, "layer_types": ["chunked_attention"] * 2, "no_rope_layers": [1, 1],
                         "num_local_experts": 2, "intermediate_size_mlp": 48}, "its layers see no window"),
        ("llama", {"head_dim": 12}, "heads of 12, 12 and 12: attention by segments expects one multiple of 8"),
    ],
)  # fmt: skip
def test_what_segments_do_not_serve_takes_the_mask(model_type, settings, words):
    model = tiny(model_type, **settings)
    (pack,) = pack_rows(group_rows()[0], budget=1000)
    with pytest.warns(UserWarning, match=f"packs take a dense mask, not attention by segments: {words}"):
        logp, _ = packed(model, pack, lambda hidden, head: linear_logp(hidden, head, pack.target_ids))
    rows, _ = group_rows()
    torch.testing.assert_close(logp, logp_alone(model, rows, [[i > 0 for i in range(len(row))] for row in rows]))
    with pytest.raises(ModelError, match=r"^compile_layers: \w+: expected a model on a GPU, in 16 bits"):
        packed(model, pack, lambda hidden, head: hidden, compile_layers=True)


def test_dropout_of_attention_is_refused():
    model = tiny("llama", attention_dropout=0.1)
    (pack,) = pack_rows([[3, 4, 5], [3, 4, 6]], budget=9)
    packed(model, pack, lambda hidden, head: hidden, compile_layers=False)
    with pytest.raises(ModelError, match=r"attention dropout 0.1: packing expects 0 in training$"):
        packed(model.train(), pack, lambda hidden, head: hidden, compile_layers=False)


def test_a_forward_in_another_dtype_than_the_proved_one_is_refused():
    model = tiny("qwen3")
    varlen.DTYPES = (torch.bfloat16,)
    words = r"its layers compute in torch.float32, where attention by segments was proved in 16 bits$"
    with pytest.raises(ModelError, match=words), attention.by_segments(some_pack(), None):
        model(input_ids=some_pack().input_ids[None])


# ---------------------------------------------------------------------------------------------------- compiled layers


@pytest.mark.parametrize("tokens", [1, 1023, 1024, 1025, 1279, 1281, 2048, 5000, 8192, 8193, 20_000, 65_536])
def test_few_sizes_and_little_padding(tokens):
    size = padded_size(tokens)
    assert size >= max(tokens, 1024) and padded_size(size) == size
    assert size == 1024 or size - tokens < size / 9
    assert len({padded_size(n) for n in range(8192, 16_384)} - {8192}) == 8


def count_graphs(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any] = aot_eager) -> list[torch.fx.GraphModule]:
    """Each graph that is compiled from here on; ``aot_eager`` runs them, which needs no compiler."""
    torch._dynamo.reset()
    layers._compiled.cache_clear()
    made: list[torch.fx.GraphModule] = []

    def counted(graph, inputs, **options):
        made.append(graph)
        return run(graph, inputs, **options)

    monkeypatch.setattr(layers.torch, "compile", functools.partial(torch.compile, backend=counted))
    return made


def step(model: nn.Module, seed: int, compile_layers: bool) -> tuple[Tensor, dict[str, Tensor]]:
    rows, targets = group_rows(seed)
    (pack,) = pack_rows(rows, budget=1000, targets=targets)

    def function(hidden, head):
        return linear_logp(hidden, head, pack.target_ids, backend="torch" if hidden.device.type == "cpu" else "auto")

    with torch.no_grad():
        teacher, _ = packed(model, pack, function, compile_layers=compile_layers)
    logp, _ = packed(model, pack, function, compile_layers=compile_layers)
    logp.mean().backward()
    torch.testing.assert_close(teacher, logp.detach(), rtol=1e-5, atol=1e-5)
    return logp.detach(), gradients(model)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_are_compiled_once(monkeypatch, checkpointing):
    made = count_graphs(monkeypatch)
    model = tiny("gemma3_text", sliding_window=6, layer_types=["sliding_attention", "full_attention"]).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = [step(model, seed, False) for seed in range(4)]
    assert not made
    counts = []
    for seed, (logp, wanted) in enumerate(expected):
        found, of_weights = step(model, seed, True)
        torch.testing.assert_close(found, logp)
        for name, gradient in wanted.items():
            torch.testing.assert_close(of_weights[name], gradient, msg=name)
        counts.append(len(made))
    assert 0 < counts[0] == counts[-1] <= 4
    with torch.no_grad():  # generation, and other rows, compile nothing
        model(input_ids=torch.arange(3, 40)[None])
        model.eval().generate(torch.arange(3, 9)[None], max_new_tokens=3)
    assert len(made) == counts[0]


@pytest.mark.slow
def test_compiled_layers_train_adapters(monkeypatch):
    peft = pytest.importorskip("peft")
    made = count_graphs(monkeypatch)
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(tiny("qwen3"), config)
    expected, wanted = step(model, 0, False)
    found, of_weights = step(model, 0, True)
    torch.testing.assert_close(found, expected)
    assert of_weights.keys() == wanted.keys() and len(wanted) == 12
    for name, gradient in wanted.items():
        torch.testing.assert_close(of_weights[name], gradient, msg=name)
    counts = len(made)
    for seed, off in itertools.product(range(1, 3), (False, True)):
        with model.disable_adapter() if off else torch.enable_grad():
            rows, _ = group_rows(seed)
            (pack,) = pack_rows(rows, budget=1000)
            with torch.no_grad():
                packed(model, pack, lambda hidden, head: hidden, compile_layers=True)
    assert len(made) == counts + 1  # without adapters


@pytest.mark.slow
def test_a_graph_serves_packs_of_any_number_of_tokens(monkeypatch):
    """A checkpoint of somebody's own compiles the graph with gradients in the backward pass; torch's is within the
    graph. (A first pack of as many tokens as the layers have features would be taken for a condition.)"""
    made = count_graphs(monkeypatch)
    model = tiny("llama", num_hidden_layers=2).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})

    def a_step_of_each_size():
        for count in (31, 18, 20, 57):
            (pack,) = pack_rows([[*range(10, 10 + count)]], budget=1000)
            logp, _ = packed(model, pack, lambda h, head, p=pack: logp_of(h, head, p), compile_layers=True)
            expected, _ = packed(model, pack, lambda h, head, p=pack: logp_of(h, head, p), compile_layers=False)
            torch.testing.assert_close(logp, expected)
            logp.sum().backward()

    a_step_of_each_size()
    assert len(made) == 1
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = lambda call, *args: checkpoint(call, *args, use_reentrant=True)
    with torch._dynamo.config.patch(recompile_limit=1):  # the backward pass has a limit of its own
        a_step_of_each_size()
    assert len(made) == 1 + 2


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_computed_again_is_in_the_backwards_graph(monkeypatch, checkpointing):
    """Without the product that nothing needs, and without a hook for each tensor that a layer keeps."""
    products: list[int] = []

    def count(graph, _):
        products.append(sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    count_graphs(monkeypatch, aot_autograd(fw_compiler=count, bw_compiler=count))
    model = tiny("llama", num_hidden_layers=2).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    (pack,) = pack_rows([[*range(10, 50)]], budget=1000)
    for hook in (torch.utils.checkpoint._checkpoint_hook, None):  # which the compiler alone asks for, once
        monkeypatch.setattr("torch.utils.checkpoint._checkpoint_hook", hook)
        logp, _ = packed(model, pack, lambda h, head: logp_of(h, head, pack), compile_layers=True)
        logp.sum().backward()
    assert products == [7, 2 * 7 + (6 if checkpointing else 0)]  # q, k, v, o, gate, up, down


@pytest.mark.slow
def test_dropout_that_is_computed_again_in_a_graph_is_the_same(monkeypatch):
    """A layer's output is linear in the last LoRA's B: Σ B·dB = Σ g·(y - y without it), if the mask is one."""
    peft = pytest.importorskip("peft")
    count_graphs(monkeypatch)
    config = peft.LoraConfig(target_modules=["down_proj"], r=4, init_lora_weights=False, lora_dropout=0.5)
    model = peft.get_peft_model(tiny("llama", num_hidden_layers=1), config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    (pack,) = pack_rows([[*range(10, 50)]], budget=1000)
    seen: list[Tensor] = []
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    packed(model, pack, lambda hidden, head: hidden, compile_layers=True)
    output = seen[-1]
    with torch.no_grad(), model.disable_adapter():
        packed(model, pack, lambda hidden, head: hidden, compile_layers=True)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    weight = layer.mlp.down_proj.lora_B["default"].weight
    expected = (gradient * (output - seen[-1])).double().sum()
    assert expected.abs() > 0.1
    torch.testing.assert_close((weight * weight.grad).double().sum(), expected, rtol=1e-4, atol=1e-3)


def test_layers_with_a_forward_of_their_own_are_not_compiled(monkeypatch):
    made, model = count_graphs(monkeypatch), tiny("llama")
    expected = logp_packed(model, some_pack())
    layer = model.model.layers[1]
    layer.forward = layer.forward  # as a hook of accelerate's
    with pytest.raises(ModelError, match=r"^compile_layers: LlamaForCausalLM: expected layers with their class's"):
        packed(model, some_pack(), lambda hidden, head: hidden, compile_layers=True)
    with pytest.warns(UserWarning, match="^LlamaForCausalLM: layers run as they are, not compiled: compile_layers: "):
        logp, _ = packed(model, some_pack(), lambda h, head: logp_of(h, head, some_pack()), compile_layers=None)
    assert logp.equal(expected) and not made


def test_the_layers_of_an_image_tower_are_not_the_decoders():
    pytest.importorskip("trl")
    if pytest.importorskip("transformers").__version__ < "5":
        pytest.skip("the tiny models of images are of transformers 5")
    from tests.support.vlm_tiny import qwen2_vl

    model = qwen2_vl()
    tower = next(m for n, m in model.named_modules() if n.endswith("visual.blocks"))
    count = model.config.get_text_config().num_hidden_layers
    tower.extend([nn.Identity() for _ in range(count - len(tower))])
    del tower[count:]
    assert len(tower) == count and {type(one).__name__ for one in layers._decoder_layers(model)} == {
        "Qwen2VLDecoderLayer"
    }


def test_layers_that_fall_back_to_eager_raise(monkeypatch):
    count_graphs(monkeypatch)
    monkeypatch.setattr(layers, "GRAPHS", 1)
    model = tiny("llama")
    with pytest.raises(ModelError, match=r"^compile_layers: LlamaDecoderLayer: \w+: .*recompile") as no:
        step(model, 0, True)  # with gradients and without
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("graph", ["forward", "forward with gradients", "backward"])
def test_by_default_layers_that_do_not_compile_run_as_they_are(monkeypatch, graph):
    """That is said once, and not tried again: also of the graph of a backward pass, before there is one."""
    if graph == "backward" and not hasattr(layers.functorch, layers.AT_ONCE):
        pytest.skip("this PyTorch compiles it in the backward pass")
    pack, tried = some_pack(), []

    def function(hidden, head):
        return logp_of(hidden, head, pack)

    def failing(graph, inputs):
        tried.append(graph)
        raise RuntimeError("no compiler")

    of_gradients = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=failing)
    count_graphs(monkeypatch, of_gradients if graph == "backward" else failing)
    model = tiny("llama")
    expected = packed(model, pack, function, compile_layers=False)[0]
    with torch.set_grad_enabled(graph != "forward"):
        with pytest.warns(UserWarning, match="layers run as they are, not compiled: .*no compiler") as said:
            logp = packed(model, pack, function)[0]
        again = packed(model, pack, function)[0]
    assert len(tried) == 1 and len(said) == 1 and logp.equal(expected) and again.equal(expected)
    with pytest.raises(ModelError, match="no compiler"), torch.set_grad_enabled(graph != "forward"):
        packed(model, pack, function, compile_layers=True)


def test_copies_and_pickles_of_compiled_layers_are_of_the_models_own_class(monkeypatch):
    count_graphs(monkeypatch)
    model = tiny("llama")
    own = type(model.model.layers[0])
    step(model, 0, True)
    assert type(model.model.layers[0]) is not own and type(model.model.layers[0]).__name__ == own.__name__
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.model.layers[0]) is own
        with torch.no_grad():
            next(other.parameters()).mul_(2)
            assert not logp_packed(other, some_pack()).equal(logp_packed(model, some_pack()))
    torch.testing.assert_close(step(copy.deepcopy(model), 0, True)[0], step(model, 0, False)[0])


def some_pack(rows: list[list[int]] | None = None, targets: list[list[bool]] | None = None) -> Pack:
    if rows is None:
        rows, targets = group_rows()
    (pack,) = pack_rows(rows, budget=1000, targets=targets)
    return pack


# ---------------------------------------------------------------------------------------------------------- on a GPU

# By name: what takes each way there. Heads of 16, which flex_attention asks for.
ON_GPU = {
    **{name: (kind, {**settings, "head_dim": 16}) for name, (kind, settings) in MODELS.items()},
    "softcaps, by blocks": (
        "gemma2",
        {
            "sliding_window": 6,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
            "head_dim": 16,
            "attn_implementation": "flex_attention",
        },
    ),
    "sinks, by blocks": (
        "gpt_oss",
        {"sliding_window": 6, "num_local_experts": 4, "head_dim": 16, "attn_implementation": "flex_attention"},
    ),
    "a dense mask": ("qwen3", {"head_dim": 16, "attn_implementation": "eager"}),
}


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def on_device(model: nn.Module, compile_layers: bool, pack: Pack | None = None) -> tuple[Tensor, Tensor]:
    """(log p, gradient of its sum) over a pack."""
    pack = pack or some_pack()
    logp, _ = packed(
        model, pack, lambda hidden, head: linear_logp(hidden, head, pack.target_ids.to(hidden.device)),
        compile_layers=compile_layers,
    )  # fmt: skip
    logp.sum().backward()
    return logp.detach().cpu(), torch.cat([one.flatten().cpu().float() for one in gradients(model).values()])


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("name", "autocast"),
    [(name, autocast) for name in ON_GPU for autocast in (False, True) if not (autocast and "blocks" in name)],
)
def test_on_a_gpu_a_pack_is_off_by_what_the_rows_alone_are(name, autocast):
    """log p and gradients in bfloat16, against float32: four times the rows' own rounding at most."""
    model_type, settings = ON_GPU[name]
    model = tiny(model_type, **settings).to(torch.bfloat16).float()
    reference = copy.deepcopy(model)
    if settings.get("attn_implementation") == "flex_attention":
        reference.set_attn_implementation("eager")
    rows, targets = group_rows()
    if "blocks" in name:  # PyTorch 2.11 has no kernel for fewer queries than a block's, more than one to a key's head
        rows, targets = (one + more for one, more in zip((rows, targets), group_rows(1), strict=True))
    expected = logp_alone(reference, rows, targets)
    expected.sum().backward()
    wanted = torch.cat([one.flatten() for one in gradients(reference).values()])
    model = model.cuda() if autocast else model.to("cuda", torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        fast = fast_road(model)
        assert (fast is None) == ("attn_implementation" in settings)
        with torch.device("cuda"):
            alone = logp_alone(model, rows, targets)
        alone.sum().backward()
        own = torch.cat([one.flatten().cpu().float() for one in gradients(model).values()])
        found, gradient = on_device(model, False, some_pack(rows, targets))
    assert rms(found - expected) <= 4 * rms(alone.detach().cpu() - expected)
    assert rms(gradient - wanted) <= 4 * rms(own - wanted)


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu_compiled_layers_are_the_same_and_compiled_once(checkpointing):
    from torch._dynamo.utils import counters

    model = tiny("qwen3", head_dim=16).to("cuda", torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected, wanted = on_device(model, False)
    reference, exact = on_device(tiny("qwen3", head_dim=16).to(torch.bfloat16).to("cuda", torch.float32), False)
    found, gradient = on_device(model, True)
    assert rms(found - reference) <= 4 * rms(expected - reference)
    assert rms(gradient - exact) <= 4 * rms(wanted - exact)
    made = counters["stats"]["unique_graphs"]
    for seed in range(1, 5):
        rows, targets = group_rows(seed)
        (pack,) = pack_rows(rows[: 8 - seed], budget=1000, targets=targets[: 8 - seed])
        packed(model, pack, lambda hidden, head: hidden.float().sum(), compile_layers=True)[0].backward()
    assert counters["stats"]["unique_graphs"] == made
