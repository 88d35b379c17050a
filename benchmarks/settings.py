"""The table of GRPOConfig's settings in docs/from-grpo.md, from the classes of the installed TRL and of this package.

python -m benchmarks.settings            # rewrites it between its markers
python -m benchmarks.settings --check    # fails where that would change it, or where a setting is in no class

What is refused, and why, says EGRSDConfig itself: here stands a value for it to refuse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import GRPOConfig

from benchmarks.table import ROOT, replaced, table
from egrsd_kernels.trl import EGRSDConfig

PAGE = "docs/from-grpo.md"
BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"
CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


@dataclass(frozen=True)
class Here:
    """What becomes of a setting: it is honoured, with a ``note``, and in ``contradictions`` refused.

    contradictions: settings that EGRSDConfig refuses in a line that begins with this setting's name.
    """

    note: str = ""
    contradictions: tuple[Mapping[str, Any], ...] = ()


def refused(note: str = "", **settings: Any) -> Here:
    return Here(note, (settings,))


AS_IN_GRPO = Here()

SETTINGS: dict[str, dict[str, Here]] = {
    "Model": {
        "model_init_kwargs": refused(model_init_kwargs={"tp_plan": "auto"}),
        "trust_remote_code": Here("of a teacher that is given by name, too"),
        "disable_dropout": AS_IN_GRPO,
        "cast_lm_head_to_fp32": refused(cast_lm_head_to_fp32=True),
        "router_aux_loss_coef": AS_IN_GRPO,
    },
    "Prompts": {
        "shuffle_dataset": AS_IN_GRPO,
        "chat_template_kwargs": Here("for the teacher's conversations, too"),
        "pad_to_multiple_of": Here("for the teacher's prompts, too"),
        "max_tool_calling_iterations": AS_IN_GRPO,
    },
    "Generation": {
        "num_generations": AS_IN_GRPO,
        "num_generations_eval": AS_IN_GRPO,
        "generation_batch_size": AS_IN_GRPO,
        "steps_per_generation": AS_IN_GRPO,
        "max_completion_length": refused("the length bonus divides by it", max_completion_length=None),
        "temperature": refused("log p of student and teacher are those at this temperature", temperature=0),
        "top_p": AS_IN_GRPO,
        "top_k": AS_IN_GRPO,
        "min_p": AS_IN_GRPO,
        "repetition_penalty": AS_IN_GRPO,
        "generation_kwargs": refused(generation_kwargs={"temperature": 0.5}),
        "cache_implementation": AS_IN_GRPO,
        "use_transformers_continuous_batching": AS_IN_GRPO,
        "transformers_continuous_batching_config": AS_IN_GRPO,
        "use_transformers_paged": AS_IN_GRPO,
        "ds3_gather_for_generation": AS_IN_GRPO,
    },
    "vLLM": {
        "use_vllm": AS_IN_GRPO,
        "vllm_mode": AS_IN_GRPO,
        "vllm_model_impl": AS_IN_GRPO,
        "vllm_enable_sleep_mode": AS_IN_GRPO,
        "vllm_structured_outputs_regex": AS_IN_GRPO,
        "vllm_server_base_url": AS_IN_GRPO,
        "vllm_server_host": AS_IN_GRPO,
        "vllm_server_port": AS_IN_GRPO,
        "vllm_server_timeout": AS_IN_GRPO,
        "vllm_group_port": AS_IN_GRPO,
        "vllm_gpu_memory_utilization": AS_IN_GRPO,
        "vllm_max_model_length": Here("bounds the completions that the window has to hold"),
        "vllm_tensor_parallel_size": AS_IN_GRPO,
        "vllm_importance_sampling_correction": AS_IN_GRPO,
        "vllm_importance_sampling_mode": AS_IN_GRPO,
        "vllm_importance_sampling_clip_max": AS_IN_GRPO,
        "vllm_importance_sampling_clip_min": AS_IN_GRPO,
        "vllm_importance_sampling_cap": AS_IN_GRPO,
    },
    "Rewards and advantages": {
        "reward_weights": AS_IN_GRPO,
        "scale_rewards": refused(scale_rewards="batch"),
        "multi_objective_aggregation": refused(multi_objective_aggregation="normalize_then_sum"),
    },
    "Loss": {
        "loss_type": AS_IN_GRPO,
        "num_iterations": AS_IN_GRPO,
        "epsilon": AS_IN_GRPO,
        "epsilon_high": refused(loss_type="cispo"),
        "delta": AS_IN_GRPO,
        "importance_sampling_level": refused('"sequence_token" is GSPO-token', importance_sampling_level="sequence"),
        "mask_truncated_completions": AS_IN_GRPO,
        "off_policy_mask_threshold": AS_IN_GRPO,
        "top_entropy_quantile": Here("by the student's entropy, beside the gate, which is of the teacher's"),
        "sapo_temperature_neg": AS_IN_GRPO,
        "sapo_temperature_pos": AS_IN_GRPO,
        "vespo_k_pos": AS_IN_GRPO,
        "vespo_lambda_pos": AS_IN_GRPO,
        "vespo_k_neg": AS_IN_GRPO,
        "vespo_lambda_neg": AS_IN_GRPO,
    },
    "Reference model": {
        "beta": AS_IN_GRPO,
        "use_bias_correction_kl": AS_IN_GRPO,
        "sync_ref_model": refused(sync_ref_model=True),
        "ref_model_mixup_alpha": AS_IN_GRPO,
        "ref_model_sync_steps": AS_IN_GRPO,
    },
    "Entropy bonus": {
        "entropy_coef": AS_IN_GRPO,
        "use_adaptive_entropy": AS_IN_GRPO,
        "entropy_coef_min": AS_IN_GRPO,
        "entropy_coef_max": AS_IN_GRPO,
        "entropy_coef_delta": AS_IN_GRPO,
        "entropy_target": AS_IN_GRPO,
    },
    "Logging": {
        "log_completions": AS_IN_GRPO,
        "log_multimodal": AS_IN_GRPO,
        "num_completions_to_print": AS_IN_GRPO,
        "log_unique_prompts": AS_IN_GRPO,
        "log_completions_hub_repo": AS_IN_GRPO,
    },
    # Those that EGRSDConfig looks at; test_settings.py says why there are no others.
    "Of transformers": {
        "remove_unused_columns": refused(remove_unused_columns=True),
        "use_liger_kernel": refused(use_liger_kernel=True),
        "resume_from_checkpoint": Here("see [going on with a run](#going-on-with-a-run)"),
        "save_only_model": Here("no run can go on from such a checkpoint"),
        "fsdp": Here("FSDP1 was never run; see [more than one process](#more-than-one-process)"),
        "deepspeed": Here("tensor parallelism by `autotp_size` is refused"),
    },
}


def own_settings() -> dict[str, Any]:
    """TRL's own settings in the installed GRPOConfig, those that it takes over from TrainingArguments left out."""
    inherited = {field.name for field in fields(TrainingArguments)}
    return {field.name: field.default for field in fields(GRPOConfig) if field.name not in inherited}


def missing_and_gone() -> tuple[list[str], list[str]]:
    """(TRL's own settings that are in no class above, names above that GRPOConfig does not have)"""
    classified = {name for group in SETTINGS.values() for name in group}
    known = {field.name for field in fields(GRPOConfig)}
    return sorted(own_settings().keys() - classified), sorted(classified - known)


def refusal(name: str, contradiction: Mapping[str, Any]) -> str:
    """What EGRSDConfig says of ``contradiction``, without the setting's name and what it got."""
    try:
        EGRSDConfig("unused", **CPU | dict(contradiction))
    except (TypeError, ValueError) as error:
        setting, _, text = str(error).partition(": ")
        if setting != name:
            raise ValueError(f"{name}: expected to be refused in {dict(contradiction)}, got: {error}") from error
        return text.rpartition(", got ")[0] or text
    raise ValueError(f"{name}: expected to be refused in {dict(contradiction)}, which was taken")


def cell(name: str, here: Here) -> str:
    """The table's last column."""
    text = [here.note] if here.note else []
    for contradiction in here.contradictions:
        given = ", ".join(f"{key}={value!r}" for key, value in contradiction.items()).replace("'", '"')
        text.append(f"`{given}` is refused: {refusal(name, contradiction)}")
    return "; ".join(text).replace("|", "\\|") or "as in GRPO"


def section() -> str:
    """What stands between the markers; the same versions give the same text."""
    missing, gone = missing_and_gone()
    if missing or gone:
        raise ValueError(
            f"SETTINGS: expected every setting of GRPOConfig and no other, missing {', '.join(missing) or 'none'}, "
            f"unknown {', '.join(gone) or 'none'}"
        )
    defaults = {field.name: field.default for field in fields(GRPOConfig)}
    rows = []
    for group, settings in SETTINGS.items():
        rows.append([f"**{group}**", "", ""])
        for name, here in settings.items():
            default = defaults[name]
            rows.append([f"`{name}`", "" if default is MISSING else f"`{default!r}`", cell(name, here)])
    return table(("setting", "default", "here"), rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help=f"the folder that holds {PAGE}")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the table is out of date")
    args = parser.parse_args(argv)
    page = args.root / PAGE
    text = page.read_text(encoding="utf-8")
    new = replaced(text, section(), BEGIN, END)
    if not args.check:
        page.write_text(new, encoding="utf-8")
    elif new != text:
        sys.exit(f"{PAGE} is out of date: run python -m benchmarks.settings")


if __name__ == "__main__":
    main()
