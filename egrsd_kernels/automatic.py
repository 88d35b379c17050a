"""Which gradients to make, exact or sparse, by what earlier steps saw: for ``grad_mode="auto"``."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

PROBE_EVERY = 64  # calls after which sparse gradients are tried again, where they did not pay


@dataclass
class _History:
    calls: int = 0
    share: float | None = None  # of rows with a gradient that had to be made exactly, when last seen
    counts: torch.Tensor | None = None  # what ``share`` is to be read from, on the host
    arrived: torch.cuda.Event | None = None  # when it is there

    def read(self) -> None:
        if self.counts is not None and (self.arrived is None or self.arrived.query()):
            dense, rows = self.counts.tolist()
            self.share = dense / rows if rows else self.share
            self.counts = self.arrived = None


@dataclass
class Automatic:
    """The share of dense rows that sparse gradients met, for each kind of problem; never waits for the device.

    What a step sees is copied to the host behind its back, and counts from the first later step that finds it there.
    """

    _seen: dict[Hashable, _History] = field(default_factory=dict)

    def sparse(self, key: Hashable, most_dense: float) -> bool:
        """Whether to make this call's gradients sparse: as long as less than ``most_dense`` of the rows are dense,
        and on a probe now and then, since the model moves on. Never where that is 0."""
        history = self._seen.setdefault(key, _History())
        history.read()
        history.calls += 1
        worth_a_try = history.share is None or history.calls % PROBE_EVERY == 0
        return most_dense > 0 and (worth_a_try or history.share < most_dense)

    def observe(self, key: Hashable, counts: torch.Tensor) -> None:
        """counts (2,): how many rows were dense, and of how many. Not taken while a copy is on its way."""
        history = self._seen.setdefault(key, _History())
        history.read()
        if history.counts is not None:
            return
        if counts.device.type == "cpu":
            history.counts = counts
        else:
            history.counts = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
            history.counts.copy_(counts, non_blocking=True)
            history.arrived = torch.cuda.Event()
            history.arrived.record()
