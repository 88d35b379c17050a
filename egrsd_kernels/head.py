"""The head: how hidden states become logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

RANK_STEP = 8  # rows of whole 16 bytes stay so beside a low-rank part


@dataclass(frozen=True, eq=False)
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

    def join(self, hidden: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(``[h, u]``, B) with h (W + s·B A)ᵀ = ``[h, u] [W, B]ᵀ`` and u = s·h Aᵀ; (h, None) without a low-rank part.

        u is made as by a linear layer in the hidden states' dtype; B gets the weight's. Differentiable in h, A and B.
        The rank is filled up with zeros to a multiple of RANK_STEP. Rows not ``wanted`` (N,) may hold anything.
        """
        if self.low_rank is None:
            return hidden, None
        a, b, scale = self.low_rank
        fill = -a.shape[0] % RANK_STEP
        rows = hidden.masked_fill(~wanted.view(*hidden.shape[:-1], 1), 0)  # else A's gradient would be 0 · NaN
        u = F.linear(rows, F.pad(scale * a, (0, 0, 0, fill)).to(hidden.dtype))
        return torch.cat([hidden, u], -1), F.pad(b, (0, fill)).to(self.weight.dtype)

    def joined(self, hidden: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, Head]:
        """The same logits from other hidden states, by a head without a low-rank part."""
        hidden, columns = self.join(hidden, wanted)
        return hidden, self.frame(widened(self.weight, columns), self.bias)

    def cap_and_temperature(self, temperature: float) -> tuple[float | None, float]:
        """(c, T) with z / temperature = c · tanh(x / c) / T for x = h Wᵀ + b; x / T where c is None."""
        cap = None if self.softcap is None else self.softcap / self.logit_scale
        return cap, temperature / self.logit_scale


def widened(weight: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
    """[W, B] (V, D + r), a copy; W itself without columns."""
    return weight if columns is None else torch.cat([weight, columns], 1)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits of operands in ``dtype`` are computed in: float32, unless the operands have more."""
    return torch.float64 if dtype == torch.float64 else torch.float32
