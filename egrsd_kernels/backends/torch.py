"""The backend in plain PyTorch: for CPUs, for GPUs without Triton, and for float64.

It goes over chunks of rows, so that full logits never exist here either. Logits are computed in float32 from the
operands as they are: a half-precision head is upcast block by block, never as a whole. The credit is the method's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from egrsd_kernels.checks import FLOATS
from egrsd_kernels.credit import lookahead_entropy, token_credit
from egrsd_kernels.head import Head, compute_dtype
from egrsd_kernels.rows import Rows, by_token

from .protocol import Credit, EntropyGradient, Finish, Gradients, Kept, Needs, VocabularyStatistics
from .scaling import scaled, scales
from .sparsity import Sparse

__all__ = [
    "build_rows", "by_token", "keep", "lookahead_entropy", "scales", "statistics", "student_pass", "takes",
    "token_credit",
]  # fmt: skip

build_rows = Rows.build

UPCAST_BYTES = 64 << 20
FLOOR = -1e4  # of log p in the sums: e^FLOOR is 0 in float64, too, and 0 times FLOOR is 0


def head_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head in ``dtype``, in blocks of vocabulary rows; one block, and no copy, where it has that dtype already."""
    v, d = weight.shape
    step = max(v, 1) if weight.dtype == dtype else max(1, UPCAST_BYTES // (max(d, 1) * dtype.itemsize))
    for start in range(0, v, step):
        block = slice(start, min(start + step, v))
        yield block, weight[block].to(dtype)


def takes(hidden: Tensor) -> bool:
    return hidden.dtype in FLOATS


def logits(head: Head, temperature: float, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """(z, softcap_grad): dz/d(hWᵀ + b) is softcap_grad, or 1 for None, over the temperature.

    hidden: (n, D) in the compute dtype. The temperature: what :meth:`Head.cap_and_temperature` makes of it.
    """
    softcap, temperature = head.cap_and_temperature(temperature)
    z = hidden.new_empty(hidden.shape[0], head.weight.shape[0])
    for block, weight in head_blocks(head.weight, hidden.dtype):
        torch.mm(hidden, weight.t(), out=z[:, block])
    if head.bias is not None:
        z += head.bias.to(z.dtype)
    softcap_grad = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        softcap_grad = 1 - z * z
        z.mul_(softcap)
    return z.div_(temperature), softcap_grad


def select(hidden: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (n, D) of hidden states (B, T, D), by their flat index."""
    length = hidden.shape[1]
    return hidden[index // length, index % length].to(dtype)


def log_softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """(log p, in the place of the logits; logsumexp (n,))."""
    # The maximum first: logsumexp itself would be rounded as coarsely as the largest logit is.
    peak = z.amax(1)
    lse = z.sub_(peak[:, None]).logsumexp(1)
    return z.sub_(lse[:, None]), peak + lse


def target_logp(logp: Tensor, target: Tensor) -> Tensor:
    """log p of the targets (n,), NaN for a target outside the vocabulary."""
    inside = (target >= 0) & (target < logp.shape[1])
    picked = logp.gather(1, torch.where(inside, target, 0)[:, None]).squeeze(1)
    return torch.where(inside, picked, torch.nan)


def count(rows: Rows, which: int) -> int:
    """How many leading rows to work on: exact on a CPU; elsewhere asking would make the device wait, so all of them."""
    return int(rows.counts[which]) if rows.order.device.type == "cpu" else rows.order.numel()


def chunks(rows: Rows, head: Head, dtype: torch.dtype, chunk_bytes: int, matrices: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, indices) of the valid rows, chunk by chunk; so many chunk-sized matrices stay in ``chunk_bytes``."""
    n = count(rows, 0)
    size = max(1, chunk_bytes // (matrices * dtype.itemsize * max(head.weight.shape[0], 1)))
    for first in range(0, n, size):
        yield first, rows.order[first : min(first + size, n)].long()


def zero_masked(rows: Rows, values: Iterable[Tensor | None]) -> None:
    """Zero, in place, the entries of the (N,) ``values`` at masked rows."""
    order = rows.order.long()
    kept = rows.among(0, 0, order.numel())
    for value in values:
        if value is not None:
            value[order] = value[order].masked_fill(~kept, 0)


class _Softmax(NamedTuple):
    """Rows ``first``, ... of the order, tokens (n,): log p (n, V), at least FLOOR, and the softcap's factor."""

    first: int
    tokens: Tensor
    log_p: Tensor
    softcap_grad: Tensor | None


def _passes(
    head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows, chunk_bytes: int,
    out: VocabularyStatistics,
) -> Iterator[_Softmax]:  # fmt: skip
    """Chunk by chunk, with what ``out`` has of its rows written, and once all is done that of masked rows."""
    dtype = compute_dtype(hidden.dtype)
    for first, index in chunks(rows, head, dtype, chunk_bytes, 3 if head.softcap is None else 5):
        z, softcap_grad = logits(head, temperature, select(hidden, index, dtype))
        if out.is_top1 is not None:
            out.is_top1[index] = z.argmax(1) == target_ids[index]  # the first of equal ones
        if out.mean_logits is not None:
            out.mean_logits[index] = z.mean(1)
        log_p, lse = log_softmax(z)
        logp = target_logp(log_p, target_ids[index])
        out.logp[index] = logp
        if out.is_top1 is not None:
            out.is_top1[index] &= ~logp.isnan()
        log_p.clamp_(min=FLOOR)
        if out.entropy is not None:
            out.entropy[index] = -log_p.exp().mul_(log_p).sum(1)
        if out.logsumexp is not None:
            out.logsumexp[index] = lse
        if out.log_sum_sq_probs is not None:  # at least 1/V, whatever underflows
            out.log_sum_sq_probs[index] = log_p.exp().square_().sum(1).log_()
        yield _Softmax(first, index, log_p, softcap_grad)
    zero_masked(rows, out)


def statistics(
    head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows, out: VocabularyStatistics,
    chunk_bytes: int,
) -> None:  # fmt: skip
    """See :meth:`~.protocol.Backend.statistics`."""
    for _ in _passes(head, temperature, hidden, target_ids, rows, chunk_bytes, out):
        pass


def balance(dz: Tensor, entry: Tensor) -> None:
    """One entry (n,) of each row (n, V) as what the others leave of the row's sum, which is 0.

    Near p = 1 a difference would cancel.
    """
    entry = entry[:, None]
    dz.scatter_(1, entry, 0)
    dz.scatter_(1, entry, -dz.sum(1, keepdim=True))


class Sums:
    """The gradients that chunks of rows add up in, in the compute dtype; the hidden states' in their own."""

    def __init__(
        self, head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows, needs: Needs
    ):  # fmt: skip
        self.head, self.hidden, self.target_ids, self.needs = head, hidden, target_ids, needs
        self.turn_to(rows)
        self.dtype = compute_dtype(hidden.dtype)
        self.divisor = head.cap_and_temperature(temperature)[1]
        vocabulary, width = head.weight.shape
        self.d_hidden = self.d_weight = self.d_bias = None
        if needs.hidden:
            self.d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        if needs.weight:
            self.d_weight = hidden.new_zeros(vocabulary, width - needs.first_column, dtype=self.dtype)
        if needs.bias:
            self.d_bias = hidden.new_zeros(vocabulary, dtype=self.dtype)

    def turn_to(self, rows: Rows) -> None:
        """What is added next is of these rows."""
        self.rows, self.active = rows, count(rows, 1)

    def share(self, first: int, index: Tensor, of_logit: Tensor) -> Tensor:
        """What x = h Wᵀ + b takes of dL/d(a logit's function) (N,): (n,), 0 where no gradient is asked for."""
        ours = self.rows.among(1, first, index.numel())
        return torch.where(ours, of_logit[index].to(self.dtype) / self.divisor, 0)

    def add(self, chunk: _Softmax, gradient: Tensor, of_entropy: EntropyGradient | None = None) -> None:
        """gradient: dL/dlogp (N,). Takes the place of the chunk's log p."""
        first, index, log_p, softcap_grad = chunk
        n = min(index.numel(), max(0, self.active - first))
        if not n:
            return
        index, log_p = index[:n], log_p[:n]
        target = self.target_ids[index]
        inside = (target >= 0) & (target < log_p.shape[1])
        g = self.share(first, index, gradient)
        g = torch.where(inside | (g == 0), g, torch.nan)
        nothing = g == 0
        if of_entropy is None:
            dz = log_p.exp_().mul_(-g[:, None])
        else:
            # dH/dz = -p (log p + H), so with dlogp_y/dz = 1_y - p the others get -p (g + g_H (log p + H)).
            g_entropy = self.share(first, index, of_entropy.gradient)
            nothing = nothing & (g_entropy == 0)
            p = log_p.exp()
            slope = log_p.add_(of_entropy.entropy[index, None]).mul_(g_entropy[:, None]).add_(g[:, None])
            dz = slope.mul_(p).neg_()
        balance(dz, target.clamp(0, dz.shape[1] - 1))
        self.add_logits(index, dz, nothing, None if softcap_grad is None else softcap_grad[:n])

    def add_logits(self, index: Tensor, dz: Tensor, nothing: Tensor, softcap_grad: Tensor | None) -> None:
        """dz: dL/dz (n, V) over the temperature, which is used up. nothing: (n,), the tokens without a gradient."""
        if softcap_grad is not None:
            dz *= softcap_grad
        # Chosen, not multiplied: where no count was asked for, a masked row may hold anything, NaN included.
        dz.masked_fill_(nothing[:, None], 0)
        h = select(self.hidden, index, self.dtype).masked_fill(nothing[:, None], 0)
        if self.d_hidden is not None:
            row_gradient = torch.zeros_like(h)
            for block, weight in head_blocks(self.head.weight, self.dtype):
                row_gradient.addmm_(dz[:, block], weight)
            # Added: a row of another chunk's may be here again, with nothing.
            self.d_hidden.view(-1, self.d_hidden.shape[-1])[index] += row_gradient.to(self.d_hidden.dtype)
        if self.d_weight is not None:
            self.d_weight.addmm_(dz.t(), h[:, self.needs.first_column :])
        if self.d_bias is not None:
            self.d_bias += dz.sum(0)

    def finish(self) -> Finish:
        """Holds on to the sums alone."""
        sums = self.d_hidden, self.d_weight, self.d_bias
        bias = self.dtype if self.head.bias is None else self.head.bias.dtype
        dtypes = self.hidden.dtype, self.head.weight.dtype, bias

        def finish(factor: Tensor | None) -> Gradients:
            made = zip(sums, dtypes, strict=True)
            return Gradients(*(scaled(gradient, factor, dtype, multiply) for gradient, dtype in made))

        return finish


def student_pass(
    head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows, out: VocabularyStatistics,
    credit: Credit, needs: Needs, chunk_bytes: int, sparse: Sparse | None = None,
    entropy_gradient: EntropyGradient | None = None,
) -> Finish:  # fmt: skip
    """See :meth:`~.protocol.Backend.student_pass`. The gradients are exact: within any tolerance of ``sparse``."""
    problem = head, temperature, hidden, target_ids, rows
    sums = Sums(*problem, needs)
    for chunk in _passes(*problem, chunk_bytes, out):
        sums.add(chunk, credit(chunk.first, chunk.tokens.numel()), entropy_gradient)
    return sums.finish()


def keep(
    head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows,
    out: VocabularyStatistics, needs: Needs, entropy_gradient: bool, keep_bytes: int, chunk_bytes: int,
) -> Kept:  # fmt: skip
    """See :meth:`~.protocol.Backend.keep`: log p in the compute dtype, and the softcap's factor."""
    size = head.weight.shape[0] * compute_dtype(hidden.dtype).itemsize
    n = min(count(rows, 0), keep_bytes // (size if head.softcap is None else 2 * size))
    first, others = rows.split(n)
    passed = list(_passes(head, temperature, hidden, target_ids, first, chunk_bytes, out))
    statistics(head, temperature, hidden, target_ids, others, out, chunk_bytes)

    def kept(
        head: Head, hidden: Tensor, gradient: Tensor, of_entropy: EntropyGradient | None, needed: Tensor,
        chunk_bytes: int,
    ) -> Finish:  # fmt: skip
        sums = Sums(head, temperature, hidden, target_ids, first, needs)
        while passed:
            sums.add(passed.pop(), gradient, of_entropy)
        again = needed.index_fill(0, first.order.long(), False)
        # Those that may need it, and no more: where no count was asked for, all of them are worked on.
        sums.turn_to(Rows.build(again, again).split(len(others.order))[0])
        known = VocabularyStatistics(torch.zeros_like(gradient))
        for chunk in _passes(head, temperature, hidden, target_ids, sums.rows, chunk_bytes, known):
            sums.add(chunk, gradient, of_entropy)
        return sums.finish()

    return kept


def multiply(source: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """out = source * factor (0-d), in the compute dtype and rounded once; ``out`` may be ``source``."""
    step = max(1, UPCAST_BYTES // 4)
    for s, o in zip(source.view(-1).split(step), out.view(-1).split(step), strict=True):
        o.copy_(s.to(compute_dtype(s.dtype)) * factor)
    return out
