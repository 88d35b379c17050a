"""Rows as a prefix tree, a model's forward over it, and the proof that each row is what it is alone."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import re
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from egrsd_kernels import VocabularyStatistics, head_of, linear_logp, token_statistics
from egrsd_kernels.models import ModelError
from egrsd_kernels.packing import Pack, attention, pack_responses, pack_rows, packed, proof, read_packs
from egrsd_kernels.packing.proof import fast_road, row_limit
from egrsd_kernels.packing.varlen import attend
from tests.support.packing import (
    BUDGETS,
    Float64,
    check_same_in_float64,
    gradients,
    group_rows,
    logp_alone,
    logp_of,
    logp_packed,
    logp_padded,
    sum_experts_one_by_one,
    tiny,
)
from tests.support.tree_attention import on_cpus


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices of 32 columns gain nothing from more, and wait for them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -------------------------------------------------------------------------------------------------------------- trees

# Few ids, so that rows share prefixes to every depth, are prefixes of one another, and are equal.
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=14)
FAR_IDS = st.sampled_from([0, 255, 256, 2**31, 2**62])  # whose bytes sort otherwise in the other order


def prefixes(rows: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(row[: n + 1]) for row in rows for n in range(len(row))}


def check(packs: list[Pack], rows: list[list[int]], budget: int) -> None:
    """All that a list of packs promises, by the prefixes that its tokens end."""
    assert sorted(row for pack in packs for row in pack.rows) == list(range(len(rows)))
    for pack in packs:
        mine = [rows[row] for row in pack.rows]
        ids = pack.input_ids.tolist()
        # Each row comes back, and each prefix is there once.
        for row, places in zip(mine, pack.places, strict=True):
            assert pack.input_ids[places].tolist() == row
            assert pack.position_ids[places].tolist() == list(range(len(row)))
        ending = {}
        for row, places in zip(mine, pack.places, strict=True):
            for n, place in enumerate(places.tolist()):
                assert ending.setdefault(place, tuple(row[: n + 1])) == tuple(row[: n + 1])
        assert len(pack) == len(ids) == len(ending) == len(prefixes(mine))
        # Within the budget, or a single row with what costs nothing beside it.
        longest = max(mine, key=len)
        assert len(pack) <= budget or all(row == longest[: len(row)] for row in mine)
        # A token sees the prefixes of what it ends, and nothing else.
        index = torch.arange(len(pack))
        seen = (index <= index[:, None]) & (index[:, None] < pack.ends)
        for query in range(len(pack)):
            assert seen[query].nonzero()[:, 0].tolist() == sorted(
                key for key in ending if ending[key] == ending[query][: len(ending[key])]
            )
        # So say the segments and their paths.
        assert [s.start for s in pack.segments] == [0, *torch.tensor([s.length for s in pack.segments]).cumsum(0)[:-1]]
        for number, segment in enumerate(pack.segments):
            last = segment.start + segment.length - 1
            path = [pack.segments[one] for one in pack.path(number)]
            assert path[-1] == segment
            assert [t for s in path for t in range(s.start, s.start + s.length)] == seen[last].nonzero()[:, 0].tolist()
            assert int(pack.ends[segment.start]) == int(pack.ends[last])  # no branch within


@settings(max_examples=150, deadline=None)
@given(rows=ROWS, budget=st.integers(1, 60))
def test_each_prefix_stands_once_and_every_row_comes_back(rows, budget):
    packs = pack_rows(rows, budget=budget)
    check(packs, rows, budget)
    # A tree that the budget holds is in one pack.
    for first in {row[0] for row in rows}:
        tree = [number for number, row in enumerate(rows) if row[0] == first]
        if len(prefixes([rows[number] for number in tree])) <= budget:
            assert len([pack for pack in packs if {*tree} & {*pack.rows}]) == 1


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(FAR_IDS, min_size=1, max_size=6), min_size=1, max_size=8))
def test_ids_of_any_size(rows):
    check(pack_rows(rows, budget=1000), rows, 1000)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), rows=ROWS, budget=st.integers(1, 60))
def test_targets_are_read_at_the_token_before_each(data, rows, budget):
    targets = [[False, *(data.draw(st.booleans()) for _ in row[1:])] for row in rows]
    found, everything = [], [(r, p) for r, row in enumerate(targets) for p, asked in enumerate(row) if asked]
    for pack in pack_rows(rows, budget=budget, targets=targets):
        assert pack.target_rows.tolist() == sorted(pack.target_rows.tolist())
        for row, position, token, hidden in zip(
            pack.target_rows.tolist(),
            pack.target_positions.tolist(),
            pack.target_ids.tolist(),
            pack.hidden_index.tolist(),
            strict=True,
        ):
            assert token == rows[row][position]
            assert hidden == pack.places[pack.rows.index(row)][position - 1]
            found.append((row, position))
        numbers = pack.target_numbers.tolist()
        pairs = zip(pack.target_rows.tolist(), pack.target_positions.tolist(), strict=True)
        assert [everything[number] for number in numbers] == [*pairs]
        cuts = pack.cu_seqlens.tolist()
        assert [len({*pack.target_rows[a:b].tolist()}) for a, b in pairwise(cuts)] == [1] * (len(cuts) - 1)
        assert cuts[0] == 0 and cuts[-1] == len(numbers) and len(cuts) - 1 == len({*pack.target_rows.tolist()})
    assert sorted(found) == everything


@settings(max_examples=50, deadline=None)
@given(data=st.data(), rows=ROWS)
def test_padded_rows_are_the_same_rows(data, rows):
    width = max(map(len, rows)) + data.draw(st.integers(0, 3))
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        left = data.draw(st.integers(0, width - len(row)))
        ids[number, left : left + len(row)] = torch.tensor(row)
        mask[number, left : left + len(row)] = True
    found, expected = pack_rows(ids, budget=30, mask=mask.long()), pack_rows(rows, budget=30)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.rows == other.rows and one.segments == other.segments
        for name in ("input_ids", "position_ids", "target_rows", "target_positions", "target_ids", "hidden_index"):
            assert getattr(one, name).equal(getattr(other, name)), name


def test_one_hidden_state_predicts_every_branch():
    (pack,) = pack_rows([[5, 6, 7], [5, 6, 8], [5, 6]], budget=10, targets=[[0, 0, 1], [0, 0, 1], [0, 0]])
    assert pack.hidden_index.tolist() == [1, 1]
    assert pack.target_ids.tolist() == [7, 8]
    assert pack.target_rows.tolist() == [0, 1]


def test_a_pack_moves_as_a_whole():
    (pack,) = pack_rows([[5, 6, 7], [5, 8]], budget=10)
    moved = pack.to("meta")
    assert (moved.rows, moved.segments) == (pack.rows, pack.segments)
    tensors = [value for value in (*vars(moved).values(), *moved.places) if isinstance(value, Tensor)]
    assert len(tensors) == 10 and all(tensor.is_meta for tensor in tensors) and moved.targets == 3


def test_a_tree_above_the_budget_is_cut_where_its_rows_share_least():
    system, one, two = [1] * 10, [2] * 10, [3] * 10
    rows = [[*system, *prompt, answer] for answer in range(4, 8) for prompt in (one, two)]
    packs = pack_rows(rows, budget=30)
    assert [len(pack) for pack in packs] == [24, 24]
    assert [pack.rows for pack in packs] == [(0, 2, 4, 6), (1, 3, 5, 7)]


def test_parts_of_a_cut_tree_that_meet_in_a_pack_share_again():
    # 1 1 and its longest branch fill a pack; the branches on its either side find room together.
    rows = [[1, 1, 0, 0], [1, 1, *[1] * 20], [1, 1, 2, 2]]
    packs = pack_rows(rows, budget=22)
    assert [(pack.rows, len(pack)) for pack in packs] == [((1,), 22), ((0, 2), 6)]


def test_packs_are_filled_by_the_largest_first():
    rows = [[number] * length for number, length in enumerate([4, 7, 3, 6])]
    assert [pack.rows for pack in pack_rows(rows, budget=10)] == [(1, 2), (0, 3)]


def test_a_row_longer_than_the_budget_is_a_pack_alone():
    rows = [[1] * 9, [2, 2], [1] * 9, [1] * 4, [1, 2]]
    packs = pack_rows(rows, budget=5)
    assert [(pack.rows, len(pack)) for pack in packs] == [((0, 2, 3), 9), ((1, 4), 4)]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, "rows: expected at least one"),
        ([[1], []], {}, "rows: row 1 has no token"),
        ([[1], [3, -2]], {}, "rows: row 1 has -2, expected integers of at least 0"),
        (torch.tensor([[1, 2], [3, -2]]), {}, "rows: row 1 has -2, expected integers of at least 0"),
        ([[1.5]], {}, "rows: row 0: expected integers"),
        ([[1]], {"budget": 0}, "budget: expected a number of tokens of at least 1, got 0"),
        ([[1, 2]], {"targets": [[0, 1], [0]]}, "targets: expected one entry for each of 1 rows, got 2"),
        ([[1, 2]], {"targets": [[0]]}, "targets: row 0 has 2 tokens, got 1 entries"),
        ([[1, 2]], {"targets": [[1, 1]]}, "targets: row 0 asks for its first token, which nothing predicts"),
        ([[1, 2]], {"mask": torch.ones(1, 2)}, "mask: expected none for rows that are not padded"),
        (torch.ones(2, 2), {}, r"rows: expected \(B, L\) integers, got \(2, 2\) torch.float32"),
        (torch.ones(2, 2).long(), {"mask": torch.ones(2, 3)}, r"mask: expected \(2, 2\) as the rows, got \(2, 3\)"),
        (
            torch.ones(1, 3).long(),
            {"mask": torch.tensor([[0, 1, 1]]), "targets": torch.tensor([[1, 0, 1]])},
            "targets: 1 of them are masked",
        ),
    ],
)
def test_what_is_no_rows_is_said_in_a_line(rows, options, words):
    with pytest.raises((TypeError, ValueError), match=f"^{words}") as error:
        pack_rows(rows, **{"budget": 10, **options})
    assert "\n" not in str(error.value)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), budget=st.integers(1, 40))
def test_responses_are_targets_in_one_order_behind_any_prompts(data, budget):
    count = data.draw(st.integers(1, 6))
    prompts = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=count, max_size=count))
    responses = data.draw(st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=count, max_size=count))
    tokens = [(row, token) for row, response in enumerate(responses) for token in response]
    if not tokens:
        with pytest.raises(
            ValueError, match=rf"^responses: expected a token in one of them .* got {count} empty ones$"
        ):
            pack_responses(prompts, responses, budget=budget)
        return
    packs = pack_responses(prompts, [torch.tensor(one, dtype=torch.int64) for one in responses], budget=budget)
    assert sorted(row for pack in packs for row in pack.rows) == sorted({row for row, _ in tokens})
    found = {}
    for pack in packs:
        for row, places in zip(pack.rows, pack.places, strict=True):
            assert pack.input_ids[places].tolist() == prompts[row] + responses[row]
        pairs = zip(pack.target_rows.tolist(), pack.target_ids.tolist(), strict=True)
        found |= dict(zip(pack.target_numbers.tolist(), pairs, strict=True))
    assert [found[number] for number in range(len(found))] == tokens


@pytest.mark.parametrize(
    ("prompts", "responses", "words"),
    [
        ([[1]], [[2], [3]], "responses: expected one for each of 1 prompts, got 2"),
        ([[1], []], [[2], [3]], "prompts: row 1 has no token, expected one that predicts the response's first"),
        ([[1.0]], [[2]], "prompts: row 0: expected integers"),
        ([[1]], [["a"]], "responses: row 0: expected integers"),
        ([[1, 2], [1, -2]], [[], [3]], "prompts: row 1 has -2, expected integers of at least 0"),
        ([[1, 2], [1, 2]], [[], [-3, 4]], "responses: row 1 has -3, expected integers of at least 0"),
        (
            torch.ones(1, 3).long(),
            [[2]],
            r"prompts: expected a sequence of rows without padding, got a \(1, 3\) tensor",
        ),
        ([[1]], torch.ones(1, 3).long(), r"responses: expected a sequence of rows without padding, got a \(1, 3\) t"),
        ([], [], "responses: expected a token in one of them at least, got 0 empty ones"),
    ],
)
def test_what_is_no_responses_is_said_in_a_line(prompts, responses, words):
    with pytest.raises((TypeError, ValueError), match=f"^{words}") as error:
        pack_responses(prompts, responses, budget=10)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- over a model

# By name: the model type and its settings; windows and chunks are shorter than the rows.
MODELS = {
    "llama": ("llama", {}),
    "llama, eager": ("llama", {"attn_implementation": "eager"}),
    "a window in each layer": ("mistral", {"sliding_window": 6}),
    "a window in some layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "windows and softcaps": (
        "gemma2",
        {"sliding_window": 6, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    ),
    "two ropes": ("gemma3_text", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "chunks": (
        "llama4_text",
        {
            "attention_chunk_size": 7,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "attn_temperature_tuning": False,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
        },
    ),
    "sinks": ("gpt_oss", {"sliding_window": 6, "num_local_experts": 4}),
    "learned positions": ("gpt2", {}),
}


def check_same(model: nn.Module) -> None:
    """log p over packs is that of the rows alone to 1e-12 nat, and every gradient to 1e-12 of the whole one's size."""
    row_limit(model)  # the proof is in float32
    with Float64():
        check_same_in_float64(model)


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_pack_are_what_each_is_alone(name):
    model_type, settings_ = MODELS[name]
    check_same(tiny(model_type, **settings_).double())


def test_the_rows_of_a_group_are_one_pack_and_several():
    rows, targets = group_rows()
    assert [len(pack_rows(rows, budget=budget, targets=targets)) > 1 for budget in BUDGETS] == [False, True]


# (which earlier row a row goes on from, how much of it, further ids): every depth, equal rows, rows within rows.
BRANCHES = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 24), st.lists(st.integers(10, 13), max_size=9)), min_size=1, max_size=8
)


@functools.cache
def doubled(name: str) -> nn.Module:
    model_type, settings_ = MODELS[name]
    model = tiny(model_type, **settings_)
    row_limit(model)
    return model.double()


@pytest.mark.parametrize("name", ["llama", "a window in each layer"])
def test_rows_of_any_tree_are_what_each_is_alone(name):
    asked = []

    @settings(max_examples=40, deadline=None)
    @given(data=st.data(), branches=BRANCHES, budget=st.integers(1, 40), seed=st.integers(0, 9))
    def check_tree(data, branches, budget, seed):
        rows: list[list[int]] = []
        for parent, length, ids in branches:
            trunk = rows[parent % len(rows)][:length] if rows else []
            rows.append([*trunk, *ids] or [10])
        targets = []
        for row in rows:
            prompt = data.draw(st.sampled_from([1, len(row)]) | st.integers(1, len(row)))
            tools = data.draw(st.integers(0, 2 ** (len(row) - prompt) - 1))  # a bit for each token of the response
            targets.append([n >= prompt and not tools >> (n - prompt) & 1 for n in range(len(row))])
        with Float64():
            check_same_in_float64(doubled(name), rows, targets, budgets=(1000, budget), seed=seed)
        asked.append(sum(map(sum, targets)))

    check_tree()
    assert max(asked) > 0


@pytest.mark.parametrize("name", ["llama", "a window in each layer"])
def test_a_tree_with_all_of_it(name):
    """Prompts of one token, two prompts that begin alike, a tool's answer, an empty response, equal rows."""
    one, two = [10, *[11] * 7], [10, *[11] * 5, 12, 12]
    responses = [(one, [13] * 9), (one, [13] * 9), (one, []), (two, [13, 14] * 5), ([10], [11] * 3), ([15], [16] * 8)]
    rows = [prompt + response for prompt, response in responses]
    targets = [[False] * len(prompt) + [n % 5 != 3 for n in range(len(response))] for prompt, response in responses]
    with Float64():
        check_same_in_float64(doubled(name), rows, targets, budgets=(1000, 20, 1))


@pytest.mark.parametrize("name", MODELS)
def test_float32_is_as_near_to_float64_in_packs_as_it_is_padded(name):
    """Sums in another order are rounded otherwise, and no more: twice as far would be something else."""
    model_type, settings_ = MODELS[name]
    rows, targets = group_rows()
    model = tiny(model_type, **settings_)
    exact = copy.deepcopy(model).double()
    weights = torch.randn(sum(map(sum, targets)), generator=torch.Generator().manual_seed(0))
    with Float64():
        expected = logp_alone(exact, rows, targets)
    (weights * expected).sum().backward()
    wanted = gradients(exact)
    assert expected.dtype == torch.float64

    def off(logp: Tensor) -> Tensor:
        """(2,): how far log p and all gradients are from float64's."""
        found = gradients(model)
        assert logp.dtype == torch.float32 and found.keys() == wanted.keys()
        apart = torch.stack([(found[one] - gradient).norm() for one, gradient in wanted.items()])
        return torch.stack([(logp - expected).norm(), apart.norm()]).detach()

    padded = logp_padded(model, rows, targets)
    (weights * padded).sum().backward()
    allowed = 2 * off(padded)
    for budget in BUDGETS:
        found = torch.full_like(padded, torch.nan)
        for pack in pack_rows(rows, budget=budget, targets=targets):
            logp = logp_packed(model, pack)
            (weights[pack.target_numbers] * logp).sum().backward()
            found[pack.target_numbers] = logp.detach()
        apart = off(found)
        assert (apart <= allowed).all(), (apart, allowed)


LAYERS = ["q_proj", "v_proj", "up_proj"]
# Configs of PEFT's, by name: those that give a token what it gets in any row, and those that read the row.
ADAPTERS = {
    "LoRA": ("LoraConfig", {"target_modules": LAYERS, "r": 4}),
    "DoRA": ("LoraConfig", {"target_modules": LAYERS, "r": 4, "use_dora": True}),
    "rsLoRA, its bias, one layer": (
        "LoraConfig",
        {"target_modules": LAYERS, "use_rslora": True, "lora_bias": True, "layers_to_transform": [1]},
    ),
    "LoRA of the embedding": ("LoraConfig", {"target_modules": ["embed_tokens", "o_proj"], "r": 4}),
    "PiSSA": ("LoraConfig", {"target_modules": LAYERS, "r": 2, "init_lora_weights": "pissa"}),
    "modules_to_save": ("LoraConfig", {"target_modules": LAYERS, "modules_to_save": ["lm_head"]}),
    "tokens": ("LoraConfig", {"target_modules": LAYERS, "trainable_token_indices": [20, 50]}),
    "tokens alone": ("TrainableTokensConfig", {"token_indices": [20, 50]}),
    "AdaLoRA": ("AdaLoraConfig", {"target_modules": LAYERS, "total_step": 100}),
    "IA3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "VeRA": ("VeraConfig", {"target_modules": ["q_proj", "o_proj"], "r": 8}),
    "LoHa": ("LoHaConfig", {"target_modules": LAYERS, "r": 4}),
    "LoKr": ("LoKrConfig", {"target_modules": LAYERS, "r": 4}),
    "OFT": ("OFTConfig", {"target_modules": LAYERS, "oft_block_size": 8}),
    "norms": ("LNTuningConfig", {"target_modules": ["norm"]}),
    "LLaMA-Adapter": ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 1}),
}
READ_THE_ROW = {
    "aLoRA": ("LoraConfig", {"target_modules": ["q_proj"], "alora_invocation_tokens": [85, 86]}),
    "PROMPT_TUNING": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "PREFIX_TUNING": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "P_TUNING": ("PromptEncoderConfig", {"num_virtual_tokens": 3}),
}


def config_of(name: str) -> object:
    peft = pytest.importorskip("peft")
    class_name, settings_ = {**ADAPTERS, **READ_THE_ROW}[name]
    config = getattr(peft, class_name)
    if missing := {*settings_} - {*config.__dataclass_fields__}:
        pytest.skip(f"this PEFT has no {min(missing)}")
    return config(task_type="CAUSAL_LM", **settings_)


def adapted(*names: str, model_type: str = "qwen3") -> nn.Module:
    """A model with adapters that change something, all of them active."""
    peft = pytest.importorskip("peft")
    first, *others = (config_of(name) for name in names)
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny(model_type), first, adapter_name=names[0])
    for name, config in zip(names[1:], others, strict=True):
        model.add_adapter(name, config)
    if others:
        model.base_model.set_adapter([*names])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.heavy
@pytest.mark.parametrize("names", [*ADAPTERS, "LoRA and DoRA"])
def test_adapters_learn_from_a_pack_what_they_learn_from_rows(names):
    model = adapted(*names.split(" and "), model_type="llama" if names == "LLaMA-Adapter" else "qwen3")
    assert row_limit(model) == math.inf
    check_same(model.double())


@pytest.mark.parametrize("name", READ_THE_ROW)
def test_adapters_that_read_the_row_are_refused(name):
    why = (
        "log p of a row in a pack is off by" if name == "aLoRA" else "its layers attend to 103 keys where the pack has"
    )
    with pytest.raises(ModelError, match=f"^model: Qwen3ForCausalLM with {name}: {why}") as no:
        row_limit(adapted(name))
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("name", ["DoRA", "aLoRA"])
def test_adapters_are_proved_by_segments_as_well(name):
    with on_cpus(), pytest.raises(ModelError, match="off by") if name == "aLoRA" else contextlib.nullcontext():
        assert fast_road(adapted(name)) is attention.by_segments


def test_adapters_stay_in_the_dtype_that_peft_keeps_them_in(monkeypatch):
    model, dtypes = adapted("LoRA").bfloat16(), set()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    use = proof._use
    seen = lambda small, name: dtypes.update((p.dtype, "lora_" in n) for n, p in small.named_parameters())  # noqa: E731
    monkeypatch.setattr(proof, "_use", lambda *given: (seen(*given), use(*given)))
    with on_cpus():
        assert fast_road(model) is attention.by_segments
    assert dtypes == {(torch.bfloat16, False), (torch.float32, True)}


def test_what_has_no_product_in_16_bits_takes_a_dense_mask(monkeypatch):
    model = tiny("qwen3").bfloat16()
    layer, before = type(model.model.layers[0].mlp), type(model.model.layers[0].mlp).forward

    def forward(self, hidden):
        if hidden.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return before(self, hidden)

    monkeypatch.setattr(layer, "forward", forward)
    with on_cpus(), pytest.warns(UserWarning, match="^Qwen3ForCausalLM: packs take a dense mask.* 'BFloat16'$"):
        assert fast_road(model) is None


def test_adapters_are_proved_as_they_are_active(monkeypatch):
    made = []
    prove = proof._prove
    monkeypatch.setattr(proof, "_prove", lambda *given: made.append(given) or prove(*given))
    model = adapted("LoRA")
    model.add_adapter("other", config_of("aLoRA"))
    for _ in range(2):
        assert row_limit(model) == math.inf
    assert row_limit(copy.deepcopy(model)) == math.inf and len(made) == 1
    model.set_adapter("other")
    with pytest.raises(ModelError, match=r"^model: Qwen3ForCausalLM with LORA, aLoRA: log p of a row in a pack is off"):
        row_limit(model)
    model.set_adapter("LoRA")
    assert row_limit(model) == math.inf and len(made) == 2
    bare = model.get_base_model()  # who calls it has adapters in its layers, and none of what is around them
    assert row_limit(bare) == math.inf and len(made) == 3


def test_adapters_that_no_small_model_can_have_are_refused(tmp_path):
    """X-LoRA's experts are files of the real model's sizes."""
    peft = pytest.importorskip("peft")
    adapted("LoRA").save_pretrained(tmp_path)
    experts = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={"0": str(tmp_path / "LoRA")})
    model = peft.get_peft_model(tiny("qwen3", use_cache=False), experts)
    with pytest.raises(
        ModelError, match=r"with XLORA, LORA: .* for want of a small model of its class with its ad"
    ) as no:
        row_limit(model)
    assert "\n" not in str(no.value) and len(str(no.value)) < 500
    twice = peft.get_peft_model(peft.inject_adapter_in_model(config_of("LoRA"), tiny("qwen3")), config_of("P_TUNING"))
    with pytest.raises(
        ModelError, match=r"packing expects PEFT adapters of one wrapper, got adapters within adapters$"
    ):
        row_limit(twice)


def test_a_model_that_is_as_small_as_it_can_be_is_proved_with_adapters_of_its_width():
    peft = pytest.importorskip("peft")
    config = peft.VBLoRAConfig(target_modules=["q_proj"], num_vectors=8, vector_length=32)
    assert row_limit(peft.get_peft_model(tiny("qwen3"), config)) == math.inf


def test_a_model_whose_width_is_tied_is_proved_with_all_its_layers(monkeypatch):
    """A smaller one can be built, and has not all of its classes."""
    model = tiny("llama", num_hidden_layers=4)
    kind = type(model)
    own = kind.__init__

    class Last(type(model.model.layers[3].mlp)):
        pass

    def init(self, config):
        if config.hidden_size != 32:
            raise ValueError("hidden_size: expected 32")
        own(self, config)
        if len(self.model.layers) == 4:
            self.model.layers[3].mlp = Last(config)

    Last.__module__ = kind.__module__
    monkeypatch.setattr(kind, "__init__", init)
    assert row_limit(kind(model.config).eval()) == math.inf


def test_layers_that_have_lost_their_last_adapter_are_what_they_wrap():
    peft = pytest.importorskip("peft")
    model = peft.inject_adapter_in_model(config_of("LoRA"), tiny("qwen3"))
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.delete_adapter("default")
    del model.peft_config
    assert row_limit(model) == math.inf


def test_layers_that_are_computed_again_see_the_same():
    """Gradient checkpointing runs them once more in the backward pass, when no pack is in progress."""
    rows, targets = group_rows()
    (pack,) = pack_rows(rows, budget=1000, targets=targets)
    model = tiny("gemma3_text", sliding_window=6, layer_types=["sliding_attention", "full_attention"]).train()
    logp_packed(model, pack).sum().backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    logp_packed(model, pack).sum().backward()
    for name, gradient in gradients(model).items():
        assert gradient.equal(expected[name]), name


def test_the_loop_of_the_docstring():
    rows, targets = group_rows()
    model = tiny("llama").double()
    advantages = torch.randn(len(rows), dtype=torch.float64)
    tokens = sum(map(sum, targets))
    per_token = advantages.repeat_interleave(torch.tensor([sum(row) for row in targets]))
    (-(per_token * logp_alone(model, rows, targets)).sum() / tokens).backward()
    expected = gradients(model)
    width = max(map(len, rows))
    ids, mask, completion_mask = torch.zeros(3, len(rows), width, dtype=torch.int64)
    for number, (row, asked) in enumerate(zip(rows, targets, strict=True)):
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
        completion_mask[number, : len(row)] = torch.tensor(asked)
    for pack in pack_rows(ids, budget=45, mask=mask, targets=completion_mask):
        logp, _ = packed(model, pack, lambda hidden, head, pack=pack: logp_of(hidden, head, pack))
        loss = -(advantages[pack.target_rows] * logp).sum() / completion_mask.sum()
        loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=0, atol=1e-6
        )  # norms and their gradients are rounded to float32


def test_what_is_read_of_all_packs_is_in_the_order_of_the_rows():
    rows, targets = group_rows()
    model = tiny("llama")
    row_limit(model)
    model.double()
    packs = pack_rows(rows, budget=45, targets=targets)
    assert len(packs) > 1
    statistics = functools.partial(token_statistics, extras=("is_top1",), backend="torch")
    with Float64():
        expected = logp_alone(model, rows, targets)
        found = read_packs(model, packs[::-1], statistics)
        logp = read_packs(model, packs, functools.partial(linear_logp, backend="torch"))
        hidden, (first, nothing) = read_packs(model, packs, lambda hidden, head, ids: (hidden, (ids, None)))
    assert isinstance(found, VocabularyStatistics) and found.mean_logits is None and found.is_top1.any()
    torch.testing.assert_close(found.logp, expected.detach(), rtol=0, atol=1e-12)
    assert hidden.shape == (len(expected), 32) and nothing is None
    assert first.tolist() == [
        id_ for row, asked in zip(rows, targets, strict=True) for id_, one in zip(row, asked, strict=True) if one
    ]
    logp.square().sum().backward()
    got = gradients(model)
    expected.square().sum().backward()
    size = torch.stack([gradient.norm() for gradient in got.values()]).norm()
    for name, gradient in gradients(model).items():
        assert (got[name] - gradient).norm() <= 1e-12 * size, name
    without = [[pack for pack in packs if pack is not one] for one in packs]
    for wrong in (*without, [*packs, packs[0]], [*packs, *packs]):
        count = sum(len(pack.target_ids) for pack in wrong)
        words = f"each once, got {len(wrong)} with {count} targets where the call has {len(expected)}"
        with pytest.raises(ValueError, match=f"^packs: expected all of one call of pack_rows, {words}$"):
            read_packs(model, wrong, statistics)
    with pytest.raises(ValueError, match=r"^packs: expected all of one call of pack_rows, got none$"):
        read_packs(model, [], statistics)
    with pytest.raises(ValueError, match=r"^function: expected an entry for each of a pack's \d+ targets, got \(\)$"):
        read_packs(model, packs, lambda hidden, head, ids: hidden.sum())
    with pytest.raises(ModelError, match=r"^compile_layers: LlamaForCausalLM: expected a model on a GPU, in 16 bits"):
        read_packs(model, packs, statistics, compile_layers=True)


@pytest.mark.parametrize("by_segments", [False, True])
def test_packs_that_were_read_without_gradients_are_learned_from(by_segments):
    rows, targets = group_rows()
    model = tiny("qwen3")
    packs = pack_rows(rows, budget=45, targets=targets)
    with on_cpus() if by_segments else contextlib.nullcontext():
        with torch.inference_mode():
            read_packs(model, packs, functools.partial(linear_logp, backend="torch"))
        for pack in packs:
            assert not pack.ends.is_inference()
            logp_packed(model, pack).sum().backward()
        found = gradients(model)
        for pack in pack_rows(rows, budget=45, targets=targets):
            logp_packed(model, pack).sum().backward()
    for name, gradient in gradients(model).items():
        assert gradient.equal(found[name]), name


# ---------------------------------------------------------------------------------------------------------- the proof


@pytest.mark.parametrize("name", MODELS)
def test_a_mask_of_packed_indices_is_refused(name, monkeypatch):
    """What other packings do: the tree is right, and a window or chunk counts tokens."""
    model_type, settings_ = MODELS[name]
    model = tiny(model_type, **settings_)
    own = attention._mask

    def by_index(maker, /, **asked):
        pack = attention._current.pack
        if pack is None:
            return own(maker, **asked)
        sees, ends = asked["mask_function"], pack.ends

        def tree(batch, head, query, key):
            return (key <= query) & (query < ends[key]) & sees(batch, head, query, key)

        return maker(**{**asked, "mask_function": tree, "attention_mask": None, "allow_is_causal_skip": False})

    monkeypatch.setattr(attention, "_mask", by_index)
    reaches = {"sliding_window", "attention_chunk_size"} & {*settings_}
    if not reaches:
        assert row_limit(model) == math.inf
        return
    with pytest.raises(ModelError, match=rf"^model: {type(model).__name__}: log p of a row in a pack is off by ") as no:
        row_limit(model)
    assert float(re.search(r"off by (\S+) nat", str(no.value))[1]) > 1e-2


def test_a_model_that_sees_its_neighbours_is_refused():
    model = tiny("llama")
    (pack,) = pack_rows([[3, 4, 5], [3, 4, 6]], budget=9)

    def no_road(pack):  # a causal row: branches see one another
        return contextlib.nullcontext()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "ROADS", {"sdpa": no_road})
        with pytest.raises(ModelError, match=r"^model: LlamaForCausalLM: log p of a row in a pack is off by ") as no:
            packed(model, pack, lambda hidden, head: hidden)
    assert "\n" not in str(no.value)
    assert packed(model, pack, lambda hidden, head: hidden)[0].shape == (4, 32)  # nothing wrong was kept


@pytest.mark.parametrize("model_type", ["mamba", "bloom"])
def test_recurrent_layers_and_distances_by_index_are_refused(model_type):
    settings_ = {"state_size": 8} if model_type == "mamba" else {}
    with pytest.raises(ModelError, match=r"off by \S+ nat from the row alone where rounding allows"):
        row_limit(tiny(model_type, **settings_))


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 63),
        ({"rope_type": "linear", "factor": 2.0}, math.inf),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, math.inf),
    ],
)
def test_a_rope_that_depends_on_the_longest_row_has_a_limit(rope, limit):
    model = tiny("llama", rope_scaling=rope)
    assert row_limit(model) == limit
    rows = [[3, *[5] * 70], [3, *[4] * 9]]
    (pack,) = pack_rows(rows, budget=100)
    if limit == math.inf:
        packed(model, pack, lambda hidden, head: hidden)
        return
    (alone,) = pack_rows([[3, *[5] * 63]], budget=100)
    for one, length in ((pack, 71), (alone, 64)):  # a row of the limit would keep what a longer one has left behind
        with pytest.raises(ModelError, match=rf"rows up to 63 tokens can be packed, .* got one of {length}$"):
            packed(model, one, lambda hidden, head: hidden)
    targets = [[False] + [True] * 62]
    expected = logp_alone(model, [[3, *[5] * 62]], targets)
    model(input_ids=torch.tensor(rows[:1]))  # generation, say
    (short,) = pack_rows([[3, *[5] * 62]], budget=100, targets=targets)
    torch.testing.assert_close(logp_packed(model, short), expected, rtol=0, atol=1e-5)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [3.0, 6.0, 9.0, 12.0]}


@pytest.mark.parametrize("model_type", ["phi3", "llama"])
def test_a_longrope_packs_rows_on_its_short_side(model_type):
    """Rows of the limit and below are short, those above it long; unlike a dynamic rope, it keeps nothing."""
    model = tiny(model_type, rope_scaling={**LONGROPE}, original_max_position_embeddings=32)
    assert row_limit(model) == 32
    model.double()
    trunk = [3, *[4, 5] * 8]
    short = [[*trunk, *[6] * 15], [*trunk, *[7] * 9], trunk, [8] * 12]  # of the limit, and below
    long = [*trunk, *[9] * 16]
    assert (max(map(len, short)), len(long)) == (32, 33)

    def asked(rows: list[list[int]]) -> list[list[bool]]:
        return [[False] + [True] * (len(row) - 1) for row in rows]

    with Float64():
        for rows in (short, [long], short):
            check_same_in_float64(model, rows, asked(rows), budgets=(100,))
        # The sides differ.
        alone = logp_alone(model, [long[:32]], asked([long[:32]]))
        beside = logp_alone(model, [long], asked([long]))[:31]
        assert (alone - beside).abs().max() > 1e-2
    for rows in ([*short, long], [long, long[:-1]], [long, long]):
        (pack,) = pack_rows(rows, budget=100)
        words = r"rows up to 32 tokens can be packed, where its rope does not yet depend on the longest, got one of 33$"
        with pytest.raises(ModelError, match=words):
            packed(model, pack, lambda hidden, head: hidden)


def test_a_scale_that_counts_packed_tokens_is_refused():
    """Llama 4 scales queries by their place in the forward from floor_scale on, by default more than the probe has."""
    of_experts = {"attention_chunk_size": 500, "layer_types": ["full_attention"] * 2, "num_local_experts": 2}
    with pytest.raises(ModelError, match=r"off by \S+ nat from the row alone where rounding allows"):
        row_limit(tiny("llama4_text", **of_experts, no_rope_layers=[0, 1], intermediate_size_mlp=48, floor_scale=8192))


def test_blocks_of_keys_that_are_longer_than_the_probe_are_refused():
    """MiniMax M3 chooses 16 blocks of 128 packed tokens: all that a short pack has, and none of a long one's."""
    pytest.importorskip("transformers.models.minimax_m3_vl")
    sparse = {"layer_types": ["minimax_m3_sparse", "full_attention"], "index_n_heads": 2, "index_head_dim": 8}
    model = tiny("minimax_m3_vl_text", **sparse, num_local_experts=2, num_experts_per_tok=1, rotary_dim=8)
    assert (model.config.index_block_size, model.config.index_topk_blocks) == (128, 16)
    with pytest.raises(ModelError, match=r"off by \S+ nat from the row alone where rounding allows"):
        row_limit(model)


@pytest.mark.parametrize("wrong", [None, "no window", "no blocks"])
def test_the_blocks_of_flex_attention_are_proved(monkeypatch, wrong):
    pytest.importorskip("torch.nn.attention.flex_attention")
    own, tables = attention._blocks, attention._seen_blocks

    def windowless(pack, maker, asked, *size):
        return own(pack, maker, {**asked, "mask_function": lambda b, h, q, k: k <= q}, *size)

    def diagonal(ends, size):
        count, order = tables(ends, size)
        return torch.ones_like(count), torch.arange(order.shape[-1]).expand_as(order).mT.contiguous().int()

    if wrong == "no window":
        monkeypatch.setattr(attention, "_blocks", windowless)
    elif wrong == "no blocks":
        monkeypatch.setattr(attention, "_seen_blocks", diagonal)
    model = tiny("mistral", sliding_window=6, attn_implementation="flex_attention", head_dim=16)
    with pytest.raises(ModelError, match="off by") if wrong else contextlib.nullcontext():
        assert row_limit(model) == math.inf


@pytest.mark.parametrize("tokens", [127, 128, 129])
def test_blocks_of_packs_of_any_length(tokens):
    pytest.importorskip("torch.nn.attention.flex_attention")
    (pack,) = pack_rows([[1, *[2] * (tokens - 2)], [1, 3]], budget=200)
    asked = {"kv_length": tokens, "device": "cpu", "mask_function": lambda b, h, q, k: k <= q}
    blocks = attention._blocks(pack, None, asked)
    assert len(pack) == tokens and blocks.shape == (1, 1, tokens, tokens)
    index, none = torch.arange(tokens), torch.tensor(0)
    expected = (index <= index[:, None]) & (index[:, None] < pack.ends)
    assert blocks.mask_mod(none, none, index[:, None], index).equal(expected)
    assert blocks.to_dense()[0, 0].bool()[index[:, None] // 128, index // 128][expected].all()


def test_what_has_no_road_is_said_in_a_line():
    (pack,) = pack_rows([[3, 4]], budget=9)
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_4"
    words = (
        "model: LlamaForCausalLM: attn_implementation: packing expects one of eager, sdpa, flex_attention, "
        "flash_attention_2, flash_attention_3, got 'flash_attention_4'"
    )
    with pytest.raises(ModelError, match=f"^{words}$"):
        packed(model, pack, lambda hidden, head: hidden)
    with pytest.raises(ModelError, match=r"^model: Linear: packing expects a model of transformers$"):
        packed(nn.Linear(2, 2), pack, lambda hidden, head: hidden)


def test_the_proof_is_made_once_and_leaves_no_trace(monkeypatch):
    masking_utils = pytest.importorskip("transformers.masking_utils")
    registry = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    before, model = dict(registry), tiny("llama").train()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    (pack,) = pack_rows([[3, 4, 5], [3, 4, 6]], budget=9)
    made = []
    prove = proof._prove
    monkeypatch.setattr(proof, "_prove", lambda *given: made.append(given) or prove(*given))
    for _ in range(2):
        packed(model, pack, lambda hidden, head: hidden)
    assert len(made) == 1
    assert dict(registry) == before and not registry._local_mapping
    assert model.training and torch.get_rng_state().equal(state)
    assert all(p.equal(weights[name]) for name, p in model.named_parameters())
    packed(copy.deepcopy(model), pack, lambda hidden, head: hidden)
    assert len(made) == 1


@pytest.mark.parametrize(
    ("model_type", "settings", "lora_dropout", "expected"),
    [
        ("llama", {}, None, False),
        ("llama", {"attention_dropout": 0.1}, None, True),
        ("opt", {"ffn_dim": 64, "dropout": 0.3}, None, True),  # without a module
        ("opt", {"ffn_dim": 64, "dropout": 0.0}, None, False),
        ("llama", {}, 0.1, True),
    ],
)
def test_what_draws_in_training_is_seen_in_a_forward(model_type, settings, lora_dropout, expected):
    model = tiny(model_type, **settings)
    if lora_dropout is not None:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=lora_dropout))
    state = torch.get_rng_state()
    assert proof.draws(model) is expected and proof.draws(model) is expected
    assert torch.get_rng_state().equal(state)


def test_the_proof_leaves_random_numbers_of_all_devices_alone(monkeypatch):
    model, seeds = tiny("llama"), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    before = torch.get_rng_state()
    row_limit(model)
    assert not seeds and torch.get_rng_state().equal(before)


def test_other_forwards_are_none_of_the_packs():
    """Neither in the function at the head, nor in another thread while a pack's forward is in progress."""
    model, other = tiny("llama").double(), tiny("mistral", sliding_window=6).double()
    rows, targets = group_rows()
    (pack,) = pack_rows(rows, budget=1000, targets=targets)
    ids = torch.randint(10, 90, (1, len(pack)))  # as long as the pack: its mask would fit
    with torch.no_grad():
        expected, own = other(input_ids=ids).logits, logp_alone(model, rows, targets)
        found = []
        forward, entered, done = model.model.forward, threading.Event(), threading.Event()

        def slow(*args, **kwargs):
            out = forward(*args, **kwargs)
            entered.set()
            assert done.wait(300)
            return out

        def elsewhere():
            assert entered.wait(300)
            found.append(other(input_ids=ids).logits)
            done.set()

        def function(hidden, head):
            found.append(other(input_ids=ids).logits)
            return logp_of(hidden, head, pack)

        packed(model, pack, function)  # the proofs
        found.clear()
        model.model.forward = slow
        thread = threading.Thread(target=elsewhere)
        thread.start()
        logp, _ = packed(model, pack, function)
        thread.join()
    torch.testing.assert_close(logp, own, rtol=0, atol=1e-12)
    assert len(found) == 2 and all(logits.equal(expected) for logits in found)


# ---------------------------------------------------------------------------------------------------- by architecture

# As docs/models.md has them; and two whose heads are refused, which do not pack either.
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "models.json"
READ = [row for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if row["outcome"] == "right"]
PACKS = [(row["kind"], row["model_type"]) for row in READ if row["packs"]]
REFUSED = [(row["kind"], row["model_type"]) for row in READ if not row["packs"]]
REFUSED += [("vision-language", "paligemma"), ("causal", "xlnet")]


def built(kind: str, model_type: str) -> nn.Module:
    if pytest.importorskip("transformers").__version__ < "5":
        pytest.skip("fewer models ask the registry for their masks in transformers 4")
    models = pytest.importorskip("benchmarks.models")
    found = {(a.kind, a.model_type): a for a in models.architectures()}
    if (kind, model_type) not in found:
        pytest.skip(f"the installed transformers has no {kind} {model_type}")
    config = models.tiny_config(models.CONFIG_MAPPING[model_type])
    try:
        return models.build(found[kind, model_type].class_name, config)
    except Exception as failure:
        pytest.skip(f"cannot be built here: {failure}")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model_type"), PACKS)
def test_architectures_that_pack(kind, model_type):
    """The proof of a small model holds for another one of its class: four layers, other weights, other rows.

    In float64 to 1e-12, gradients included. In float32, with experts as they are by default, packs may be twice as far
    from it as the rows alone are.
    """
    model = built(kind, model_type)
    rows, targets = group_rows(seed=1)
    rows = [[id_ % 65 + 10 for id_ in row] for row in rows]  # ids of no special meaning there
    (pack,) = pack_rows(rows, budget=1000, targets=targets)
    with torch.no_grad():
        found, alone = logp_packed(model, pack), logp_alone(model, rows, targets)
    exact = sum_experts_one_by_one(copy.deepcopy(model)).double()
    with Float64():
        head_of(exact)  # by its own numbers, where it was read in float32
        check_same_in_float64(exact, rows, targets)
        with torch.no_grad():
            expected = logp_alone(exact, rows, targets)
    assert (found - expected).norm() <= 2 * (alone - expected).norm()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model_type"), REFUSED)
def test_architectures_that_are_refused(kind, model_type):
    model = built(kind, model_type)
    with torch.no_grad():
        model(input_ids=torch.arange(10, 26)[None])  # BigBird's attention is another one from then on
    with pytest.raises(ModelError, match=r"off by \S+ nat|does not pass|for want of a small model of its class") as no:
        row_limit(model)
    assert "\n" not in str(no.value)


def test_attention_that_is_served_is_called_as_before():
    """Transformers' vision layers name the mask, its language layers do not."""
    calls = []

    def own(*arguments, **options):
        calls.append((arguments, options))

    module, states, mask = object(), (torch.zeros(1), torch.ones(1), torch.ones(1)), torch.ones(1)
    attend(own, module, *states, mask, scaling=0.5)
    attend(own, module, *states, attention_mask=mask, scaling=0.5, is_causal=False)
    attend(own, module, *states, attention_mask=None)
    assert [arguments[0] for arguments, _ in calls] == [module] * 3
    assert [arguments[4] for arguments, _ in calls] == [mask, mask, None]
    assert [options for _, options in calls] == [{"scaling": 0.5}, {"scaling": 0.5, "is_causal": False}, {}]
