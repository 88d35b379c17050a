"""Every setting of GRPOConfig, and what becomes of it here: ``python -m benchmarks.settings`` makes a table of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
        "vllm_importance_sampling_correction": Here(
            "beside a divergence, too: it is not weighed, but has no token that the correction drops"
        ),
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
        "sync_ref_model": refused("not with adapters nor with sharded weights", sync_ref_model=True),
        "ref_model_mixup_alpha": HONOURED,
        "ref_model_sync_steps": HONOURED,
    },
    "Entropy bonus": {
        "entropy_coef": Here('with grad_mode="exact"'),
        "use_adaptive_entropy": Here('with grad_mode="exact"'),
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
        "resume_from_checkpoint": Here("by `egrsd train`; see [going on with a run](from-grpo.md#going-on-with-a-run)"),
        "save_only_model": Here("but no run can go on from such a checkpoint"),
        "fsdp": Here("see [more than one process](from-grpo.md#more-than-one-process)"),
        "deepspeed": Here("but `autotp_size` above 1 is refused: tensor parallelism is not supported"),
    },
}

KNOWN = {name for group in SETTINGS.values() for name in group}
"""Their names. What a later TRL adds is not among them, and unknown to whatever does not hand it on to TRL."""
