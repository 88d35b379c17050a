"""Token regimes: what the teacher's entropy, now and just ahead, says about a token (arXiv 2605.13255, Figure A5)."""

from enum import IntEnum

import torch
from torch import Tensor


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
        normalised_entropy: Ĥ, any shape.
        normalised_lookahead_entropy: Ĥ^CL on the same scale, same shape; it never exceeds Ĥ, as its window holds t.
        tau_low: at most this counts as certain.
        tau_high: at least this counts as uncertain.
        mask: same shape, bool or 0/1; 0 gives ``Regime.PADDING``. Default: all valid.

    Returns:
        int64 codes of that shape.
    """
    shape = normalised_entropy.shape
    if normalised_lookahead_entropy.shape != shape:
        raise ValueError(
            f"normalised_lookahead_entropy: expected the shape of normalised_entropy, {tuple(shape)}, "
            f"got {tuple(normalised_lookahead_entropy.shape)}"
        )
    if mask is not None and mask.shape != shape:
        raise ValueError(f"mask: expected the shape of normalised_entropy, {tuple(shape)}, got {tuple(mask.shape)}")
    if not tau_low < tau_high:  # otherwise a token could be lock and fork at once
        raise ValueError(f"tau_low: expected less than tau_high = {tau_high}, got {tau_low}")

    uncertain = normalised_entropy >= tau_high
    codes = torch.full(shape, Regime.MID, dtype=torch.int64, device=normalised_entropy.device)
    codes[normalised_entropy <= tau_low] = Regime.LOCK
    codes[uncertain & (normalised_lookahead_entropy >= tau_high)] = Regime.FORK
    codes[uncertain & (normalised_lookahead_entropy <= tau_low)] = Regime.PIVOT
    if mask is not None:
        codes[~mask.bool()] = Regime.PADDING
    return codes


def regime_shares(codes: Tensor) -> dict[str, float]:
    """Share of the valid tokens in each regime, by lower-case name; sums to 1, or all 0 without a valid token."""
    counts = torch.stack([(codes == code).sum() for code in range(len(REGIMES))]).tolist()
    total = max(sum(counts), 1)
    return {name: count / total for name, count in zip(REGIMES, counts, strict=True)}
