"""Divergences in plain PyTorch: see :class:`~.protocol.DivergenceBackend`, and :mod:`.torch`, whose passes these are.

Both models' logits of a chunk of rows are there at once, each in its operands' compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from egrsd_kernels.checks import FLOATS
from egrsd_kernels.head import Head, compute_dtype
from egrsd_kernels.rows import Rows

from .protocol import Divergence, DivergenceStatistics, Finish, KeptDivergence, Needs, Pair, PairCredit
from .torch import Sums, balance, chunks, count, log_softmax, logits, select, target_logp, zero_masked

__all__ = ["divergence_pass", "keep_divergence", "takes"]

MATRICES = 11  # logits-sized ones that a chunk holds at most: ten, with a softcap and top_k, and some booleans


def takes(pair: Pair) -> bool:
    return pair.student_hidden.dtype in FLOATS and pair.teacher_hidden.dtype in FLOATS


class _Ratio(NamedTuple):
    """Both distributions of a chunk (n, V), each log p at least -inf."""

    student: Tensor
    """log p_S."""
    teacher: Tensor
    """log p_T."""
    log_ratio: Tensor
    """r = log p_S - log p_T, 0 where both are 0; of those that count as one, of their sums."""
    coarse_teacher: Tensor
    """log p_S - r: log p_T, but for those that count as one."""


def _difference(log_s: Tensor, log_t: Tensor) -> Tensor:
    return (log_s - log_t).masked_fill_(log_s.isneginf() & log_t.isneginf(), 0)


def _ratio(log_s: Tensor, log_t: Tensor, top_k: int | None) -> _Ratio:
    r = _difference(log_s, log_t)
    if top_k is None or top_k >= log_s.shape[1]:
        return _Ratio(log_s, log_t, r, log_t)
    alone = torch.zeros_like(log_t, dtype=torch.bool).scatter_(1, log_t.topk(top_k, 1).indices, True)
    # Of the others themselves: 1 - the sum of the k would cancel.
    rest = [x.masked_fill(alone, -torch.inf).logsumexp(1, keepdim=True) for x in (log_s, log_t)]
    r = torch.where(alone, r, _difference(*rest))
    # Where the student has nothing of the rest, log p_S - r is -inf - -inf: there the teacher's mass lies as it does.
    coarse = torch.where(alone | rest[0].isneginf(), log_t, log_s - r)
    return _Ratio(log_s, log_t, r, coarse)


def _weighted(p: Tensor, of: Tensor) -> Tensor:
    """p · of, 0 where p is, whatever of is there."""
    return (p * of).masked_fill_(p == 0, 0)


def _gap(x: _Ratio) -> Tensor:
    """p_S - p_T, from the larger of the two: a difference would cancel where r is small."""
    larger, r = torch.maximum(x.student, x.coarse_teacher).exp_(), x.log_ratio
    return larger.mul_(r.abs().neg_().expm1_()).mul_(r.sign().neg_())


# Both logsumexp are rounded, and so all r of a row are off by one number. Σ (p_S - p_T), which is 0, is off by the same
# with p_T or p_S as weights: beside it D is off by the square of that number, and no term of the sum is negative.


def _reverse_kl(x: _Ratio) -> tuple[Tensor, Tensor]:
    p = x.student.exp()
    term = _weighted(p, x.log_ratio)
    mean = term.sum(1, keepdim=True)  # off as r is, which it is subtracted from
    return term.sub_(_gap(x)).sum(1), _weighted(p, x.log_ratio - mean)


def _forward_kl(x: _Ratio) -> tuple[Tensor, Tensor]:
    gap = _gap(x)
    return (gap - _weighted(x.teacher.exp(), x.log_ratio)).sum(1), gap


def _jsd(x: _Ratio, beta: float) -> tuple[Tensor, Tensor]:
    p, r = x.student.exp(), x.log_ratio
    common = r.abs().neg_().expm1_().mul_(torch.full_like(r, 1 - beta).masked_fill_(r >= 0, beta)).log1p_().neg_()
    u, of_teacher = r.clamp(max=0).add_(common), common.sub_(r.clamp(min=0))  # ln(p_S / m) and ln(p_T / m)
    mean = _weighted(p, u).sum(1)
    divergence = (1 - beta) * mean + beta * _weighted(x.teacher.exp(), of_teacher).sum(1)
    return divergence, _weighted(p, u.sub_(mean[:, None])).mul_(1 - beta)


def divergence_of(log_s: Tensor, log_t: Tensor, which: Divergence) -> tuple[Tensor, Tensor]:
    """(D (n,), dD/dz (n, V)) of log p_S and log p_T (n, V). See :class:`~.protocol.Divergence`."""
    x = _ratio(log_s, log_t, which.top_k)
    if which.kind == "jsd":
        divergence, dz = _jsd(x, which.beta)
    else:
        divergence, dz = _reverse_kl(x) if which.kind == "reverse_kl" else _forward_kl(x)
    balance(dz, log_s.argmax(1))
    return divergence.clamp(min=0), dz  # below 0 by rounding alone


class _Rows(NamedTuple):
    """Rows ``first``, ... of the order, tokens (n,), with what is known of them (n, V)."""

    first: int
    tokens: Tensor
    dz: Tensor
    """dD/dz; NaN where the target is outside the vocabulary, and where a reverse KL is infinite."""
    log_p: Tensor | None
    """The student's."""
    softcap_grad: Tensor | None


def _log_p(
    head: Head, temperature: float, hidden: Tensor, index: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(log p (n, V) in ``dtype``, the softcap's factor) of tokens (n,)."""
    z, softcap_grad = logits(head, temperature, select(hidden, index, compute_dtype(hidden.dtype)))
    return log_softmax(z)[0].to(dtype), softcap_grad


def _entropy(log_p: Tensor) -> Tensor:
    return -_weighted(log_p.exp(), log_p).sum(1)


def _passes(
    pair: Pair, target_ids: Tensor | None, rows: Rows, out: DivergenceStatistics, chunk_bytes: int,
    use: Callable[[_Rows], Any],
) -> None:  # fmt: skip
    """Write ``out``, and give each chunk to ``use`` once that of its rows is there. No chunk outlives the next one."""
    dtype = compute_dtype(pair.student_hidden.dtype)
    for first, index in chunks(rows, pair.student, dtype, chunk_bytes, MATRICES):
        use(_chunk(pair, target_ids, first, index, out, dtype))
    zero_masked(rows, out)


def _chunk(
    pair: Pair, target_ids: Tensor | None, first: int, index: Tensor, out: DivergenceStatistics, dtype: torch.dtype
) -> _Rows:
    """Of tokens (n,), whose ``out`` is written."""
    log_s, softcap_grad = _log_p(pair.student, pair.temperature, pair.student_hidden, index, dtype)
    log_t = _log_p(pair.teacher, pair.temperature, pair.teacher_hidden, index, dtype)[0]
    divergence, dz = divergence_of(log_s, log_t, pair.divergence)
    outside = torch.zeros_like(divergence)
    if target_ids is not None:
        target = target_ids[index]
        outside = outside.masked_fill_((target < 0) | (target >= log_s.shape[1]), torch.nan)
        for where, log_p in ((out.student_logp, log_s), (out.teacher_logp, log_t)):
            if where is not None:
                where[index] = target_logp(log_p, target)
    for where, log_p in ((out.student_entropy, log_s), (out.teacher_entropy, log_t)):
        if where is not None:
            where[index] = _entropy(log_p) + outside
    out.divergence[index] = divergence + outside
    # An infinite reverse KL has no derivative, also where that of a student with a single word would round to 0. An
    # infinite forward KL has one, p_S - p_T.
    lost = outside.masked_fill(divergence.isinf(), torch.nan) if pair.divergence.kind == "reverse_kl" else outside
    return _Rows(first, index, dz.add_(lost[:, None]), log_s, softcap_grad)


def _sums(pair: Pair, target_ids: Tensor | None, rows: Rows, needs: Needs) -> Sums:
    targets = rows.order if target_ids is None else target_ids  # which nothing reads then
    return Sums(pair.student, pair.temperature, pair.student_hidden, targets, rows, needs)


def _add(sums: Sums, chunk: _Rows, credit: PairCredit) -> None:
    """The gradient of Σ credit · (D, log p). Takes the place of what the chunk holds."""
    first, index, dz, log_p, softcap_grad = chunk
    n = min(index.numel(), max(0, sums.active - first))
    if not n:
        return
    index, dz = index[:n], dz[:n]
    g = sums.share(first, index, credit.of_divergence)
    nothing = g == 0
    # Chosen, not multiplied: an infinite divergence without a weight has no gradient.
    dz = dz.mul_(g[:, None]).masked_fill_(nothing[:, None], 0)
    if credit.of_logp is not None:
        assert log_p is not None
        log_p, target = log_p[:n], sums.target_ids[index]
        g = sums.share(first, index, credit.of_logp)
        silent, inside = g == 0, (target >= 0) & (target < log_p.shape[1])
        of_logp = log_p.exp_().mul_(-torch.where(inside | silent, g, torch.nan)[:, None])
        balance(of_logp, target.clamp(0, log_p.shape[1] - 1))
        dz, nothing = dz.add_(of_logp.masked_fill_(silent[:, None], 0)), nothing & silent
    sums.add_logits(index, dz, nothing, None if softcap_grad is None else softcap_grad[:n])


def divergence_pass(
    pair: Pair, target_ids: Tensor | None, rows: Rows, out: DivergenceStatistics,
    credit: Callable[[int, int], PairCredit], needs: Needs, chunk_bytes: int,
) -> Finish:  # fmt: skip
    """See :meth:`~.protocol.DivergenceBackend.divergence_pass`."""
    sums = _sums(pair, target_ids, rows, needs)

    def use(chunk: _Rows) -> None:
        if any(needs[:3]):
            _add(sums, chunk, credit(chunk.first, chunk.tokens.numel()))

    _passes(pair, target_ids, rows, out, chunk_bytes, use)
    return sums.finish()


def _without_softcap(x: _Rows) -> _Rows:
    """All that dL/dD needs, in one matrix."""
    dz = x.dz if x.softcap_grad is None else x.dz.mul_(x.softcap_grad)
    return _Rows(x.first, x.tokens, dz, log_p=None, softcap_grad=None)


def keep_divergence(
    pair: Pair, target_ids: Tensor | None, rows: Rows, out: DivergenceStatistics, needs: Needs, keep_bytes: int,
    chunk_bytes: int,
) -> KeptDivergence:  # fmt: skip
    """See :meth:`~.protocol.DivergenceBackend.keep_divergence`: dD/d(hWᵀ + b) over the temperature's share."""
    size = pair.student.weight.shape[0] * compute_dtype(pair.student_hidden.dtype).itemsize
    first, others = rows.split(min(count(rows, 0), keep_bytes // size))
    passed: list[_Rows] = []
    _passes(pair, target_ids, first, out, chunk_bytes, lambda chunk: passed.append(_without_softcap(chunk)))
    _passes(pair, target_ids, others, out, chunk_bytes, lambda chunk: None)

    def kept(pair: Pair, gradient: Tensor, needed: Tensor, chunk_bytes: int) -> Finish:
        sums, credit = _sums(pair, target_ids, first, needs), PairCredit(gradient)
        while passed:
            _add(sums, passed.pop(), credit)
        again = needed.index_fill(0, first.order.long(), False)
        # Those that may need it, and no more: where no count was asked for, all of them are worked on.
        sums.turn_to(Rows.build(again, again).split(len(others.order))[0])
        known = DivergenceStatistics(torch.zeros_like(gradient))
        _passes(pair, target_ids, sums.rows, known, chunk_bytes, lambda chunk: _add(sums, chunk, credit))
        return sums.finish()

    return kept
