"""Operands whose softmax looks like a reasoning model's: most tokens nearly decided, some forks, a broad background."""

from __future__ import annotations

import math

import torch

VOCABULARY = 151_936  # Qwen3
HIDDEN_SIZES = {"0.6b": 1024, "1.7b": 2048, "4b": 2560, "8b": 4096, "32b": 5120}


def head_weight(vocabulary: int, size: int, generator: torch.Generator, dtype=torch.bfloat16) -> torch.Tensor:
    """(V, D) normal with standard deviation 0.02, the initialisation that transformers' models share."""
    weight = torch.empty(vocabulary, size, device=generator.device, dtype=dtype)
    return weight.normal_(0, 0.02, generator=generator)


def peaked_hidden(weight: torch.Tensor, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden (n, D), sampled target (n,)): softmax rows with 1 to 16 candidates over a normal background.

    Two rows in three are nearly decided (one candidate 6 to 11 nats above the background's logsumexp); the others are
    forks, whose 2 to 16 candidates lie within 4 nats. Candidates are log-uniform in rank, as words in a text. The
    target is the row's first candidate or, in a fork, any of them.
    """
    device = weight.device
    vocabulary, size = weight.shape
    spread = 2.0  # standard deviation of the background logits, nats
    background = math.log(vocabulary) + spread**2 / 2
    width = 16

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    rank = (uniform(n, width) * math.log(vocabulary)).exp().long().clamp_(1, vocabulary) - 1
    candidate = (rank * 48_271) % vocabulary  # scatters the ranks over the vocabulary
    decided = uniform(n) < 2 / 3
    count = torch.where(decided, 1, 2 + (uniform(n) * (width - 1)).long())
    used = torch.arange(width, device=device) < count[:, None]
    for j in range(1, width):  # a candidate drawn twice counts once
        used[:, j] &= (candidate[:, j : j + 1] != candidate[:, :j]).all(1)
    height = background + torch.where(decided[:, None], 6 + 5 * uniform(n, width), 4 * uniform(n, width))
    hidden = torch.empty(n, size, device=device, dtype=weight.dtype)
    for rows in torch.arange(n, device=device).split(2048):
        direction = weight[candidate[rows]].float()
        direction *= (used[rows] * height[rows])[..., None] / direction.square().sum(-1, keepdim=True)
        noise = torch.randn(len(rows), size, device=device, generator=generator)
        hidden[rows] = (direction.sum(1) + noise * (spread / (0.02 * size**0.5))).to(weight.dtype)
    pick = (uniform(n) * used.sum(1)).long()
    order = used.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return hidden, candidate.gather(1, order.gather(1, pick[:, None])).squeeze(1)
