"""The benchmark of a whole step at a size that a CPU can take: every way sees the same, and its rows add up."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks import step
from tests.support.tree_attention import on_cpus

TINY = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SMALL = "--shapes tiny --device cpu --groups 2 --group 3 --prompt 9 --solution 7 --response 32 --repeats 1 --commit abc"


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(step.SHAPES, "tiny", TINY)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with on_cpus():
        yield
    torch.set_num_threads(before)


def arguments(more: str = ""):
    return step.parse([*SMALL.split(), *more.split(), "--output", "unused.json"])


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("budget", [60, 1000])
def test_every_way_sees_the_same_tokens_and_has_the_same_gradients(budget):
    args = arguments()
    cpu = torch.device("cpu")
    model = step.build("tiny", None, cpu).float()
    rollouts = step.Rollouts.random(args, TINY["vocab_size"])
    assert rollouts.lengths.max() == 32 and rollouts.prompts[0].equal(rollouts.prompts[2])
    exact = step.seen_alone(model, rollouts, cpu, torch.float32)
    found = {}
    for way in ("padded", "packed", "prefix"):
        batch = step.Batch.of(rollouts, way, cpu, budget)
        loss, seen = step.run_step(model, batch, "ours")
        found[way] = loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        for one, other in zip((seen.student_logp, seen.teacher_logp), exact, strict=True):
            assert step.rms(one, other) < 0.02  # bfloat16's rounding, of 6.2 nat
    for loss, gradient in found.values():
        torch.testing.assert_close(loss, found["padded"][0], rtol=0, atol=1e-3)
        assert (gradient - found["padded"][1]).norm() < 0.05 * gradient.norm()
    tokens = {way: sum(len(p) for p in packs) for way, packs in packs_of(rollouts, budget).items()}
    assert tokens["apart"] == sum(9 + n for n in rollouts.lengths.tolist()) > tokens["shared"]


def packs_of(rollouts, budget):
    rows = [torch.cat(pair) for pair in zip(rollouts.prompts, rollouts.responses, strict=True)]
    asked = [torch.arange(len(row)) >= 9 for row in rows]
    return {"apart": step.apart(rows, budget, asked), "shared": step.pack_rows(rows, budget=budget, targets=asked)}


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_a_result_file(tmp_path, capsys):
    output = tmp_path / "step.json"
    step.main([*SMALL.split(), "--ways", "padded,prefix,prefix-kept", "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["commit"] == "abc" and "--shapes tiny" in report["command"]
    (shape,) = report["shapes"]
    assert [row["way"] for row in shape["rows"]] == ["padded", "prefix", "prefix-kept"]
    for row in shape["rows"]:
        assert row["ms"] > 0 and row["over_products"] == row["ms"] / shape["products_ms"], row
        assert row["over_first"] == shape["rows"][0]["ms"] / row["ms"]
    assert "prefix-kept" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_a_way_that_sees_something_else_has_no_time(tmp_path, monkeypatch):
    own = step.pack_rows
    monkeypatch.setattr(step, "pack_rows", lambda rows, **options: own([row.flip(0) for row in rows], **options))
    output = tmp_path / "step.json"
    step.main([*SMALL.split(), "--ways", "prefix", "--output", str(output)])
    (row,) = json.loads(output.read_text())["shapes"][0]["rows"]
    assert row["error"] == "log p of the student is off" and "ms" not in row


@pytest.mark.parametrize("more", ["--shapes 3b", "--ways prefix,fast"])
def test_unknown_names_are_refused(more, capsys):
    with pytest.raises(SystemExit):
        arguments(more)
    assert "unknown" in capsys.readouterr().err
