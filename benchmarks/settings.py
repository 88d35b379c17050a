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
from egrsd_kernels.trl.config import REFUSED

PAGE = "docs/from-grpo.md"
BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"
CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


@dataclass(frozen=True)
class Here:
    """What becomes of a setting: it is honoured, in the way of the ``note``, except in its ``contradictions``.

    contradictions: settings that EGRSDConfig refuses in a line that begins with this setting's name.
    """

    note: str = ""
    contradictions: tuple[Mapping[str, Any], ...] = ()


def refused(note: str = "", **settings: Any) -> Here:
    return Here(note, (settings,))


HONOURED = Here()
NEVER = Here("refused")  # the reason is in REFUSED

SETTINGS: dict[str, dict[str, Here]] = {
    "Model": {
        "model_init_kwargs": refused(model_init_kwargs={"tp_plan": "auto"}),
        "trust_remote_code": Here("for a teacher that is given by name, too"),
        "disable_dropout": HONOURED,
        "cast_lm_head_to_fp32": NEVER,
        "router_aux_loss_coef": HONOURED,
    },
    "Prompts": {
        "shuffle_dataset": HONOURED,
        "chat_template_kwargs": Here("for the teacher's conversations, too"),
        "pad_to_multiple_of": Here("for the teacher's prompts, too"),
        "max_tool_calling_iterations": HONOURED,
    },
    "Generation": {
        "num_generations": HONOURED,
        "num_generations_eval": HONOURED,
        "generation_batch_size": HONOURED,
        "steps_per_generation": HONOURED,
        "max_completion_length": refused(max_completion_length=None),
        "temperature": Here("in log p of student and teacher, too"),
        "top_p": HONOURED,
        "top_k": HONOURED,
        "min_p": HONOURED,
        "repetition_penalty": HONOURED,
        "generation_kwargs": refused(generation_kwargs={"temperature": 0.5}),
        "cache_implementation": HONOURED,
        "use_transformers_continuous_batching": HONOURED,
        "transformers_continuous_batching_config": HONOURED,
        "use_transformers_paged": HONOURED,
        "ds3_gather_for_generation": HONOURED,
    },
    "vLLM": {
        "use_vllm": HONOURED,
        "vllm_mode": HONOURED,
        "vllm_model_impl": HONOURED,
        "vllm_enable_sleep_mode": HONOURED,
        "vllm_structured_outputs_regex": HONOURED,
        "vllm_server_base_url": HONOURED,
        "vllm_server_host": HONOURED,
        "vllm_server_port": HONOURED,
        "vllm_server_timeout": HONOURED,
        "vllm_group_port": HONOURED,
        "vllm_gpu_memory_utilization": HONOURED,
        "vllm_max_model_length": Here("in the check of the window, too"),
        "vllm_tensor_parallel_size": HONOURED,
        "vllm_importance_sampling_correction": HONOURED,
        "vllm_importance_sampling_mode": HONOURED,
        "vllm_importance_sampling_clip_max": HONOURED,
        "vllm_importance_sampling_clip_min": HONOURED,
        "vllm_importance_sampling_cap": HONOURED,
    },
    "Rewards and advantages": {
        "reward_weights": HONOURED,
        "scale_rewards": refused(scale_rewards="batch"),
        "multi_objective_aggregation": refused(multi_objective_aggregation="normalize_then_sum"),
    },
    "Loss": {
        "loss_type": Here("every one of TRL's"),
        "num_iterations": Here("each update takes the magnitude anew"),
        "epsilon": HONOURED,
        "epsilon_high": refused(loss_type="cispo"),
        "delta": HONOURED,
        "importance_sampling_level": refused('and "sequence_token", GSPO-token', importance_sampling_level="sequence"),
        "mask_truncated_completions": HONOURED,
        "off_policy_mask_threshold": HONOURED,
        "top_entropy_quantile": Here("by the student's entropy; the gate is by the teacher's"),
        "sapo_temperature_neg": HONOURED,
        "sapo_temperature_pos": HONOURED,
        "vespo_k_pos": HONOURED,
        "vespo_lambda_pos": HONOURED,
        "vespo_k_neg": HONOURED,
        "vespo_lambda_neg": HONOURED,
    },
    "Reference model": {
        "beta": HONOURED,
        "use_bias_correction_kl": HONOURED,
        "sync_ref_model": refused(sync_ref_model=True),
        "ref_model_mixup_alpha": HONOURED,
        "ref_model_sync_steps": HONOURED,
    },
    "Entropy bonus": {
        "entropy_coef": HONOURED,
        "use_adaptive_entropy": HONOURED,
        "entropy_coef_min": HONOURED,
        "entropy_coef_max": HONOURED,
        "entropy_coef_delta": HONOURED,
        "entropy_target": HONOURED,
    },
    "Logging": {
        "log_completions": HONOURED,
        "log_multimodal": HONOURED,
        "num_completions_to_print": HONOURED,
        "log_unique_prompts": HONOURED,
        "log_completions_hub_repo": HONOURED,
    },
    # Those that EGRSDConfig looks at.
    "Of transformers": {
        "remove_unused_columns": refused(remove_unused_columns=True),
        "use_liger_kernel": NEVER,
        "resume_from_checkpoint": Here("by `egrsd train`; see [going on with a run](#going-on-with-a-run)"),
        "save_only_model": Here("but no run can go on from such a checkpoint"),
        "fsdp": Here("see [more than one process](#more-than-one-process)"),
        "deepspeed": Here("but `autotp_size` above 1 is refused: tensor parallelism is not supported"),
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
    if here is NEVER:
        return f"refused: {REFUSED[name]}".replace("|", "\\|")
    text = [f"honoured, {here.note}" if here.note else "honoured"]
    for contradiction in here.contradictions:
        given = ", ".join(f"{key}={value!r}" for key, value in contradiction.items()).replace("'", '"')
        text.append(f"`{given}` is refused: {refusal(name, contradiction)}")
    return "; ".join(text).replace("|", "\\|")


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
