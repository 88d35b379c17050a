"""EGRSDTrainer with a divergence: what its loss is given, for every kind of teacher, and what comes of it."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from transformers import Qwen3ForCausalLM

from egrsd_kernels import Head, fused_egrsd_loss, token_statistics
from egrsd_kernels.trl import EGRSDConfig, EGRSDTrainer, direct_loss
from reference import egrsd_divergence_loss
from tests.support.trl_tiny import make, tiny_config, weights

DIVERGENCE = {"divergence": "reverse_kl", "divergence_weight": 0.5}


def larger() -> Qwen3ForCausalLM:
    torch.manual_seed(7)
    return Qwen3ForCausalLM(tiny_config(hidden_size=48))


def calls_of(path, monkeypatch, **options):
    """(trainer, logs, the loss's calls: positional arguments, keywords, result) of a run."""
    calls = []

    def spy(*args, **kwargs):
        result = fused_egrsd_loss(*args, **kwargs)
        head = args[1].frame(args[1].weight.detach().clone())  # which moves with the optimizer's step
        calls.append(((args[0], head, *args[2:]), kwargs, result))
        return result

    monkeypatch.setattr(direct_loss, "fused_egrsd_loss", spy)
    run, logs = make(path, **DIVERGENCE | options)
    before = weights(run)
    run.train()
    assert any((value != before[name]).any() for name, value in weights(run).items())
    return run, logs, calls


TEACHERS = {
    "adapters off": {},
    "frozen": {"peft": False, "learning_rate": 1e-2},
    "moving": {"peft": False, "teacher_model_kind": "ema", "teacher_update_rate": 0.3, "learning_rate": 1e-2},
    "another": {"teacher_model": larger},
}


@pytest.mark.parametrize(
    "kind", [name if name == "moving" else pytest.param(name, marks=pytest.mark.slow) for name in TEACHERS]
)
def test_the_loss_reads_the_teacher_as_it_was(tmp_path, monkeypatch, kind):
    """Its hidden states through its head give the teacher's log p, also where its weights have moved since."""
    options = {k: value() if k == "teacher_model" else value for k, value in TEACHERS[kind].items()}
    _, logs, calls = calls_of(tmp_path, monkeypatch, max_steps=3, **options)
    assert len(calls) == 6
    for (student, head, hidden, targets, advantages), given, (loss, stats) in calls:
        mask, teacher = given["mask"], given["teacher_weight"]
        assert isinstance(teacher, Head) and hidden.shape[:2] == student.shape[:2]
        assert not hidden.requires_grad and not teacher.weight.requires_grad
        own = token_statistics(hidden, teacher, targets, mask=mask)
        torch.testing.assert_close(own.logp, given["teacher_logp"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own.entropy, given["teacher_entropy"], rtol=1e-5, atol=1e-5)
        names = ("entropy_scale", "normalizer", "gamma", "gate_floor", "lookahead", "clip_eps", "mask", "temperature")
        want, _, d = egrsd_divergence_loss(
            student.detach(), head.weight.detach(), hidden, targets, advantages, teacher_weight=teacher.weight,
            **{name: given[name] for name in (*names, *DIVERGENCE)},
        )  # fmt: skip
        torch.testing.assert_close(stats.divergence.double(), d, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loss.detach().double(), want, rtol=1e-4, atol=1e-5)
    means = [row["divergence/mean"] for row in logs.steps]
    assert len(means) == 3 and all(x > 0 for x in means)


def test_the_divergence_alone(tmp_path, monkeypatch):
    """Rewards that are all alike teach nothing, and the divergence does."""
    run, logs, calls = calls_of(
        tmp_path, monkeypatch, policy_weight=0.0, divergence="jsd", divergence_beta=0.3, divergence_top_k=20,
        reward_funcs=lambda completions, **_: [1.0] * len(completions), length_beta=0.0, eval_dataset=None,
    )  # fmt: skip
    for _, given, (loss, stats) in calls:
        assert given["divergence_top_k"] == 20 and given["policy_weight"] == 0
        want = 0.5 * (stats.gate * stats.divergence).sum() / given["normalizer"]
        torch.testing.assert_close(loss.detach(), want)
    run.evaluate(run.train_dataset)
    assert [row for row in logs.rows if "eval_divergence/mean" in row]


def test_what_the_importance_correction_drops(tmp_path, monkeypatch):
    """As vLLM's sequence_mask: a rollout with the ratio 0 has no divergence in the loss, and the others have theirs."""

    class Dropping(EGRSDTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            ratio = torch.ones(len(output["completion_ids"]), 1)
            ratio[::2] = 0
            return output | {"importance_sampling_ratio": ratio}

    _, _, calls = calls_of(tmp_path, monkeypatch, cls=Dropping, policy_weight=0.0, max_steps=1)
    masks = torch.cat([given["mask"] for _, given, _ in calls])
    assert int(masks.any(1).sum()) == len(masks) // 2
    for _, given, (loss, stats) in calls:
        assert not stats.divergence[~given["mask"]].any()
        torch.testing.assert_close(loss.detach(), 0.5 * (stats.gate * stats.divergence).sum() / given["normalizer"])


def test_nothing_is_kept_after_an_error(tmp_path):
    run, _ = make(tmp_path, max_steps=1, **DIVERGENCE)
    statistics = run._statistics

    def fails(*args, **kwargs):
        statistics(*args, **kwargs)
        raise torch.OutOfMemoryError("none left")

    run._statistics = fails
    with pytest.raises(torch.OutOfMemoryError):
        run.train()
    assert run._teacher_states is None


@pytest.mark.slow
def test_in_packs(tmp_path):
    """As padded: losses, divergences and weights."""
    runs = {}
    for packing in (False, True):
        run, logs = make(tmp_path / str(packing), packing=packing, **DIVERGENCE)
        run.train()
        assert (run._packed is not None) == packing
        runs[packing] = (
            [row[name] for row in logs.steps for name in ("loss", "divergence/mean", "grad_norm")],
            weights(run),
        )
    assert runs[True][0] == pytest.approx(runs[False][0], rel=1e-4, abs=1e-6)
    for name, value in runs[False][1].items():
        torch.testing.assert_close(runs[True][1][name], value, rtol=1e-3, atol=1e-4)


def test_without_one_nothing_is_kept(tmp_path, monkeypatch):
    _, logs, calls = calls_of(tmp_path, monkeypatch, divergence=None, divergence_weight=1.0, max_steps=1)
    assert all(args[2] is None for args, _, _ in calls)
    assert "divergence/mean" not in logs.steps[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"divergence": "kl"}, 'divergence: expected "reverse_kl" or "forward_kl" or "jsd", got'),
        ({"divergence": None}, "divergence_weight: expected 1, since divergence is None"),
        ({"divergence_beta": 0.2}, "divergence_beta: expected 0.5, since the kind is"),
        ({"divergence_weight": -1.0}, "divergence_weight: expected a finite number above 0"),
        ({"policy_weight": -1.0}, "policy_weight: expected a finite number at least 0"),
        ({"divergence_top_k": 0}, "divergence_top_k: expected at least 1"),
        ({"grad_mode": "sparse"}, 'grad_mode: expected "exact", since there is a divergence'),
        ({"num_iterations": 2}, "divergence: expected None unless each rollout serves one update"),
        ({"loss_type": "grpo"}, "divergence: expected None unless"),
        ({"token_advantage": "grpo"}, "divergence: expected None unless"),
        ({"beta": 0.1}, "divergence: expected None unless"),
        ({"prefix_weight": 0.5}, "divergence: expected None unless"),
    ],
    ids=str,
)
def test_what_a_config_refuses(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        EGRSDConfig(str(tmp_path), use_cpu=True, bf16=False, **DIVERGENCE | options)


def test_a_function_of_ones_own_has_none(tmp_path):
    with pytest.raises(ValueError, match="divergence: expected None, as the trainer is given a token_advantage"):
        own = functools.partial(EGRSDTrainer, token_advantage=lambda evidence: evidence.student_logp)
        make(tmp_path, cls=own, **DIVERGENCE)


def test_sharded_weights_have_none(tmp_path):
    from egrsd_kernels.trl.starting import check_constructed

    run, _ = make(tmp_path, **DIVERGENCE)
    check_constructed(run)
    run._sharded = True  # as under FSDP and ZeRO-3
    with pytest.raises(ValueError, match=r"^divergence: expected None, not supported with sharded weights$"):
        check_constructed(run)
