"""Entropy-guided reinforced self-distillation (EGRSD, CL-EGRSD; arXiv 2605.13255) in plain PyTorch over full logits.

Every signal of the method is one small pure function that carries the paper's name for it; `egrsd_loss` puts them
together behind the signature of `egrsd_kernels.fused_egrsd_loss`. Everything is computed in the dtype of the inputs:
pass float64 tensors, or `dtype=torch.float64`, for a result to measure others against. Logarithms are natural, so log
probabilities and entropies are in nats. Shapes: N tokens, S sequences, V vocabulary entries, D hidden features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100


class TokenStats(NamedTuple):
    """The signals of every token: detached, shaped like target_ids, 0 where masked."""

    student_logp: Tensor  # log p_S(y)
    teacher_logp: Tensor  # log p_T(y)
    teacher_entropy: Tensor  # H
    lookahead_entropy: Tensor  # H^CL
    magnitude: Tensor  # w
    gate: Tensor  # ω
    token_advantage: Tensor  # Â = A · w · ω


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None, temperature: float = 1.0
) -> Tensor:
    """z = h Wᵀ + b, then softcap · tanh(z / softcap), then z / temperature.  (..., D), (V, D), (V,) -> (..., V)"""
    z = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def log_prob(logits: Tensor, target_ids: Tensor) -> Tensor:
    """log p(y) = z_y − log Σ_v exp(z_v), in nats.  (..., V), (...) -> (...);  NaN where y is not in [0, V)."""
    vocabulary = logits.shape[-1]
    target = target_ids.long().clamp(0, vocabulary - 1)
    logp = torch.log_softmax(logits, dim=-1).gather(-1, target[..., None])[..., 0]
    return logp.masked_fill(target != target_ids, torch.nan)


def entropy(logits: Tensor) -> Tensor:
    """H = −Σ_v p(v) log p(v) over the full vocabulary, in nats, with 0 · log 0 = 0.  (..., V) -> (...)"""
    logp = torch.log_softmax(logits, dim=-1)
    p = logp.exp()
    return -(p * logp.masked_fill(p == 0, 0.0)).sum(dim=-1)


def is_top1(logits: Tensor, target_ids: Tensor) -> Tensor:
    """Whether y is the most likely token: of equal maxima, the first is.  (..., V), (...) -> (...) bool"""
    top = logits.argmax(dim=-1)
    return (top == target_ids) & ~log_prob(logits, target_ids).isnan()


def mean_logits(logits: Tensor) -> Tensor:
    """(1/V) Σ_v z_v, in nats.  (..., V) -> (...)"""
    return logits.mean(dim=-1)


def log_sum_sq_probs(logits: Tensor) -> Tensor:
    """log Σ_v p(v)², in nats.  (..., V) -> (...)"""
    return torch.logsumexp(2 * torch.log_softmax(logits, dim=-1), dim=-1)


def direction(advantages: Tensor) -> Tensor:
    """D = sign(A), with sign(0) = 0."""
    return torch.sign(advantages)


def log_ratio(teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
    """δ = log p_T(y) − log p_S(y), in nats."""
    return teacher_logp - student_logp


def magnitude(advantages: Tensor, teacher_logp: Tensor, student_logp: Tensor, clip_eps: float = 0.2) -> Tensor:
    """w = clip(exp(D · δ), 1 − ε, 1 + ε);  w = 1 where D = 0, whatever δ is.  (N,) -> (N,)"""
    d = direction(advantages)
    w = torch.exp(d * log_ratio(teacher_logp, student_logp)).clamp(1 - clip_eps, 1 + clip_eps)
    return torch.where(d == 0, 1.0, w)


def lookahead_entropy(
    entropy: Tensor,
    mask: Tensor,
    seq_end: Tensor,
    lookahead: int,
    filter: str = "minimum",
    decay: float = 1.0,
    temperature: float = 0.0,
    quantile: float = 0.0,
) -> Tensor:
    """H^CL_t = min H_j over the valid j in [t, min(t + W, end of t's sequence)], in nats;  0 where t is not valid.

    entropy (N,) and mask (N,) bool hold the sequences one after another, and seq_end (N,) the index of the last
    position of each position's own sequence. An invalid position in the window is skipped; a NaN entropy is not.
    Other filters, of which H_t is an upper bound: "discounted", min λ^−(j − t) · H_j;  "softmin",
    −τ log (1/n) Σ exp(−H_j / τ) over the n valid j, at τ = 0 the minimum;  "quantile", the q-quantile of the H_j,
    interpolated linearly.
    """
    position = torch.arange(len(entropy), device=entropy.device)
    following, seen = [], []
    for step in range(min(lookahead, max(len(entropy) - 1, 0)) + 1):
        seen.append(mask.roll(-step) & (position + step <= seq_end))
        ahead = entropy.roll(-step)
        if filter == "discounted":
            ahead = torch.where(ahead > 0, ahead / decay**step, ahead)  # 0 stays 0
        following.append(ahead)
    h, valid = torch.stack(following), torch.stack(seen)  # (W + 1, N)
    if filter == "softmin" and temperature > 0:
        exponent = torch.where(valid, -h / temperature, -torch.inf)
        h_cl = -temperature * (torch.logsumexp(exponent, 0) - valid.sum(0).to(h.dtype).log())
    elif filter == "quantile":
        h_cl = torch.nanquantile(torch.where(valid, h, torch.nan), quantile, dim=0)
        h_cl = torch.where((valid & h.isnan()).any(0), torch.nan, h_cl)
    else:
        h_cl = torch.where(valid, h, torch.inf).amin(0)  # the identity of min, so that invalid ones are never chosen
    return torch.where(mask, torch.minimum(entropy, h_cl), 0.0)


def entropy_scale(
    entropy: Tensor,
    lookahead_entropy: Tensor,
    mask: Tensor,
    scale: str | float | Tensor = "batch_max",
    min_entropy_scale: float = 1.0,
) -> Tensor:
    """The normaliser of the entropy: a 0-d tensor in nats, never below min_entropy_scale.  (N,), (N,), (N,) -> ()

    "batch_max": the maximum of the raw H over the valid tokens (Eq. 8), at every lookahead;
    "batch_max_lookahead": the maximum of H^CL over the valid tokens (Algorithm 1);
    a float or a 0-d tensor: that value. Without a valid token a batch maximum is min_entropy_scale.
    """
    if not isinstance(scale, str):
        value = torch.as_tensor(scale, dtype=entropy.dtype, device=entropy.device)
    elif scale in ("batch_max", "batch_max_lookahead"):
        candidates = (entropy if scale == "batch_max" else lookahead_entropy)[mask]
        value = candidates.max() if candidates.numel() else entropy.new_tensor(min_entropy_scale)
    else:
        raise ValueError(f"entropy_scale is {scale!r}: expected 'batch_max', 'batch_max_lookahead' or a value in nats")
    return value.clamp(min=min_entropy_scale)


def normalised_entropy(
    entropy: Tensor,
    lookahead_entropy: Tensor,
    mask: Tensor,
    scale: str | float | Tensor = "batch_max",
    min_entropy_scale: float = 1.0,
) -> Tensor:
    """Ĥ = H^CL / entropy_scale(...), without unit (Eq. 8).  (N,), (N,), (N,) -> (N,)"""
    return lookahead_entropy / entropy_scale(entropy, lookahead_entropy, mask, scale, min_entropy_scale)


def gate(normalised_entropy: Tensor, gamma: float = 0.3, gate_floor: float = 0.1) -> Tensor:
    """ω = clip(1 − γ Ĥ, gate_floor, 1).  (N,) -> (N,)"""
    return (1 - gamma * normalised_entropy).clamp(gate_floor, 1)


def token_advantage(advantages: Tensor, magnitude: Tensor, gate: Tensor) -> Tensor:
    """Â = A · w · ω;  exactly 0 where A = 0.  (N,) -> (N,)"""
    return torch.where(advantages == 0, 0.0, advantages * magnitude * gate)


def position_weights(mask: Tensor, log_ratio: Tensor, position: float = 0.0, prefix: float = 0.0) -> Tensor:
    """ρ = (1 + κ (2u − 1)) · (1 + η (1 − a)) of the tokens of one response, κ = position, η = prefix.  (T,) -> (T,)

    u = (k − ½) / n for the k-th of n valid tokens;  a = Σ_{j < t} |δ_j| / Σ_j |δ_j| over the valid ones, 0 where they
    are all 0;  ρ = 1 where not valid.
    """
    weights = torch.ones_like(log_ratio)
    tokens = mask.nonzero()[:, 0].tolist()
    total = sum(float(log_ratio[t].abs()) for t in tokens)
    before = 0.0
    for k, t in enumerate(tokens, 1):
        u, a = (k - 0.5) / len(tokens), before / total if total else 0.0
        weights[t] = (1 + position * (2 * u - 1)) * (1 + prefix * (1 - a))
        before += float(log_ratio[t].abs())
    return weights


def egrsd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    target_ids: Tensor,
    advantages: Tensor,
    *,
    teacher_weight: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    teacher_logp: Tensor | None = None,
    teacher_entropy: Tensor | None = None,
    gamma: float = 0.3,
    gate_floor: float = 0.1,
    lookahead: int = 0,
    lookahead_filter: str = "minimum",
    lookahead_decay: float = 1.0,
    lookahead_temperature: float = 0.0,
    lookahead_quantile: float = 0.0,
    clip_eps: float = 0.2,
    entropy_scale: str | float | Tensor = "batch_max",
    min_entropy_scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    normalizer: float | Tensor | None = None,
    return_stats: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """L = −(1/Σm) Σ m Â log p_S(y), where the gradient flows through log p_S alone.

    Padded: hidden (B, T, D), target_ids and mask (B, T), advantages (B,) or (B, T). Packed: hidden (N, D), target_ids
    and mask (N,), cu_seqlens (S + 1,), advantages (S,) or (N,); without cu_seqlens the N tokens are one sequence.
    A target of −100 is a masked position. Weights are (V, D), biases (V,). The teacher's head is the student's,
    detached, weight and bias, as far as it is not given. teacher_logp and teacher_entropy, shaped like target_ids and
    in nats, stand in for teacher_hidden=None. `dtype` converts every floating-point input first, differentiably.
    """
    if dtype is not None:
        student_hidden, student_weight, teacher_hidden, advantages = (
            _to(dtype, x) for x in (student_hidden, student_weight, teacher_hidden, advantages)
        )
        teacher_weight, student_bias, teacher_bias, teacher_logp, teacher_entropy = (
            _to(dtype, x) for x in (teacher_weight, student_bias, teacher_bias, teacher_logp, teacher_entropy)
        )
    if teacher_weight is None:  # one frozen backbone: the teacher reads through the student's head
        teacher_weight = student_weight
        teacher_bias = student_bias if teacher_bias is None else teacher_bias
    _check_shapes(target_ids, mask=mask, teacher_logp=teacher_logp, teacher_entropy=teacher_entropy)
    _check_shapes(target_ids, features=True, student_hidden=student_hidden, teacher_hidden=teacher_hidden)
    if {teacher_logp is None, teacher_entropy is None} != {teacher_hidden is not None}:
        raise ValueError("expected either teacher_hidden or both teacher_logp and teacher_entropy")

    seq_end, advantages = _flat_layout(target_ids, advantages, cu_seqlens)
    valid = target_ids.flatten() != IGNORE_INDEX
    if mask is not None:
        valid = valid & mask.flatten().bool()
    rows = valid.nonzero()[:, 0]  # masked positions are left out, not multiplied by 0: they may hold NaN

    def select(x: Tensor) -> Tensor:  # (B, T, ...) or (N, ...) -> (valid tokens, ...)
        return x.flatten(0, target_ids.ndim - 1)[rows]

    def spread(x: Tensor) -> Tensor:  # (valid tokens,) -> (N,), 0 where masked
        return x.new_zeros(valid.shape).index_put((rows,), x)

    y = select(target_ids)
    student_logp = log_prob(logits(select(student_hidden), student_weight, student_bias, softcap, temperature), y)

    with torch.no_grad():  # all that Â is made of is a constant
        if teacher_hidden is not None:
            z = logits(select(teacher_hidden), teacher_weight, teacher_bias, softcap, temperature)
            log_p_t, h = log_prob(z, y), spread(entropy(z))
        else:
            log_p_t, h = select(teacher_logp), spread(select(teacher_entropy))
        window = lookahead, lookahead_filter, lookahead_decay, lookahead_temperature, lookahead_quantile
        h_cl = lookahead_entropy(h, valid, seq_end, *window)
        omega = gate(normalised_entropy(h, h_cl, valid, entropy_scale, min_entropy_scale), gamma, gate_floor)[rows]
        w = magnitude(advantages[rows], log_p_t, student_logp, clip_eps)
        a_hat = token_advantage(advantages[rows], w, omega)

    nothing = (a_hat == 0) & student_logp.isneginf()  # 0 · −∞: no push on a token that cannot occur
    loss = torch.where(nothing, 0.0, -a_hat * student_logp).sum()
    if rows.numel():
        loss = loss / (rows.numel() if normalizer is None else normalizer)
    if not return_stats:
        return loss
    per_token = spread(student_logp.detach()), spread(log_p_t), h, h_cl, spread(w), spread(omega), spread(a_hat)
    return loss, TokenStats(*(x.view(target_ids.shape) for x in per_token))


def _to(dtype: torch.dtype, x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _check_shapes(target_ids: Tensor, features: bool = False, **tensors: Tensor | None) -> None:
    """Each of `tensors` is None or shaped like target_ids, with one more dimension where it holds features."""
    for name, x in tensors.items():
        if x is not None and (x.shape[:-1] if features else x.shape) != target_ids.shape:
            raise ValueError(f"{name} is {tuple(x.shape)}, which does not fit target_ids {tuple(target_ids.shape)}")


def _flat_layout(target_ids: Tensor, advantages: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """(seq_end, advantages), both (N,): the last position of each token's sequence, and the advantage of each token.

    A padded batch is B sequences of T positions; packed advantages are a token's where there are N of them.
    """
    n, device = target_ids.numel(), target_ids.device
    if target_ids.ndim == 2:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens is for the packed layout, but target_ids is (B, T)")
        lengths = torch.full(target_ids.shape[:1], target_ids.shape[1], device=device)
        per_token = advantages.ndim == 2
    else:
        boundaries = torch.tensor([0, n], device=device) if cu_seqlens is None else cu_seqlens.to(device).long()
        lengths = boundaries.diff()
        if boundaries[0] != 0 or boundaries[-1] != n or (lengths < 0).any():
            raise ValueError(f"cu_seqlens is {boundaries.tolist()}: expected boundaries that rise from 0 to N = {n}")
        per_token = advantages.shape == target_ids.shape
    if advantages.shape != (target_ids.shape if per_token else lengths.shape):
        expected = f"a sequence {tuple(lengths.shape)} or a token {tuple(target_ids.shape)}"
        raise ValueError(f"advantages is {tuple(advantages.shape)}: expected one {expected}")
    seq_end = (lengths.cumsum(0) - 1).repeat_interleave(lengths)
    return seq_end, advantages.flatten() if per_token else advantages.repeat_interleave(lengths)
