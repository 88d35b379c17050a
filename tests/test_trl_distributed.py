"""Two gloo processes train as one process with the same global batch does, and resume bit for bit."""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from egrsd_kernels.credit import gate
from egrsd_kernels.trl import EGRSDTrainer
from tests.support.processes import in_processes
from tests.support.trl_tiny import exported, make, weights

pytestmark = pytest.mark.slow

# SGD: Adam would turn a gradient that is zero but for rounding into a step of full size.
OPTIONS = {"max_steps": 3, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.5, "rollout_steps": 1}


def skips(completions, **_) -> list[float | None]:
    """Judges what is long, and finds no end of one of them."""
    lengths = [len(completion[0]["content"]) for completion in completions]
    return [None if length < 6 else math.inf if length == 9 else float(length % 2) for length in lengths]


def hint(example) -> list[dict]:
    return [*example["prompt"], {"role": "assistant", "content": example["solution"]}]


def no_hint(example) -> list[dict]:
    return example["prompt"]


def contrast(evidence) -> torch.Tensor:
    right, wrong = evidence.contexts["right"], evidence.contexts["wrong"]
    gates = gate(right.entropy, evidence.entropy_scale, gamma=0.8, gate_floor=0.1)
    return evidence.rewards.nan_to_num()[:, None] * gates + 0.1 * (right.logp - wrong.logp)


SETTINGS = {
    "lora": {"peft": True},
    "full": {"peft": False, "entropy_scale": "batch_max_lookahead", "advantage": "group"},
    "dr_grpo": {"peft": True, "teacher_model_kind": "ema", "teacher_update_rate": 0.5, "loss_type": "dr_grpo"},
    "unjudged": {"peft": True, "reward_funcs": skips},
    "contexts": {
        "cls": functools.partial(EGRSDTrainer, contexts={"right": hint, "wrong": no_hint}, token_advantage=contrast),
        "rollout_steps": 0,
    },
    "divergence": {"peft": False, "divergence": "reverse_kl", "divergence_weight": 0.5},
    "two updates": {"peft": True, "loss_type": "grpo", "num_iterations": 2, "epsilon": 0.02, "beta": 0.3},
}
SAME = ("teacher_entropy/mean", "gate/mean", "magnitude/clipped", "reward", "abs_log_ratio/entropy_decile_3",
        "regime/fork", "teacher_entropy/bin_7", "restored/fork", "right_entropy/mean", "token_advantage/abs_mean",
        "rewards/unjudged", "rewards/infinite", "divergence/mean")  # fmt: skip


def fixed_completions(self, prompt_ids, *_, **__):
    """Completions by prompt, occurrence and step: what is sampled must not depend on the number of processes."""
    rows, offset = [], self.accelerator.process_index * len(prompt_ids)
    for index, ids in enumerate(prompt_ids):
        rng = random.Random(f"{ids}{(offset + index) % 2}{self.state.global_step}")
        rows.append([rng.randrange(6, 60) for _ in range(rng.randrange(3, 11))] + [1])
    return rows, None


def train(path: Path, world: int) -> dict:
    """Every setting once, on however many processes there are; what they came to."""
    out = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EGRSDTrainer, "_generate_single_turn", fixed_completions)
        for name, options in SETTINGS.items():
            batch = {"per_device_train_batch_size": 4 // world}
            run, logs = make(path / name, **OPTIONS | batch | options)
            run.train()
            out[name] = {"weights": weights(run), "rows": logs.steps, "welford": run.welford.state_dict()}
    return out


def worker(rank: int, path: Path) -> dict:
    out = train(path, 2)
    # Sampled this time, each process from its own random state, with rollouts still in use at the checkpoint.
    options = {"num_iterations": 2, "max_steps": 3, "per_device_train_batch_size": 2}
    saved = options | {"save_strategy": "steps", "save_steps": 1}
    straight, _ = make(path / "straight", **saved)
    straight.train()
    torch.manual_seed(99 + rank)
    resumed, _ = make(path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(path / "straight" / "checkpoint-1"))
    out["straight"], out["resumed"] = weights(straight), weights(resumed)
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[dict, Path]:
    path = tmp_path_factory.mktemp("two")
    return in_processes(worker, path)[0], path


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[dict, Path]:
    path = tmp_path_factory.mktemp("one")
    return train(path, 1), path


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_equal_one(one, two, name):
    got, expected = two[0][name], one[0][name]
    assert got["welford"] == pytest.approx(expected["welford"])
    for key in ("loss", *SAME):
        assert [row.get(key, 0) for row in got["rows"]] == pytest.approx(
            [row.get(key, 0) for row in expected["rows"]], rel=1e-4, abs=1e-6
        ), key
    for key, value in expected["weights"].items():
        torch.testing.assert_close(got["weights"][key], value, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", [name for name, options in SETTINGS.items() if options.get("rollout_steps") != 0])
def test_two_processes_export_the_rollouts_of_both(one, two, name):
    got, expected = (
        sorted((r.step, r.prompt, "".join(r.tokens), round(r.advantage, 3)) for r in exported(path / name))
        for _, path in (two, one)
    )
    assert got == expected
    assert len(got) == 24


def test_the_rollouts_that_nothing_judged_are_of_every_kind(one):
    rows = one[0]["unjudged"]["rows"]
    assert any(0 < row["rewards/infinite"] < row["rewards/unjudged"] < 1 for row in rows)


def test_the_divergence_is_one(one):
    assert all(row["divergence/mean"] > 0.01 for row in one[0]["divergence"]["rows"])


def test_two_processes_resume_bit_for_bit(two):
    for key, value in two[0]["straight"].items():
        assert torch.equal(two[0]["resumed"][key], value), key
