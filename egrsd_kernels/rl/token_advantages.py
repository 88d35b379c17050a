"""What each token's log p is worth: one function from a rollout's statistics and rewards to (B, T).

    grpo, reinforce    Â = A              :func:`sequence_advantage`, no teacher
    rlsd               Â = A · w          :func:`rlsd`
    egrsd              Â = A · w · ω      :func:`egrsd`, ω of H
    cl_egrsd           Â = A · w · ω      :func:`cl_egrsd`, ω of H^CL

With :func:`position_weights` the last three begin with A · ρ, for weights ρ > 0 of a token's place in its response.

GRPO and REINFORCE differ in A alone: relative to the rollouts of the same prompt, or to all earlier rewards
(:class:`egrsd_kernels.rl.WelfordAdvantage`). A function of one's own takes the same evidence. The formulas of w, ω and
H^CL are those of :mod:`egrsd_kernels.credit`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from egrsd_kernels import checks
from egrsd_kernels.checks import expect
from egrsd_kernels.credit import (
    CreditOptions,
    Lookahead,
    TokenStats,
    gate,
    lookahead_entropy,
    magnitude,
    token_advantage,
)


class ContextStatistics(NamedTuple):
    """What the teacher, in one context, says of the response tokens; detached."""

    logp: Tensor
    """log p_T(y) (B, T), nats; 0 where masked."""
    entropy: Tensor
    """H (B, T), nats; 0 where masked."""


@dataclass(frozen=True)
class TokenEvidence:
    """What a token advantage is made of: B rollouts of at most T response tokens each. Nothing has a gradient."""

    mask: Tensor
    """(B, T) bool, True for a token that is trained on."""
    student_logp: Tensor
    """log p_S(y) (B, T), nats, of the policy that is being trained, as it is now; 0 where masked. float32 or float64,
    as are the others."""
    advantages: Tensor
    """A (B,), the sequences'; 0 where no reward function judged the rollout."""
    rewards: Tensor
    """(B,), what A is made of: in the trainer the weighted sums with the length bonus, NaN where none judged."""
    contexts: Mapping[str, ContextStatistics]
    """By name, what the teacher says in each context; empty without a teacher."""
    entropy_scale: Tensor
    """What the gate divides entropies by (0-d, nats): one for all contexts, so that their gates compare."""
    options: CreditOptions
    """γ, the gate's floor, and ε."""
    lookahead: Lookahead
    """W, and how the window is filtered."""
    position_weight: float = 0.0
    """κ of :func:`position_weights`."""
    prefix_weight: float = 0.0
    """η of :func:`position_weights`."""

    @property
    def teacher(self) -> ContextStatistics:
        """The only context.

        Raises:
            ValueError: there are several, or none.
        """
        expect(len(self.contexts) == 1, "contexts", ", ".join(self.contexts) or None, "one, which teaches")
        return next(iter(self.contexts.values()))


TokenAdvantage = Callable[[TokenEvidence], Tensor]
"""From the evidence to Â (B, T). What it returns at masked positions is not used."""


def sequence_advantage(evidence: TokenEvidence) -> Tensor:
    """Â = A for every token: GRPO and REINFORCE, by where A comes from."""
    return evidence.advantages[:, None].expand(evidence.mask.shape)


def rlsd(evidence: TokenEvidence) -> Tensor:
    """Â = A · w: EGRSD with γ = 0."""
    return egrsd(replace(evidence, options=evidence.options._replace(gamma=0.0)))


def egrsd(evidence: TokenEvidence) -> Tensor:
    """Â = A · w · ω, the gate of the token's own entropy: CL-EGRSD with W = 0."""
    return cl_egrsd(replace(evidence, lookahead=Lookahead(0)))


def cl_egrsd(evidence: TokenEvidence) -> Tensor:
    """Â = A · w · ω, the gate of the entropy over the lookahead window."""
    return token_stats(evidence).token_advantage


TOKEN_ADVANTAGES: dict[str, TokenAdvantage] = {
    "grpo": sequence_advantage, "reinforce": sequence_advantage, "rlsd": rlsd, "egrsd": egrsd, "cl_egrsd": cl_egrsd,
}  # fmt: skip
"""The five by name."""

WITHOUT_TEACHER = ("grpo", "reinforce")
"""Those of them that read no context."""


def token_stats(evidence: TokenEvidence) -> TokenStats:
    """Every signal of CL-EGRSD (of EGRSD with W = 0) (B, T), as :func:`egrsd_kernels.fused_egrsd_loss` returns them.

    Raises:
        ValueError: there is not one context.
    """
    mask, options, context = evidence.mask, evidence.options, evidence.teacher
    log_ratio = context.logp - evidence.student_logp
    advantages = sequence_advantage(evidence)
    if evidence.position_weight or evidence.prefix_weight:
        place = {"position": evidence.position_weight, "prefix": evidence.prefix_weight}
        advantages = advantages * position_weights(mask, **place, log_ratio=log_ratio)
    ahead = padded_lookahead_entropy(context.entropy, mask, evidence.lookahead)
    w = magnitude(advantages, log_ratio, options.clip_eps)
    omega = gate(ahead, evidence.entropy_scale, options.gamma, options.gate_floor)
    credit = token_advantage(advantages, w, omega)
    nothing = torch.zeros_like(w)
    signals = evidence.student_logp, context.logp, context.entropy, ahead, w, omega, credit, nothing, nothing
    return TokenStats(*(torch.where(mask, signal, 0) for signal in signals))


def padded_lookahead_entropy(entropy: Tensor, mask: Tensor, lookahead: Lookahead) -> Tensor:
    """H^CL (B, T), nats, of entropy (B, T) under mask (B, T) bool: :func:`egrsd_kernels.credit.lookahead_entropy`."""
    rows, width = mask.shape
    last = torch.arange(rows, device=mask.device).repeat_interleave(width) * width + width - 1
    return lookahead_entropy(entropy.flatten(), mask.flatten(), last, lookahead).view(mask.shape)


def position_weights(
    mask: Tensor, *, position: float = 0.0, prefix: float = 0.0, log_ratio: Tensor | None = None
) -> Tensor:
    """ρ = (1 + κ (2u − 1)) · (1 + η (1 − a)): what a token's place in its response counts for.

    - u = (k − ½) / n for the k-th of a response's n valid tokens: its relative position, in (0, 1). That factor is 1 on
      average over the response; κ > 0 favours the end, as arXiv 2605.21606 does, and κ < 0 the beginning.
    - a = Σ_{j < t} |δ_j| / Σ_j |δ_j|, in [0, 1]: how much of the response's disagreement between teacher and student
      lies before the token. η > 0 favours what comes before it: the weights of IW-OPD (arXiv 2606.22600; η = ½ there).

    ρ > 0 is a constant that leaves the direction of an advantage alone. So it multiplies A, one a token: what
    ``fused_egrsd_loss`` makes of A · ρ is A · w · ω · ρ, and gate and magnitude are what they are without it.

    Args:
        mask: (B, T) bool or 0/1, one response a row. What is masked has no position and no disagreement.
        position: κ, a number in [-1, 1]; 0 is off.
        prefix: η, a number of at least 0; 0 is off.
        log_ratio: δ = log p_T(y) − log p_S(y) (B, T), nats, of any real dtype; needed where η is not 0. Counted in
            units of 2^-32 nats, up to 1024 nats a token. A NaN at a valid position is a NaN in all of its row.

    Returns:
        (B, T) float32 (float64 beside a float64 log_ratio), without gradient; 1 where masked.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it expects.
    """
    mask = checks.mask_of("mask", mask)
    expect(mask.ndim == 2, "mask", mask, "a (B, T) tensor")
    position = checks.number("position", position, low=-1, high=1)
    prefix = checks.number("prefix", prefix, low=0)
    weights = torch.ones(mask.shape, dtype=torch.float64, device=mask.device)
    if position:
        place = mask.cumsum(1).double() - 0.5
        relative = place / mask.sum(1, keepdim=True).clamp(min=1)
        weights = weights * (1 + position * (2 * relative - 1))
    if prefix:
        expect(log_ratio is not None, "log_ratio", None, "a tensor, since prefix is not 0", TypeError)
        delta = checks.tensor("log_ratio", log_ratio, shape=mask.shape, like=mask).detach()
        delta = torch.where(mask, delta.double().abs(), 0)
        # Whole units: a sum of integers is the same in any order, so a GPU's is deterministic.
        units = (delta.nan_to_num(0).clamp(max=1024) * 2.0**32).round().long()
        through = units.cumsum(1)
        before = (through - units).double() / through[:, -1:].clamp(min=1)
        before = torch.where(delta.isnan().any(1, keepdim=True), torch.nan, before)
        weights = weights * (1 + prefix * (1 - before))
    double = log_ratio is not None and log_ratio.dtype == torch.float64
    return torch.where(mask, weights, 1).to(torch.float64 if double else torch.float32)


def apply_token_advantage(function: TokenAdvantage, evidence: TokenEvidence) -> Tensor:
    """Â (B, T) of ``function``, which may be anybody's: in the dtype of student_logp, detached, 0 where masked.

    Raises:
        TypeError, ValueError: in one line, where it returns something else. That Â is finite is checked where
            :func:`egrsd_kernels.fused_egrsd_loss` checks values.
    """
    name = f"token_advantage: {getattr(function, '__qualname__', type(function).__qualname__)}"
    value = checks.tensor(name, function(evidence), shape=evidence.mask.shape, like=evidence.mask)
    expect(value.dtype in checks.FLOATS, name, value, checks.FLOAT_TENSOR, TypeError)
    value = torch.where(evidence.mask, value.detach().to(evidence.student_logp.dtype), 0)
    if checks.values_checked(value):
        checks.refuse(name, value, value, ~value.isfinite(), "no NaN and no infinity at a valid position")
    return value
