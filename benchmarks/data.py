"""Random operands whose softmax is peaked, like a reasoning model's, or flat; and figures of the softmax that came out.

``peaked``, the default everywhere, draws two tokens in three nearly decided and the others as forks, over a broad
background. What is known of trained models: of more than 10^6 response tokens of Qwen3-8B at temperature 1, 50.6 % have
an entropy below 0.01 nat, and 20 % one above 0.672 nat (Wang et al., 2025, arXiv 2506.01939, section 3). Here, at
V = 151,936, 42 to 44 % are below 0.01 nat, and 20 % above 0.90 to 0.92 nat: slightly less decided, so no favour to code
that profits from sparse rows. The median row has one entry above 2^-12, the mean row four. The teacher is the student,
moved by 2 % of its hidden states' size: |δ| is 0.007 nat on average, and below 0.001 nat in the lower half of entropy.

``flat`` is nearly uniform: what no trained model gives, and the worst case for such code.

The dense kernels and the bare matrix products do the same operations on both, but a GPU's power, and so its clock,
depends on the numbers. Every result file carries :func:`summary` of the rows that it was made on.
"""

from __future__ import annotations

import math

import torch

VOCABULARY = 151_936  # Qwen3
HIDDEN_SIZES = {"0.6b": 1024, "1.7b": 2048, "4b": 2560, "8b": 4096, "32b": 5120}
NOTICED = 2.0**-12  # probabilities above are counted: below, an entry is lost beside 1 in a bfloat16 gradient


def head_weight(vocabulary: int, size: int, generator: torch.Generator, dtype=torch.bfloat16) -> torch.Tensor:
    """(V, D) normal with standard deviation 0.02, the initialisation that transformers' models share."""
    weight = torch.empty(vocabulary, size, device=generator.device, dtype=dtype)
    return weight.normal_(0, 0.02, generator=generator)


def peaked_hidden(weight: torch.Tensor, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden (n, D), sampled target (n,)): softmax rows with 1 to 16 candidates over a normal background.

    Two rows in three are nearly decided (one candidate 6 to 11 nats above the background's logsumexp); the others are
    forks, whose 2 to 16 candidates lie within 4 nats. Candidates are log-uniform in rank, as words in a text. The
    target is sampled from among the candidates.
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
    score = torch.empty(n, width, device=device)
    for rows in torch.arange(n, device=device).split(2048):
        vectors = weight[candidate[rows]].float()
        direction = vectors * (used[rows] * height[rows])[..., None] / vectors.square().sum(-1, keepdim=True)
        noise = torch.randn(len(rows), size, device=device, generator=generator)
        hidden[rows] = (direction.sum(1) + noise * (spread / (0.02 * size**0.5))).to(weight.dtype)
        score[rows] = (vectors @ hidden[rows].float()[..., None]).squeeze(-1)  # the candidates' logits
    gumbel = -uniform(n, width).log().neg().log()
    pick = torch.where(used, score + gumbel, -math.inf).argmax(1, keepdim=True)
    return hidden, candidate.gather(1, pick).squeeze(1)


def flat_hidden(weight: torch.Tensor, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden (n, D), target (n,)): logits with a standard deviation of 0.1 nat, targets anywhere."""
    vocabulary, size = weight.shape
    noise = torch.randn(n, size, device=weight.device, generator=generator)
    targets = torch.randint(vocabulary, (n,), device=weight.device, generator=generator)
    return (noise * (0.1 / (0.02 * size**0.5))).to(weight.dtype), targets


def teacher_hidden(hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The teacher's hidden states: the student's, slightly moved, as the same backbone's under another context are."""
    scale = 0.02 * hidden.float().square().mean().sqrt()
    noise = torch.randn(hidden.shape, device=hidden.device, generator=generator)
    return (hidden + scale * noise).to(hidden.dtype)


GENERATORS = {"peaked": peaked_hidden, "flat": flat_hidden}


def summary(log_p: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """What kind of rows (n, V) of log-probabilities these are; entropies and log p in nats."""
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    noticed = (p > NOTICED).sum(-1).double()
    return {
        "rows": len(log_p),
        "entropy_mean": entropy.mean().item(),
        "entropy_median": entropy.median().item(),
        "entropy_80th_percentile": entropy.double().quantile(0.8).item(),
        "share_entropy_below_0.01": (entropy < 0.01).double().mean().item(),
        "share_entropy_below_0.1": (entropy < 0.1).double().mean().item(),
        "logp_mean": log_p.gather(1, targets[:, None]).mean().item(),
        "entries_above_2^-12_mean": noticed.mean().item(),
        "entries_above_2^-12_median": noticed.median().item(),
    }
