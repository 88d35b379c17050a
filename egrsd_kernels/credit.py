"""The method (arXiv 2605.13255), once: from a teacher's and a student's statistics to each token's advantage.

    H^CL_t = H over the lookahead window, by default its least  :func:`lookahead_entropy`
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

Filter = Literal["minimum", "discounted", "softmin", "quantile"]
EntropyScale = Literal["batch_max", "batch_max_lookahead"]
FILTERS: tuple[Filter, ...] = get_args(Filter)
ENTROPY_SCALES: tuple[EntropyScale, ...] = get_args(EntropyScale)


class Lookahead(NamedTuple):
    """The window of :func:`lookahead_entropy`, and how it is filtered; by default every filter is the minimum."""

    window: int
    """W, in tokens after the token itself; 0 is EGRSD."""
    filter: Filter = "minimum"
    decay: float = 1.0
    """λ in (0, 1], of "discounted"."""
    temperature: float = 0.0
    """τ in [0, 10^6] nats, of "softmin"."""
    quantile: float = 0.0
    """q in [0, 1], of "quantile"."""

    @classmethod
    def checked(
        cls, window: object, filter: Any, decay: object = 1.0, temperature: object = 0.0, quantile: object = 0.0
    ) -> Lookahead:
        """From arguments of :func:`egrsd_kernels.fused_egrsd_loss`; a TypeError or ValueError names a wrong one."""
        known = isinstance(filter, str) and filter in FILTERS
        expect(known, "lookahead_filter", filter, " or ".join(f'"{name}"' for name in FILTERS))
        given = {"decay": decay, "temperature": temperature, "quantile": quantile}
        numbers = {}
        for name, (owner, bounds) in FILTER_NUMBERS.items():
            value = numbers[name] = number(f"lookahead_{name}", given[name], **bounds)
            neutral = cls._field_defaults[name]
            if filter != owner and value != neutral:
                expect(False, f"lookahead_{name}", value, f'{neutral:g}, since lookahead_filter is "{filter}"')
        return cls(checks.integer("lookahead", window, low=0), filter, **numbers)

    @classmethod
    def of(cls, settings: Any) -> Lookahead:
        """From an object that has the loss's arguments by name, such as an EGRSDConfig; as :meth:`checked`."""
        return cls.checked(settings.lookahead, *(getattr(settings, name) for name in LOOKAHEAD_SETTINGS))


FILTER_NUMBERS: dict[str, tuple[Filter, dict[str, Any]]] = {
    "decay": ("discounted", {"low": 0, "high": 1, "strict": True}),
    # From the mean, which an infinite τ is, 10^6 nats are less than 10^-4 nats away.
    "temperature": ("softmin", {"low": 0, "high": 1e6}),
    "quantile": ("quantile", {"low": 0, "high": 1}),
}
"""Fields of :class:`Lookahead` that are one filter's own: whose, and the bounds."""

LOOKAHEAD_SETTINGS = tuple(f"lookahead_{name}" for name in Lookahead._fields[1:])
"""Names of the arguments, and of the trainer's settings, that say how the window is filtered."""


class CreditOptions(NamedTuple):
    """The method's numbers; see :func:`egrsd_kernels.fused_egrsd_loss`."""

    gamma: float
    gate_floor: float
    clip_eps: float


class TokenStats(NamedTuple):
    """Per-token figures of one call, detached, shaped like ``target_ids``, 0 where masked; entropies in nats.

    float32 (float64 for float64 inputs). gradient_error_bound: of sparse gradients, a token's share |c_t| dropped_t /
    Σ_s |c_s| ‖p_s − e_s‖₁ of the relative error (see sparse_tol): the sum is at most ``sparse_tol``. 0 where the
    gradient is exact. divergence: D, nats, where the loss has one, else 0.
    """

    student_logp: Tensor
    teacher_logp: Tensor
    teacher_entropy: Tensor
    lookahead_entropy: Tensor
    magnitude: Tensor
    gate: Tensor
    token_advantage: Tensor
    gradient_error_bound: Tensor
    divergence: Tensor


# ------------------------------------------------------------------------------------------------------- the lookahead


# A filter maps windows (n, W + 1), the token's own entropy first and +inf where nothing is seen, to (n,). It is at
# least the least entropy of its window, and keeps a NaN. What it makes of a window without any entropy is not used.


def _minimum(window: Tensor, lookahead: Lookahead) -> Tensor:
    """min_j H_j."""
    return window.amin(1)


def _discounted(window: Tensor, lookahead: Lookahead) -> Tensor:
    """min_j λ^−(j − t) H_j; what rounding leaves below 0 stays as it is."""
    distance = torch.arange(window.shape[1], device=window.device)
    # In two factors: one alone leaves the dtype's range while the product with a tiny entropy does not.
    half = torch.exp2(distance.to(window.dtype) * (-0.5 * math.log2(lookahead.decay)))
    half = half.clamp(max=torch.finfo(window.dtype).max)
    return torch.where(window > 0, window * half * half, window).amin(1)


def _softmin(window: Tensor, lookahead: Lookahead) -> Tensor:
    """−τ log mean_j exp(−H_j / τ), from the minimum at τ = 0 to the mean.

    The mean and not the sum: a window of equal entropies is that entropy, however many it holds.
    """
    lowest = window.amin(1)
    seen = window != torch.inf
    # A logarithm near 1 is off by its dtype's last place, times τ: in float64 that is nothing up to the largest τ.
    excess = (window - lowest[:, None]).double()
    weight = torch.where(excess > 0, torch.exp(-excess / lookahead.temperature), 1)  # 1 where τ = 0 makes 0 / 0, too
    mean = torch.where(seen, weight, 0).sum(1) / seen.sum(1)
    return (lowest - lookahead.temperature * mean.log()).to(window.dtype)


def _quantile(window: Tensor, lookahead: Lookahead) -> Tensor:
    """The q-quantile of the H_j, with linear interpolation, as torch.quantile and numpy.quantile have it."""
    seen = (window != torch.inf).sum(1)
    rank = lookahead.quantile * (seen - 1).clamp(min=0).to(window.dtype)
    below = rank.floor()
    ascending = window.sort(1).values
    ends = torch.stack([below.long(), rank.ceil().long()], 1)
    low, high = ascending.gather(1, ends).unbind(1)
    value = low + (high - low) * (rank - below)
    return torch.where(window.isnan().any(1), torch.nan, value)


_FILTERS: dict[Filter, Callable[[Tensor, Lookahead], Tensor]] = {
    "minimum": _minimum, "discounted": _discounted, "softmin": _softmin, "quantile": _quantile,
}  # fmt: skip
WINDOW_ELEMENTS = 1 << 20  # of the windows that are looked at at once; some 50 MiB


def lookahead_entropy(entropy: Tensor, valid: Tensor, seq_end: Tensor, lookahead: Lookahead) -> Tensor:
    """H^CL (N,): min(H_t, filter of H over valid positions j in [t, min(t + W, seq_end_t)]); 0 where t is not valid.

    "minimum": min_j H_j. "discounted": min_j λ^−(j − t) H_j, which a later token lowers the less the further it is.
    "softmin": −τ log mean_j exp(−H_j / τ). "quantile": the q-quantile of the H_j, linear between two of them.
    None is ever above H_t, nor below min_j H_j, and so never below 0. A NaN in the window is kept.

    Args:
        entropy: (N,) nats, at least 0; float32 or float64. valid: (N,) bool.
        seq_end: (N,) integer, the last position of each token's own sequence.
    """
    n, device = entropy.numel(), entropy.device
    ahead = torch.arange(min(lookahead.window, n) + 1, device=device)
    result = torch.zeros_like(entropy)
    for tokens in torch.arange(n, device=device).split(max(WINDOW_ELEMENTS // len(ahead), 1)):
        j = tokens[:, None] + ahead
        inside = j <= seq_end[tokens, None]
        j = j.clamp(max=n - 1)
        window = torch.where(inside & valid[j], entropy[j], torch.inf)
        filtered = _FILTERS[lookahead.filter](window, lookahead)
        result[tokens] = torch.minimum(entropy[tokens], filtered)
    return torch.where(valid, result, 0)


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
    rows: Rows, first_row: int, n_rows: int, advantages: Tensor, scale: Tensor, share: Tensor, options: CreditOptions,
    stats: TokenStats, loss: Tensor, gradient: Tensor,
) -> None:  # fmt: skip
    """Write magnitude, gate and Â into ``stats``, −Â · log p_S into ``loss``, and share · Â into ``gradient``.

    For the valid rows among the ``n_rows`` from ``first_row`` of the order on; every other entry stays as it is.

    Args:
        advantages: A (N,). scale: 0-d, nats. share: 0-d. loss, gradient: (N,).
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
    written = (
        (stats.magnitude, w), (stats.gate, omega), (stats.token_advantage, credit), (loss, term),
        (gradient, credit * share),
    )  # fmt: skip
    for out, value in written:
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
