"""From a batch of the trainer to what token advantages are made of, and what is kept of each token for the logs."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from egrsd_kernels.credit import ENTROPY_SCALES, CreditOptions, Lookahead, batch_max
from egrsd_kernels.rl import ContextStatistics, TokenAdvantage, TokenEvidence, apply_token_advantage, token_stats
from egrsd_kernels.rl.token_advantages import padded_lookahead_entropy, sequence_advantage


def learned(inputs: Mapping[str, Any]) -> Tensor:
    """(B, T) bool: the completion's tokens that the policy made and learns from, without those that tools returned."""
    mask = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


def peak_entropy(inputs: Mapping[str, Any], contexts: Iterable[str], args: Any) -> Tensor:
    """The largest entropy of a batch in any context (0-d float64, nats), as entropy_scale takes it; 0 without one."""
    mask = learned(inputs)
    peak = torch.zeros((), dtype=torch.float64, device=mask.device)
    for name in contexts:
        entropy = inputs[f"{name}_entropy"].masked_fill(~mask, 0)
        if args.entropy_scale == "batch_max_lookahead":
            entropy = padded_lookahead_entropy(entropy, mask, Lookahead.of(args))
        peak = torch.maximum(peak, batch_max(entropy).double())
    return peak


def evidence_of(
    inputs: Mapping[str, Any],
    advantages: Tensor,
    student_logp: Tensor,
    contexts: Iterable[str],
    args: Any,
    gamma: float,
) -> TokenEvidence:
    """What a token advantage is made of: advantages (B,), student_logp (B, T), the rest from the batch."""
    mask = learned(inputs)

    def unmasked(values: Tensor) -> Tensor:
        return values.detach().masked_fill(~mask, 0)

    return TokenEvidence(
        mask=mask,
        student_logp=unmasked(student_logp),
        advantages=advantages.clone(),  # a function of the user's may write into them, and the batch serves again
        rewards=inputs["reward"].clone(),
        contexts={
            name: ContextStatistics(unmasked(inputs[f"{name}_logp"]), unmasked(inputs[f"{name}_entropy"]))
            for name in contexts
        },
        entropy_scale=inputs["entropy_scale"].clone(),
        options=CreditOptions(gamma, args.gate_floor, args.clip_eps),
        lookahead=Lookahead.of(args),
        position_weight=args.position_weight,
        prefix_weight=args.prefix_weight,
    )


def signals_of(evidence: TokenEvidence, own: TokenAdvantage | None) -> dict[str, Tensor]:
    """By name, (B, T) each: student_logp and token_advantage, and what the logs need beside them.

    Those of :class:`egrsd_kernels.TokenStats` where the method is EGRSD or a part of it; own: the user's function,
    whose contexts have ``{name}_entropy`` and ``{name}_abs_log_ratio``, |log p_T(y) − log p_S(y)|, nats.
    """
    if own is None and evidence.contexts:
        return token_stats(evidence)._asdict()  # the config's numbers make each method of it
    credit = apply_token_advantage(own or sequence_advantage, evidence)
    signals = {"student_logp": evidence.student_logp, "token_advantage": credit}
    for name, context in evidence.contexts.items():
        distance = (context.logp - evidence.student_logp).abs()
        signals |= {f"{name}_entropy": context.entropy, f"{name}_abs_log_ratio": distance}
    return signals


def measure_steps(trainer: Any, batches: list[dict[str, Any]]) -> None:
    """Put the entropy scale of its optimizer step, and the direct loss's normaliser, into each micro-batch.

    Both are taken over the step's micro-batches on all processes: the loss is then the same however a step's rollouts
    are cut up. Where a generation does not hold whole steps, its micro-batches are one group.
    """
    args, accelerator = trainer.args, trainer.accelerator
    local = torch.stack([_amount_and_peak(trainer, batch) for batch in batches])
    every = accelerator.gather(local[None])  # (processes, batches, 2)
    accumulation = args.gradient_accumulation_steps
    size = len(batches) if len(batches) % accumulation else accumulation
    for start in range(0, len(batches), size):
        group = every[:, start : start + size]
        scale = group[..., 1].max().clamp(min=args.min_entropy_scale)
        # DDP, FSDP and DeepSpeed average gradients over processes: hence the division.
        normalizer = group[..., 0].sum().clamp(min=1) / accelerator.num_processes
        for batch in batches[start : start + size]:
            batch["entropy_scale"] = scale.float()
            if trainer._direct:
                batch["normalizer"] = normalizer.float()


def _amount_and_peak(trainer: Any, batch: dict[str, Any]) -> Tensor:
    """(2,) float64 of one micro-batch: what it adds to the normaliser, and its entropy scale in nats."""
    mask, scale = learned(batch), trainer.args.entropy_scale
    if scale in ENTROPY_SCALES:
        peak = peak_entropy(batch, trainer._contexts, trainer.args)
    else:
        peak = torch.tensor(math.log(trainer._vocab_size) if scale == "log_vocab" else scale, device=mask.device)
    dr_grpo = trainer.args.loss_type == "dr_grpo"
    amount = torch.tensor(len(mask) * trainer.max_completion_length, device=mask.device) if dr_grpo else mask.sum()
    return torch.stack([amount.double(), peak.double()])
