"""The head: how hidden states become logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True)
class Head:
    """Logits z = softcap · tanh(logit_scale · x / softcap) of x = h (W + s·B A)ᵀ + b, in nats.

    weight: W (V, D); bfloat16, float16, float32 or float64. bias: b (V,), any of those dtypes, or None. logit_scale and
    softcap are above 0; softcap=None: without tanh. low_rank: (A (r, D), B (V, r), s), a LoRA on the head, or None:
    without it. The temperature that logits are divided by last is no part of the head: it is an argument, common to
    student and teacher.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    low_rank: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def detach(self) -> Head:
        low_rank = None
        if self.low_rank is not None:
            a, b, scale = self.low_rank
            low_rank = a.detach(), b.detach(), scale
        return self.frame(self.weight.detach(), None if self.bias is None else self.bias.detach(), low_rank=low_rank)

    @property
    def frame(self) -> Callable[..., Head]:
        """Makes the same head of another (weight, bias, low_rank=), and holds on to none of this one."""
        return partial(Head, logit_scale=self.logit_scale, softcap=self.softcap)

    def cap_and_temperature(self, temperature: float) -> tuple[float | None, float]:
        """(c, T) with z / temperature = c · tanh(x / c) / T for x = h Wᵀ + b; x / T where c is None."""
        cap = None if self.softcap is None else self.softcap / self.logit_scale
        return cap, temperature / self.logit_scale


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits of operands in ``dtype`` are computed in: float32, unless the operands have more."""
    return torch.float64 if dtype == torch.float64 else torch.float32
