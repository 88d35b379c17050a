"""TRL's own loss on token advantages: every loss type and term against TRL's code on the model's full logits."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from peft import PeftModel, get_peft_model
from trl import GRPOTrainer

import reference
from egrsd_kernels.trl import fuse_heads
from tests.support.trl_tiny import LORA, OPTIONS, make, tiny_model, tokenizer, weights
from tests.test_trl_models import build

KEYS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
CREDIT = {"gamma": OPTIONS["gamma"], "lookahead": OPTIONS["lookahead"], "clip_eps": 0.5}


def norm(tensors) -> float:
    return math.sqrt(sum(x.square().sum().item() for x in tensors))


def gradients(loss, model) -> list[torch.Tensor]:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    made = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(trained, made, strict=True)]


def apart(one, other) -> float:
    """How far gradients are from others, relative to their norm."""
    size = norm(other)
    assert size > 1e-4
    return norm(a - b for a, b in zip(one, other, strict=True)) / size


def check_both_paths(run, steps: int) -> None:
    """Train; at each of so many micro-batches the direct loss's gradients are those of TRL's, in float32."""
    direct, compared = run._direct_loss, 0

    def both(model, inputs):
        nonlocal compared
        theirs, _ = run._trl_loss(model, inputs)
        ours, signals = direct(model, inputs)
        assert apart(gradients(ours, model), gradients(theirs, model)) < 1e-6
        compared += 1
        return ours, signals

    run._direct_loss = both
    run.train()
    assert compared == steps


# -------------------------------------------------------------------------------------------------- one step, two paths


@pytest.mark.heavy
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "dr_grpo", "peft": False, "temperature": 0.7},
        {"peft": False, "model": "mixtral", "router_aux_loss_coef": 0.3},
        {"mask_truncated_completions": True, "importance_sampling_level": "sequence_token"},
        {"position_weight": 0.7, "peft": False},
    ],
)
def test_both_paths_give_the_same_step(tmp_path, options):
    """The direct loss and TRL's on the same batch: gradients, Â, and what they are made of."""
    if options.get("model") == "mixtral":
        options = {**options, "model": build("mixtral", num_local_experts=4)}
    run, logs = make(tmp_path, **options)
    assert run.args.direct
    direct, checked = run._direct_loss, 0

    def both(model, inputs):
        nonlocal checked
        metrics = {name: list(values) for name, values in run._metrics["train"].items()}
        theirs, other = run._trl_loss(model, inputs)
        run._metrics["train"].clear()
        run._metrics["train"].update(metrics)
        ours, stats = direct(model, inputs)
        if inputs["completion_mask"].any():
            # Float32: some hundred products are summed in another order.
            assert apart(gradients(ours, model), gradients(theirs, model)) < 1e-6
            checked += 1
        assert stats.keys() == other.keys() >= {"token_advantage", "gate"}
        for name, one in stats.items():
            torch.testing.assert_close(one, other[name], rtol=1e-5, atol=1e-5, msg=name)
        return ours, stats

    run._direct_loss = both
    run.train()
    assert checked >= 2
    assert all(math.isfinite(row["loss"]) for row in logs.steps)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_vllms_correction_weighs_the_loss_and_not_what_is_logged(tmp_path, level):
    """As with vLLM whose log p was another: on both paths the ratio is the loss's, and Â, w and ω are the method's."""
    run, _ = make(tmp_path, max_steps=1, position_weight=0.5 if level == "token" else 0.0)
    direct, checked = run._direct_loss, 0

    def both(model, inputs):
        nonlocal checked
        mask = inputs["completion_mask"]
        ratio = torch.rand(mask.shape if level == "token" else (len(mask), 1))
        ratio[0] = 0  # a rollout that the default mode masks
        batch, run.use_vllm = inputs | {"importance_sampling_ratio": ratio}, True
        theirs, other = run._trl_loss(model, batch)
        ours, stats = direct(model, batch)
        run.use_vllm = False
        assert apart(gradients(ours, model), gradients(theirs, model)) < 1e-6
        assert (stats["magnitude"][0] != 1)[mask[0].bool()].all()
        for name, one in stats.items():
            torch.testing.assert_close(one, other[name], rtol=1e-5, atol=1e-5, msg=name)
        checked += 1
        return ours, stats

    run._direct_loss = both
    run.train()
    assert run.args.direct and checked == 2


# ------------------------------------------------------------------------------------------- TRL's code on full logits


class OnFullLogits:
    """Holds loss, gradient and metrics of each micro-batch against TRL's loss on log p of the model's own logits.

    TRL gets the reference's Â (B, T). log p of the policy before and of the reference model, which the batch has, are
    held against full logits, too.
    """

    STATE = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")

    def __init__(self, run):
        self.run, self.loss, self.losses, self.moved, self.compared = run, run._compute_loss, [], [], 0
        run._compute_loss = self.compare

    def logits(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        extra = {"output_router_logits": True} if self.run.aux_loss_enabled else {}
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **extra)
        return out.logits[:, -inputs["completion_ids"].shape[1] - 1 : -1], out

    def token_advantages(self, logits, inputs):
        names = ("teacher_logp", "teacher_entropy", "entropy_scale")
        _, stats = reference.egrsd_loss(
            logits.detach(), torch.eye(logits.shape[-1]), None, inputs["completion_ids"], inputs["advantages"],
            mask=inputs["completion_mask"], temperature=self.run.temperature, return_stats=True,
            **CREDIT | {name: inputs[name] for name in names},
        )  # fmt: skip
        return stats.token_advantage

    def trls(self, model, inputs):
        """TRL's loss with everything from full logits."""
        run, mask = self.run, inputs["completion_mask"]
        logits, out = self.logits(model, inputs)
        scaled = logits / run.temperature
        found = (reference.log_prob(scaled, inputs["completion_ids"]) * mask, reference.entropy(scaled) * mask)
        found += (out.aux_loss,) if run.aux_loss_enabled else (None,)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "_get_per_token_logps_and_entropies", lambda *_, **__: found)
            batch = {**inputs, "advantages": self.token_advantages(logits, inputs)}
            return self.formula(found, model, batch)

    def formula(self, found, model, batch):
        return GRPOTrainer._compute_loss(self.run, model, batch)

    def compare(self, model, inputs):
        run, metrics = self.run, self.run._metrics["train"]
        before = {name: len(values) for name, values in metrics.items()}
        state = {name: getattr(run, name) for name in self.STATE}
        advantages = inputs["advantages"].clone()
        ours = self.loss(model, inputs)
        assert torch.equal(inputs["advantages"], advantages) and advantages.ndim == 1  # a constant of the rollouts
        logged = {name: list(values) for name, values in metrics.items()}
        later = {name: getattr(run, name) for name in self.STATE}
        for name, value in state.items():
            setattr(run, name, value)
        theirs = self.trls(model, inputs)
        for name in {*metrics}:
            for one, other in zip(
                logged[name][before.get(name, 0) :], metrics[name][len(logged[name]) :], strict=False
            ):
                assert one == pytest.approx(other, rel=1e-4, abs=1e-5, nan_ok=True), name
        metrics.clear()
        metrics.update(logged)
        for name, value in later.items():
            setattr(run, name, value)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        one, other = gradients(ours, model), gradients(theirs, model)
        if norm(other) > 1e-4:
            assert apart(one, other) < 1e-5
            self.compared += 1
        else:  # all of it masked or clipped
            assert norm(one) < 1e-4
        self.losses.append(ours.item())
        with torch.no_grad():
            old = inputs.get("old_per_token_logps")
            if old is not None:
                logp = reference.log_prob(self.logits(model, inputs)[0] / run.temperature, inputs["completion_ids"])
                self.moved.append(((logp - old) * inputs["completion_mask"]).abs().max().item())
        return ours


OFF_POLICY = {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.05}
LOSSES = {
    "dapo": {},
    "grpo": {"loss_type": "grpo", "epsilon": 0.05, "epsilon_high": 0.3},
    "bnpo": {"loss_type": "bnpo", "peft": False, "learning_rate": 5e-3},
    "dr_grpo": {"loss_type": "dr_grpo", "delta": 1.5},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.02},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo", "learning_rate": 5e-3},
    "luspo": {"loss_type": "luspo"},
    "KL": {"beta": 0.3, "use_bias_correction_kl": True},
    "quantile": {"top_entropy_quantile": 0.4},
    "bonus": {"entropy_coef": 0.1},
    "bonus of the quantile": {"entropy_coef": 0.1, "top_entropy_quantile": 0.4, "loss_type": "grpo", "peft": False,
                              "learning_rate": 5e-3},
    "adaptive bonus": {"use_adaptive_entropy": True, "entropy_target": 5.0, "entropy_coef": 0.1,
                       "entropy_coef_delta": 0.01},
    "off-policy mask": {"off_policy_mask_threshold": 1e-3},
    "several updates a generation": {"steps_per_generation": 4, "num_iterations": 1},
    "a generation of parts of updates": {"steps_per_generation": 3, "num_iterations": 1, "max_steps": 3,
                                         "per_device_train_batch_size": 2},
    "router": {"model": "mixtral", "peft": False, "router_aux_loss_coef": 0.3, "learning_rate": 5e-3},
    "sparse": {"grad_mode": "sparse"},
    "checkpointed": {"gradient_checkpointing": True, "entropy_coef": 0.1},
    "truncated masked": {"mask_truncated_completions": True, "loss_type": "bnpo"},
}  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_trls_on_full_logits(tmp_path, name):
    options = OFF_POLICY | {"clip_eps": 0.5, "temperature": 0.8} | LOSSES[name]
    if options.get("model") == "mixtral":
        options["model"] = build("mixtral", num_local_experts=4)
    run, logs = make(tmp_path, **options)
    assert not run.args.direct
    check = OnFullLogits(run)
    run.train()
    assert len(check.losses) == options["max_steps"] * 2 and check.compared >= 2
    assert max(check.moved) > 0.02  # the later updates are another policy's
    rows = logs.steps
    assert all(row.keys() >= {"gate/mean", "magnitude/mean", "entropy"} for row in rows)
    if name in ("grpo", "dr_grpo", "dapo"):
        assert rows[-1]["clip_ratio/region_mean"] > 0
    if name == "KL":
        assert rows[-1]["kl"] > 1e-3
    if name == "adaptive bonus":
        assert rows[-1]["entropy_coef"] == pytest.approx(0.12)
    if name == "router":
        assert rows[0]["aux_loss"] > 0


class GSPOToken(OnFullLogits):
    """GSPO-token, r = sg(s) · π/sg(π) with s = exp(mean log π/π_old), in the loss "grpo"."""

    def formula(self, found, model, batch):
        (logp, _, _), mask = found, batch["completion_mask"]
        old = batch.get("old_per_token_logps", logp.detach())
        count = mask.sum(1, keepdim=True)
        s = (((logp - old) * mask).sum(1, keepdim=True) / count).exp().detach()
        r = s * (logp - logp.detach()).exp()
        clipped = r.clamp(1 - self.run.epsilon_low, 1 + self.run.epsilon_high)
        value = torch.minimum(r * batch["advantages"], clipped * batch["advantages"]) * mask
        return -(value.sum(1) / count[:, 0]).mean() / self.run.current_gradient_accumulation_steps


@pytest.mark.heavy
def test_the_sequences_ratio_with_each_tokens_credit(tmp_path):
    options = OFF_POLICY | {
        "clip_eps": 0.5,
        "temperature": 0.8,
        "loss_type": "grpo",
        "epsilon": 0.01,
        "learning_rate": 0.01,
    }
    run, logs = make(tmp_path, importance_sampling_level="sequence_token", **options)
    check = GSPOToken(run)
    run.train()
    assert len(check.losses) == 4 and check.compared >= 3 and max(check.moved) > 0.02
    assert logs.steps[-1]["clip_ratio/region_mean"] > 0


# ------------------------------------------------------------------------------------------------- reference, unjudged


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """A folder with the tiny model: TRL loads a reference model from there."""
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.heavy
@pytest.mark.parametrize("sync", [False, True])
def test_the_reference_model_is_read_without_logits(tmp_path, saved, sync):
    more = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0} if sync else {}
    run, logs = make(tmp_path, model=saved, peft=False, beta=0.1, max_steps=2, **more)
    seen, generate = [], run._generate_and_score_completions

    def remember(inputs):
        output = generate(inputs)
        logits = OnFullLogits.logits(check, run.ref_model, output)[0] / run.temperature
        expected = reference.log_prob(logits, output["completion_ids"]) * output["completion_mask"]
        torch.testing.assert_close(output["ref_per_token_logps"], expected, rtol=1e-4, atol=1e-5)
        seen.append((output["ref_per_token_logps"] - output["teacher_logp"]).abs().max().item())
        return output

    check = OnFullLogits(run)
    run._compute_loss = check.loss
    run._generate_and_score_completions = remember
    run.train()
    assert len(seen) == 2 and all(row["kl"] >= 0 for row in logs.steps)
    assert (logs.steps[1]["kl"] < 1e-6) == sync  # a copy of the policy
    if sync:
        for mine, theirs in zip(run.model.parameters(), run.ref_model.parameters(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.heavy
def test_a_pretrained_adapter_is_its_own_reference(tmp_path):
    """TRL copies it under the name "ref"; the teacher is the model without either."""
    model = get_peft_model(tiny_model(), LORA)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    run, logs = make(tmp_path, model=model, peft=False, beta=0.1, **OFF_POLICY)
    assert isinstance(run.model, PeftModel) and "ref" in run.model.peft_config
    before = {name: value.clone() for name, value in run.model.named_parameters() if ".ref." in name}
    plain, found = tiny_model(), []
    statistics = run._statistics

    def checked(teacher, *arguments):
        out = statistics(teacher, *arguments)
        with torch.no_grad():
            logits = OnFullLogits.logits(check, plain, dict(zip(KEYS, arguments, strict=False)))[0]
        expected = reference.log_prob(logits / run.temperature, arguments[2]) * arguments[4]
        torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-5)
        found.append(out)
        return out

    check = OnFullLogits(run)
    run._compute_loss = check.loss
    run._statistics = checked
    run.train()
    assert found and logs.steps[0]["kl"] < 1e-6 < logs.steps[1]["kl"]
    assert all(torch.equal(value, before[name]) for name, value in run.model.named_parameters() if ".ref." in name)


@pytest.mark.heavy
@pytest.mark.parametrize("loss_type", ["grpo", "vespo"])
def test_what_nothing_judged_has_no_gradient(tmp_path, loss_type):
    run, logs = make(tmp_path, reward_funcs=lambda completions, **_: [None] * len(completions), loss_type=loss_type)
    before = weights(run)
    run.train()
    assert logs.steps[0]["rewards/unjudged"] == 1 and logs.steps[0]["loss"] == 0
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())


def test_a_loss_that_reads_advantages_before_log_p_fails(tmp_path, monkeypatch):
    """A version of TRL that did would train without token credit, and nothing would tell."""

    def early(self, model, inputs):
        return inputs["advantages"].sum() * 0

    run, _ = make(tmp_path, loss_type="grpo", max_steps=1)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", early)
    with pytest.raises(KeyError, match="advantages"):
        run.train()


def test_a_synchronised_reference_of_adapters_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError) as caught:
        make(tmp_path, beta=0.1, sync_ref_model=True)
    assert str(caught.value).startswith("sync_ref_model: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"beta": 0.1}])
def test_the_direct_path_is_a_matter_of_the_settings(tmp_path, options):
    run, _ = make(tmp_path, max_steps=1, **options)
    called = []
    for name in ("_direct_loss", "_trl_loss"):
        own = getattr(run, name)
        setattr(run, name, lambda *a, own=own, name=name: called.append(name) or own(*a))
    run.train()
    assert called == ["_trl_loss" if options else "_direct_loss"] * 2


def test_it_trains_the_same_while_trls_heads_are_fused(tmp_path, saved):
    """Policy and reference model then have our fused forward, which the trainer takes off or leaves aside."""
    options = {"model": saved, "peft": False, "beta": 0.1, "num_iterations": 2}
    plain, _ = make(tmp_path / "plain", **options)
    plain.train()
    with fuse_heads():
        fused, _ = make(tmp_path / "fused", **options)
        fused.train()
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(fused)[name]), name
