"""Factors of gradients that are known late."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def power_of_two(x: Tensor) -> Tensor:
    """2^k for x = m 2^k > 0 with 1/2 <= m < 1, and 2 for 0: to divide by it, and to multiply again, rounds nothing."""
    x = torch.where(x > 0, x, 1)
    return x / torch.frexp(x).mantissa


def scaled(
    gradient: Tensor | None, factor: Tensor | None, dtype: torch.dtype,
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor | None:  # fmt: skip
    """gradient · factor (0-d, or None for 1) in ``dtype``, in place where it has that dtype; None for None."""
    if gradient is None or factor is None:
        return None if gradient is None else gradient.to(dtype)
    return multiply(gradient, factor, gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype))
