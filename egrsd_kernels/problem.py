"""What both backends work on: heads, the order of rows, options, statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

IGNORE_INDEX = -100  # transformers' mark for a position without a target
DEFAULT_CHUNK_BYTES = 1 << 30  # the most logits-sized memory that a call holds at a time


@dataclass(frozen=True)
class Head:
    """Logits z = h Wᵀ + b, then softcap · tanh(z / softcap), then z / temperature."""

    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None = None  # (V,)
    softcap: float | None = None
    temperature: float = 1.0

    def detach(self) -> Head:
        bias = None if self.bias is None else self.bias.detach()
        return Head(self.weight.detach(), bias, self.softcap, self.temperature)


@dataclass(frozen=True)
class Rows:
    """Which tokens need work, without asking the device how many there are.

    ``order`` (N,) int32 is a permutation: first the valid tokens with an advantage, then the valid ones without (they
    need log p, but no gradient), then the masked ones. ``counts`` (2,) int32, on the device: how many are valid, and
    how many of those have an advantage.
    """

    order: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def build(cls, valid: torch.Tensor, active: torch.Tensor) -> Rows:
        active = valid & active
        key = 2 - valid.to(torch.uint8) - active.to(torch.uint8)
        order = torch.argsort(key, stable=True).to(torch.int32)
        return cls(order, torch.stack([valid.sum(), active.sum()]).to(torch.int32))


@dataclass(frozen=True)
class Options:
    """The scalars of the method; see :func:`egrsd_kernels.fused_egrsd_loss`."""

    gamma: float
    gate_floor: float
    lookahead: int
    clip_eps: float
    entropy_scale: str | float | torch.Tensor
    min_entropy_scale: float
    chunk_bytes: int


class TokenStats(NamedTuple):
    """Per-token figures of one call, detached, shaped like ``target_ids``, 0 where masked; entropies in nats.

    float32 (float64 for float64 inputs).
    """

    student_logp: torch.Tensor
    teacher_logp: torch.Tensor
    teacher_entropy: torch.Tensor
    lookahead_entropy: torch.Tensor
    magnitude: torch.Tensor
    gate: torch.Tensor
    token_advantage: torch.Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, unless the operands have more."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# What a student pass leaves: the gradients of (hidden, weight, bias), None where not needed, times a 0-d factor or 1.
Finish = Callable[[torch.Tensor | None], tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]


def scaled(gradient, factor: torch.Tensor | None, dtype: torch.dtype, multiply: Callable) -> torch.Tensor | None:
    """gradient · factor (0-d, or None for 1) in ``dtype``, in place where it has that dtype; None for None."""
    if gradient is None or factor is None:
        return None if gradient is None else gradient.to(dtype)
    return multiply(gradient, factor, gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype))
