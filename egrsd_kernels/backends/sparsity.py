"""What sparse gradients may leave out, and what they did leave out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DEFAULT_SPARSE_TOL = 2.0**-10


@dataclass(frozen=True)
class Sparse:
    """What a student pass may leave out of its gradients, and what it did leave out: (N,), in the callers' order.

    With c = dL/dlogp, Σ |c| dropped <= tolerance Σ |c| mass; see docs/sparse.md for the proof.
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
