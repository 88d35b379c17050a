"""The comparison of methods, from pre-training to picture, in a few steps; and its parts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("matplotlib")

from egrsd_kernels.trl.settings import parse_settings
from examples import experiment, task

SMALL = ["--steps=1", "--batch=8", "--seeds=0", "--pretrain-steps=8", "--width=64", "--layers=1", "--device=cpu"]


def test_reward_is_the_demos_verifier():
    rng = random.Random(0)
    for problem in task.sample_problems(rng, 200, additions=experiment.ADDITIONS):
        for text in (problem.solution(rng, slips=rng), problem.solution(), "=", "is", "the answer is 7 ", "=7"):
            completion = [{"role": "assistant", "content": text}]
            assert experiment.correct([completion], [problem.answer]) == [float(problem.accepts(text))]


def test_every_method_is_a_config(tmp_path):
    """Each differs from the others, in the method's settings alone."""
    args = experiment.parse(SMALL)
    common = experiment.config(tmp_path, args) | {"output_dir": str(tmp_path)}
    configs = {name: parse_settings(common | own)[1] for name, own in experiment.methods(0.5, 3).items()}
    found = {name: (c.advantage, c.clip_eps, c.gamma, c.lookahead) for name, c in configs.items()}
    assert found == {
        "GRPO": ("group", 0.0, 0.0, 0),
        "REINFORCE": ("welford", 0.0, 0.0, 0),
        "RLSD": ("welford", 0.2, 0.0, 0),
        "EGRSD": ("welford", 0.2, 0.5, 0),
        "CL-EGRSD": ("welford", 0.2, 0.5, 3),
    }
    assert {(c.length_beta, c.max_steps, c.per_device_train_batch_size) for c in configs.values()} == {(0.5, 1, 8)}
    assert found.keys() == experiment.COLORS.keys()


@pytest.mark.slow
def test_from_pretraining_to_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "HELD_OUT", 16)
    monkeypatch.setattr(experiment, "PROBLEMS", 32)
    monkeypatch.setattr(experiment, "COLORS", {"EGRSD": "#c2410c"})
    monkeypatch.setattr(experiment, "methods", lambda gamma, lookahead: {"EGRSD": {"gamma": gamma}})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    experiment.main([*SMALL, "--output", str(tmp_path)])
    report = json.loads((tmp_path / "experiment.json").read_text())
    (run,) = report["runs"]
    assert (run["method"], run["seed"]) == ("EGRSD", 0)
    assert [point["step"] for point in run["curve"]] == [0, 1]
    assert run["curve"][0]["length"] == report["start"]["sampled"]["length"] > 0
    assert report["methods"] == {"EGRSD": {"gamma": 1.0}} and report["device"] == "CPU"
    assert (tmp_path / "experiment.png").read_bytes().startswith(b"\x89PNG")
    held_out = {tuple(terms) for terms in json.loads((tmp_path / "held_out.json").read_text())}
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 32
    for row in rows:
        problem = task.Problem(tuple(int(term) for term in row["prompt"][0]["content"].replace("-", "+-").split("+")))
        assert problem.terms not in held_out and problem.accepts(row["solution"]) and problem.answer == row["answer"]

    # Called again, it trains nothing anew.
    trained = (tmp_path / "EGRSD-0" / "trainer_state.json").stat().st_mtime_ns
    monkeypatch.setattr(experiment, "pretrain", None)
    experiment.main([*SMALL, "--output", str(tmp_path)])
    assert (tmp_path / "EGRSD-0" / "trainer_state.json").stat().st_mtime_ns == trained
    assert json.loads((tmp_path / "experiment.json").read_text())["runs"] == report["runs"]
    assert "checkpoint" in capsys.readouterr().out


def test_failed_runs_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "train_all", lambda commands, jobs: dict.fromkeys(commands, 1))
    with pytest.raises(SystemExit, match="CL-EGRSD-0"):
        experiment.run_all(tmp_path, experiment.parse(SMALL))


def test_the_docs_show_the_committed_results():
    root = Path(experiment.__file__).parents[1]
    report = json.loads((root / "examples" / "results" / "experiment-h100.json").read_text())
    page = (root / "docs" / "experiment.md").read_text(encoding="utf-8")
    rows = experiment.summary(report)
    assert len(rows) == 6
    assert all(f"| {' | '.join(row)} |" in page for row in rows)
    assert report["command"] in page


def test_command_leaves_out_the_defaults():
    assert experiment.parse(["--seeds", "1", "2", "--jobs", "8"]).command.endswith("experiment --seeds 1 2 --jobs 8")


def test_spread_is_over_seeds():
    assert experiment.spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert experiment.spread([4.0]) == (4.0, 0.0)


def test_modules_are_found_from_the_root():
    """The reward is named as examples.experiment.correct in the runs' config."""
    assert experiment.correct.__module__ == "examples.experiment"
    assert (Path(experiment.__file__).parents[1] / "setup.py").is_file()
