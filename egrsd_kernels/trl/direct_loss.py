"""EGRSD's loss of a micro-batch with the gradient in its own pass, padded or in packs: see EGRSDConfig.direct.

inputs ── Arguments.of ──┬── padded_loss ──┐
                         └── packed_loss ──┴── TokenStats ── signals_of_stats
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from egrsd_kernels import Head, TokenStats, fused_egrsd_loss
from egrsd_kernels.credit import LOOKAHEAD_SETTINGS
from egrsd_kernels.rl import position_weights

from .evidence import evidence_of, learned, signals_of
from .packed_rows import Part
from .packed_step import PackedStep

# Settings that the fused loss has by the same names; γ is the step's.
DIVERGENCE = ("divergence", "divergence_weight", "divergence_beta", "divergence_top_k", "policy_weight")
CREDIT = ("gate_floor", "lookahead", *LOOKAHEAD_SETTINGS, "clip_eps", "min_entropy_scale")


class Arguments(NamedTuple):
    """Of the fused loss: target_ids (B, T); advantages (B,) or (B, T); of_tokens, by name (B, T) or (B, T, D); others.

    of_tokens: mask, teacher_logp, teacher_entropy, and with a divergence teacher_hidden.
    """

    target_ids: Tensor
    advantages: Tensor
    of_tokens: dict[str, Any]
    options: dict[str, Any]

    @classmethod
    def of(
        cls, inputs: Mapping[str, Any], context: str, args: Any, gamma: float, scoring: Mapping[str, Any],
        teacher_head: Head | None,
    ) -> Arguments:  # fmt: skip
        """Those of a micro-batch; scoring: how a head is read; teacher_head: with a divergence."""
        mask, advantages = learned(inputs), inputs["advantages"]
        ratio = inputs.get("importance_sampling_ratio")
        if ratio is not None:  # vLLM's correction; it is not negative, so it leaves sign(A) alone
            advantages = (advantages[:, None] * ratio).expand(mask.shape)
            if args.divergence is not None:  # it has no advantage that could be 0 where the correction drops
                mask = mask & (ratio != 0)
        if args.position_weight:
            place = position_weights(mask, position=args.position_weight)
            advantages = (advantages if advantages.ndim == 2 else advantages[:, None]) * place
        of_tokens = {
            "mask": mask,
            "teacher_logp": inputs[f"{context}_logp"],
            "teacher_entropy": inputs[f"{context}_entropy"],
        }
        options = {
            "entropy_scale": inputs["entropy_scale"],
            "normalizer": inputs["normalizer"],
            "gamma": gamma,
            **{name: getattr(args, name) for name in CREDIT},
            **scoring,
        }
        if args.divergence is not None:
            of_tokens["teacher_hidden"] = inputs[f"{context}_hidden"]
            options |= {"teacher_weight": teacher_head} | {name: getattr(args, name) for name in DIVERGENCE}
        return cls(inputs["completion_ids"], advantages, of_tokens, options)


def padded_loss(given: Arguments) -> Callable[[Tensor, Head], tuple[Tensor, TokenStats]]:
    """(loss, TokenStats) as a function of the student's hidden states (B, T, D) and head."""
    of_tokens = dict(given.of_tokens)
    teacher_hidden = of_tokens.pop("teacher_hidden", None)

    def loss_of(hidden: Tensor, head: Head) -> tuple[Tensor, TokenStats]:
        found: Any = fused_egrsd_loss(
            hidden, head, teacher_hidden, given.target_ids, given.advantages, **of_tokens, **given.options,
            return_stats=True,
        )  # fmt: skip
        return found

    return loss_of


def packed_loss(
    packed: PackedStep,
    model: nn.Module,
    inputs: Mapping[str, Any],
    given: Arguments,
    done: Callable[[TokenStats], None],
) -> Tensor:
    """The loss in packs, in one forward of each; the stats are known, and done called with them, after these."""
    target_ids, advantages = given.target_ids, given.advantages
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand(target_ids.shape)
    stats = TokenStats(*(torch.zeros(target_ids.shape, device=target_ids.device) for _ in TokenStats._fields))

    def share_of(part: Part, hidden: Tensor, head: Head) -> Tensor:
        here: dict[str, Any] = {name: part.of(values) for name, values in given.of_tokens.items()}
        here["mask"] = here["mask"] & part.counted
        loss, found = fused_egrsd_loss(
            hidden, head, here.pop("teacher_hidden", None), part.target_ids, part.of(advantages),
            cu_seqlens=part.cu_seqlens, **here, **given.options, return_stats=True,
        )  # fmt: skip
        for into, values in zip(stats, found, strict=True):
            part.put(into, values)
        return loss

    pair = ("prompt", "completion")
    ids, mask = (torch.cat([inputs[f"{name}_{kind}"] for name in pair], dim=1) for kind in ("ids", "mask"))
    parts = packed.parts(model, ids, mask, target_ids.shape[1])
    return packed.direct(model, parts, share_of, lambda: done(stats))


def signals_of_stats(
    inputs: Mapping[str, Any], stats: TokenStats, context: str, args: Any, gamma: float
) -> dict[str, Tensor]:
    """By name, (B, T) each, what is logged: the method's own, as on the way of TRL's loss."""
    if inputs.get("importance_sampling_ratio") is None:
        return stats._asdict()
    evidence = evidence_of(inputs, inputs["advantages"], stats.student_logp, (context,), args, gamma)
    own = {name: getattr(stats, name) for name in ("gradient_error_bound", "divergence")}
    return signals_of(evidence, None) | own
