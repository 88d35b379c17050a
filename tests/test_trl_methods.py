"""Token advantages by name, or of one's own, and contexts by name, in the trainer."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

import torch
from trl import GRPOConfig, GRPOTrainer, TrlParser

from egrsd_kernels.rl import TOKEN_ADVANTAGES, TokenEvidence, position_weights, token_stats
from egrsd_kernels.rollouts import read_rollouts
from egrsd_kernels.trl import EGRSDConfig, EGRSDTrainer
from egrsd_kernels.trl.checkpoint import CheckpointError
from egrsd_kernels.trl.evidence import evidence_of
from egrsd_kernels.trl.methods import FIXED, LACKS
from egrsd_kernels.trl.teacher import AdaptersOff
from tests.support.trl_tiny import OPTIONS, dataset, make, tiny_model, tokenizer, weights

BASE = {name: OPTIONS[name] for name in ("use_cpu", "bf16", "report_to", "num_generations", "max_steps")}


def config(**options) -> EGRSDConfig:
    return EGRSDConfig("unused", **BASE | options)


# --------------------------------------------------------------------------------------------------------- the config


def settled(made: EGRSDConfig) -> tuple:
    return made.gamma, made.lookahead, made.clip_eps, made.advantage


def test_what_each_name_makes_of_the_settings():
    assert settled(config()) == (0.3, 0, 0.2, "welford")
    of = {name: settled(config(token_advantage=name)) for name in TOKEN_ADVANTAGES}
    assert of == {
        "grpo": (0.0, 0, 0.0, "group"),
        "reinforce": (0.0, 0, 0.0, "welford"),
        "rlsd": (0.0, 0, 0.2, "welford"),
        "egrsd": (0.3, 0, 0.2, "welford"),
        "cl_egrsd": (0.3, 3, 0.2, "welford"),
    }
    assert FIXED.keys() == LACKS.keys() == TOKEN_ADVANTAGES.keys()
    # By name or by number, it is the same run.
    by_name, by_number = config(token_advantage="rlsd", gate_floor=0.1), config(gamma=0)
    assert by_name.of_the_run() == by_number.of_the_run()
    assert [name for name in TOKEN_ADVANTAGES if not config(token_advantage=name).direct] == ["grpo", "reinforce"]


def test_what_fits_a_name_is_taken():
    assert settled(config(token_advantage="rlsd", gamma=0, clip_eps=0.1, advantage="group")) == (0, 0, 0.1, "group")
    assert config(token_advantage="cl_egrsd", lookahead=5, gamma=1).lookahead == 5
    assert config(token_advantage="grpo", scale_rewards="none", teacher_model_kind="base").advantage == "group"
    arguments = ["--output_dir", "x", "--use_cpu", "true", "--bf16", "false", "--token_advantage", "egrsd",
                 "--teacher_model_init_kwargs", '{"dtype": "bfloat16"}', "--gamma", "0.7"]  # fmt: skip
    (parsed,) = TrlParser((EGRSDConfig,)).parse_args_and_config(arguments)
    assert (parsed.token_advantage, parsed.gamma) == ("egrsd", 0.7)
    assert parsed.teacher_model_init_kwargs == {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"token_advantage": "ppo"},
            "token_advantage: expected one of grpo, reinforce, rlsd, egrsd, cl_egrsd, or None",
        ),
        ({"token_advantage": "rlsd", "gamma": 0.3}, "gamma: expected 0.0, as token_advantage is 'rlsd', got 0.3"),
        ({"token_advantage": "egrsd", "lookahead": 2}, "lookahead: expected 0, as token_advantage is 'egrsd', got 2"),
        (
            {"token_advantage": "cl_egrsd", "lookahead": 0},
            "lookahead: expected at least 1, as token_advantage is 'cl_egrsd', got 0",
        ),
        (
            {"token_advantage": "grpo", "advantage": "welford"},
            "advantage: expected 'group', as token_advantage is 'grpo', got 'welford'",
        ),
        (
            {"token_advantage": "reinforce", "teacher_model_kind": "ema"},
            "teacher_model_kind: expected 'base', as token_advantage 'reinforce' has no teacher, got 'ema'",
        ),
        (
            {"token_advantage": "grpo", "rollout_steps": 5},
            "rollout_steps: expected 0, as token_advantage 'grpo' has no teacher, got 5",
        ),
        (
            {"token_advantage": "grpo", "position_weight": 0.5},
            "position_weight: expected 0.0, as token_advantage 'grpo' has no weight of a token, got 0.5",
        ),
        (
            {"token_advantage": "rlsd", "gamma_schedule": "linear", "gamma_end": 1},
            "gamma_schedule: expected 'constant', as token_advantage 'rlsd' has no gate, got 'linear'",
        ),
        (
            {"token_advantage": "egrsd", "lookahead_filter": "discounted"},
            "lookahead_filter: expected 'minimum', as token_advantage 'egrsd' has no lookahead, got 'discounted'",
        ),
    ],
)
def test_what_a_name_does_not_have_is_refused(options, message):
    with pytest.raises(ValueError) as caught:
        config(**options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------- the trainer


def with_(**arguments):
    """EGRSDTrainer with these, some of which a config has as well."""
    return functools.partial(EGRSDTrainer, **arguments)


SGD = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3}  # Adam would make full steps of gradients of rounding
# The methods' own numbers, in the place of trl_tiny's.
NAMED = {"gamma": None, "lookahead": None}


def apart(one: dict, other: dict) -> float:
    """The distance of two runs' weights."""
    return sum((one[key] - other[key]).square().sum() for key in one).sqrt().item()


def moved(run) -> float:
    """How far a run has come from tiny_model, whose weights are the same every time."""
    start = tiny_model().state_dict()
    return apart(dict(run.model.named_parameters()), start)


@pytest.mark.heavy
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_grpo_by_name_is_trls_and_reads_no_teacher(tmp_path, loss_type):
    options = {"peft": False, "loss_type": loss_type, **SGD}
    theirs, logs = make(tmp_path / "a", cls=GRPOTrainer, config=GRPOConfig, **options)
    theirs.train()
    plain = dataset().remove_columns("solution")
    ours, log = make(tmp_path / "b", token_advantage="grpo", length_beta=0.0, train_dataset=plain, **options | NAMED)
    assert ours.teacher.state_dict() == {}
    ours.train()
    assert moved(theirs) > 1e-2
    assert apart(weights(theirs), weights(ours)) < 1e-4 * moved(theirs)
    for row, expected in zip(log.steps, logs.steps, strict=True):
        # Its metrics are TRL's, and none of a teacher's.
        assert row["entropy"] == pytest.approx(expected["entropy"], rel=1e-3)
        assert {key for key in row if "teacher" in key or "gate" in key} == set()
    assert any(row["token_advantage/abs_mean"] > 0 for row in log.steps)


def test_reinforce_by_name_is_egrsd_without_magnitude_and_gate(tmp_path):
    by_number, _ = make(tmp_path / "a", peft=False, gamma=0.0, clip_eps=0.0, lookahead=0, **SGD)
    by_number.train()
    by_name, _ = make(tmp_path / "b", peft=False, token_advantage="reinforce", **SGD | NAMED)
    by_name.train()
    assert moved(by_name) > 1e-2
    assert apart(weights(by_name), weights(by_number)) < 1e-4 * moved(by_name)


@pytest.mark.heavy
@pytest.mark.parametrize("name, numbers", [("cl_egrsd", {"gamma": 0.8, "lookahead": 3}), ("rlsd", {})])
def test_a_function_of_ones_own_is_what_a_name_is(tmp_path, name, numbers):
    numbers = NAMED | numbers
    named, logs = make(tmp_path / "a", token_advantage=name, **SGD | numbers)
    assert named._direct
    named.train()
    seen: list[TokenEvidence] = []

    def own(evidence):
        seen.append(evidence)
        return TOKEN_ADVANTAGES[name](evidence)

    run, log = make(tmp_path / "b", cls=with_(token_advantage=own), **SGD | numbers)
    assert not run._direct and isinstance(run.teacher, AdaptersOff)
    run.train()
    fresh = weights(make(tmp_path / "c")[0])
    size = apart(weights(named), fresh)
    assert size > 1e-3 and apart(weights(run), weights(named)) < 1e-4 * size
    assert len(seen) == 6  # micro-batches
    for evidence in seen:
        rows, length = evidence.mask.shape
        assert rows == 4 and evidence.rewards.shape == evidence.advantages.shape == (4,)
        assert evidence.student_logp.shape == (4, length) and not evidence.student_logp.requires_grad
        assert list(evidence.contexts) == ["teacher"] and evidence.entropy_scale.ndim == 0
    for row, expected in zip(log.steps, logs.steps, strict=True):
        for key in ("teacher_entropy/mean", "reward"):
            assert row[key] == pytest.approx(expected[key], rel=1e-3)
        assert row["teacher_abs_log_ratio/mean"] == pytest.approx(expected["abs_log_ratio/mean"], rel=1e-2, abs=1e-6)


def right(example):
    return [*example["prompt"], {"role": "assistant", "content": f"It is {example['answer']}."}]


def wrong(example):
    return [*example["prompt"], {"role": "assistant", "content": "It is 0."}]


def plainly(evidence):
    return evidence.advantages[:, None].expand(evidence.mask.shape)


def contrast(evidence):
    hints = evidence.contexts
    return evidence.advantages[:, None] + 0.1 * (hints["right"].logp - hints["wrong"].logp)


def test_the_teacher_reads_in_each_context(tmp_path):
    """log p and entropy against full logits of the model as it is at the start, a row at a time, without padding."""
    plain = dataset().remove_columns("solution")
    both = with_(contexts={"right": right, "wrong": wrong}, token_advantage=contrast)
    run, logs = make(tmp_path, cls=both, train_dataset=plain, max_steps=1)
    examples = {f"<user>{e['prompt'][0]['content']}<end><assistant>": e for e in run.train_dataset}
    calls = []
    compute = run._compute_loss
    run._compute_loss = lambda model, inputs: calls.append(dict(inputs)) or compute(model, inputs)
    run.train()
    teacher = tiny_model().eval()
    for inputs in calls:
        mask = inputs["completion_mask"].bool()
        for index, (ids, attended) in enumerate(zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)):
            example = examples[tokenizer().decode(ids[attended.bool()])]
            completion = inputs["completion_ids"][index][mask[index]]
            for name, context in {"right": right, "wrong": wrong}.items():
                words = tokenizer().apply_chat_template(context(example), add_generation_prompt=True, return_dict=True)
                whole = torch.tensor([[*words["input_ids"], *completion.tolist()]])
                with torch.no_grad():
                    logp = teacher(whole).logits[0, -len(completion) - 1 : -1].log_softmax(-1)
                got = inputs[f"{name}_logp"][index], inputs[f"{name}_entropy"][index]
                want = logp.gather(-1, completion[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
                for values, expected in zip(got, want, strict=True):
                    torch.testing.assert_close(values[mask[index]], expected, rtol=1e-4, atol=1e-4)
                    assert not values[~mask[index]].any()
    (row,) = logs.steps
    peak = max(inputs[f"{name}_entropy"].max().item() for inputs in calls for name in ("right", "wrong"))
    assert calls[0]["entropy_scale"].item() == pytest.approx(max(peak, 1.0))
    tokens = [(inputs["right_entropy"].sum().item(), inputs["completion_mask"].sum().item()) for inputs in calls]
    entropy, count = (sum(column) for column in zip(*tokens, strict=True))
    assert row["right_entropy/mean"] == pytest.approx(entropy / count, rel=1e-4)
    assert row["wrong_entropy/mean"] != row["right_entropy/mean"] and math.isfinite(row["token_advantage/mean"])


def test_a_context_by_the_students_name_is_a_context(tmp_path):
    """Its log-ratio is not the student's with itself, and what is trained and logged stays the student's."""
    seen: list[TokenEvidence] = []

    def plain(evidence):
        seen.append(evidence)
        return plainly(evidence)

    contexts = {"student": wrong, "right": right}
    run, logs = make(tmp_path, cls=with_(contexts=contexts, token_advantage=plain), max_steps=1)
    run.train()
    apart = [(one.contexts["student"].logp - one.student_logp)[one.mask].abs() for one in seen]
    expected = torch.cat(apart).mean().item()
    assert expected > 0.1 and logs.steps[0]["student_abs_log_ratio/mean"] == pytest.approx(expected, rel=1e-4)


def test_a_function_that_writes_into_its_evidence_leaves_the_rollouts_alone(tmp_path):
    """Three micro-batches to an update, two updates to a rollout, and an evaluation between them."""
    seen = []

    def careless(evidence):
        fields = evidence.advantages, evidence.rewards, evidence.entropy_scale
        fields += tuple(x for statistics in evidence.contexts.values() for x in statistics)
        seen.append([x.clone() for x in fields])
        for x in fields:
            x.mul_(2)
        return evidence.advantages[:, None].expand(evidence.mask.shape)

    options = {"gradient_accumulation_steps": 3, "num_iterations": 2, "max_steps": 2}
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": dataset(4), "num_generations_eval": 2}
    evaluated |= {"per_device_eval_batch_size": 4}
    run, _ = make(tmp_path, cls=with_(token_advantage=careless), **options, **evaluated)
    run.train()
    first, second = seen[:3], seen[-5:-2]  # of four rows times two generations an evaluation has two batches
    assert len(seen) == 10
    for one, other in zip(first, second, strict=True):
        assert one[0].any() and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_is_not_finite_stops_the_run_where_values_are_not_looked_at_at_once(tmp_path, monkeypatch):
    """As on a GPU: before the optimizer's step, so the weights are what they were."""
    monkeypatch.setattr("egrsd_kernels.checks.values_checked", lambda _: False)
    nan = with_(token_advantage=lambda evidence: torch.full(evidence.mask.shape, math.nan))
    run, _ = make(tmp_path, cls=nan)
    before = weights(run)
    with pytest.raises(ValueError, match=r"^token_advantage: expected no NaN and no infinity at a valid position"):
        run.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())


def test_what_a_context_writes_into_its_row_is_the_teachers_alone(tmp_path):
    """Else the student would be prompted with the hint, and the next context would begin with it."""

    def writing(hint):
        def context(example):
            example["prompt"].append({"role": "assistant", "content": hint})
            example["prompt"][0]["content"] += hint
            example["answer"] = hint
            return example["prompt"]

        return context

    own = with_(contexts={"one": writing("Hm."), "other": writing("Oh!")}, token_advantage=plainly)
    run, _ = make(tmp_path, cls=own, max_steps=1)
    read, prompts, answers = [], [], []
    tokenize, judge, generate = run._tokenize_prompts, run.reward_funcs[0], run._generate
    run._tokenize_prompts = lambda conversations: read.append(copy.deepcopy(conversations)) or tokenize(conversations)
    run._generate = lambda given: prompts.extend(copy.deepcopy(given)) or generate(given)
    run.reward_funcs[0] = lambda **given: answers.extend(given["answer"]) or judge(**given)
    run.train()
    assert all(len(prompt) == 1 and prompt[0]["content"].endswith("?") for prompt in prompts)
    assert prompts and answers and all(answer.isdecimal() for answer in answers)
    assert [[len(conversation) for conversation in each] for each in read] == [[1] * 8, [2] * 8, [2] * 8]
    for conversations, end in zip(read, ("?", "?Hm.", "?Oh!"), strict=True):
        assert all(conversation[0]["content"].endswith(end) for conversation in conversations)


@pytest.mark.parametrize("own", [False, True])
def test_an_interrupted_step_is_in_nobody_elses_metrics(tmp_path, own):
    """As where memory runs out in a notebook, or a user interrupts."""
    cls = with_(token_advantage=TOKEN_ADVANTAGES["egrsd"]) if own else EGRSDTrainer
    evaluated = {"eval_dataset": dataset(2), "num_generations_eval": 2, "per_device_eval_batch_size": 4}
    run, _ = make(tmp_path, cls=cls, **evaluated)
    step, calls = run.training_step, []

    def interrupted(*arguments, **options):
        if run._step_log.signals:
            raise RuntimeError("out of memory")
        return step(*arguments, **options)

    run.training_step = interrupted
    with pytest.raises(RuntimeError, match="out of memory"):
        run.train()
    metrics = run._step_log.metrics_of
    run._step_log.metrics_of = lambda tokens, count: calls.append(count) or metrics(tokens, count)
    run.training_step = step
    run.evaluate()
    assert calls == [1] and run._in_loss is None


@pytest.mark.slow
def test_several_updates_and_a_resume_with_contexts(tmp_path):
    options = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    cls = with_(contexts={"right": right, "wrong": wrong}, token_advantage=contrast)
    straight, expected = make(tmp_path / "a", cls=cls, **options)
    straight.train()
    make(tmp_path / "b", cls=cls, **options)[0].train()
    resumed, logs = make(tmp_path / "b", cls=cls, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert all(torch.equal(value, weights(resumed)[key]) for key, value in weights(straight).items())
    assert logs.steps[-1]["token_advantage/mean"] == expected.steps[-1]["token_advantage/mean"]
    for other, says in (
        (with_(contexts={"right": right}, token_advantage=contrast), r"contexts: .*wrong.* there"),
        (
            with_(contexts={"right": right, "wrong": wrong}, token_advantage=right),
            r"token_advantage: \"contrast\" there",
        ),
    ):
        run, _ = make(tmp_path / "b", cls=other, **options)
        with pytest.raises(CheckpointError, match=says):
            run.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "arguments, options, says",
    [
        ({"token_advantage": 3}, {}, "token_advantage: expected a function of a TokenEvidence, got 3"),
        (
            {"token_advantage": contrast},
            {"token_advantage": "egrsd", "lookahead": None},
            "token_advantage: expected None in args, as the trainer is given a function, got 'egrsd'",
        ),
        (
            {"token_advantage": contrast},
            {"rollout_steps": 2},
            "rollout_steps: expected 0, as a token_advantage of one's own has no gate to show, got 2",
        ),
        (
            {"contexts": {"right": right, "wrong": wrong}},
            {},
            "contexts: expected one, unless token_advantage is a function, got 'right, wrong'",
        ),
        ({"contexts": {}}, {}, "contexts: expected one, unless token_advantage is a function, got ''"),
        ({"contexts": [right]}, {}, "contexts: expected functions by name, got [<function right"),
        ({"contexts": {"a hint": right}}, {}, "contexts: expected names as Python has them, got 'a hint'"),
        ({"contexts": {"right": "r"}}, {}, "contexts: right: expected a function of a row of the dataset, got 'r'"),
        (
            {"contexts": {"right": right}},
            {"token_advantage": "grpo", **NAMED},
            "contexts: expected None, as token_advantage 'grpo' has no teacher, got 'right'",
        ),
        (
            {"contexts": {"right": right}, "teacher_template": ({"role": "user", "content": "{solution}"},)},
            {},
            "teacher_template: expected none beside contexts, which word all that the teacher reads",
        ),
        (
            {"teacher_template": ({"role": "user", "content": "{solution}"},)},
            {"token_advantage": "grpo", **NAMED},
            "teacher_template: expected none as there is no teacher",
        ),
    ],
)
def test_what_contexts_and_functions_are_refused(tmp_path, arguments, options, says):
    with pytest.raises((TypeError, ValueError)) as caught:
        make(tmp_path, cls=with_(**arguments), **options)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_a_row_that_a_context_cannot_read_is_named(tmp_path):
    def broken(example):
        raise ValueError("hint: this row has none")

    with pytest.raises(ValueError, match=r"^train_dataset, row 0: hint: this row has none$"):
        make(tmp_path, cls=with_(contexts={"hint": broken}))
    with pytest.raises(ValueError, match=r"^train_dataset, row 0: .*model's window of 512"):
        make(tmp_path, token_advantage="grpo", max_completion_length=510, **NAMED)


def test_one_context_of_ones_own_serves_a_named_method_and_the_export(tmp_path):
    plain = dataset().remove_columns("solution")
    run, logs = make(tmp_path, cls=with_(contexts={"hint": right}), train_dataset=plain, max_steps=1, rollout_steps=1)
    run.train()
    assert run._direct and logs.steps[0]["gate/mean"] < 1
    (file,) = (tmp_path / "rollouts").iterdir()
    assert {rollout.reference for rollout in read_rollouts(file)} == {None}


def test_weights_of_a_tokens_place_are_the_trainers_too(tmp_path):
    """Â, in the loss and in the logs, is ρ times what the evidence gives without."""
    run, _ = make(tmp_path, max_steps=1, position_weight=-0.5, prefix_weight=0.5)
    put, seen = run._put_token_advantages, []

    def spy(inputs, student_logp):
        advantages = inputs["sequence_advantages"]
        put(inputs, student_logp)
        evidence = evidence_of(inputs, advantages, student_logp, run._contexts, run.args, run.gamma)
        plain = token_stats(replace(evidence, position_weight=0.0, prefix_weight=0.0)).token_advantage
        delta = evidence.teacher.logp - evidence.student_logp
        rho = position_weights(evidence.mask, position=-0.5, prefix=0.5, log_ratio=delta)
        torch.testing.assert_close(inputs["advantages"], plain * rho, rtol=1e-5, atol=1e-7)
        seen.append((plain - inputs["advantages"]).abs().max().item())

    run._put_token_advantages = spy
    run.train()
    assert len(seen) == 2 and max(seen) > 0.01
