"""The loss, its signals and its gradient in explicit loops over Python floats: what the reference is tested against.

Nothing here is shared with `reference`, and nothing is vectorised or differentiated by a machine: the gradient is the
formula dL/dz_v = −(Â / Σm) (1[v = y] − p_v), carried by hand through temperature and softcap to h, W and b.
Tensors of small sizes or nested lists go in; float32 values become Python floats (float64) exactly.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

IGNORED = -100


@dataclass
class OracleResult:
    """Positions are flat, in reading order: N = B · T, or the packed N."""

    loss: float
    stats: dict[str, list[float]]  # of each position, 0 where masked
    grad_hidden: list[list[float]]  # (N, D)
    grad_weight: list[list[float]]  # (V, D)
    grad_bias: list[float]  # (V,)


def egrsd_oracle(
    student_hidden: Any,
    student_weight: Any,
    teacher_hidden: Any,
    target_ids: Any,
    advantages: Any,
    *,
    teacher_weight: Any = None,
    student_bias: Any = None,
    teacher_bias: Any = None,
    mask: Any = None,
    cu_seqlens: Any = None,
    teacher_logp: Any = None,
    teacher_entropy: Any = None,
    gamma: float = 0.3,
    gate_floor: float = 0.1,
    lookahead: int = 0,
    lookahead_filter: str = "minimum",
    lookahead_decay: float = 1.0,
    lookahead_temperature: float = 0.0,
    lookahead_quantile: float = 0.0,
    clip_eps: float = 0.2,
    entropy_scale: Any = "batch_max",
    min_entropy_scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    normalizer: Any = None,
) -> OracleResult:
    targets, hidden_s, hidden_t = _plain(target_ids), _plain(student_hidden), _plain(teacher_hidden)
    weight_s, bias_s = _plain(student_weight), _plain(student_bias)
    weight_t, bias_t = _plain(teacher_weight), _plain(teacher_bias)
    if weight_t is None:
        weight_t = weight_s
        if bias_t is None:
            bias_t = bias_s
    given_logp, given_entropy, flags = _plain(teacher_logp), _plain(teacher_entropy), _plain(mask)
    adv = _plain(advantages)

    # Flat positions, and the sequences as lists of flat positions.
    sequences = []
    if isinstance(targets[0], list):
        width = len(targets[0])
        for b in range(len(targets)):
            sequences.append([b * width + t for t in range(width)])
        if not isinstance(adv[0], list):
            adv = [[a] * width for a in adv]
        adv, targets, hidden_s = _join(adv), _join(targets), _join(hidden_s)
        hidden_t, flags, given_logp, given_entropy = map(_join, (hidden_t, flags, given_logp, given_entropy))
    else:
        bounds = _plain(cu_seqlens) or [0, len(targets)]
        for start, stop in itertools.pairwise(bounds):
            sequences.append(list(range(start, stop)))
        if len(adv) != len(targets):
            adv = [a for a, sequence in zip(adv, sequences, strict=True) for _ in sequence]
    n, vocabulary = len(targets), len(weight_s)
    valid = [targets[i] != IGNORED and (flags is None or bool(flags[i])) for i in range(n)]

    # Student and teacher at every valid position.
    log_p_s, log_p_t, entropy = [0.0] * n, [0.0] * n, [0.0] * n
    probabilities, slopes = {}, {}
    for i in range(n):
        if not valid[i]:
            continue
        z, slopes[i] = _logits(hidden_s[i], weight_s, bias_s, softcap, temperature)
        logs = _log_softmax(z)
        log_p_s[i] = logs[targets[i]]
        probabilities[i] = [math.exp(x) for x in logs]
        if hidden_t is None:
            log_p_t[i], entropy[i] = given_logp[i], given_entropy[i]
        else:
            logs = _log_softmax(_logits(hidden_t[i], weight_t, bias_t, softcap, temperature)[0])
            log_p_t[i] = logs[targets[i]]
            for x in logs:
                if math.exp(x) > 0:
                    entropy[i] -= math.exp(x) * x

    # Lookahead within each sequence.
    ahead = [0.0] * n
    for sequence in sequences:
        for place, i in enumerate(sequence):
            if valid[i]:
                window = enumerate(sequence[place : place + lookahead + 1])
                weight = lookahead_decay if lookahead_filter == "discounted" else 1.0
                seen = sorted(entropy[j] / weight**k for k, j in window if valid[j])
                if lookahead_filter == "softmin" and lookahead_temperature > 0:
                    shares = [math.exp((seen[0] - h) / lookahead_temperature) for h in seen]
                    found = seen[0] - lookahead_temperature * math.log(math.fsum(shares) / len(seen))
                elif lookahead_filter == "quantile":
                    rank = lookahead_quantile * (len(seen) - 1)
                    share = rank - math.floor(rank)
                    found = (1 - share) * seen[math.floor(rank)] + share * seen[math.ceil(rank)]
                else:
                    found = seen[0]
                ahead[i] = min(entropy[i], found)

    # The normaliser.
    if entropy_scale == "batch_max":
        scale = max([entropy[i] for i in range(n) if valid[i]], default=min_entropy_scale)
    elif entropy_scale == "batch_max_lookahead":
        scale = max([ahead[i] for i in range(n) if valid[i]], default=min_entropy_scale)
    else:
        scale = float(entropy_scale)
    scale = max(scale, min_entropy_scale)

    # Magnitude, gate and token advantage; the loss and its gradient.
    count = sum(valid) if normalizer is None else float(normalizer)
    magnitude, gate, credit = [0.0] * n, [0.0] * n, [0.0] * n
    width = len(weight_s[0])
    grad_hidden = [[0.0] * width for _ in range(n)]
    grad_weight = [[0.0] * width for _ in range(vocabulary)]
    grad_bias = [0.0] * vocabulary
    loss = 0.0
    for i in range(n):
        if not valid[i]:
            continue
        gate[i] = min(max(1 - gamma * ahead[i] / scale, gate_floor), 1.0)
        if adv[i] == 0:
            magnitude[i] = 1.0
            continue  # nothing is added to the loss or to a gradient
        exponent = (log_p_t[i] - log_p_s[i]) * (1 if adv[i] > 0 else -1)
        ratio = math.inf if exponent > 700 else math.exp(exponent)
        magnitude[i] = min(max(ratio, 1 - clip_eps), 1 + clip_eps)  # a NaN, being the first argument, stays
        credit[i] = adv[i] * magnitude[i] * gate[i]
        loss -= credit[i] * log_p_s[i] / count
        for v in range(vocabulary):
            dz = -(credit[i] / count) * ((1.0 if v == targets[i] else 0.0) - probabilities[i][v])
            da = dz * slopes[i][v]
            grad_bias[v] += da
            for k in range(width):
                grad_hidden[i][k] += da * weight_s[v][k]
                grad_weight[v][k] += da * hidden_s[i][k]

    stats = {
        "student_logp": log_p_s,
        "teacher_logp": log_p_t,
        "teacher_entropy": entropy,
        "lookahead_entropy": ahead,
        "magnitude": magnitude,
        "gate": gate,
        "token_advantage": credit,
    }
    return OracleResult(loss, stats, grad_hidden, grad_weight, grad_bias)


def _logits(hidden: list, weight: list, bias: list | None, softcap: float | None, temperature: float) -> tuple:
    """The logits z of one position, and dz_v / da_v where a = h Wᵀ + b."""
    z, slope = [], []
    for v, row in enumerate(weight):
        a = 0.0 if bias is None else bias[v]
        for x, y in zip(hidden, row, strict=True):
            a += x * y
        if softcap is None:
            z.append(a / temperature)
            slope.append(1 / temperature)
        else:
            bent = math.tanh(a / softcap)
            z.append(softcap * bent / temperature)
            slope.append((1 - bent * bent) / temperature)
    return z, slope


def _log_softmax(z: list[float]) -> list[float]:
    top = max(z)
    total = 0.0
    for x in z:
        total += math.exp(x - top)
    return [x - top - math.log(total) for x in z]


def _plain(x: Any) -> Any:
    return x.tolist() if hasattr(x, "tolist") else x


def _join(rows: list | None) -> list | None:
    return None if rows is None else [item for row in rows for item in row]
