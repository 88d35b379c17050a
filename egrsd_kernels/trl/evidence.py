"""From a batch of the trainer to what token advantages are made of, and what is kept of each token for the logs."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from egrsd_kernels.credit import CreditOptions, Lookahead, batch_max
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
