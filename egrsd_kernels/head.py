"""The head: how hidden states become logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional as F

RANK_STEP = 8  # joined ranks are multiples of it: rows of 16 bytes stay rows of 16 bytes


@dataclass(frozen=True)
class Head:
    """Logits z = softcap · tanh(logit_scale · (h (W + scale · B A)ᵀ + b) / softcap), in nats.

    Attributes:
        weight: W (V, D); bfloat16, float16, float32 or float64.
        bias: b (V,), any of those dtypes; or None.
        logit_scale: above 0.
        softcap: above 0; or None, without tanh.
        low_rank: (A, B, scale) of a low-rank part beside W, as of a LoRA on the head: A (r, D), B (V, r), any of those
            dtypes; or None.

    The temperature that logits are divided by last is no part of the head: it is an argument, common to student and
    teacher.
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
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias, low_rank=low_rank)

    def join(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """([h, u], B) with h (W + scale · B A)ᵀ = [h, u] [W, B]ᵀ, where u = scale · h Aᵀ; (h, None) without low_rank.

        As linear layers in the hidden states' dtype make them; differentiable in h, A and B. The rank is filled up with
        zeros. :attr:`frame` makes [W, B].
        """
        if self.low_rank is None:
            return hidden, None
        a, b, scale = self.low_rank
        fill = -a.shape[0] % RANK_STEP
        u = F.linear(hidden, F.pad(scale * a, (0, 0, 0, fill)).to(hidden.dtype))
        return torch.cat([hidden, u], -1), F.pad(b, (0, fill)).to(self.weight.dtype)

    @property
    def frame(self) -> Callable[..., Head]:
        """Makes the same head, without a low-rank part, of another (weight, bias), and holds on to neither of this one.

        A third operand, columns (V, r), is joined to the weight's: a copy of V (D + r) numbers.
        """
        return partial(_framed, logit_scale=self.logit_scale, softcap=self.softcap)

    def joined(self, hidden: torch.Tensor) -> tuple[torch.Tensor, Head]:
        """The same logits by other hidden states and a head without a low-rank part."""
        hidden, columns = self.join(hidden)
        return hidden, self.frame(self.weight, self.bias, columns)

    def cap_and_temperature(self, temperature: float) -> tuple[float | None, float]:
        """(c, T) with z / temperature = c · tanh(x / c) / T for x = h Wᵀ + b; x / T where c is None."""
        cap = None if self.softcap is None else self.softcap / self.logit_scale
        return cap, temperature / self.logit_scale


def _framed(
    weight: torch.Tensor, bias: torch.Tensor | None, columns: torch.Tensor | None = None, *,
    logit_scale: float, softcap: float | None,
) -> Head:  # fmt: skip
    return Head(weight if columns is None else torch.cat([weight, columns], 1), bias, logit_scale, softcap)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits of operands in ``dtype`` are computed in: float32, unless the operands have more."""
    return torch.float64 if dtype == torch.float64 else torch.float32
