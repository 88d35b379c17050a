"""What a practitioner watches: entropies, gates, magnitudes, regimes, and what they cost."""

import math
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from egrsd_kernels import credit
from egrsd_kernels.credit import Regime, regime_shares, token_regimes

BINS = 10
LEAST_ENTROPY = 0.01  # nats


def token_metrics(
    stats: Mapping[str, Tensor],
    *,
    gamma: float,
    gate_floor: float,
    clip_eps: float,
    scale: float | Tensor,
    log_vocab: float,
    tau_low: float,
    tau_high: float,
    sparse_calls: int = 0,
    divergence: bool = False,
) -> dict[str, float]:
    """Metrics of the tokens of one optimizer step, as plain numbers by the names under which they are logged.

    - teacher_entropy/mean, lookahead_entropy/mean (nats), gate/mean, magnitude/mean;
    - teacher_entropy/bin_0: the share of tokens below 0.01 nat; bin_1 … bin_9: in nine steps by the same factor from
      there to log V; gate/bin_0 … bin_9: in each tenth of [0, 1]; likewise magnitude of [1 − ε, 1 + ε] (none where
      ε = 0);
    - magnitude/clipped: the share at either bound;
    - abs_log_ratio/mean and abs_log_ratio/entropy_decile_0 … 9: |δ| in nats, over all tokens and over each tenth of
      them in the order of their entropy;
    - regime/lock, fork, pivot, mid: shares; restored/lock …: what the lookahead gives back there on average, the gate
      less the gate that H itself would get (no entry where a regime has no token);
    - gradient/error_bound and gradient/exact, of sparse gradients: the certified relative error of a call of the loss,
      and the share of tokens whose gradient was made exactly, those without one among them;
    - divergence/mean (nats), where the loss has one.

    Args:
        stats: the fields of :class:`egrsd_kernels.TokenStats`, each (N,), of valid tokens only.
        gamma, gate_floor, clip_eps: as in the loss.
        scale: what entropies were divided by in the gate, nats: of all, or (N,) of each token.
        log_vocab: log V, what the regimes compare entropies with, nats.
        tau_low, tau_high: the regimes' thresholds.
        sparse_calls: how many calls of the loss with sparse gradients the tokens are of.
        divergence: whether the loss has one.

    Returns:
        The metrics; empty without a token.
    """
    entropy, lookahead = stats["teacher_entropy"], stats["lookahead_entropy"]
    gate, magnitude = stats["gate"], stats["magnitude"]
    if not entropy.numel():
        return {}
    distance = (stats["teacher_logp"] - stats["student_logp"]).abs()
    metrics = {
        "teacher_entropy/mean": entropy.mean(),
        "lookahead_entropy/mean": lookahead.mean(),
        "gate/mean": gate.mean(),
        "magnitude/mean": magnitude.mean(),
        "abs_log_ratio/mean": distance.mean(),
    }
    # Half of a trained model's tokens are below 0.01 nat: equal steps would put nearly all into the first.
    steps = (entropy / LEAST_ENTROPY).log() * ((BINS - 1) / math.log(log_vocab / LEAST_ENTROPY))
    metrics |= _histogram("teacher_entropy", torch.where(steps > 0, 1 + steps, 0) / BINS)
    metrics |= _histogram("gate", gate)
    if clip_eps:
        metrics |= _histogram("magnitude", (magnitude - 1 + clip_eps) / (2 * clip_eps))
        # The bounds as float32 rounds them.
        metrics["magnitude/clipped"] = ((magnitude - 1).abs() >= clip_eps * (1 - 1e-6)).float().mean()
    if sparse_calls:
        bound = stats["gradient_error_bound"]
        metrics["gradient/error_bound"] = bound.sum() / sparse_calls
        metrics["gradient/exact"] = (bound == 0).float().mean()
    if divergence:
        metrics["divergence/mean"] = stats["divergence"].mean()
    for index, part in enumerate(distance[entropy.argsort()].tensor_split(BINS)):
        if part.numel():
            metrics[f"abs_log_ratio/entropy_decile_{index}"] = part.mean()

    codes = token_regimes(entropy / log_vocab, lookahead / log_vocab, tau_low, tau_high)
    restored = gate - credit.gate(entropy, scale, gamma, gate_floor)
    shares = regime_shares(codes)
    for name, share in shares.items():
        if share:
            metrics[f"restored/{name}"] = restored[codes == Regime[name.upper()]].mean()
    numbers = torch.stack(list(metrics.values())).tolist()  # one wait for the device
    return dict(zip(metrics, numbers, strict=True)) | {f"regime/{name}": share for name, share in shares.items()}


def evidence_metrics(tokens: Mapping[str, Tensor], contexts: Iterable[str]) -> dict[str, float]:
    """Metrics of tokens whose worth is not EGRSD's: token_advantage/mean and token_advantage/abs_mean, and for each
    context CONTEXT_entropy/mean and CONTEXT_abs_log_ratio/mean, nats.

    Args:
        tokens: (N,) each: token_advantage, and CONTEXT_entropy and CONTEXT_abs_log_ratio of the ``contexts``.

    Returns:
        The metrics; empty without a token.
    """
    credit = tokens["token_advantage"]
    if not credit.numel():
        return {}
    metrics = {"token_advantage/mean": credit.mean(), "token_advantage/abs_mean": credit.abs().mean()}
    for name in contexts:
        metrics |= {f"{name}_{what}/mean": tokens[f"{name}_{what}"].mean() for what in ("entropy", "abs_log_ratio")}
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))


def gathered_tokens(batches: Sequence[Mapping[str, Tensor]], accelerator: Accelerator) -> dict[str, Tensor]:
    """The tokens of an optimizer step on all processes: by name (N,) each, of signals (n,) of each micro-batch."""
    names = list(batches[0])
    local = torch.stack([torch.cat([signals[name] for signals in batches]) for name in names], dim=1)
    # Processes hold different numbers of tokens; padding is told from tokens by an infinite log p.
    local = accelerator.pad_across_processes(local, dim=0, pad_index=math.inf)
    every = accelerator.gather(local).T
    return dict(zip(names, every[:, every[names.index("student_logp")] != math.inf], strict=True))


def peak_memory_gib(device: torch.device) -> float:
    """The most memory so far, GiB: allocated on a CUDA device, else resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _histogram(name: str, values: Tensor) -> dict[str, Tensor]:
    """Shares of ``values`` in the tenths of [0, 1]; what is outside counts to the nearest."""
    counts = torch.histc(values.float().clamp(0, 1), BINS, 0, 1) / values.numel()
    return {f"{name}/bin_{index}": share for index, share in enumerate(counts)}
