"""The table of GRPOConfig's settings: whole, as the page has it, and true of EGRSDConfig."""

from __future__ import annotations

import inspect
import re
import shutil
from dataclasses import fields

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

import trl

from benchmarks import settings
from benchmarks.table import ROOT
from egrsd_kernels.trl import EGRSDConfig
from egrsd_kernels.trl.config import GROUP_ONLY, KNOWN, REFUSED, TERMS
from egrsd_kernels.trl.grpo_settings import HONOURED, NEVER, SETTINGS

# Another value than the default, and what it needs beside it, where no flag is turned and no number raised.
OTHER = {
    "cache_implementation": "static",
    "chat_template_kwargs": {"enable_thinking": False},
    "delta": 4.0,
    "epsilon_high": 0.3,
    "generation_batch_size": 24,
    "generation_kwargs": {"do_sample": True},
    "importance_sampling_level": "sequence_token",
    "log_completions_hub_repo": "me/completions",
    "loss_type": "grpo",
    "max_tool_calling_iterations": 3,
    "min_p": 0.1,
    "model_init_kwargs": {"dtype": "bfloat16"},
    "num_completions_to_print": 3,
    "num_generations": 4,
    "num_generations_eval": 4,
    "off_policy_mask_threshold": 0.5,
    "pad_to_multiple_of": 8,
    "reward_weights": [1.0, 0.5],
    "router_aux_loss_coef": 0.1,
    "steps_per_generation": 3,
    "top_entropy_quantile": 0.5,
    "top_p": 0.9,
    "transformers_continuous_batching_config": {"max_batch_tokens": 64},
    "vllm_importance_sampling_cap": None,
    "vllm_importance_sampling_clip_min": 0.1,
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_max_model_length": 512,
    "vllm_mode": "server",
    "vllm_model_impl": "transformers",
    "vllm_server_base_url": "http://localhost:8000",
    "vllm_server_host": "localhost",
    "vllm_structured_outputs_regex": "a*",
}
BESIDE = {
    "log_completions_hub_repo": {"log_completions": True},
    "multi_objective_aggregation": {"advantage": "group"},
    "scale_rewards": {"advantage": "group"},
    "sync_ref_model": {"beta": 0.1},
}
OTHER |= {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "batch"}
# Former words of TRL's, which give way to others there.
FORMER = {"use_transformers_paged", "vllm_importance_sampling_cap"}


def test_every_setting_of_trls_is_in_a_class():
    assert settings.missing_and_gone() == ([], [])
    names = [name for group in SETTINGS.values() for name in group]
    assert len(names) == len(set(names)) > 80
    never = {name for group in SETTINGS.values() for name, here in group.items() if here is NEVER}
    assert never == set(REFUSED)
    refused = {name for group in SETTINGS.values() for name, here in group.items() if here.contradictions}
    assert refused >= set(GROUP_ONLY)


def test_a_setting_that_nobody_has_looked_at_fails(monkeypatch):
    loss = {name: here for name, here in SETTINGS["Loss"].items() if name != "delta"}
    monkeypatch.setitem(SETTINGS, "Loss", loss | {"epsilon_low": HONOURED})
    with pytest.raises(ValueError, match=r"^SETTINGS: .* missing delta, unknown epsilon_low$"):
        settings.section()


def test_a_setting_of_a_later_trl_is_left_to_trls_loss(monkeypatch):
    made = EGRSDConfig("unused", **settings.CPU, num_generations=4)
    assert made.direct
    monkeypatch.setattr("egrsd_kernels.trl.config.KNOWN", KNOWN - {"num_generations"})
    assert not made.direct and EGRSDConfig("unused", **settings.CPU).direct


# Why the loss may be made directly whatever these are: with a ratio of 1 they clip nothing, they belong to a term or a
# loss type that is not direct, they decide that it is, or the direct loss reads them, too.
OF_THE_RATIO = {"epsilon_high", "importance_sampling_level"}
OF_TERMS = {"use_bias_correction_kl", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"}
OF_LOSS_TYPES = {"sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_neg", "vespo_k_pos", "vespo_lambda_neg",
                 "vespo_lambda_pos"}  # fmt: skip
DECIDE = {"loss_type", "num_iterations", "steps_per_generation", "gradient_accumulation_steps"}
READ_TOO = {"max_completion_length", "router_aux_loss_coef", "use_vllm", "vllm_importance_sampling_correction"}


def test_the_direct_loss_forgets_no_setting_that_trls_loss_reads():
    """Of a TRL whose loss begins to read one that was there before, too."""
    parts = ("_compute_loss", "get_off_policy_mask", "get_gamma_weights", "get_high_entropy_mask", "compute_loss",
             "_get_per_token_logps_and_entropies", "training_step")  # fmt: skip
    source = "".join(inspect.getsource(getattr(trl.GRPOTrainer, name)) for name in parts)
    read = {field.name for field in fields(trl.GRPOConfig) if re.search(rf"\b{field.name}\b", source)}
    assert {"beta", "delta", "loss_type"} <= read
    assert read - set(TERMS) <= OF_THE_RATIO | OF_TERMS | OF_LOSS_TYPES | DECIDE | READ_TOO


@pytest.mark.parametrize("name", sorted(settings.own_settings().keys() - REFUSED.keys() - FORMER))
def test_what_is_honoured_is_taken(name):
    default = settings.own_settings()[name]
    value = OTHER.get(name, not default if isinstance(default, bool) else None)
    if value is None:
        value = default + 1
    made = EGRSDConfig("unused", **settings.CPU | BESIDE.get(name, {}) | {name: value})
    assert getattr(made, name) == value != default


def test_what_is_said_to_be_refused_is():
    with pytest.raises(ValueError, match=r"^beta: expected to be refused in {'beta': 1}, which was taken$"):
        settings.refusal("beta", {"beta": 1})
    with pytest.raises(ValueError, match=r"^beta: expected to be refused in {'epsilon': -1}, got: epsilon: "):
        settings.refusal("beta", {"epsilon": -1})
    for name in REFUSED:
        default = {field.name: field.default for field in fields(EGRSDConfig)}[name]
        assert settings.refusal(name, {name: not default}).endswith(REFUSED[name])


@pytest.mark.skipif(trl.__version__ < "1.16", reason="the page's defaults are a newer TRL's")
def test_the_page_has_the_table(tmp_path):
    settings.main(["--check"])
    (tmp_path / "docs").mkdir()
    page = tmp_path / settings.PAGE
    shutil.copy(ROOT / settings.PAGE, page)
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("| `beta` |", "| `beta` is |"), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"^docs/grpo-settings.md is out of date: run python -m benchmarks.settings$"):
        settings.main(["--root", str(tmp_path), "--check"])
    settings.main(["--root", str(tmp_path)])
    assert page.read_text(encoding="utf-8") == text
