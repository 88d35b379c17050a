"""Token regimes: what the teacher's entropy, now and just ahead, says about a token (arXiv 2605.13255, Figure A5)."""

from enum import IntEnum

import torch
from torch import Tensor

from . import inputs
from .inputs import expect, number


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
        inputs.tensor(name, value)
        expect(value.dtype in (*inputs.INTEGERS, *inputs.FLOATS), name, value, "a tensor of real numbers", TypeError)
    shape = normalised_entropy.shape
    if normalised_lookahead_entropy.shape != shape:
        raise ValueError(
            f"normalised_lookahead_entropy: expected the shape of normalised_entropy, {tuple(shape)}, "
            f"got {tuple(normalised_lookahead_entropy.shape)}"
        )
    inputs.tensor("normalised_lookahead_entropy", normalised_lookahead_entropy, like=normalised_entropy)
    if mask is not None:
        mask = inputs.mask_of("mask", mask, shape=shape, like=normalised_entropy)
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
    inputs.tensor("codes", codes)
    expect(codes.dtype in inputs.INTEGERS, "codes", codes, "an integer tensor, of token_regimes", TypeError)
    if inputs.values_checked(codes):
        unknown = (codes < Regime.PADDING) | (codes > Regime.MID)
        inputs.refuse("codes", codes, codes, unknown, f"codes of {Regime.PADDING:d} to {Regime.MID:d}")
    counts = torch.stack([(codes == code).sum() for code in range(len(REGIMES))]).tolist()
    total = max(sum(counts), 1)
    return {name: count / total for name, count in zip(REGIMES, counts, strict=True)}
