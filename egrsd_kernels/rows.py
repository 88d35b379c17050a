"""Which tokens are worked on, in which order, and which sequence each belongs to.

``backends/triton/rows.py`` has the twins of :meth:`Rows.build` and :func:`by_token`.
"""

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
        """From two (N,) tensors: valid, bool, and active, bool or what is 0 where not. Not valid is not active."""
        active = valid & (active != 0)
        key = 2 - valid.to(torch.uint8) - active.to(torch.uint8)
        order = torch.argsort(key, stable=True).to(torch.int32)
        return cls(order, torch.stack([valid.sum(), active.sum()]).to(torch.int32))

    def among(self, which: int, first: int, n: int) -> torch.Tensor:
        """Which of the rows first, ..., first + n - 1 of the order are among the leading ``counts[which]`` (n,)."""
        return torch.arange(first, first + n, device=self.order.device) < self.counts[which]

    def split(self, n: int) -> tuple[Rows, Rows]:
        """The first n of the order, and the others."""
        if n >= len(self.order):
            return self, Rows(self.order[n:], torch.zeros_like(self.counts))
        return (
            Rows(self.order[:n], self.counts.clamp(max=n)),
            Rows(self.order[n:], (self.counts - n).clamp_(min=0)),
        )


class Sequences(NamedTuple):
    """How N flat tokens lie in sequences: so many tokens each, or between boundaries."""

    length: int
    """N for packed ones."""
    boundaries: torch.Tensor | None
    """(S + 1,) int32 or int64, contiguous, from 0 to N. None: every ``length`` tokens."""

    def of(self, n: int, device: torch.device) -> torch.Tensor:
        """The sequence (N,) that each token belongs to."""
        position = torch.arange(n, device=device)
        if self.boundaries is None:
            return position // max(self.length, 1)
        ends = self.boundaries[1:]
        return torch.searchsorted(ends, position, right=True).clamp_(max=len(ends) - 1)


def by_token(
    values: torch.Tensor, n: int, sequences: Sequences, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values (N,) in ``dtype``, the last position (N,) int32 of each token's sequence).

    values: contiguous; a vector has one a sequence, or one a token where there are N; a matrix (B, T) one a token.
    """
    sequence = sequences.of(n, values.device)
    ends = sequences.boundaries
    last = (sequence + 1) * sequences.length - 1 if ends is None else (ends[1:] - 1)[sequence].clamp(max=n - 1)
    flat = values.reshape(-1) if values.numel() == n else values[sequence]
    return flat.to(dtype), last.to(torch.int32)
