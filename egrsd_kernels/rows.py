"""Which tokens are worked on, and in which order."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """The tokens that need work first, without asking the device how many there are.

    order: (N,) int32, a permutation of the tokens: the valid ones with an advantage, then the valid ones without (they
        need log p, but no gradient), then the masked ones.
    counts: (2,) int32, on the device: how many tokens are valid, and how many of those have an advantage.
    """

    order: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def build(cls, valid: torch.Tensor, active: torch.Tensor) -> Rows:
        """From two (N,) bool tensors; what is not valid is not active either."""
        active = valid & active
        key = 2 - valid.to(torch.uint8) - active.to(torch.uint8)
        order = torch.argsort(key, stable=True).to(torch.int32)
        return cls(order, torch.stack([valid.sum(), active.sum()]).to(torch.int32))

    def among(self, which: int, first: int, n: int) -> torch.Tensor:
        """Which of the rows first, ..., first + n - 1 of the order are among the leading ``counts[which]`` (n,)."""
        return torch.arange(first, first + n, device=self.order.device) < self.counts[which]

    def split(self, n: int) -> tuple[Rows, Rows]:
        """The first n of the order, and the others."""
        return (
            Rows(self.order[:n], self.counts.clamp(max=n)),
            Rows(self.order[n:], (self.counts - n).clamp_(min=0)),
        )
