"""Random operands whose softmax is peaked, like a reasoning model's, or flat; and figures of the softmax that came out.

``peaked``, the default everywhere, is made after two measurements. How decided the rows are: of more than 10^6 response
tokens of Qwen3-8B at temperature 1, 50.6 % have an entropy below 0.01 nat, and 20 % one above 0.672 nat (Wang et al.,
2025, arXiv 2506.01939, section 3); here, at V = 151,936, 51 % and 21 % do. And what lies beyond a row's first entries:
about as much as in rows of equal entropy of a language model of ours (results/language_model-h100.json, held-out text,
V = 32,768):

    entropy, nats                      0.086    0.27    0.62     1.1
    beyond 16 entries: model          1.3e-3  5.0e-3  1.1e-2  2.5e-2
                       here           1.1e-3  3.9e-3  1.0e-2  2.2e-2
    beyond 256:        model          6.4e-4  2.4e-3  4.9e-3  1.2e-2
                       here           6.5e-4  2.4e-3  6.4e-3  1.3e-2
    beyond 4096:       model          2.1e-4  8.2e-4  1.7e-3  4.1e-3
                       here           2.3e-4  8.5e-4  2.3e-3  4.7e-3

The teacher is the student, moved by 2 % of its hidden states' size: |δ| is 0.006 nat on average, and below 1.3e-4 nat
in the lower half of entropy.

``flat`` is nearly uniform: what no trained model gives, and the worst case for such code.

The dense kernels and the bare matrix products do the same operations on both, but a GPU's power, and so its clock,
depends on the numbers. Every result file carries :func:`summary` of the rows that it was made on.
"""

from __future__ import annotations

import math

import torch

VOCABULARY = 151_936  # Qwen3
HIDDEN_SIZES = {"0.6b": 1024, "1.7b": 2048, "4b": 2560, "8b": 4096, "32b": 5120}
MARGINS = {(0.0, 2.0): 0.19, (2.0, 7.4): 0.32, (7.4, 17.0): 0.49}  # nats, first candidate above second: how many rows
NOTICED = 2.0**-12  # probabilities above are counted: below, an entry is lost beside 1 in a bfloat16 gradient


def head_weight(vocabulary: int, size: int, generator: torch.Generator, dtype=torch.bfloat16) -> torch.Tensor:
    """(V, D) normal with standard deviation 0.02, the initialisation that transformers' models share."""
    weight = torch.empty(vocabulary, size, device=generator.device, dtype=dtype)
    return weight.normal_(0, 0.02, generator=generator)


def peaked_hidden(weight: torch.Tensor, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden (n, D), sampled target (n,)): softmax rows with 16 candidates over a normal background.

    The first candidate is the margin above the second; what follows falls off as a power of its rank. Candidates are
    log-uniform in rank, as words in a text. The target is sampled from among them.
    """
    device = weight.device
    vocabulary, size = weight.shape
    width = 16
    spread = 2.75  # standard deviation of the background logits, nats
    background = math.log(vocabulary) + spread**2 / 2  # its logsumexp

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    rank = (uniform(n, width) * math.log(vocabulary)).exp().long().clamp_(1, vocabulary) - 1
    candidate = (rank * 48_271) % vocabulary  # scatters the ranks over the vocabulary
    used = torch.ones(n, width, dtype=torch.bool, device=device)
    for j in range(1, width):  # a candidate drawn twice counts once
        used[:, j] &= (candidate[:, j : j + 1] != candidate[:, :j]).all(1)
    margin = _piecewise(uniform(n), MARGINS)
    runner_up = margin[:, None] + 1.7 * torch.arange(1, width, device=device).log() + 0.5 * normal(n, width - 1)
    logit = background + 1.5 + margin[:, None] - torch.cat([torch.zeros_like(margin)[:, None], runner_up], 1)
    hidden = torch.empty(n, size, device=device, dtype=weight.dtype)
    score = torch.empty(n, width, device=device)
    for rows in torch.arange(n, device=device).split(2048):
        vectors = weight[candidate[rows]].float() * used[rows][..., None]
        gram = vectors @ vectors.transpose(1, 2) + torch.diag_embed((~used[rows]).float())

        def towards(z: torch.Tensor, gram=gram, vectors=vectors) -> torch.Tensor:
            """The shortest vector that gives the candidates the logits z."""
            return (torch.linalg.solve(gram, z[..., None]) * vectors).sum(1)

        direction = towards(torch.where(used[rows], logit[rows], 0))
        left = (spread**2 - 0.02**2 * direction.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
        noise = normal(len(rows), size)
        noise -= towards((vectors @ noise[..., None]).squeeze(-1))
        hidden[rows] = (direction + noise * left / (0.02 * size**0.5)).to(weight.dtype)
        score[rows] = (vectors @ hidden[rows].float()[..., None]).squeeze(-1)  # the candidates' logits
    gumbel = -uniform(n, width).log().neg().log()
    pick = torch.where(used, score + gumbel, -math.inf).argmax(1, keepdim=True)
    return hidden, candidate.gather(1, pick).squeeze(1)


def _piecewise(u: torch.Tensor, pieces: dict[tuple[float, float], float]) -> torch.Tensor:
    """Quantiles ``u`` of a distribution that is uniform over each interval of ``pieces``, with so much of it there."""
    ends = torch.tensor(list(pieces.values()), device=u.device).cumsum(0)
    piece = torch.searchsorted(ends[:-1], u)
    low, high = torch.tensor(list(pieces), device=u.device).T[:, piece]
    share = torch.tensor(list(pieces.values()), device=u.device)[piece]
    return high - (ends[piece] - u) / share * (high - low)


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
