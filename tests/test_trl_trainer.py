"""EGRSDTrainer on a CPU with a tiny model, a few steps each: every option trains, and does what it says."""

from __future__ import annotations

import copy
import itertools
import math
import types

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from egrsd_kernels import fused_egrsd_loss
from egrsd_kernels.rl import WelfordAdvantage
from egrsd_kernels.rollouts import write_token_report
from egrsd_kernels.trl import EGRSDConfig, EGRSDTrainer
from reference.egrsd import egrsd_loss
from tests.support.trl_tiny import (
    LORA,
    OPTIONS,
    SPECIAL,
    Dataset,
    correct,
    dataset,
    exported,
    make,
    row,
    tiny_model,
    tokenizer,
    weights,
)

SETTINGS = {
    "lora": {},
    "lora, checkpointed": {"gradient_checkpointing": True},
    "lora, frozen": {"teacher_model_kind": "frozen"},
    "lora, ema": {"teacher_model_kind": "ema", "teacher_update_rate": 0.5},
    "full": {"peft": False},
    "full, copy": {"peft": False, "teacher_model_kind": "ema", "teacher_update_rate": 1.0},
    "rlsd": {"gamma": 0.0},
    "reinforce": {"gamma": 0.0, "clip_eps": 0.0},
    "no lookahead": {"lookahead": 0},
    "group": {"advantage": "group", "scale_rewards": "none"},
    "several passes": {"num_iterations": 2, "steps_per_generation": 4},
    "no thinking": {"chat_template_kwargs": {"enable_thinking": False}},
    "sparse": {"grad_mode": "sparse", "sparse_tol": 0.01},
    "bf16": {"bf16": True},
    "temperature": {"temperature": 0.7},
    "padded": {"pad_to_multiple_of": 8},
    "truncated masked": {"mask_truncated_completions": True},
    "eval": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 4,
        "eval_dataset": dataset(4),
        "logging_steps": 2,
    },
    "eval of TRL's loss": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 4,
        "eval_dataset": dataset(4),
        "logging_steps": 2,
        "loss_type": "grpo",
        "beta": 0.1,
        "num_iterations": 2,
    },
}
ALWAYS = {"gamma", "tokens_per_second", "peak_memory_gib", "reward", "completions/clipped_ratio"}
WITH_TOKENS = {
    "teacher_entropy/mean",
    "gate/bin_3",
    "regime/fork",
    "abs_log_ratio/entropy_decile_2",
    "completions/mean_length",
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", SETTINGS)
def test_every_option_trains(tmp_path, name):
    run, logs = make(tmp_path, **SETTINGS[name])
    before = weights(run)
    run.train()
    assert run.state.global_step == 2
    assert all(math.isfinite(row["loss"]) for row in logs.steps)
    assert any(not torch.equal(before[key], value) for key, value in weights(run).items())
    assert logs.steps[0].keys() >= ALWAYS | WITH_TOKENS
    if name == "reinforce":
        assert all(row["gate/mean"] == row["magnitude/mean"] == 1 for row in logs.steps)
    measured = [row["gradient/error_bound"] for row in logs.steps if "gradient/error_bound" in row]
    assert len(measured) == (2 if name == "sparse" else 0) and all(bound <= 0.01 for bound in measured)
    if name.startswith("eval"):
        evaluated = [row for row in logs.rows if "eval_reward" in row]
        assert len(evaluated) == 2
        assert evaluated[0].keys() >= {f"eval_{metric}" for metric in ALWAYS | WITH_TOKENS}
        assert run.welford.steps == 2 // run.num_iterations  # evaluation left the statistics alone
        assert ("eval_kl" in evaluated[0]) == (run.beta > 0)


class Spy:
    """Records what each loss call got and gave."""

    def __init__(self, run, look=lambda inputs, loss: None):
        self.calls, self.results, compute = [], [], run._compute_loss

        def compute_loss(model, inputs):
            loss = compute(model, inputs)
            self.calls.append(dict(inputs))
            self.results.append((loss.item(), look(inputs, loss)))
            return loss

        run._compute_loss = compute_loss


@pytest.mark.heavy
@pytest.mark.parametrize("peft", [True, False])
def test_the_loss_is_the_references_on_full_logits(tmp_path, peft):
    """With a teacher made from scratch: the untouched model in float64, one unpadded row at a time."""
    run, _ = make(tmp_path, peft=peft, temperature=0.8)
    base = run.model.get_base_model() if peft else run.model
    plain = tiny_model().double()
    examples = {f"<user>{e['prompt'][0]['content']}<end><assistant>": e for e in run.train_dataset}

    @torch.no_grad()
    def reference(inputs, _):
        prompt, completion = inputs["prompt_ids"], inputs["completion_ids"]
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        student = base.model(torch.cat([prompt, completion], 1), mask, positions).last_hidden_state
        student = student[:, prompt.shape[1] - 1 : -1].double()
        teacher = torch.zeros_like(student)
        for index, (ids, attended) in enumerate(zip(prompt, inputs["prompt_mask"], strict=True)):
            example = examples[tokenizer().decode(ids[attended.bool()])]
            context = tokenizer().apply_chat_template(
                run.teacher_prompt(example), add_generation_prompt=True, return_dict=True
            )["input_ids"]
            count = int(inputs["completion_mask"][index].sum())
            whole = torch.tensor([[*context, *completion[index, :count].tolist()]])
            teacher[index, :count] = plain.model(whole).last_hidden_state[0, len(context) - 1 : -1]
        return egrsd_loss(
            student,
            base.lm_head.weight.double(),
            teacher,
            completion,
            inputs["advantages"].double(),
            teacher_weight=plain.lm_head.weight,
            mask=inputs["completion_mask"],
            gamma=0.8,
            lookahead=3,
            temperature=0.8,
            normalizer=inputs["normalizer"].double(),
            entropy_scale=inputs["entropy_scale"].double(),
        ).item()

    spy = Spy(run, reference)
    run.train()
    assert len(spy.results) == 4
    for loss, expected in spy.results:
        assert loss == pytest.approx(expected, rel=1e-4, abs=1e-5)
    if peft:
        for key, value in tiny_model().state_dict().items():
            ours = dict(base.named_parameters())
            assert torch.equal(value, ours.get(key, ours.get(key.replace(".weight", ".base_layer.weight"))))


@pytest.mark.heavy
@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo"])
def test_without_magnitude_and_gate_it_is_grpo(tmp_path, loss_type):
    # SGD: Adam would turn a gradient that is zero but for rounding into a step of full size.
    options = {"loss_type": loss_type, "max_steps": 3, "optim": "sgd", "learning_rate": 0.5}
    theirs, _ = make(tmp_path / "a", cls=GRPOTrainer, config=GRPOConfig, **options)
    before = weights(theirs)
    theirs.train()
    ours, _ = make(tmp_path / "b", advantage="group", length_beta=0.0, gamma=0.0, clip_eps=0.0, **options)
    ours.train()
    moved = sum((value - before[key]).square().sum() for key, value in weights(theirs).items()).sqrt()
    apart = sum((value - weights(ours)[key]).square().sum() for key, value in weights(theirs).items()).sqrt()
    assert moved > 1e-2
    assert apart < 1e-4 * moved


@pytest.mark.heavy
@pytest.mark.parametrize("scale", ["batch_max", "batch_max_lookahead", "log_vocab", 3.5])
@pytest.mark.parametrize("generation", [2, 4, 1])
def test_the_scale_and_the_normaliser_are_the_steps(tmp_path, scale, generation):
    """Those of two micro-batches; the scale is each one's where each is generated by itself."""
    run, _ = make(tmp_path, entropy_scale=scale, steps_per_generation=generation, min_entropy_scale=0.1)
    spy = Spy(run)
    run.train()
    assert len(spy.calls) == 4
    size = min(generation, 2)
    for step in (spy.calls[i : i + size] for i in range(0, 4, size)):
        tokens, entropies = 0, []
        for inputs in step:
            lengths = inputs["completion_mask"].sum(1).tolist()
            tokens += sum(lengths)
            for values, length in zip(inputs["teacher_entropy"].tolist(), lengths, strict=True):
                window = 4 if scale == "batch_max_lookahead" else 1
                entropies += [min(values[t : min(t + window, length)]) for t in range(length)]
        expected = {"log_vocab": math.log(len(tokenizer())), 3.5: 3.5}.get(scale, max(entropies))
        for inputs in step:
            assert "normalizer" not in inputs if generation != 2 else inputs["normalizer"].item() == tokens
            assert inputs["entropy_scale"].item() == pytest.approx(expected)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "filter",
    [
        {"lookahead_filter": "discounted", "lookahead_decay": 0.6},
        {"lookahead_filter": "softmin", "lookahead_temperature": 1.0},
        {"lookahead_filter": "quantile", "lookahead_quantile": 0.5},
    ],
    ids=["discounted", "softmin", "quantile"],
)
def test_the_filtered_lookahead_is_the_losss(tmp_path, filter):
    """Its numbers, and the scale after it (Algorithm 1)."""
    window = {"lookahead": 3, **filter}
    run, _ = make(tmp_path, max_steps=1, entropy_scale="batch_max_lookahead", min_entropy_scale=0.01, **window)
    base = run.model.get_base_model()

    @torch.no_grad()
    def expected(inputs, _):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        hidden = base.model(ids, mask, (mask.cumsum(1) - 1).clamp(min=0)).last_hidden_state
        arguments = hidden[:, inputs["prompt_ids"].shape[1] - 1 : -1], base.lm_head.weight, None
        names = ("teacher_logp", "teacher_entropy", "normalizer", "entropy_scale")
        options = {name: inputs[name] for name in names} | {"mask": inputs["completion_mask"], "gamma": 0.8}
        arguments += inputs["completion_ids"], inputs["advantages"]
        loss, stats = fused_egrsd_loss(*arguments, **options, **window, return_stats=True)
        least = fused_egrsd_loss(*arguments, **options, lookahead=3, return_stats=True)[1]
        ahead, least = stats.lookahead_entropy, least.lookahead_entropy
        return loss.item(), ahead.max().item(), (ahead.sum() / least.sum()).item()

    spy = Spy(run, expected)
    run.train()
    losses, peaks, above_the_minimum = zip(*(expected for _, expected in spy.results), strict=True)
    assert [loss for loss, _ in spy.results] == pytest.approx(losses)
    assert spy.calls[0]["entropy_scale"].item() == pytest.approx(max(peaks)) and min(above_the_minimum) > 1.01


# --------------------------------------------------------------------------------------------------------- no logits


class Largest(TorchDispatchMode):
    """The size in elements of the largest tensor that was made while it was on."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


@pytest.mark.heavy
@pytest.mark.parametrize("chunk_mib", [1, 64])
def test_logits_are_never_made(tmp_path, chunk_mib):
    """Teacher pass, loss and backward make nothing as large as the logits of a batch; the head makes one column.

    As a check of the check: allowed more working memory, the loss takes it.
    """
    vocabulary, tokens = 40_000, 4 * 12
    run, _ = make(
        tmp_path,
        model=tiny_model(vocabulary),
        chunk_mib=chunk_mib,
        max_steps=1,
        generation_kwargs={"min_new_tokens": 12},
    )
    columns, largest = {True: set(), False: set()}, Largest()
    head = run.model.get_base_model().lm_head
    head.register_forward_hook(lambda module, _, out: columns[largest.on].add(out.shape[-1]))
    largest.on = False

    def watched(function):
        def call(*args, **kwargs):
            with largest:
                largest.on = True
                out = function(*args, **kwargs)
                largest.on = False
            return out

        return call

    for owner, name in ((run, "_compute_loss"), (run, "_statistics"), (run.accelerator, "backward")):
        setattr(owner, name, watched(getattr(owner, name)))
    run.train()
    assert columns == {True: {1}, False: {vocabulary}}  # of the others, generation makes logits
    weight = vocabulary * 32  # seen as a view
    assert weight < tokens * vocabulary
    if chunk_mib == 1:
        assert largest.elements == weight
    else:
        assert largest.elements == tokens * vocabulary


@pytest.mark.slow
def test_old_log_p_without_logits(tmp_path):
    """What TRL asks for of fresh rollouts, against log_softmax of full logits."""
    run, _ = make(tmp_path, temperature=0.7)
    ids = torch.randint(6, 60, (6, 20))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        logp, entropy, *_ = run._get_per_token_logps_and_entropies(run.model, ids, mask, 8, 2, compute_entropy=True)
    with torch.no_grad():
        logits = run.model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 11:-1]
    expected = (logits / 0.7).log_softmax(-1)
    torch.testing.assert_close(logp, expected.gather(-1, ids[:, -8:, None])[..., 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_vllms_importance_ratio_multiplies_the_advantages(tmp_path, loss_type):
    """vLLM's part is played by transformers, whose log p it reports as half: the ratio is 2 everywhere."""

    def first_loss(path, vllm: bool) -> dict:
        options = {"vllm_importance_sampling_mode": "token_truncate", "max_steps": 1, "advantage": "group"}
        options |= {"loss_type": loss_type, "epsilon_high": 2.0}
        run, logs = make(path, **options)
        if vllm:
            generate = run._generate_single_turn

            def played(prompt_ids, *rest):
                run.use_vllm = False
                responses, _ = generate(prompt_ids, *rest)
                run.use_vllm = True
                told = []
                for prompt, response in zip(prompt_ids, responses, strict=True):
                    with torch.no_grad():
                        logits = run.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
                    logp = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
                    told.append((logp - math.log(2)).tolist())
                return responses, told

            run.use_vllm, run.vllm_importance_sampling_correction = True, True
            run._generate_single_turn = played
        run.train()
        return logs.steps[0]

    plain, corrected = first_loss(tmp_path / "plain", False), first_loss(tmp_path / "vllm", True)
    assert plain["completions/mean_length"] == corrected["completions/mean_length"]
    assert plain["grad_norm"] > 1e-3
    assert corrected["grad_norm"] == pytest.approx(2 * plain["grad_norm"], rel=1e-4)
    assert corrected["loss"] == pytest.approx(2 * plain["loss"], abs=2e-4)  # some versions log 4 digits


# ---------------------------------------------------------------------------------------------------------- teachers


class Track(TrainerCallback):
    """The teacher's and the student's first trained weight after each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **_):
        self.seen.append((self.run.teacher.kept[0].clone(), self.run.teacher.own[0].detach().clone()))


@pytest.mark.heavy
@pytest.mark.parametrize(
    "options, rate, every",
    [
        ({"teacher_model_kind": "frozen"}, 0.0, 1),
        ({"teacher_model_kind": "ema", "teacher_update_rate": 0.25}, 0.25, 1),
        ({"teacher_model_kind": "ema", "teacher_update_rate": 0.25, "teacher_sync_steps": 3}, 0.25, 3),
        ({"teacher_model_kind": "ema", "teacher_update_rate": 1.0, "teacher_sync_steps": 2}, 1.0, 2),
        ({"teacher": "ema", "teacher_ema_decay": 0.75, "teacher_copy_steps": 2}, 0.25, 1),
        ({"teacher": "copy", "teacher_ema_decay": 0.75, "teacher_copy_steps": 2}, 1.0, 2),
    ],
)
def test_how_the_teacher_moves(tmp_path, options, rate, every):
    track = Track()
    run, _ = make(tmp_path, peft=False, max_steps=4, **options)
    run.add_callback(track)  # after the teacher's own
    track.run = run
    start = run.teacher.kept[0].clone()
    run.train()
    expected = start
    for step, (teacher, student) in enumerate(track.seen, 1):
        if step % every == 0:
            expected = (1 - rate) * expected + rate * student
        torch.testing.assert_close(teacher, expected)
    assert not torch.equal(student, start)
    assert torch.equal(teacher, start) == (rate == 0)


def test_the_teacher_reads_its_weights_and_gives_the_students_back(tmp_path):
    run, _ = make(tmp_path, peft=False)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.01)
    before, start = weights(run), dict(tiny_model().named_parameters())
    with pytest.raises(KeyboardInterrupt), run._as_teacher():
        assert all(torch.equal(value, start[key]) for key, value in weights(run).items())
        assert not run.model.training
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[key]) for key, value in weights(run).items())
    assert run.model.training


def test_a_frozen_teacher_is_recognised_whatever_the_order_of_sums(tmp_path):
    """A float sum depends on the number of threads, and on the device."""
    run, _ = make(tmp_path, peft=False)
    digest = run.teacher.state_dict()["digest"]
    weight = run.teacher.kept[0]
    run.teacher.kept[0] = weight.flip(0)  # the same numbers in another order
    assert run.teacher.state_dict()["digest"] == digest
    run.teacher.kept[0] = weight.clone()
    run.teacher.kept[0].view(torch.int32)[0, 0] ^= 1
    assert run.teacher.state_dict()["digest"] != digest


def test_unwrapping_leaves_the_model_readable(tmp_path):
    """Accelerate takes off its wrapper of the forward in mixed precision, and nothing else."""
    run, _ = make(tmp_path, peft=False, bf16=True, max_steps=1, eval_dataset=dataset(4), per_device_eval_batch_size=4)
    run.train()
    run.accelerator.unwrap_model(run.model_wrapped, keep_fp32_wrapper=False)
    assert math.isfinite(run.evaluate()["eval_loss"])


def test_the_datasets_may_be_positional(tmp_path):
    """As GRPOTrainer's: what a script passes keeps its place."""
    args = EGRSDConfig(str(tmp_path), **OPTIONS)
    run = EGRSDTrainer(tiny_model(), correct, args, dataset(), dataset(4), processing_class=tokenizer())
    assert len(run.train_dataset) == 12 and len(run.eval_dataset) == 4


def test_the_teachers_context(tmp_path):
    run, _ = make(tmp_path, chat_template_kwargs={"enable_thinking": False})
    asked, tokenize = [], run._tokenize_prompts
    run._tokenize_prompts = lambda prompts: asked.append((prompts, tokenize(prompts)[0])) or tokenize(prompts)
    run.train()
    prompts, ids = asked[1]  # after the student's
    example = next(e for e in run.train_dataset if e["prompt"] == prompts[0][:1])
    assert [message["role"] for message in prompts[0]] == ["user", "assistant", "user"]
    assert prompts[0][1]["content"] == example["solution"]
    text = tokenizer().decode(ids[0])
    assert example["solution"] in text and text.endswith("<assistant><think></think>")

    template = [{"role": "user", "content": "Hint. {solution}"}]
    run, _ = make(tmp_path, teacher_template=template, solution_column="answer")
    assert run.teacher_prompt(row(1, 2)) == [
        {"role": "user", "content": "1+2?"},
        {"role": "user", "content": "Hint. 3"},
    ]


# ---------------------------------------------------------------------------------------------------------- rollouts


def test_exported_rollouts_are_what_the_run_learned_from(tmp_path):
    run, logs = make(tmp_path, rollout_steps=2, max_steps=4, gamma_schedule="linear", gamma_end=0.0)
    spy = Spy(run)
    run.train()
    records = exported(tmp_path)
    assert [path.name for path in sorted((tmp_path / "rollouts").iterdir())] == [
        "rollouts-step000002.jsonl",
        "rollouts-step000004.jsonl",
    ]
    assert [r.step for r in records] == [2] * 8 + [4] * 8
    assert [row["gamma"] for row in logs.steps] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    calls = {2: spy.calls[2:4], 4: spy.calls[6:8]}
    rewards = [{r.reward for r in records if r.step == step} for step in (2, 4)]
    assert all(len(r) > 1 for r in rewards)
    solutions = {f"<user>{e['prompt'][0]['content']}<end><assistant>": e["solution"] for e in dataset()}
    for index, r in enumerate(records):
        count, gamma = len(r.tokens), {2: 0.6, 4: 0.2}[r.step]
        assert r.reference == solutions[r.prompt]
        assert r.title == ("" if r.tokens[-1] == "<end>" else "truncated")
        completion = [{"content": "".join(token for token in r.tokens if token not in SPECIAL)}]
        assert r.reward == pytest.approx(correct([completion], None)[0] * (1 + 0.5 * (1 - count / 12)), rel=1e-5)
        inputs = calls[r.step][index % 8 // 4]
        assert r.advantage == pytest.approx(inputs["advantages"][index % 4].item(), rel=1e-5)
        assert r.entropy == pytest.approx(inputs["teacher_entropy"][index % 4, :count].tolist(), rel=1e-5)
        assert r.lookahead_entropy == [min(r.entropy[t : t + 4]) for t in range(count)]
        scale = inputs["entropy_scale"].item()
        for t in range(count):
            assert r.gate[t] == pytest.approx(min(max(1 - gamma * r.lookahead_entropy[t] / scale, 0.1), 1), rel=1e-4)
            assert r.token_advantage[t] == pytest.approx(r.advantage * r.magnitude[t] * r.gate[t], rel=1e-4)
            ratio = math.exp(math.copysign(1, r.advantage) * r.log_ratio[t])
            assert r.magnitude[t] == pytest.approx(min(max(ratio, 0.8), 1.2), rel=1e-4)
    write_token_report(tmp_path / "page.html", records)


@pytest.mark.slow
def test_advantages_are_whitened_by_the_generations_before(tmp_path):
    run, _ = make(tmp_path, rollout_steps=1, max_steps=4)
    run.train()
    welford = WelfordAdvantage(warmup_steps=1)
    records = exported(tmp_path)
    for step in range(1, 5):
        now = [r for r in records if r.step == step]
        expected = welford(torch.tensor([r.reward for r in now]))
        assert [r.advantage for r in now] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    assert run.welford.state_dict() == pytest.approx(welford.state_dict(), rel=1e-5)


@pytest.mark.slow
def test_the_bonus_is_for_a_positive_sum_of_rewards(tmp_path):
    """A penalty of a constant size punishes short answers no more than long ones."""

    def penalty(completions, **_):
        return [1.0] * len(completions)

    run, _ = make(tmp_path, reward_funcs=[correct, penalty], reward_weights=[1.0, -0.5], rollout_steps=1, max_steps=2)
    run.train()
    rollouts = exported(tmp_path)
    assert len({len(r.tokens) for r in rollouts}) > 1
    for r in rollouts:
        right = r.reward > 0
        expected = 0.5 * (1 + 0.5 * (1 - len(r.tokens) / 12)) if right else -0.5
        assert r.reward == pytest.approx(expected, rel=1e-5)
    assert {r.reward > 0 for r in rollouts} == {True, False}


@pytest.mark.slow
def test_tokens_per_second_count_every_step_between_two_logs(tmp_path):
    """TRL averages what steps log; a generation that serves several of them is in the time of one."""
    options = {"num_iterations": 2, "steps_per_generation": 4, "logging_steps": 4, "max_steps": 4}
    run, logs = make(tmp_path, rollout_steps=1, **options)
    reads = itertools.count(1)
    clock = types.SimpleNamespace(perf_counter=lambda: run.state.global_step + 1e-4 * next(reads))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("egrsd_kernels.trl.step_log.time", clock)
        run.train()
    tokens = sum(len(r.tokens) for r in exported(tmp_path))
    assert logs.steps[0]["tokens_per_second"] == pytest.approx(tokens / 3, rel=0.01)  # the last step is the third's end


@pytest.mark.slow
def test_a_masked_rollout_is_exported_without_tokens(tmp_path):
    run, _ = make(tmp_path, rollout_steps=1, max_steps=1, mask_truncated_completions=True)
    run.train()
    truncated = [r for r in exported(tmp_path) if r.title == "truncated"]
    assert truncated and not any(r.tokens for r in truncated)


@pytest.mark.slow
def test_a_step_without_any_token_does_nothing_and_says_so(tmp_path):
    """Every rollout truncated and masked: loss 0, no metric of tokens, no NaN in the weights."""
    options = {"mask_truncated_completions": True, "generation_kwargs": {"min_new_tokens": 12}}
    run, logs = make(tmp_path, max_steps=1, **options)
    before = weights(run)
    run.train()
    assert logs.steps[0]["loss"] == 0
    assert logs.steps[0].keys() >= ALWAYS and "gate/mean" not in logs.steps[0]
    assert all(torch.equal(value, before[key]) for key, value in weights(run).items())


# --------------------------------------------------------------------------------------------------------- bad input


def bad_row(**change) -> Dataset:
    return Dataset.from_list([row(1, 2), row(3, 4) | change, *dataset(2)])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"solution_column": "proof"}, "train_dataset: expected a column 'proof', got prompt, solution, answer"),
        ({"train_dataset": dataset().remove_columns("prompt")}, "train_dataset: expected a column 'prompt'"),
        ({"eval_dataset": {"a": dataset().remove_columns("solution")}}, "eval_dataset: expected a column 'solution'"),
        ({"train_dataset": bad_row(solution=" ")}, "train_dataset, row 1: solution: expected the text of a reference"),
        ({"train_dataset": bad_row(solution=None)}, "train_dataset, row 1: solution: expected the text of a reference"),
        ({"train_dataset": bad_row(prompt=[])}, "train_dataset, row 1: prompt: expected a conversation"),
        (
            {"train_dataset": Dataset.from_list([row(1, 2) | {"prompt": "1+2?"}] * 4)},
            "train_dataset, row 0: prompt: expected a conversation, a list of messages, got '1+2?'",
        ),
        (
            {"train_dataset": bad_row(prompt=[{"role": "user", "content": None}])},
            "train_dataset, row 1: prompt: expected messages with role and content, got {",
        ),
        (
            {"train_dataset": Dataset.from_list([row(1, 2) | {"prompt": ["1+2?"]}] * 4)},
            "train_dataset, row 0: prompt: expected messages with role and content, got '1+2?'",
        ),
        ({"train_dataset": dataset(3)}, "train_dataset: expected at least 4 rows, the prompts of one generation"),
        ({"train_dataset": dataset(4).select([])}, "train_dataset: expected at least 4 rows, the prompts of one"),
        ({"teacher_template": [{"role": "user", "content": "?"}]}, "train_dataset, row 0: template: expected"),
        (
            {"teacher_model_kind": "adapters_off", "peft": False},
            "teacher_model_kind: 'adapters_off' expects a model with PEFT adapters",
        ),
        ({"reward_funcs": None}, "reward_funcs: expected at least one"),
        ({"config": GRPOConfig}, "args: expected an EGRSDConfig, got GRPOConfig"),
    ],
)
def test_a_bad_argument_is_named_in_one_line(tmp_path, options, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        make(tmp_path, **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_chat_template_is_refused(tmp_path):
    plain = copy.copy(tokenizer())
    plain.chat_template = None
    args = EGRSDConfig(str(tmp_path), **OPTIONS)
    with pytest.raises(ValueError, match=r"^processing_class: expected a tokenizer with a chat template"):
        EGRSDTrainer(tiny_model(), correct, args, dataset(), processing_class=plain)


def test_teachers_that_would_not_work_are_refused():
    from peft import get_peft_model

    from egrsd_kernels.trl.teacher import AdaptersOff, make_teacher

    with pytest.raises(ValueError, match=r"^teacher_model_kind: 'ema' is not supported with sharded weights"):
        make_teacher(tiny_model(), "ema", sharded=True)
    with pytest.raises(ValueError, match=r"^teacher_model_kind: 'ema' expects trained weights in float32, got torch.b"):
        make_teacher(tiny_model().bfloat16(), "ema", sharded=False, update_rate=0.5)
    assert make_teacher(tiny_model().bfloat16(), "ema", sharded=False, update_rate=1.0).moves  # copies round nothing
    assert isinstance(make_teacher(get_peft_model(tiny_model(), LORA), "base", sharded=True), AdaptersOff)
