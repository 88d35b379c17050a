"""The benchmark of a whole update at a size that a CPU can take: each way does the same work, and rows add up."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks import end_to_end, updates
from benchmarks.end_to_end import CELLS, Cell, largest_batch, merged
from benchmarks.measure import version
from benchmarks.rollouts import Rollouts
from benchmarks.updates import WAYS, Plan, Task
from tests.support.tree_attention import dense, on_cpus

CPU = torch.device("cpu")
SMALL = "--device cpu --groups 2 --group 4 --prompt 9 --solution 7 --response 32 --repeats 2 --commit abc"


@pytest.fixture(autouse=True)
def _by_segments_on_one_core(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(end_to_end, "release", lambda device: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with on_cpus():
        yield
    torch.set_num_threads(before)


def arguments(more: str = "") -> argparse.Namespace:
    return end_to_end.parse([*SMALL.split(), *more.split(), "--output", "unused.json"])


def flash_attention(query, key, value, cu_queries, cu_keys, longest_query, longest_key, softmax_scale, **_):
    """PyTorch's, a segment after another, aligned at the last key."""
    out = []
    for n in range(len(cu_queries) - 1):
        q, k = slice(*cu_queries[n : n + 2].tolist()), slice(*cu_keys[n : n + 2].tolist())
        assert q.stop - q.start <= longest_query and k.stop - k.start <= longest_key
        seen = torch.arange(k.stop - k.start) <= torch.arange(k.stop - k.start)[q.start - q.stop :, None]
        out.append(dense(query[q], key[k], value[k], seen, softmax_scale))
    return torch.cat(out)


@pytest.fixture
def made(monkeypatch) -> list[torch.nn.Module]:
    """The models that updates build."""
    models, own = [], updates.build

    def build(*args, **kwargs):
        models.append(own(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr(updates, "build", build)
    monkeypatch.setattr(updates, "flash_attention", flash_attention)
    return models


def once(way: str, objective: str, plan: Plan, made: list[torch.nn.Module]) -> tuple[updates.Seen, torch.Tensor]:
    """What an update sees, and its gradients."""
    task = Task("tiny", objective, Rollouts.random(500, 2, 4, 9, 7, 32), CPU)
    update = WAYS[way].make(task, plan)
    update()
    seen = update()  # gradients are made anew
    found = [parameter.grad.flatten() for parameter in made[-1].parameters() if parameter.requires_grad]
    assert len(found) == 2 * 7 * 2  # A and B of seven projections in two layers
    return seen, torch.cat(found)


OURS = [("padded", Plan(False, 4)), ("packed", Plan(True, 60)), ("prefix", Plan(False, 1000))]
TRLS = [("trl", Plan(True, 8)), ("trl", Plan(False, 2)), ("trl-trie", Plan(True, 1000)), ("trl-trie", Plan(False, 80))]
COMPILED = [("padded-compiled", Plan(True, 4)), ("packed-compiled", Plan(True, 60)), ("trl-compiled", Plan(True, 4)),
            ("prefix-fused", Plan(True, 1000))]  # fmt: skip


@pytest.mark.parametrize("objective", ["egrsd", pytest.param("grpo", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("way", "plan"),
    [*OURS, *TRLS[:1], *TRLS[2:3], *(pytest.param(*case, marks=pytest.mark.slow) for case in (*TRLS[1::2], *COMPILED))],
    ids=lambda value: value if isinstance(value, str) else f"{'kept' if value.kept else 'again'} {value.size}",
)
def test_every_way_does_the_same_work(way, plan, objective, made, monkeypatch):
    if way.startswith("trl"):
        packing = pytest.importorskip("trl.experimental.async_grpo.packing", reason="needs TRL 1.16 or newer")
        monkeypatch.setattr(packing, "_flash_attn", packing._flash_attn)  # as it was, after
    if WAYS[way].compiled:
        monkeypatch.setattr(torch, "compile", lambda model, *_, **__: model)
        monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    wanted, expected = once("padded", objective, Plan(True, 8), made)
    seen, gradient = once(way, objective, plan, made)
    # bfloat16 keeps 8 bits; log p is 6.2 nat, and what stands on it no more.
    for one, other in zip(seen[1:], wanted[1:], strict=True):
        assert (one - other).abs().max() <= 6.2 * 2**-8
    assert wanted.student_logp.max() < 0 and (wanted.teacher_logp.max() < 0) == (objective == "egrsd")
    assert (gradient - expected).norm() <= 0.03 * expected.norm() > 0


def test_rollouts_of_a_group_share_a_prompt_and_nothing_is_shared_apart():
    rollouts = Rollouts.random(500, 2, 3, 9, 7, 32)
    assert rollouts.lengths.max() == 32 and rollouts.prompts[0] is rollouts.prompts[2] is not rollouts.prompts[3]
    assert rollouts.tokens(torch.tensor([1])).tolist() == list(range(32, 32 + int(rollouts.lengths[1])))
    rows = rollouts.rows(teacher=False)
    asked = [torch.arange(len(row)) >= 9 for row in rows]
    lengths = [
        sum(map(len, packs))
        for packs in (updates.apart(rows, 1000, asked), updates.pack_rows(rows, budget=1000, targets=asked))
    ]
    assert lengths == [sum(map(len, rows)), sum(map(len, rows)) - 2 * 2 * 9]


def test_the_bare_products_count_no_token_twice(monkeypatch):
    task = Task("tiny", "egrsd", Rollouts.random(500, 2, 4, 9, 7, 32), CPU)
    tokens = int(task.rollouts.lengths.sum())
    count = []
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, weight: count.append(x.shape[0] * weight.numel()))
    layers, run = updates.bare_products(task)
    run()
    assert layers == 2
    weights = 64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 96
    assert sum(count) == weights * (2 * (2 * 9 + tokens) + (2 * 16 + tokens))


# ----------------------------------------------------------------------------------------------------------------- rows


def measured(name: str, more: str = "") -> dict:
    rows = []
    args = arguments(more)
    end_to_end.measure(Cell.of(name), args, rows.append)
    return rows[-1]


def test_a_row():
    row = measured("tiny/prefix")
    assert row["rollouts"] == 8 and row["kept"] and "error" not in row and len(row["tried"]) == 1
    assert 0 < row["low"] <= row["ms"] <= row["high"] and row["products_ms"] > 0
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["ms"] * 1e3)
    assert row["student_off"] < 0.02 and row["teacher_off"] < 0.02


def test_what_fits_whole_is_not_cut_up_and_else_the_fastest_counts(monkeypatch):
    tried = []

    def time_plan(cell, task, plan, exact, args):
        tried.append(plan)
        if plan.size > 2 and plan.kept:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"ms": 10.0 if plan.kept else 7.0}

    monkeypatch.setattr(end_to_end, "exact_logp", lambda task: ([], []))
    monkeypatch.setattr(end_to_end, "time_plan", time_plan)
    row = measured("tiny/padded")
    assert tried == [Plan(True, 4), Plan(True, 2), Plan(False, 8)]
    assert (row["ms"], row["kept"], row["size"]) == (7.0, False, 8) and "error" not in row
    assert [one.get("error") for one in row["tried"]] == ["out of memory", None, None]

    def broken(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(end_to_end, "time_plan", broken)
    row = measured("tiny/padded")
    assert "illegal memory access" in row["error"] and "ms" not in row


def test_a_way_that_sees_something_else_has_no_time(monkeypatch):
    own = updates.pack_rows
    monkeypatch.setattr(updates, "pack_rows", lambda rows, **options: own([row.flip(0) for row in rows], **options))
    row = measured("tiny/prefix")
    assert "log p of the student is off" in row["error"] and "ms" not in row


@pytest.mark.skipif(version("unsloth") is not None, reason="Unsloth is installed")
def test_a_package_that_is_missing_is_a_cells_result():
    row = measured("tiny/unsloth")
    assert row["error"] == "ModuleNotFoundError: No module named 'unsloth'" and "ms" not in row


def test_want_of_memory_is_told_from_other_errors():
    behind = RuntimeError("the compiler failed")
    behind.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert all(map(end_to_end.out_of_memory, [
        torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton Error [CUDA]: out of memory"), behind
    ]))  # fmt: skip
    assert not end_to_end.out_of_memory(RuntimeError("shapes do not match"))
    assert not end_to_end.out_of_memory(ValueError("out of memory"))


def test_kernels_by_kind():
    kernels = [("nvjet_tst_128x256", 30.0, 400), ("void pytorch_flash::flash_fwd_kernel", 5.0, 28),
               ("triton_red_fused_mul_7", 4.0, 60), ("_vocabulary_pass", 8.0, 2), ("Memcpy DtoD", 1.0, 9),
               ("void at::native::vectorized_elementwise_kernel<4>", 2.0, 90), ("something", 0.5, 1)]  # fmt: skip
    found = end_to_end.by_kind(kernels, {"_vocabulary_pass"})
    assert found["busy_ms"] == 50.5 and found["launches"] == 590
    assert [(one["kind"], one["launches"]) for one in found["kinds"]] == [
        ("matrix products", 400), ("head's kernels", 2), ("attention", 28), ("compiled elementwise", 60),
        ("eager elementwise", 90), ("copies", 9), ("other", 1),
    ]  # fmt: skip


def test_the_kernels_of_heads_are_known_by_name():
    pytest.importorskip("egrsd_kernels.backends.triton.vocab")
    assert any("vocab" in name for name in end_to_end.head_kernels())


# ---------------------------------------------------------------------------------------------------------------- cells


def test_the_cells():
    names = [cell.name for cell in CELLS]
    assert len(names) == len(set(names)) and names[0] == "1.7b/prefix-compiled"
    for shape in ("1.7b", "4b"):  # every way at two sizes, and the extremes at the others
        assert {cell.way for cell in CELLS if cell.shape == shape and not cell.setting} == set(WAYS)
    assert {"8b/trl", "0.6b/prefix-compiled", "1.7b/trl/grpo", "1.7b/prefix-compiled/groups-of-16"} <= set(names)
    some = [cell.name for cell in end_to_end.chosen("8b/trl/grpo,tiny/padded,4b/trl*")]
    assert some[-2:] == ["tiny/padded", "8b/trl/grpo"] and some[:-2] == [n for n in names if n.startswith("4b/trl")]
    assert {cell.way for cell in end_to_end.chosen("tiny/*")} == set(WAYS)
    rollouts = Cell.of("tiny/trl/groups-of-16").rollouts(arguments("--solution 600"))
    assert (
        rollouts.prompts[0] is rollouts.prompts[7] and len(rollouts.prompts) == 8 and len(rollouts.solutions[0]) == 1000
    )


@pytest.mark.parametrize("name", ["3b/trl", "1.7b/fast", "1.7b/trl/sft", "1.7b"])
def test_unknown_cells_are_refused(name, capsys):
    with pytest.raises(SystemExit):
        arguments(f"--cells {name}")
    assert "--cells" in capsys.readouterr().err


def process_of(rows: dict[str, dict], calls: list[str]):
    def run_cell(cell, args, lane, seconds):
        calls.append(cell.name)
        row = {"cell": cell.name, "shape": cell.shape, "way": cell.way, "setting": "", "wall_s": 1.0} | rows[cell.name]
        return {"environment": {"device": "GPU", "packages": {"trl": "1.16"}, "commit": "abc"}, "row": row}

    return run_cell


def test_the_file_goes_on_where_it_ended(tmp_path, monkeypatch, capsys):
    figure = {"ms": 5.0, "tokens_per_second": 2.0, "products_ms": 3.0, "kept": True, "size": 8}
    rows, calls = {"tiny/trl": figure, "tiny/padded": {"error": "out of memory"}}, []
    monkeypatch.setattr(end_to_end, "run_cell", process_of(rows, calls))
    command = [*SMALL.split(), "--cells", "tiny/trl,tiny/padded", "--output", str(tmp_path / "result.json")]
    end_to_end.main(command)
    assert "5.0 ms" in capsys.readouterr().out
    rows["tiny/padded"] = figure | {"ms": 4.0}
    end_to_end.main([*command, "--missing", "--lanes", "2"])
    assert calls == ["tiny/trl", "tiny/padded", "tiny/padded"]
    report = json.loads((tmp_path / "result.json").read_text())
    assert {row["cell"]: row.get("ms") for row in report["rows"]} == {"tiny/trl": 5.0, "tiny/padded": 4.0}
    assert report["device"] == "GPU" and report["rows"][0]["commit"] == "abc"
    assert report["rows"][0]["command"].startswith(
        "python -m benchmarks.end_to_end --cells tiny/trl,tiny/padded --repeats"
    )
    with pytest.raises(ValueError, match="other settings"):
        end_to_end.main([*command, "--prompt", "10"])
    end_to_end.main([*command, "--seconds", "0"])
    assert "not begun" in capsys.readouterr().out and len(calls) == 3


def test_rows_of_another_machine_are_not_mixed():
    report = merged({}, {"environment": {"device": "A", "packages": {"trl": "1"}}, "row": {"cell": "4b/trl"}})
    crashed = merged(report, {"environment": None, "row": {"cell": "1.7b/trl", "error": "status -11: "}})
    assert [row["cell"] for row in crashed["rows"]] == ["1.7b/trl", "4b/trl"]
    with pytest.raises(ValueError, match="another device"):
        merged(report, {"environment": {"device": "B", "packages": {}}, "row": {"cell": "4b/padded"}})
    older = {"environment": {"device": "A", "packages": {"trl": "0", "unsloth": "9"}}, "row": {"cell": "4b/unsloth"}}
    both = merged(report, older)
    assert both["packages"] == {"trl": "1", "unsloth": "9"} and both["rows"][-1]["packages"] == {"trl": "0"}


@pytest.mark.slow
def test_a_cell_is_a_process(tmp_path):
    """One that runs, one whose package is missing or that cannot run here, and one whose time is over."""
    output = tmp_path / "result.json"
    command = [*SMALL.split(), "--output", str(output)]
    end_to_end.main([*command, "--cells", "tiny/prefix,tiny/trl-trie", "--lanes", "2"])
    end_to_end.main([*command, "--cells", "tiny/padded", "--cell-seconds", "0.4"])
    rows = {row["cell"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows["tiny/prefix"]["ms"] > 0 and rows["tiny/prefix"]["commit"] == "abc"
    assert rows["tiny/trl-trie"]["error"]  # PyTorch's FlashAttention is a GPU's
    assert rows["tiny/padded"]["error"] == "stopped after 0 s"


# --------------------------------------------------------------------------------------------------- the largest batch


def memory(limit, fixed=10.0, each=2.0, calls=None):
    """A step whose memory is fixed + each · n, and that fails above ``limit`` rollouts."""

    def probe(size):
        if calls is not None:
            calls.append(size)
        return fixed + each * size if size <= limit else None

    return probe


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 7, 27, 28, 97, 200, 1000])
@pytest.mark.parametrize("optimism", [0.8, 1.0, 1.3])
def test_the_largest_batch_is_found(limit, optimism):
    """``optimism``: how far the capacity, which sets the prediction, is from where steps really fail."""
    calls = []
    capacity = optimism * (10.0 + 2.0 * limit)
    best, fails = largest_batch(memory(limit, calls=calls), capacity, start=4, seconds=1e9)
    assert len(calls) == len(set(calls)) <= 10
    assert fails is None or fails > limit
    assert 0.96 * min(optimism, 1) * limit - 2 <= best <= limit


def test_nothing_fits():
    assert largest_batch(lambda size: None, 100.0, start=4, seconds=1e9) == (0, 1)


def test_the_search_stops_when_its_time_is_over():
    now = iter(range(100))
    calls = []
    best, fails = largest_batch(memory(1000, calls=calls), 1e9, 4, seconds=2.5, clock=lambda: next(now))
    assert calls == [4, 16]
    assert (best, fails) == (16, None)


def test_a_cell_of_the_largest_batch(monkeypatch):
    """On a GPU that is made up: 100 bytes, of which a rollout takes 7."""
    sizes = []

    def make(task, plan):
        sizes.append(len(task.rollouts.responses))
        assert not plan.kept and plan.size == sizes[-1]

        def update():
            if 7 * sizes[-1] > 100:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return updates.Seen(*torch.zeros(4))

        return update

    monkeypatch.setitem(end_to_end.WAYS, "padded", updates.Way("made up", make))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7 * sizes[-1])
    row = measured("tiny/padded/largest", f"--gib {100 / 0.98 / 2**30}")
    assert row["largest_rollouts"] == 14 and "ms" not in row
