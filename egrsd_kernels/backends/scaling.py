"""Factors of gradients that are known late."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from egrsd_kernels.rows import Rows


def power_of_two(x: Tensor) -> Tensor:
    """2^k for x = m 2^k > 0 with 1/2 <= m < 1, and 2 for 0: to divide by it, and to multiply again, rounds nothing."""
    x = torch.where(x > 0, x, 1)
    return x / torch.frexp(x).mantissa


def scale_rows(direction: Tensor, factor: Tensor) -> Tensor:
    """direction (B, T, D) times factor (N,), rounded once; 0 where the factor is, whatever the direction is."""
    factor = factor.reshape(*direction.shape[:-1], 1)
    scaled = torch.mul(direction, factor, out=torch.empty_like(direction))
    # Chosen, not multiplied: the direction of a target outside the vocabulary, or of an infinite divergence, is no
    # finite one.
    return scaled.masked_fill_(factor == 0, 0)


class Scales(NamedTuple):
    """What a loss divides by; 0-d, in its dtype."""

    entropy: Tensor
    """What entropies are divided by, nats."""
    normalizer: Tensor
    """What the sum over tokens is divided by; 1 without a valid token."""
    power: Tensor | None
    """The power of two in it, for float16. The forward pass leaves it out of the gradients: a token's hidden gradient
    is then of the head's own size, which float16 can hold. The backward pass divides by it, which rounds nothing."""
    share: Tensor
    """-1 / normalizer, times that power: of a token's advantage in the gradient that the forward pass makes."""


def scales(peak: Tensor, least: float, rows: Rows, normalizer: Tensor | None, low: bool) -> Scales:
    """Of entropies up to ``peak`` (0-d, nats), divided by at least ``least``; normalizer: 0-d, or None for Σm.

    low: whether gradients are float16, which needs the power.
    """
    n_valid = rows.counts[0]
    divisor = n_valid.to(peak.dtype) if normalizer is None else normalizer
    divisor = torch.where(n_valid == 0, 1, divisor)
    power = power_of_two(divisor) if low else None
    return Scales(peak.clamp(min=least), divisor, power, -(1 if power is None else power) / divisor)


def scaled(
    gradient: Tensor | None, factor: Tensor | None, dtype: torch.dtype,
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor | None:  # fmt: skip
    """gradient · factor (0-d, or None for 1) in ``dtype``, in place where it has that dtype; None for None."""
    if gradient is None or factor is None:
        return None if gradient is None else gradient.to(dtype)
    return multiply(gradient, factor, gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype))
