"""Rewards that are none: not known, infinite, too few, of another type; and rollouts that cannot be written."""

import errno
import functools
import logging
import math
import os
from decimal import Decimal

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from transformers import TrainerCallback

from egrsd_kernels.rl import WelfordAdvantage
from egrsd_kernels.trl.rewards import RewardError, checked, without_infinite
from tests.support.trl_tiny import correct, dataset, exported, make, weights

INF, NAN = math.inf, math.nan


def odd(answer) -> list[bool]:
    return [int(a) % 2 == 1 for a in answer]


def skipping(value):
    """Judges as ``correct`` does, and gives ``value`` for odd answers."""

    def reward(completions, answer, **_):
        return [value if skip else one for one, skip in zip(correct(completions, answer), odd(answer), strict=True)]

    return reward


class Seen:
    """What each loss call got."""

    def __init__(self, run):
        self.calls, compute = [], run._compute_loss

        def compute_loss(model, inputs):
            self.calls.append(inputs)
            return compute(model, inputs)

        run._compute_loss = compute_loss


@pytest.mark.heavy
@pytest.mark.parametrize("advantage", ["welford", "group"])
@pytest.mark.parametrize("value", [None, NAN, INF, -INF, 1e30])
def test_what_is_not_judged_teaches_nothing(tmp_path, advantage, value):
    options = {"advantage": advantage, "rollout_steps": 1, "max_steps": 3, "num_generations": 4}
    run, logs = make(tmp_path, reward_funcs=skipping(value), **options)
    seen = Seen(run)
    run.train()
    records = exported(tmp_path)
    is_odd = {f"<user>{e['prompt'][0]['content']}<end><assistant>": odd([e["answer"]])[0] for e in dataset()}
    skipped = [r for r in records if is_odd[r.prompt]]
    judged = [r for r in records if not is_odd[r.prompt]]
    assert skipped and judged
    assert {r.reward for r in skipped} == {None} and {r.advantage for r in skipped} == {0.0}
    assert all(math.isfinite(r.reward) for r in judged) and any(r.advantage for r in judged)
    for step, row in enumerate(logs.steps, 1):
        now = [r for r in records if r.step == step]
        share = sum(r.reward is None for r in now) / len(now)
        assert row["rewards/unjudged"] == pytest.approx(share)
        assert row["rewards/infinite"] == pytest.approx(0 if value is None or math.isnan(value) else share)
        known = [r.reward for r in now if r.reward is not None]
        if known:
            assert row["reward"] == pytest.approx(sum(known) / len(known), rel=1e-5)
        # Their tokens count as TRL counts them.
        calls = seen.calls[2 * step - 2 : 2 * step]
        assert {c["normalizer"].item() for c in calls} == {sum(len(r.tokens) for r in now)}
        peak = max(c["teacher_entropy"].max().item() for c in calls)
        assert [c["entropy_scale"].item() for c in calls] == pytest.approx([max(peak, 1.0)] * 2)
    if advantage == "welford":
        welford = WelfordAdvantage(1)
        for step in (1, 2, 3):
            now = [r.reward for r in judged if r.step == step]
            expected = welford(torch.tensor(now)).tolist() if now else []
            assert [r.advantage for r in judged if r.step == step] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert run.welford.state_dict() == pytest.approx(welford.state_dict(), rel=1e-5)
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in logs.steps)


@pytest.mark.heavy
@pytest.mark.parametrize("advantage", ["welford", "group"])
def test_a_generation_in_which_nothing_is_judged(tmp_path, advantage):
    def reward(completions, answer, trainer_state, **_):
        return [None] * len(completions) if trainer_state.global_step < 2 else correct(completions, answer)

    run, logs = make(tmp_path, reward_funcs=reward, advantage=advantage, max_steps=3, max_grad_norm=0.0)
    seen = Seen(run)
    run.train()
    assert [row["rewards/unjudged"] for row in logs.steps] == [1, 1, 0]
    assert [row["loss"] for row in logs.steps[:2]] == [0, 0]
    assert [row["reward"] for row in logs.steps[:2]] == [None, None] and logs.steps[2]["reward"] is not None
    assert not any(call["advantages"].any() for call in seen.calls[:4])
    assert all(torch.isfinite(value).all() for value in weights(run).values())
    if advantage == "welford":  # a generation without rewards uses up no step of the warm-up
        assert run.welford.steps == 1 and run.welford.count == 8
        got = torch.cat([call["advantages"] for call in seen.calls[4:]])
        torch.testing.assert_close(got.sort()[0], (run._rewards - 0.5).sort()[0])


@pytest.mark.slow
def test_evaluation_leaves_the_statistics_alone(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "max_steps": 2}
    run, logs = make(tmp_path, reward_funcs=skipping(INF), eval_dataset=dataset(6), **options)
    shares = []
    calculate = run._calculate_rewards

    def spy(*args):
        rewards = calculate(*args)
        shares.append((run._mode, (~rewards.isnan().all(1)).sum().item()))
        return rewards

    run._calculate_rewards = spy
    run.train()
    assert run.welford.count == sum(judged for mode, judged in shares if mode == "train")
    assert {mode for mode, _ in shares} == {"train", "eval"}
    assert sum("eval_rewards/unjudged" in row and "eval_rewards/infinite" in row for row in logs.rows) == 2


def test_an_infinite_reward_is_named_once_for_each_function(tmp_path, caplog):
    def minus(completions, **_):
        return [-INF] + [0.0] * (len(completions) - 1)

    with caplog.at_level(logging.WARNING, "egrsd_kernels"):
        run, _ = make(tmp_path, reward_funcs=[skipping(INF), minus], max_steps=3)
        run.train()
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("egrsd_kernels")]
    assert len(lines) == 2 and not any("\n" in line for line in lines)
    assert lines[0].startswith("reward_funcs: reward: expected a finite number, at most 1e+18 in size, got inf for the")
    assert lines[1].startswith("reward_funcs: minus: expected a finite number, at most 1e+18 in size, got -inf for the")
    questions = [repr(e["prompt"][0]["content"]) for e in dataset()]
    assert any(f"to {question}; such rollouts are left out" in lines[0] for question in questions)
    assert all(line.endswith("only counted, in rewards/infinite") for line in lines)


def test_which_rewards_are_too_large():
    rewards = torch.tensor(
        [[1.0, 2.0], [INF, 2.0], [1.0, -INF], [NAN, 3.0], [NAN, NAN], [8e17, 8e17], [1.0, 2e19], [INF, NAN]]
    )
    kept, infinite = without_infinite(rewards, torch.tensor([1.0, 1.0]))
    expected = [[1, 2], [NAN, NAN], [NAN, NAN], [NAN, 3], [NAN, NAN], [NAN, NAN], [NAN, NAN], [NAN, NAN]]
    np.testing.assert_array_equal(kept.numpy(), np.array(expected))
    assert infinite.int().tolist() == [
        [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]
    ]  # fmt: skip
    # A function without weight is only watched: what it says leaves the rollout in.
    kept, infinite = without_infinite(torch.tensor([[1.0, INF], [INF, 1.0]]), torch.tensor([1.0, 0.0]))
    np.testing.assert_array_equal(kept.numpy(), np.array([[1.0, NAN], [NAN, NAN]]))
    assert infinite.int().tolist() == [[0, 1, 0], [1, 0, 0]]


class Instance:
    def __init__(self, rewards):
        self.rewards = rewards

    def __call__(self, prompts, **_):
        return self.rewards


class Async(Instance):
    async def __call__(self, prompts, **_):
        return self.rewards


BAD = {
    "too few": ([1.0, 2.0], "2"),
    "too many": ([1.0] * 4, "4"),
    "empty": ([], "0"),
    "number": (1.0, "float 1.0"),
    "0-d tensor": (torch.tensor(1.0), "Tensor"),
    "0-d array": (np.array(1.0), "ndarray"),
    "nothing": (None, "None"),
    "text": ("abc", "str 'abc'"),
    "bytes": (b"abc", "bytes"),
    "dict": ({0: 1.0, 1: 1.0, 2: 1.0}, "dict"),
    "set": ({1.0, 2.0, 3.0}, "set"),
    "words": ([1.0, "0.5\n", 1.0], "str '0.5\\n' at index 1"),
    "nested": ([[1.0], [1.0], [1.0]], "list at index 0"),
    "matrix": (torch.zeros(3, 2), "Tensor at index 0"),
    "array of rows": (np.zeros((3, 2)), "ndarray at index 0"),
    "complex": ([1.0, 1.0, 1j], "complex 1j at index 2"),
    "NumPy's complex": (np.ones(3, np.complex64), "complex64 np.complex64(1+0j) at index 0"),
    "complex tensor": (torch.ones(3, dtype=torch.complex64), "Tensor at index 0"),
    "object": ([object(), 1.0, 1.0], "object at index 0"),
    "a list too many": ([1.0, [None], 1.0], "list at index 1"),
    "dates": (np.array(["2020"] * 3, "datetime64[D]"), "datetime64 at index 0"),
}


@pytest.mark.parametrize("kind", [Instance, Async])
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_list_of_rewards_is_named_in_one_line(name, kind):
    returned, got = BAD[name]
    with pytest.raises(RewardError) as error:
        called(kind(returned), 3)
    assert str(error.value) == (
        f"reward_funcs: length: expected a list of 3 numbers or None, one for each completion, got {got}"
    )


def called(function, count: int) -> list[float]:
    result = checked(function, "length")(prompts=[""] * count, completions=[""] * count)
    if isinstance(result, list):
        return result
    try:
        result.send(None)
    except StopIteration as stop:
        return stop.value


@pytest.mark.parametrize(
    "returned",
    [
        (1, True, None),
        torch.tensor([1, 1, NAN], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([[1.0], [1.0], [NAN]]),
        np.array([1, 1, NAN], np.float16),
        [torch.tensor(1), np.float32(1), NAN],
        [Decimal(1), np.bool_(True), torch.tensor([NAN])],
        (value for value in (1, 1, None)),
        {"a": 1, "b": 1.0, "c": None}.values(),
    ],
)
def test_every_kind_of_number_is_a_reward(returned):
    np.testing.assert_array_equal(called(Instance(returned), 3), [1.0, 1.0, NAN])


def test_an_integer_beyond_any_float_is_infinite():
    assert called(Instance([10**400, -(10**400), 0]), 3) == [INF, -INF, 0]


def test_a_mistake_inside_the_function_stays_what_it_is():
    def broken():
        yield 1.0
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        called(Instance(broken()), 3)


@pytest.mark.slow
def test_names_models_and_asynchronous_functions_are_as_before(tmp_path):
    async def later(completions, **_):
        return [0.25 for _ in completions]

    model = torch.nn.Linear(1, 1)
    assert checked(model, "m") is model
    functions = [later, functools.partial(correct), Instance([1.0] * 8)]
    run, logs = make(tmp_path, reward_funcs=functions, max_steps=1, gradient_accumulation_steps=2)
    assert functions[0] is later  # the caller's list stays as it was
    assert run.reward_func_names == ["later", "correct", "Instance"]
    run.train()
    assert logs.steps[0].keys() >= {f"rewards/{name}/mean" for name in run.reward_func_names}
    assert logs.steps[0]["rewards/Instance/mean"] >= 1.0


@pytest.mark.heavy
@pytest.mark.parametrize("reward", [lambda **_: 0.5, lambda completions, **_: ["1"] * len(completions)])
def test_a_run_says_which_function_returned_no_rewards(tmp_path, reward):
    reward.__name__ = "judge"
    run, _ = make(tmp_path, reward_funcs=reward, max_steps=1)
    with pytest.raises(
        RewardError, match=r"^reward_funcs: judge: expected a list of 8 numbers or None, .*, got [^\n]+$"
    ):
        run.train()


@pytest.mark.heavy
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "a file in the folder's place"])
def test_a_run_goes_on_where_rollouts_cannot_be_written(tmp_path, caplog, monkeypatch, fault):
    run, logs = make(tmp_path, rollout_steps=1, max_steps=3)
    if isinstance(fault, OSError):

        def full(source, target):
            if "step000003" not in str(target):
                raise fault

        monkeypatch.setattr("egrsd_kernels.rollouts.files.os.replace", full)
        reason = "No space left on device"
    else:

        class InTheWay(TrainerCallback):  # after the start, which asks for a free folder
            def on_train_begin(self, *args, **kwargs):
                (tmp_path / "rollouts").write_text("")

        run.add_callback(InTheWay())
        reason = "File exists"
    with caplog.at_level(logging.WARNING, "egrsd_kernels"):
        run.train()
    assert len(logs.steps) == 3
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("egrsd_kernels")]
    assert lines == [
        f"rollout_steps: {tmp_path}/rollouts/rollouts-step000001.jsonl: {reason}; training goes on without this file, "
        f"and without a word on later ones that cannot be written"
    ]
    if isinstance(fault, OSError):  # step 3's would be renamed
        assert [path.name.split(".")[1] for path in (tmp_path / "rollouts").iterdir()] == ["rollouts-step000003"]
