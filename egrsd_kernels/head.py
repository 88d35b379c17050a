"""The head: how hidden states become logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True)
class Head:
    """Logits z = softcap · tanh(logit_scale · (h Wᵀ + b) / softcap), in nats; softcap=None: without tanh.

    weight: (V, D); bfloat16, float16, float32 or float64. bias: (V,), any of those dtypes, or None. logit_scale and
    softcap are above 0. The temperature that logits are divided by last is no part of the head: it is an argument,
    common to student and teacher.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def detach(self) -> Head:
        return self.frame(self.weight.detach(), None if self.bias is None else self.bias.detach())

    @property
    def frame(self) -> Callable[[torch.Tensor, torch.Tensor | None], Head]:
        """Makes the same head of another (weight, bias), and holds on to neither of this one."""
        return partial(Head, logit_scale=self.logit_scale, softcap=self.softcap)

    def cap_and_temperature(self, temperature: float) -> tuple[float | None, float]:
        """(c, T) with z / temperature = c · tanh(x / c) / T for x = h Wᵀ + b; x / T where c is None."""
        cap = None if self.softcap is None else self.softcap / self.logit_scale
        return cap, temperature / self.logit_scale


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits of operands in ``dtype`` are computed in: float32, unless the operands have more."""
    return torch.float64 if dtype == torch.float64 else torch.float32
