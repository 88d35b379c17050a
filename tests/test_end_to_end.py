"""The benchmark of a whole update at a size that a CPU can take: each way does the same work, and rows add up."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks import end_to_end, timeline, updates
from benchmarks.end_to_end import CELLS, Cell, largest_batch, merged
from benchmarks.measure import version
from benchmarks.rollouts import Rollouts
from benchmarks.updates import WAYS, Plan, Task
from tests.support.tree_attention import dense, on_cpus

CPU = torch.device("cpu")
RELEASE = end_to_end.release
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
            ("prefix-fused-graphs", Plan(True, 1000))]  # fmt: skip


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


class Times:
    """Of plans: ms, or None where memory ends; those that were asked for."""

    def __init__(self, monkeypatch, ms, retries=()):
        self.tried, self.ms, self.retries = [], ms, retries
        monkeypatch.setattr(end_to_end, "exact_logp", lambda task: ([], []))
        monkeypatch.setattr(end_to_end, "time_plan", self)

    def __call__(self, cell, task, plan, exact, best, args):
        self.tried.append(plan)
        if (ms := self.ms(plan)) is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"ms": ms, "alloc_retries": int(plan in self.retries)}


def test_what_is_not_whole_is_timed_computed_again_too_and_the_fastest_counts(monkeypatch):
    times = Times(monkeypatch, lambda plan: None if plan.size > 4 and plan.kept else 10.0 if plan.kept else 7.0)
    row = measured("tiny/padded-compiled")
    assert times.tried == [Plan(True, 8), Plan(True, 4), Plan(False, 8)]
    assert (row["ms"], row["kept"], row["size"]) == (7.0, False, 8) and "error" not in row
    assert [one.get("error") for one in row["tried"]] == ["out of memory", None, None]


def test_smaller_parts_are_tried_while_they_are_faster(monkeypatch):
    times = Times(monkeypatch, lambda plan: {8: 3.0, 4: 2.0, 2: 2.5}[plan.size])
    assert measured("tiny/padded")["size"] == 4
    assert times.tried == [Plan(True, 8), Plan(True, 4), Plan(True, 2)]
    for way, size, ms in (("padded", 8, 1.1 * end_to_end.QUICK), ("packed", 16384, 3.0)):
        times = Times(monkeypatch, lambda plan, ms=ms: ms)
        measured(f"tiny/{way}")
        assert times.tried == [Plan(True, size)]


def test_the_leads_are_timed_both_ways(monkeypatch):
    for way, plans in (("prefix-fused", [Plan(True, 16384), Plan(False, 16384)]),
                       ("prefix-graphs", [Plan(True, 16384)])):  # fmt: skip
        times = Times(monkeypatch, lambda plan: 5.0 if plan.kept else 9.0)
        row = measured(f"tiny/{way}")
        assert times.tried == plans and row["kept"]
    times = Times(monkeypatch, lambda plan: 5.0)
    measured("tiny/prefix-fused/grpo")
    assert times.tried == [Plan(True, 16384)]


def test_a_plan_whose_memory_ran_out_and_was_freed_does_not_end_the_search(monkeypatch):
    whole, half, again = Plan(True, 16384), Plan(True, 8192), Plan(False, 16384)
    times = Times(monkeypatch, {whole: 9.0, half: 8.0, again: 10.0}.get, retries=[whole])
    row = measured("tiny/prefix-graphs")
    assert times.tried == [whole, half, again]
    assert (row["ms"], row["alloc_retries"], row["tried"][0]["alloc_retries"]) == (8.0, 0, 1)


def test_what_is_foreseen_not_to_fit_is_not_run(monkeypatch):
    times = Times(monkeypatch, lambda plan: 10.0 if plan.kept else 11.0)
    task = Task("tiny", "egrsd", Rollouts.random(500, 2, 4, 9, 7, 32), CPU)
    needed = {size: end_to_end.foreseen_gib(WAYS["padded-compiled"], task, size) for size in (8, 4)}
    weights = 2 * (2 * (64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 96) + 500 * 64) / 2**30
    assert needed[8] - weights == pytest.approx(2 * (needed[4] - weights)) and needed[4] > weights
    row = measured("tiny/padded-compiled", f"--gib {(needed[8] + needed[4]) / 2}")
    assert times.tried == [Plan(True, 4), Plan(False, 8)] and row["size"] == 4
    assert row["tried"][0] == {"kept": True, "size": 8, "error": "foreseen to take 0 GiB"}


@pytest.mark.parametrize(("way", "size", "seen"), [("trl", 8, 38.5), ("prefix-compiled", 16384, 35.3),
                                                   ("packed-compiled", 16384, 37.4)])  # fmt: skip
def test_memory_is_foreseen_about_as_an_h200_has_seen_it(way, size, seen):
    task = Task("1.7b", "egrsd", Rollouts.random(151_936, 4, 8, 300, 600, 1024), CPU)
    assert end_to_end.foreseen_gib(WAYS[way], task, size) == pytest.approx(seen, rel=0.1)


def test_an_error_is_a_cells_result(monkeypatch):
    def broken(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(end_to_end, "time_plan", broken)
    row = measured("tiny/padded")
    assert "illegal memory access" in row["error"] and "ms" not in row


class Allocator:
    """torch.cuda's, as far as it is asked: graphs keep 7 GiB reserved, of which 2 are allocated at the most."""

    def __init__(self, monkeypatch):
        self.calls = []
        for name, value in (("memory_allocated", 2**30), ("max_memory_allocated", 2 * 2**30),
                            ("max_memory_reserved", 7 * 2**30)):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
        for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda name=name: self.calls.append(name))
        retries = iter([3, 5])
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": next(retries)})
        monkeypatch.setattr(end_to_end, "profile", lambda update: {"busy_ms": 1.0})


def test_a_plans_graphs_are_gone_before_the_next_is_measured(monkeypatch):
    calls = Allocator(monkeypatch).calls
    trees = SimpleNamespace(reset_cudagraph_trees=lambda: calls.append("graphs"))
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)
    RELEASE(torch.device("cuda"))
    assert calls == ["graphs", "synchronize", "empty_cache", "reset_peak_memory_stats"]


@pytest.mark.parametrize(("name", "peak"), [("prefix-compiled", 2.0), ("prefix-graphs", 7.0)])
def test_the_memory_of_graphs_is_what_is_reserved(name, peak, monkeypatch):
    allocator = Allocator(monkeypatch)

    def make(task, plan):
        def update():
            allocator.calls.append("update")
            return updates.Seen(torch.zeros(()), *torch.zeros(3, 4))

        return update

    way = WAYS[name]
    monkeypatch.setitem(WAYS, name, updates.Way("made up", make, packs=True, compiled=True, graphs=way.graphs))
    task = Task("tiny", "egrsd", Rollouts.random(500, 2, 4, 9, 7, 32), torch.device("cuda"))
    object.__setattr__(task, "targets", torch.zeros(4))  # none is on a device that is not there
    found = end_to_end.time_plan(
        Cell("tiny", name), task, Plan(True, 9), ([torch.zeros(4)] * 2, [0.0, 0.0]), 1e9, arguments()
    )
    assert (found["peak_gib"], found["above_weights_gib"], found["alloc_retries"]) == (peak, peak - 1, 2)
    assert found["profile"] == {"busy_ms": 1.0}
    warm = allocator.calls[: allocator.calls.index("reset_peak_memory_stats")]
    # Graphs are recorded by the second update; what was only compiled with is given back before one that is as all.
    assert warm == ["update"] * (2 if way.graphs else 1) + ["empty_cache", "update", "synchronize"]


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


# Names that PyTorch's profiler gave on an H200, some of their arguments left out.
NAMED = {
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopB_TNT": "matrix products",
    "nvjet_tst_64x8_64x16_4x1_v_bz_splitK_TNT": "matrix products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": "matrix products",
    "sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_stage6": "matrix products",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>": "matrix products",
    "triton_tem_fused_mm_3": "matrix products",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 64, 4, cutlass::bfloat16_t>>": "attention",
    "void pytorch_flash::flash_bwd_convert_dq_kernel<Flash_bwd_kernel_traits<cutlass::bfloat16_t>>": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::Params)": "attention",
    "triton_red_fused__to_copy_index_select_mul_7": "compiled elementwise",
    "Memcpy DtoD (Device -> Device)": "copies and casts",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>": "copies and casts",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<2>, Copy<float>>":
        "copies and casts",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<1>, BinaryOpScalar<1>>":
        "eager elementwise",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "eager elementwise",
    "void at::native::(anonymous namespace)::vectorized_gather_kernel<16, long>": "gathers and sums by index",
    "segment_sum_kernel": "gathers and sums by index",
    "something": "other",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_kernels_by_kind(name):
    assert timeline.kind_of(name) == NAMED[name]


def test_a_timeline():
    """Two streams that overlap from 20 to 30 µs, nothing from 60 to 100."""
    launches = [("nvjet_a", 0, 30), ("vocab_kernel", 20, 60), ("nvjet_a", 100, 130), ("nvjet_b", 130, 135)]
    found = timeline.summary([timeline.Launch(*one) for one in launches[::-1]], {"vocab_kernel"})
    assert (found["busy_ms"], found["idle_ms"], found["launches"]) == (0.095, 0.04, 4)
    assert found["kinds"] == [
        {"kind": "matrix products", "ms": 0.065, "launches": 3}, {"kind": "head's kernels", "ms": 0.04, "launches": 1}
    ]  # fmt: skip
    assert found["longest"][0] == {"name": "nvjet_a", "ms": 0.06, "launches": 2} and len(found["longest"]) == 3
    many = timeline.summary([timeline.Launch(f"{n:0120d}", n, n + 1) for n in range(40)], set())
    assert len(many["longest"]) == 10 and all(len(one["name"]) == 100 for one in many["longest"])
    assert timeline.summary([], set())["busy_ms"] == 0


def test_a_profile_counts_what_ran_on_the_gpu_alone(monkeypatch):
    event = SimpleNamespace(name="nvjet", time_range=SimpleNamespace(start=5.0, end=9.0), device_type=DeviceType.CUDA)
    call = SimpleNamespace(name="cudaLaunchKernel", time_range=event.time_range, device_type=DeviceType.CPU)
    recorded = contextlib.nullcontext(SimpleNamespace(events=lambda: [event, call]))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: recorded)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    pytest.importorskip("triton")
    found = timeline.profile(lambda: None)
    assert found["launches"] == 1 and found["busy_ms"] == 0.004


def test_the_kernels_of_heads_are_known_by_name(monkeypatch):
    vocab = pytest.importorskip("egrsd_kernels.backends.triton.vocab")
    assert {"vocab_kernel", "head_kernel"} <= timeline.head_kernels()
    from triton.runtime.jit import JITFunction

    from egrsd_kernels.backends.triton.launch import Kernel

    def launched_by_lookup(x):
        pass

    monkeypatch.setattr(vocab, "vocab_kernel", Kernel(JITFunction(launched_by_lookup)))  # as on NVIDIA's GPUs
    assert "launched_by_lookup" in timeline.head_kernels() and "segment_sum_kernel" not in timeline.head_kernels()


# ---------------------------------------------------------------------------------------------------------------- cells


def test_the_cells():
    names = [cell.name for cell in CELLS]
    assert len(names) == len(set(names)) and names[:2] == ["1.7b/prefix-fused", "1.7b/trl"]
    for shape in ("1.7b", "4b"):  # every way at two sizes, and the extremes at the others
        assert {cell.way for cell in CELLS if cell.shape == shape and not cell.setting} == set(WAYS)
    assert {"8b/trl", "0.6b/prefix-fused", "1.7b/trl/grpo", "1.7b/prefix-fused/groups-of-16"} <= set(names)
    assert set(updates.OURS) >= {"prefix", "prefix-fused-graphs"} and not set(updates.OURS) & {"packed", "trl-trie"}
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
    # Stopped when all the time was over: not all plans were tried. When its own was, it would end so again.
    rows["tiny/trl"], rows["tiny/padded"] = (figure | {"stopped_s": seconds} for seconds in (30.0, 1e3))
    end_to_end.main(command)
    end_to_end.main([*command, "--missing"])
    assert calls[3:] == ["tiny/trl", "tiny/padded", "tiny/trl"]


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
