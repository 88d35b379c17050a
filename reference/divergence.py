"""Full-vocabulary divergences of student and teacher in plain PyTorch over full logits.

Every divergence is written as its definition over two distributions; gradients are autograd's. Everything is computed
in the dtype of the inputs: pass float64 tensors for a result to measure others against. Divergences are in nats.
Shapes: N tokens, V vocabulary entries, D hidden features; C parts that the vocabulary is partitioned into.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .egrsd import TokenStats, egrsd_loss, entropy, log_prob, logits


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p (log p − log q) in nats, with 0 · log 0 = 0.  (..., C), (..., C) -> (...)"""
    never = log_p.isneginf()  # both logarithms are replaced there, so that no −inf − (−inf) reaches the gradient
    term = log_p.exp() * (log_p.masked_fill(never, 0.0) - log_q.masked_fill(never, 0.0))
    return term.masked_fill(never, 0.0).sum(dim=-1)


def reverse_kl(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """KL(p_S ‖ p_T): the student pays for what the teacher would not say.  (..., C), (..., C) -> (...)"""
    return kl(log_student, log_teacher)


def forward_kl(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """KL(p_T ‖ p_S): the student pays for what the teacher would say and it would not.  (..., C), (..., C) -> (...)"""
    return kl(log_teacher, log_student)


def jsd(log_student: Tensor, log_teacher: Tensor, beta: float) -> Tensor:
    """β KL(p_T ‖ m) + (1 − β) KL(p_S ‖ m) with m = (1 − β) p_S + β p_T, 0 < β < 1.  (..., C), (..., C) -> (...)"""
    log_m = log_mixture(log_student, log_teacher, beta)
    return beta * kl(log_teacher, log_m) + (1 - beta) * kl(log_student, log_m)


def log_mixture(log_student: Tensor, log_teacher: Tensor, beta: float) -> Tensor:
    """log((1 − β) p_S + β p_T).  (..., C), (..., C) -> (..., C)"""
    never = log_student.isneginf() & log_teacher.isneginf()
    mixture = torch.logaddexp(
        log_student.masked_fill(never, 0.0) + math.log1p(-beta), log_teacher.masked_fill(never, 0.0) + math.log(beta)
    )
    return mixture.masked_fill(never, -torch.inf)


def top_and_rest(log_p: Tensor, top: Tensor) -> Tensor:
    """The logarithms of the probabilities of the entries ``top``, and of all others together.

    (..., V), (..., k) ids -> (..., k + 1)
    """
    others = log_p.scatter(-1, top, -torch.inf)
    nothing = others.isneginf().all(dim=-1, keepdim=True)  # a sum of nothing has a logarithm, and no gradient
    rest = torch.logsumexp(others.masked_fill(nothing, 0.0), dim=-1, keepdim=True).masked_fill(nothing, -torch.inf)
    return torch.cat([log_p.gather(-1, top), rest], dim=-1)


def divergence(
    student_logits: Tensor, teacher_logits: Tensor, kind: str, beta: float = 0.5, top_k: int | None = None
) -> Tensor:
    """D(p_S, p_T) in nats, differentiable in both.  (..., V), (..., V) -> (...)

    kind: "reverse_kl", "forward_kl" or "jsd". top_k: of the partition of the vocabulary into the teacher's k likeliest
    entries, each for itself, and all others together; what is between two partitions of one vocabulary is a divergence
    as well, and at most that of the vocabulary itself.
    """
    log_s = torch.log_softmax(student_logits, dim=-1)
    log_t = torch.log_softmax(teacher_logits, dim=-1)
    if top_k is not None and top_k < log_t.shape[-1]:
        top = log_t.topk(top_k, dim=-1).indices
        log_s, log_t = top_and_rest(log_s, top), top_and_rest(log_t, top)
    if kind == "jsd":
        return jsd(log_s, log_t, beta)
    if kind not in ("reverse_kl", "forward_kl"):
        raise ValueError(f"kind is {kind!r}: expected 'reverse_kl', 'forward_kl' or 'jsd'")
    return reverse_kl(log_s, log_t) if kind == "reverse_kl" else forward_kl(log_s, log_t)


def linear_divergence(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *,
    kind: str = "reverse_kl", beta: float = 0.5, target_ids: Tensor | None = None, temperature: float = 1.0,
    mask: Tensor | None = None, top_k: int | None = None, student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None, softcap: float | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Of each token, by name: divergence, student_entropy, teacher_entropy, and with targets log p of them for both.

    The divergence is differentiable in the student's operands.
    (..., D), (V, D), (..., D'), (V, D') -> (...); 0 where the mask is 0 or the target −100.
    """
    valid = torch.ones(student_hidden.shape[:-1], dtype=torch.bool, device=student_hidden.device)
    if mask is not None:
        valid = valid & mask.bool()
    if target_ids is not None:
        valid = valid & (target_ids != -100)
    z_s = logits(student_hidden[valid], student_weight, student_bias, softcap, temperature)
    z_t = logits(teacher_hidden[valid], teacher_weight, teacher_bias, softcap, temperature).detach().to(z_s.dtype)
    found = {
        "divergence": divergence(z_s, z_t, kind, beta, top_k),
        "student_entropy": entropy(z_s.detach()),
        "teacher_entropy": entropy(z_t),
    }
    if target_ids is not None:
        found["student_logp"] = log_prob(z_s.detach(), target_ids[valid])
        found["teacher_logp"] = log_prob(z_t, target_ids[valid])
    return {name: torch.zeros_like(valid, dtype=x.dtype).masked_scatter(valid, x) for name, x in found.items()}


def egrsd_divergence_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, target_ids: Tensor, advantages: Tensor, *,
    divergence: str, divergence_weight: float = 1.0, divergence_beta: float = 0.5, divergence_top_k: int | None = None,
    policy_weight: float = 1.0, dtype: torch.dtype = torch.float64, **options: Any,
) -> tuple[Tensor, TokenStats, Tensor]:  # fmt: skip
    """L = (1/Σm) Σ m (−policy_weight · Â log p_S(y) + divergence_weight · ω D), its signals, and D of each token.

    The gate ω is a constant. options: of `egrsd_loss`; the normaliser takes the place of Σm in both terms.
    """
    loss, stats = egrsd_loss(
        student_hidden,
        student_weight,
        teacher_hidden,
        target_ids,
        advantages,
        dtype=dtype,
        return_stats=True,
        **options,
    )
    student, teacher = (options.get(f"{name}_bias") for name in ("student", "teacher"))
    teacher_weight = options.get("teacher_weight")
    if teacher_weight is None:
        teacher_weight, teacher = student_weight, student if teacher is None else teacher
    operands = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    d = linear_divergence(
        *(x.to(dtype) for x in operands), kind=divergence, beta=divergence_beta, top_k=divergence_top_k,
        student_bias=None if student is None else student.to(dtype),
        teacher_bias=None if teacher is None else teacher.to(dtype), target_ids=target_ids,
        **{name: options[name] for name in ("mask", "softcap", "temperature") if name in options},
    )["divergence"]  # fmt: skip
    valid = target_ids != -100
    if options.get("mask") is not None:
        valid = valid & options["mask"].bool()
    divisor = options.get("normalizer")
    divisor = max(int(valid.sum()), 1) if divisor is None else divisor
    return policy_weight * loss + divergence_weight * (stats.gate * d).sum() / divisor, stats, d.detach()
