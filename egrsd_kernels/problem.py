"""What both backends work on: heads, the order of rows, options, statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

IGNORE_INDEX = -100  # transformers' mark for a position without a target
DEFAULT_SPARSE_TOL = 2.0**-10
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

    float32 (float64 for float64 inputs). gradient_error_bound: of sparse gradients, a token's share |c_t| dropped_t /
    Σ_s |c_s| ‖p_s − e_s‖₁ of the relative error (see sparse_tol): the sum is at most ``sparse_tol``. 0 where the
    gradient is exact.
    """

    student_logp: torch.Tensor
    teacher_logp: torch.Tensor
    teacher_entropy: torch.Tensor
    lookahead_entropy: torch.Tensor
    magnitude: torch.Tensor
    gate: torch.Tensor
    token_advantage: torch.Tensor
    gradient_error_bound: torch.Tensor


@dataclass(frozen=True)
class Sparse:
    """What a student pass may leave out of its gradients, and what it did leave out: (N,), in the callers' order.

    With c = dL/dlogp, Σ |c| dropped <= tolerance Σ |c| mass; see ``kernels/sparse.py`` for the proof.
    """

    tolerance: float
    dropped: torch.Tensor  # float32: the gradient's mass left out, or a little more; 0 where the gradient is exact
    mass: torch.Tensor  # float32: that gradient's, ‖p − e_y‖₁; less, down to 0, under a softcap or where it is exact
    dense: torch.Tensor  # int32: 1 where the gradient was looked at and found too dense to leave anything out

    @classmethod
    def of(cls, tolerance: float, target_ids: torch.Tensor) -> Sparse:
        dropped, mass = torch.zeros(2, target_ids.numel(), dtype=torch.float32, device=target_ids.device)
        return cls(tolerance, dropped, mass, torch.zeros_like(target_ids, dtype=torch.int32))

    def error_bound(self, gradient: torch.Tensor) -> torch.Tensor:
        """|c_t| dropped_t / Σ_s |c_s| mass_s (N,) float32, for c = ``gradient``: of the gradient's relative L1 error.

        In float64, where no |c| of float32 overflows. What is not finite was left to the exact kernels.
        """
        c = gradient.double().abs().nan_to_num(0, 0, 0)
        error = c * self.dropped
        return torch.where(error > 0, error / (c * self.mass).sum(), 0).float()


def power_of_two(x: torch.Tensor) -> torch.Tensor:
    """2^k for x = m 2^k > 0 with 1/2 <= m < 1, and 2 for 0: to divide by it, and to multiply again, rounds nothing."""
    x = torch.where(x > 0, x, 1)
    return x / torch.frexp(x).mantissa


def exceeding(dropped: torch.Tensor, mass: torch.Tensor, gradient: torch.Tensor, tolerance: float) -> torch.Tensor:
    """The tokens (N,) to make exactly, mostly none, for Σ |c| dropped <= tolerance Σ |c| mass with c = ``gradient``.

    Where the inequality does not hold, all those that drop more than the tolerance of their own mass: it then holds for
    each of the others. In float64, with a margin for its rounding. Where c is not finite nothing may be left out.
    """
    finite = gradient.isfinite()
    c = torch.where(finite, gradient, 0).double().abs()
    allowed = tolerance * (1 - 2.0**-30) * mass.double()
    beyond = ((c * dropped).sum() > (c * allowed).sum()) & (dropped > allowed) & (c != 0)
    return beyond | (~finite & (dropped > 0))


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
