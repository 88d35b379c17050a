import inspect
import re
from types import SimpleNamespace as Parallelism

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

from trl import GRPOTrainer, ModelConfig, TrlParser

from egrsd_kernels.trl import PRESETS, EGRSDConfig
from egrsd_kernels.trl.config import CHOICES
from egrsd_kernels.trl.settings import parse_settings
from tests.support.trl_tiny import OPTIONS

BASE = {name: OPTIONS[name] for name in ("use_cpu", "bf16", "report_to", "num_generations", "max_steps")}


def config(**options) -> EGRSDConfig:
    return EGRSDConfig("unused", **BASE | options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gamma": -0.1}, "gamma: expected a finite number at least 0, got -0.1"),
        ({"gamma": "0.3"}, "gamma: expected a number, got '0.3'"),
        ({"gamma_schedule": "step"}, "gamma_schedule: expected one of constant, linear, cosine, got 'step'"),
        ({"gamma_schedule": "linear"}, 'gamma_end: expected a number with gamma_schedule="linear", got None'),
        ({"gamma_end": 1.0}, "gamma_end: expected None with a constant gamma_schedule, got 1.0"),
        ({"gamma_steps": 3}, "gamma_steps: expected None with a constant gamma_schedule, got 3"),
        ({"gamma_schedule": "cosine", "gamma_end": 1.0, "gamma_steps": 0}, "gamma_steps: expected at least 1, got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: expected at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected at least 1, got 0"),
        ({"num_generations": 0}, "num_generations: expected at least 1, got 0"),
        ({"num_iterations": 0}, "num_iterations: expected at least 1, got 0"),
        ({"max_completion_length": 0}, "max_completion_length: expected at least 1, got 0"),
        ({"learning_rate": -1}, "learning_rate: expected a finite number at least 0, got -1"),
        ({"temperature": 0}, "temperature: expected a finite number above 0, got 0"),
        ({"min_p": 5}, "min_p: expected a finite number at least 0 and at most 1, got 5"),
        ({"top_p": 0.0}, "top_p: expected a finite number above 0 and at most 1, got 0.0"),
        ({"generation_kwargs": {"temperature": 2.0}}, "generation_kwargs: expected no temperature: set temperature, w"),
        ({"generation_kwargs": {"max_new_tokens": 9}}, "generation_kwargs: expected no max_new_tokens: set max_compl"),
        ({"gate_floor": 1.5}, "gate_floor: "),
        ({"clip_eps": 2}, "clip_eps: "),
        ({"lookahead": 1.5}, "lookahead: expected an integer, got 1.5"),
        ({"entropy_scale": "largest"}, "entropy_scale: expected one of batch_max, batch_max_lookahead, log_vocab, or"),
        ({"entropy_scale": 0}, "entropy_scale: expected a finite number above 0, got 0"),
        ({"min_entropy_scale": 0}, "min_entropy_scale: "),
        ({"loss_type": "ppo"}, "loss_type: expected one of dapo, dr_grpo, grpo, bnpo, cispo, sapo, vespo, luspo, got"),
        ({"loss_type": None}, "loss_type: expected one of dapo, dr_grpo, grpo, bnpo, cispo, sapo, vespo, luspo, got"),
        ({"advantage": "rank"}, "advantage: expected one of welford, group, got 'rank'"),
        ({"scale_rewards": "batch"}, "scale_rewards: expected 'group' unless advantage is \"group\", got 'batch'"),
        ({"welford_warmup_steps": 0}, "welford_warmup_steps: expected at least 1, got 0"),
        ({"length_beta": -1}, "length_beta: "),
        ({"max_completion_length": None}, "max_completion_length: expected a number of tokens: length_beta and"),
        (
            {"lookahead_filter": "mean"},
            "lookahead_filter: expected one of minimum, discounted, softmin, quantile, got 'mean'",
        ),
        ({"lookahead_decay": 0.9}, 'lookahead_decay: expected 1, since lookahead_filter is "minimum", got 0.9'),
        (
            {"lookahead_filter": "discounted", "lookahead_decay": 0},
            "lookahead_decay: expected a finite number above 0 and at most 1, got 0",
        ),
        ({"lookahead_temperature": 1}, 'lookahead_temperature: expected 0, since lookahead_filter is "minimum", got 1'),
        (
            {"lookahead_filter": "quantile", "lookahead_quantile": 1.5},
            "lookahead_quantile: expected a finite number at least 0 and at most 1, got 1.5",
        ),
        ({"position_weight": -1.1}, "position_weight: expected a finite number at least -1 and at most 1, got -1.1"),
        ({"prefix_weight": -1}, "prefix_weight: expected a finite number at least 0, got -1"),
        ({"teacher_model_kind": "live"}, "teacher_model_kind: expected one of base, adapters_off, frozen, ema, got 'l"),
        ({"teacher_update_rate": 1.1}, "teacher_update_rate: expected a finite number at least 0 and at most 1"),
        ({"teacher_sync_steps": 0}, "teacher_sync_steps: expected at least 1, got 0"),
        ({"teacher": "self"}, "teacher: expected one of auto, adapters_off, frozen, ema, copy, got 'self'"),
        ({"teacher_ema_decay": 1.1}, "teacher_ema_decay: "),
        ({"teacher_copy_steps": 0}, "teacher_copy_steps: "),
        ({"backend": "cuda"}, "backend: "),
        ({"grad_mode": "dense"}, "grad_mode: expected one of exact, sparse, got 'dense'"),
        ({"sparse_tol": 0}, "sparse_tol: expected a finite number above 0 and at most 1, got 0"),
        ({"chunk_mib": 0}, "chunk_mib: "),
        ({"tau_low": 0.3}, "tau_low: expected less than tau_high = 0.17, got 0.3"),
        ({"rollout_steps": -1}, "rollout_steps: "),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"remove_unused_columns": True}, "remove_unused_columns: expected False: reward functions read the columns"),
        ({"model_init_kwargs": {"tp_plan": "auto"}}, "model_init_kwargs: tp_plan: tensor parallelism is not supported"),
        ({"parallelism_config": Parallelism(tp_size=2)}, "parallelism_config: expected tp_size 1, tensor parallelism"),
        ({"parallelism_config": Parallelism(cp_size=2)}, "parallelism_config: expected cp_size 1, context parallelism"),
        (
            {"parallelism_config": Parallelism(sp_size=4)},
            "parallelism_config: expected sp_size 1, sequence parall",
        ),
        ({"beta": -1}, "beta: expected a finite number at least 0, got -1"),
        ({"beta": None}, "beta: expected a number, got None"),
        ({"epsilon_high": "0.3"}, "epsilon_high: expected a number, got '0.3'"),
        ({"delta": 0}, "delta: expected a finite number above 0, got 0"),
        ({"top_entropy_quantile": 1.2}, "top_entropy_quantile: expected a finite number at least 0 and at most 1"),
        ({"off_policy_mask_threshold": -1}, "off_policy_mask_threshold: expected a finite number at least 0, got -1"),
        (
            {"importance_sampling_level": "sequence"},
            'importance_sampling_level: expected one of token, sequence_token: "sequence" would give each token the '
            "mean of the tokens' credits, got 'sequence'",
        ),
        (
            {"loss_type": "cispo"},
            'epsilon_high: expected at least 1 with loss_type="cispo", which clamps the weight of the gradient there, '
            "got None",
        ),
        (
            {"sync_ref_model": True},
            "sync_ref_model: expected False with beta 0, which has no reference model, got True",
        ),
        ({"packing": "yes"}, "packing: expected True or False, got 'yes'"),
        ({"compile_layers": "graphs"}, "compile_layers: expected True, False, None or 'cudagraphs', got 'graphs'"),
        ({"compile_layers": 1}, "compile_layers: expected True, False, None or 'cudagraphs', got 1"),
        (
            {"compile_layers": "cudagraphs", "packing": False},
            "compile_layers: expected None or False without packing, got 'cudagraphs'",
        ),
        ({"grad_mode": "sparse", "entropy_coef": 0.1}, 'grad_mode: expected "exact" with an entropy bonus, whose'),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32: expected False: logits are made in float32 anyway, go"),
        ({"use_liger_kernel": True}, "use_liger_kernel: expected False: TRL gives it up; model_init_kwargs="),
    ],
)
def test_a_bad_setting_is_named_in_one_line(options, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        config(**options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_every_loss_of_trls_is_known():
    """By the names that its trainer compares loss_type with."""
    source = inspect.getsource(GRPOTrainer)
    lists = re.findall(r"loss_type (?:in|not in|==|!=) (\[[^]]*\]|\"\w+\")", source)
    names = {name for found in lists for name in re.findall(r"\w+", found)}
    assert names == set(CHOICES["loss_type"])


@pytest.mark.parametrize(
    "options, direct",
    [
        ({}, True),
        ({"loss_type": "dr_grpo", "epsilon": 0.1, "epsilon_high": 0.3}, True),  # the ratio is 1
        ({"gradient_accumulation_steps": 3, "generation_batch_size": 24}, True),
        ({"num_iterations": 2}, False),
        ({"steps_per_generation": 2}, False),
        ({"gradient_accumulation_steps": 3, "steps_per_generation": 2}, False),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, False),
        ({"loss_type": "grpo"}, False),
        ({"loss_type": "cispo", "epsilon_high": 1}, False),
        ({"beta": 0.01}, False),
        ({"delta": 4}, False),
        ({"entropy_coef": -0.01}, False),
        ({"use_adaptive_entropy": True}, False),
        ({"top_entropy_quantile": 0.2}, False),
        ({"off_policy_mask_threshold": 0.5}, False),
        ({"position_weight": 0.5}, True),
        ({"prefix_weight": 0.5}, False),  # it asks for log p of later tokens
    ],
)
def test_when_the_loss_is_made_directly(options, direct):
    assert config(**options).direct is direct


def test_gamma_schedules():
    assert [config(gamma=0.4).gamma_at(step, 10) for step in (0, 5, 10)] == [0.4] * 3
    linear = config(gamma=0.2, gamma_schedule="linear", gamma_end=1)
    assert [linear.gamma_at(step, 10) for step in (0, 5, 10, 11)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    cosine = config(gamma=1.0, gamma_schedule="cosine", gamma_end=0.0, gamma_steps=4)
    expected = [1.0, 0.853553, 0.5, 0.0, 0.0]
    assert [cosine.gamma_at(step, 10) for step in (0, 1, 2, 4, 9)] == pytest.approx(expected, abs=1e-6)


def test_numbers_come_as_a_command_line_and_as_a_file_pass_them():
    assert config(entropy_scale="5.5").entropy_scale == 5.5
    assert config(entropy_scale=5).entropy_scale == 5.0
    assert config(gamma=1).gamma == 1.0
    assert config(advantage="group", scale_rewards="none").scale_rewards == "none"
    assert config(length_beta=0, max_completion_length=None).max_completion_length is None
    (parsed,) = TrlParser((EGRSDConfig,)).parse_args_and_config(
        ["--output_dir", "x", "--use_cpu", "true", "--bf16", "false", "--gamma", "0.7", "--entropy_scale", "log_vocab"]
    )
    assert (parsed.gamma, parsed.entropy_scale) == (0.7, "log_vocab")


@pytest.mark.parametrize(
    "given, expected",
    [(None, None), (True, True), (False, False), ("true", True), ("0", False), ("cudagraphs", "cudagraphs")],
)
def test_how_layers_run_comes_as_a_command_line_and_as_a_file_pass_it(given, expected):
    assert config(compile_layers=given).compile_layers is expected
    needed = {"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["r"], "output_dir": "x"}
    _, parsed, _ = parse_settings({**needed, "use_cpu": True, "bf16": False, "compile_layers": given})
    assert parsed.compile_layers == expected
    if isinstance(given, str):
        _, parsed, _ = parse_settings({**needed, "use_cpu": True, "bf16": False}, ["--compile_layers", given])
        assert parsed.compile_layers == expected


def test_the_presets_are_the_papers_settings(monkeypatch):
    monkeypatch.setattr(EGRSDConfig, "world_size", 8)
    gates = {}
    for name, path in PRESETS.items():
        args, model = TrlParser((EGRSDConfig, ModelConfig)).parse_args_and_config(
            ["--config", str(path), "--output_dir", "x", "--use_cpu", "true"]
        )
        gates[name] = model.model_name_or_path, args.gamma, args.lookahead
        assert (args.learning_rate, args.max_grad_norm, args.per_device_train_batch_size) == (5e-6, 0.1, 4)
        assert (args.max_completion_length, args.clip_eps, args.length_beta) == (1024, 0.2, 0.5)
        assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (64, 128, 0.0)
        assert len(model.lora_target_modules) == 7
        assert args.bf16 and model.use_peft and args.teacher_model_kind == "adapters_off"
    assert gates == {
        "qwen3-4b-egrsd": ("Qwen/Qwen3-4B", 0.3, 0),
        "qwen3-4b-cl-egrsd": ("Qwen/Qwen3-4B", 0.3, 3),
        "qwen3-8b-egrsd": ("Qwen/Qwen3-8B", 0.3, 0),
        "qwen3-8b-cl-egrsd": ("Qwen/Qwen3-8B", 1.0, 5),
    }


def test_parallelism_that_a_launcher_asks_for_is_refused(monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    config()  # nothing reads it
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(ValueError, match=r"^parallelism_config: expected tp_size 1, tensor parallelism is not supp"):
        config()


def test_what_a_run_is_leaves_out_how_it_is_watched():
    one = config(gamma=0.4).of_the_run()
    watched = {"logging_steps": 3, "save_steps": 7, "rollout_steps": 2, "backend": "torch", "resume_changed": True}
    assert config(gamma=0.4, **watched | {"max_steps": 9}).of_the_run() == one
    other = config(
        gamma=0.4, lookahead=2, optim="sgd", lr_scheduler_type="linear", teacher_model_kind="ema"
    ).of_the_run()
    assert {name: value for name, value in other.items() if one.get(name) != value} == {
        "lookahead": 2,
        "optim": "sgd",
        "teacher_model_kind": "ema",
        "teacher_sync_steps": 1,
        "teacher_update_rate": 0.001,
    }
    assert one["lr_scheduler_type"] == "linear" and one["gamma"] == 0.4


TEACHER = ("teacher_model_kind", "teacher_update_rate", "teacher_sync_steps")


def teacher_of(settings) -> tuple:
    return tuple(getattr(settings, name) for name in TEACHER)


@pytest.mark.parametrize(
    "former, present, says",
    [
        ({"teacher": "auto"}, ("base", 0.001, 1), "teacher='auto': deprecated, write teacher_model_kind='base'"),
        (
            {"teacher": "ema", "teacher_ema_decay": 0.99, "teacher_copy_steps": 7},  # the last had no effect
            ("ema", 0.01, 1),
            "teacher='ema' and teacher_ema_decay=0.99 and teacher_copy_steps=7: deprecated, write "
            "teacher_model_kind='ema', teacher_update_rate=0.01",
        ),
        (
            {"teacher": "copy", "teacher_ema_decay": 0.5},
            ("ema", 1.0, 100),
            "teacher='copy' and teacher_ema_decay=0.5: deprecated, write teacher_model_kind='ema', "
            "teacher_update_rate=1.0, teacher_sync_steps=100",
        ),
        (
            {"teacher_model_kind": "ema", "teacher_copy_steps": 7},
            ("ema", 0.001, 7),
            "teacher_copy_steps=7: deprecated, write teacher_sync_steps=7",
        ),
    ],
)
def test_former_names_are_taken_with_a_warning(former, present, says):
    with pytest.warns(FutureWarning) as caught:
        made = config(**former)
    (ours,) = [one for one in caught if "deprecated, write" in str(one.message)]  # others are transformers'
    assert str(ours.message) == says and ours.filename == __file__
    assert teacher_of(made) == present and made.teacher is None
    options = [part for name, value in former.items() for part in (f"--{name}", str(value))]
    with pytest.warns(FutureWarning):
        (parsed,) = TrlParser((EGRSDConfig,)).parse_args_and_config(
            ["--output_dir", "x", "--use_cpu", "true", *options]
        )
    assert teacher_of(parsed) == present


def test_sparse_gradients_are_no_longer_chosen_by_themselves():
    with pytest.warns(FutureWarning, match=r"^grad_mode='auto': deprecated, write grad_mode='exact'$"):
        assert config(grad_mode="auto").grad_mode == "exact"


@pytest.mark.parametrize(
    "former, present",
    [
        ({"teacher": "ema"}, {"teacher_model_kind": "base"}),
        ({"teacher_ema_decay": 0.5}, {"teacher_update_rate": 0.5}),
        ({"teacher_copy_steps": 1}, {"teacher_sync_steps": 1}),
        ({"teacher": "copy"}, {"teacher_update_rate": 0.5}),
    ],
)
def test_a_setting_is_not_given_by_both_names(former, present):
    with pytest.raises(ValueError) as caught:
        config(**former, **present)
    words = " and ".join(f"{name}={value!r}" for name, value in former.items())
    assert str(caught.value) == f"{next(iter(present))}: given twice, also by the former {words}: leave that out"


def test_a_command_line_overrides_the_other_name_of_a_setting():
    base = {"output_dir": "x", "use_cpu": True, "model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["r"]}
    _, made, _ = parse_settings(base | {"teacher_model_kind": "adapters_off"}, ["--teacher_model_kind=frozen"])
    assert made.teacher_model_kind == "frozen"
    with pytest.warns(FutureWarning, match=r"^teacher='frozen': deprecated"):
        _, made, _ = parse_settings(base | {"teacher_model_kind": "adapters_off"}, ["--teacher=frozen"])
    assert made.teacher_model_kind == "frozen"
    _, made, _ = parse_settings(
        base | {"teacher": "ema", "teacher_ema_decay": 0.5},
        ["--teacher-model-kind=frozen", "--teacher_update_rate=0.1"],
    )
    assert teacher_of(made) == ("frozen", 0.1, 1)
    with pytest.raises(ValueError, match=r"^teacher_model_kind: given twice, also by the former teacher='ema'"):
        parse_settings(base | {"teacher": "ema", "teacher_model_kind": "ema"})
