"""The end-to-end benchmark at a size that a CPU can take: its variants compute one loss, and its rows add up."""

import json
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks import end_to_end, peers
from benchmarks.end_to_end import Batch, Lengths, build_policy, largest_batch, merge, qwen3_config
from benchmarks.measure import Stopwatch
from benchmarks.peers import HEADS

TINY = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LENGTHS = Lengths(prompt=5, solution=4, response=9)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["tied", "untied"])
def policy(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(end_to_end.SHAPES, "tiny", {**TINY, "tie_word_embeddings": request.param == "tied"})
        return build_policy(qwen3_config("tiny"), "cpu", torch.float32)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(end_to_end.SHAPES, "tiny", TINY)
    return ["--models", "tiny", "--device", "cpu", "--dtype", "float32", "--rollouts", "2", "--steps", "2"] + [
        argument for name, length in LENGTHS._asdict().items() for argument in (f"--{name}", str(length))
    ]


def loss_and_gradients(policy, variant):
    policy.reset()
    policy.model.zero_grad()
    batch = Batch.random(TINY["vocab_size"], 3, LENGTHS, "cpu")
    loss = end_to_end.compute_loss(policy, HEADS[variant](), batch, Stopwatch(CPU))
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in policy.adapters]


def test_eager_and_ours_agree(policy):
    loss, gradients = loss_and_gradients(policy, "ours")
    expected_loss, expected = loss_and_gradients(policy, "eager")
    assert len(gradients) == 2 * 7 * 2  # A and B of seven projections in two layers
    assert loss.abs() > 1e-3
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert wanted.norm() > 0
        assert (gradient - wanted).norm() <= 2e-5 * wanted.norm()


def test_the_teacher_differs_from_the_student(policy):
    batch = Batch.random(TINY["vocab_size"], 2, LENGTHS, "cpu")
    with torch.no_grad():
        student = policy.hidden(batch.student_ids, LENGTHS.response)
        with policy.model.disable_adapter():
            without_adapters = policy.hidden(batch.student_ids, LENGTHS.response)
            teacher = policy.hidden(batch.teacher_ids, LENGTHS.response)
    assert student.shape == teacher.shape == (2, LENGTHS.response, TINY["hidden_size"])
    assert (student - without_adapters).abs().max() > 1e-3
    assert (teacher - without_adapters).abs().max() > 1e-3


def test_the_eager_logits_are_those_of_transformers(policy):
    batch = Batch.random(TINY["vocab_size"], 2, LENGTHS, "cpu")
    positions = torch.arange(LENGTHS.prompt - 1, LENGTHS.prompt + LENGTHS.response - 1)
    with torch.no_grad():
        expected = policy.model(input_ids=batch.student_ids, logits_to_keep=positions, use_cache=False).logits
        logits = policy.head(policy.hidden(batch.student_ids, LENGTHS.response))
    torch.testing.assert_close(logits, expected)


def test_chunks_of_teacher_logits_change_nothing(policy, monkeypatch):
    monkeypatch.setattr(peers, "CHUNK", 4)
    batch = Batch.random(TINY["vocab_size"], 2, LENGTHS, "cpu")
    with torch.no_grad():
        hidden = policy.hidden(batch.teacher_ids, LENGTHS.response)
        expected = peers.eager_statistics(hidden, policy.head.weight, batch.target_ids)
        chunked = peers.chunked_statistics(hidden, policy.head.weight, batch.target_ids)
    for got, wanted in zip(chunked, expected, strict=True):
        torch.testing.assert_close(got, wanted.flatten())


def test_a_step_moves_the_adapters_alone(policy):
    policy.reset()
    policy.model.zero_grad()
    before = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    optimizer = torch.optim.AdamW(policy.adapters, lr=1e-3)
    batch = Batch.random(TINY["vocab_size"], 2, LENGTHS, "cpu")
    watch = Stopwatch(CPU)
    end_to_end.training_step(policy, HEADS["ours"](), batch, optimizer, watch)
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name
    assert 0 < end_to_end.head_ms(watch) < watch.ms("start", "end")


@pytest.mark.parametrize("variant", ["eager", "ours"])
def test_a_probe_leaves_no_gradients(policy, variant):
    policy.model.zero_grad()
    end_to_end.peak_step(policy, HEADS[variant](), Batch.random(TINY["vocab_size"], 2, LENGTHS, "cpu"))
    assert all(parameter.grad is None for parameter in policy.adapters)


# ---------------------------------------------------------------------------------------------------------------- rows


def test_main_writes_a_row_for_every_variant(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # as if it were not installed
    output = tmp_path / "end_to_end.json"
    command = [*tiny, "--output", str(output), "--commit", "abc"]
    end_to_end.main(command)
    report = json.loads(output.read_text())
    rows = {row["variant"]: row for row in report["rows"]}
    assert list(rows) == ["eager", "liger", "ours"]
    assert rows["liger"]["error"] == "liger_kernel is not installed"
    assert rows["liger"]["step_ms"] is None
    for name in ("eager", "ours"):
        row = rows[name]
        assert row["error"] is None
        assert (row["model"], row["layers"], row["rollouts"], row["tokens"]) == ("tiny", 2, 2, 18)
        assert 0 < row["low"] <= row["step_ms"] <= row["high"]
        assert 0 < row["head_ms"] < row["step_ms"]
    assert rows["eager"]["loss"] == pytest.approx(rows["ours"]["loss"], abs=1e-5)
    assert rows["eager"]["grad_norm"] == pytest.approx(rows["ours"]["grad_norm"], rel=1e-4)
    assert "losses of eager and ours differ by" in capsys.readouterr().out

    end_to_end.main([*command, "--variants", "ours", "--commit", "def"])
    merged = json.loads(output.read_text())
    assert [(row["variant"], row["commit"]) for row in merged["rows"]] == [
        ("eager", "abc"),
        ("liger", "abc"),
        ("ours", "def"),
    ]


def test_a_variant_that_fails_costs_the_others_nothing(tiny, tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")

    monkeypatch.setitem(HEADS, "broken", broken)
    output = tmp_path / "end_to_end.json"
    end_to_end.main([*tiny, "--output", str(output), "--variants", "broken,ours"])
    first, second = json.loads(output.read_text())["rows"]
    assert first["error"] == "out of memory"
    assert second["error"] is None


def test_merge_replaces_the_same_model_layers_and_variant():
    def row(variant, layers, step_ms):
        return {"model": "4b", "layers": layers, "variant": variant, "step_ms": step_ms}

    earlier = {"device": "a", "rows": [row("eager", 36, 1.0), row("ours", 36, 2.0), row("ours", 8, 3.0)]}
    report = {"device": "a", "rows": [row("ours", 36, 4.0)]}
    assert [row["step_ms"] for row in merge(report, earlier)["rows"]] == [3.0, 1.0, 4.0]
    assert merge(report, None) is report
    with pytest.raises(ValueError, match="another device"):
        merge({"device": "b", "rows": []}, earlier)


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


def test_a_row_holds_the_largest_batch(policy, monkeypatch):
    """The search of ``measure`` on a GPU that is made up: 100 bytes, of which a rollout takes 7."""
    sizes = []

    def peak_step(policy, head, batch):
        sizes.append(len(batch.advantages))
        if 7 * sizes[-1] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(end_to_end, "peak_step", peak_step)
    monkeypatch.setattr(end_to_end, "release", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7 * sizes[-1])
    row = end_to_end.measure(policy, "ours", 4, LENGTHS, steps=2, largest_seconds=60)
    assert row["error"] is None
    assert row["largest_rollouts"] == 14
    assert row["largest_batch_tokens"] == 14 * LENGTHS.response
    assert row["probe_peak_mib"] == 28 / 2**20

    # A step that fails for want of memory still gives way to smaller ones; any other failure is the row's error.
    monkeypatch.setattr(end_to_end, "training_step", lambda policy, head, batch, *_: peak_step(policy, head, batch))
    row = end_to_end.measure(policy, "ours", 30, LENGTHS, steps=2, largest_seconds=60)
    assert (row["error"], row["step_ms"], row["largest_rollouts"]) == ("out of memory", None, 14)

    def broken(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(end_to_end, "training_step", broken)
    row = end_to_end.measure(policy, "ours", 4, LENGTHS, steps=2, largest_seconds=60)
    assert "illegal memory access" in row["error"]
    assert row["largest_rollouts"] is None


def test_out_of_memory_is_told_from_other_errors():
    assert end_to_end.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert end_to_end.out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert not end_to_end.out_of_memory(RuntimeError("shapes do not match"))
    assert not end_to_end.out_of_memory(ValueError("out of memory"))
