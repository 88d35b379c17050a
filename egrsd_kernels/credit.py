"""The method (arXiv 2605.13255), once: from a teacher's and a student's statistics to each token's advantage.

    H^CL_t = the minimum of H_j over the lookahead window    :func:`lookahead_entropy`
    scale  = max(max H, min_entropy_scale)                   :func:`batch_max`, Eq. 8
    ω      = clip(1 − γ H^CL / scale, gate_floor, 1)         :func:`gate`
    w      = clip(exp(sign(A) δ), 1 − ε, 1 + ε)              :func:`magnitude`
    Â      = A · w · ω                                       :func:`token_advantage`

Everything is plain tensor functions: the PyTorch backend, the trainer, the token page and the benchmarks call these.
``backends/triton/credit.py`` is the fused twin of :func:`lookahead_entropy` and :func:`token_credit`. Entropies and
logarithms are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from . import checks
from .checks import expect, number
from .rows import Rows

Filter = Literal["minimum", "discounted"]
EntropyScale = Literal["batch_max", "batch_max_lookahead"]
FILTERS: tuple[Filter, ...] = get_args(Filter)
ENTROPY_SCALES: tuple[EntropyScale, ...] = get_args(EntropyScale)


class Lookahead(NamedTuple):
    """The window of :func:`lookahead_entropy`, and how it is filtered."""

    window: int
    """W, in tokens after the token itself; 0 is EGRSD."""
    filter: Filter = "minimum"
    decay: float = 1.0
    """λ in (0, 1], of "discounted"."""

    @classmethod
    def checked(cls, window: object, filter: Any, decay: object) -> Lookahead:
        """From arguments of :func:`egrsd_kernels.fused_egrsd_loss`; a TypeError or ValueError names a wrong one."""
        known = isinstance(filter, str) and filter in FILTERS
        expect(known, "lookahead_filter", filter, " or ".join(f'"{name}"' for name in FILTERS))
        decay = number("lookahead_decay", decay, low=0, high=1, strict=True)
        expect(decay == 1 or filter == "discounted", "lookahead_decay", decay, '1, since lookahead_filter is "minimum"')
        return cls(checks.integer("lookahead", window, low=0), filter, decay)


class CreditOptions(NamedTuple):
    """The method's numbers; see :func:`egrsd_kernels.fused_egrsd_loss`."""

    gamma: float
    gate_floor: float
    clip_eps: float


class TokenStats(NamedTuple):
    """Per-token figures of one call, detached, shaped like ``target_ids``, 0 where masked; entropies in nats.

    float32 (float64 for float64 inputs). gradient_error_bound: of sparse gradients, a token's share |c_t| dropped_t /
    Σ_s |c_s| ‖p_s − e_s‖₁ of the relative error (see sparse_tol): the sum is at most ``sparse_tol``. 0 where the
    gradient is exact.
    """

    student_logp: Tensor
    teacher_logp: Tensor
    teacher_entropy: Tensor
    lookahead_entropy: Tensor
    magnitude: Tensor
    gate: Tensor
    token_advantage: Tensor
    gradient_error_bound: Tensor


# ------------------------------------------------------------------------------------------------------- the lookahead


def _sliding(
    entropy: Tensor, valid: Tensor, seq_end: Tensor, window: int, ahead: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """min over valid j in [t, min(t + window, seq_end_t)] of ahead(H_j, j − t), for an ``ahead`` with
    ahead(ahead(H, a), b) = ahead(H, a + b); a NaN in the window is kept.

    A window of ``span`` positions is two windows of the largest power of two in it, one at each end; minima over those
    come from doubling.
    """
    n = entropy.numel()
    position = torch.arange(n, device=entropy.device)
    last = torch.minimum(seq_end.long(), position + min(window, n))
    span = last - position + 1
    lowest = torch.where(valid, entropy, torch.inf)  # over [t, t + width)
    result, width = lowest, 1
    while width <= min(window + 1, n):
        tail = ahead(lowest[(last - width + 1).clamp(min=0)], span - width)
        result = torch.where((span >= width) & (span < 2 * width), torch.minimum(lowest, tail), result)
        following = torch.cat([lowest[width:], lowest.new_full((width,), torch.inf)])[:n]
        lowest = torch.minimum(lowest, ahead(following, span.new_full((), width)))
        width *= 2
    return torch.where(valid, result, 0)


def _minimum(entropy: Tensor, distance: Tensor, decay: float) -> Tensor:
    return entropy


def _discounted(entropy: Tensor, distance: Tensor, decay: float) -> Tensor:
    """λ^−distance · H; what rounding leaves below 0 stays as it is."""
    # In two factors: one alone leaves the dtype's range while the product with a tiny entropy does not.
    half = torch.exp2(distance.clamp(min=0).to(entropy.dtype) * (-0.5 * math.log2(decay)))
    half = half.clamp(max=torch.finfo(entropy.dtype).max)
    return torch.where(entropy > 0, entropy * half * half, entropy)


_AHEAD = {"minimum": _minimum, "discounted": _discounted}


def lookahead_entropy(entropy: Tensor, valid: Tensor, seq_end: Tensor, lookahead: Lookahead) -> Tensor:
    """H^CL (N,): H filtered over the valid positions j in [t, min(t + W, seq_end_t)]; 0 where t is not valid.

    "minimum": min_j H_j. "discounted": min_j λ^−(j − t) H_j, which a later token lowers the less the further it is.
    Neither is ever above H_t. A NaN in the window is kept.

    Args:
        entropy: (N,) nats, at least 0; float32 or float64. valid: (N,) bool.
        seq_end: (N,) integer, the last position of each token's own sequence.
    """
    return _sliding(
        entropy, valid, seq_end, lookahead.window, lambda h, d: _AHEAD[lookahead.filter](h, d, lookahead.decay)
    )


# ---------------------------------------------------------------------------------------------- scale, gate, magnitude


def batch_max(entropy: Tensor, group: torch.distributed.ProcessGroup | None = None) -> Tensor:
    """max H (0-d, nats) of the minibatch, over all processes of ``group``; 0 without a token.

    Masked tokens hold 0 and no entropy is below that, so they change no maximum.
    """
    peak = entropy.max() if entropy.numel() else entropy.new_zeros(())
    if group is not None:
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX, group=group)
    return peak


def gate(lookahead_entropy: Tensor, scale: Tensor | float, gamma: float, gate_floor: float) -> Tensor:
    """ω = clip(1 − γ H^CL / scale, gate_floor, 1)."""
    normalised = lookahead_entropy / scale
    return (1 - gamma * normalised).clamp(gate_floor, 1)


def magnitude(advantages: Tensor, log_ratio: Tensor, clip_eps: float) -> Tensor:
    """w = clip(exp(sign(A) δ), 1 − ε, 1 + ε) for δ = log p_T(y) − log p_S(y); 1 where A = 0."""
    # sign(0) · inf would be NaN; direction 0 means a ratio of 1.
    ratio = torch.where(advantages == 0, 1, torch.exp(advantages.sign() * log_ratio))
    return ratio.clamp(1 - clip_eps, 1 + clip_eps)


def token_advantage(advantages: Tensor, magnitude: Tensor, gate: Tensor) -> Tensor:
    """Â = A · w · ω; 0 where A = 0."""
    return torch.where(advantages == 0, 0, advantages * magnitude * gate)


def token_credit(
    rows: Rows, first_row: int, n_rows: int, advantages: Tensor, scale: Tensor, options: CreditOptions,
    stats: TokenStats, loss: Tensor,
) -> None:  # fmt: skip
    """Write magnitude, gate and token advantage into ``stats``, and −Â · log p_S into ``loss``.

    For the valid rows among the ``n_rows`` from ``first_row`` of the order on; every other entry stays as it is.

    Args:
        advantages: A (N,). scale: 0-d, nats. loss: (N,).
        stats: (N,) each; log p of student and teacher, and H^CL, are read.
    """
    order = rows.order[first_row : first_row + n_rows].long()
    # Masked rows of the slice get what they have: to leave them out, the device would have to tell how many they are.
    valid = rows.among(0, first_row, order.numel())
    a, logp = torch.where(valid, advantages[order], 0), torch.where(valid, stats.student_logp[order], 0)
    w = magnitude(a, stats.teacher_logp[order] - logp, options.clip_eps)
    omega = gate(stats.lookahead_entropy[order], scale, options.gamma, options.gate_floor)
    credit = token_advantage(a, w, omega)
    # Without an advantage log p = -inf costs nothing, but the NaN of a target outside the vocabulary must be seen.
    term = torch.where((credit == 0) & ~logp.isnan(), 0, -credit * logp)
    for out, value in ((stats.magnitude, w), (stats.gate, omega), (stats.token_advantage, credit), (loss, term)):
        out[order] = torch.where(valid, value, out[order])


# ---------------------------------------------------------------------------------------------------------- regimes


class Regime(IntEnum):
    """Integer codes of :func:`token_regimes`."""

    PADDING = -1
    """Masked out: not a response token."""
    LOCK = 0
    """The teacher is certain: Ĥ ≤ τ_low."""
    FORK = 1
    """Uncertain, and it stays so: Ĥ ≥ τ_high and Ĥ^CL ≥ τ_high."""
    PIVOT = 2
    """Uncertain, but certainty follows within the lookahead: Ĥ ≥ τ_high and Ĥ^CL ≤ τ_low."""
    MID = 3
    """The rest."""


REGIMES = tuple(regime.name.lower() for regime in Regime if regime is not Regime.PADDING)
"""Names of the regimes, in the order of their codes."""

TAU_LOW, TAU_HIGH = 0.01, 0.17
"""The thresholds of Figure A5, for H / log V."""


def token_regimes(
    normalised_entropy: Tensor,
    normalised_lookahead_entropy: Tensor,
    tau_low: float = TAU_LOW,
    tau_high: float = TAU_HIGH,
    mask: Tensor | None = None,
) -> Tensor:
    """Sort every token into exactly one :class:`Regime`.

    The default thresholds are those of Figure A5, which normalises entropy by its largest possible value:
    Ĥ = H / log V, H in nats. With another scale choose other thresholds.

    Args:
        normalised_entropy: Ĥ, any shape; integers, bfloat16, float16, float32 or float64. NaN, which a run that
            diverged may have recorded, is ``Regime.MID``.
        normalised_lookahead_entropy: Ĥ^CL on the same scale, same shape, any of those dtypes; it never exceeds Ĥ, as
            its window holds t.
        tau_low: at most this counts as certain. A number below tau_high.
        tau_high: at least this counts as uncertain. A number.
        mask: same shape, bool, or 0/1 in any of those dtypes; 0 gives ``Regime.PADDING``. Default: all valid.

    Returns:
        int64 codes of that shape.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it expects. That a mask is 0/1 is checked where
            :func:`egrsd_kernels.fused_egrsd_loss` checks values.
    """
    entropies = {
        "normalised_entropy": normalised_entropy,
        "normalised_lookahead_entropy": normalised_lookahead_entropy,
    }
    for name, value in entropies.items():
        checks.tensor(name, value)
        expect(value.dtype in (*checks.INTEGERS, *checks.FLOATS), name, value, "a tensor of real numbers", TypeError)
    shape = normalised_entropy.shape
    if normalised_lookahead_entropy.shape != shape:
        raise ValueError(
            f"normalised_lookahead_entropy: expected the shape of normalised_entropy, {tuple(shape)}, "
            f"got {tuple(normalised_lookahead_entropy.shape)}"
        )
    checks.tensor("normalised_lookahead_entropy", normalised_lookahead_entropy, like=normalised_entropy)
    if mask is not None:
        mask = checks.mask_of("mask", mask, shape=shape, like=normalised_entropy)
    tau_low, tau_high = number("tau_low", tau_low), number("tau_high", tau_high)
    # Otherwise a token could be lock and fork at once.
    expect(tau_low < tau_high, "tau_low", tau_low, f"less than tau_high = {tau_high}")

    uncertain = normalised_entropy >= tau_high
    codes = torch.full(shape, Regime.MID, dtype=torch.int64, device=normalised_entropy.device)
    codes = codes.masked_fill(normalised_entropy <= tau_low, Regime.LOCK)
    codes = codes.masked_fill(uncertain & (normalised_lookahead_entropy >= tau_high), Regime.FORK)
    codes = codes.masked_fill(uncertain & (normalised_lookahead_entropy <= tau_low), Regime.PIVOT)
    return codes if mask is None else codes.masked_fill(~mask, Regime.PADDING)


def regime_shares(codes: Tensor) -> dict[str, float]:
    """Share of the valid tokens in each regime, by lower-case name; sums to 1, or all 0 without a valid token.

    Args:
        codes: of :func:`token_regimes`, any shape and integer dtype. The host waits for a GPU's.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it expects.
    """
    checks.tensor("codes", codes)
    expect(codes.dtype in checks.INTEGERS, "codes", codes, "an integer tensor, of token_regimes", TypeError)
    if checks.values_checked(codes):
        unknown = (codes < Regime.PADDING) | (codes > Regime.MID)
        checks.refuse("codes", codes, codes, unknown, f"codes of {Regime.PADDING:d} to {Regime.MID:d}")
    counts = torch.stack([(codes == code).sum() for code in range(len(REGIMES))]).tolist()
    total = max(sum(counts), 1)
    return {name: count / total for name, count in zip(REGIMES, counts, strict=True)}
