"""The backend in plain PyTorch: for CPUs, for GPUs without Triton, and for float64.

It goes over chunks of rows, so that full logits never exist here either. Logits are computed in float32 from the
operands as they are: a half-precision head is upcast block by block, never as a whole. The credit is the method's own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from egrsd_kernels.checks import FLOATS
from egrsd_kernels.credit import lookahead_entropy, token_credit
from egrsd_kernels.head import Head, compute_dtype
from egrsd_kernels.rows import Rows

from .protocol import Credit, Finish, Gradients, Needs
from .scaling import scaled
from .sparsity import Sparse

__all__ = ["lookahead_entropy", "statistics", "student_pass", "takes", "token_credit"]

UPCAST_BYTES = 64 << 20


def _head_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head in ``dtype``, in blocks of vocabulary rows; one block, and no copy, where it has that dtype already."""
    v, d = weight.shape
    step = max(v, 1) if weight.dtype == dtype else max(1, UPCAST_BYTES // (max(d, 1) * dtype.itemsize))
    for start in range(0, v, step):
        block = slice(start, min(start + step, v))
        yield block, weight[block].to(dtype)


def takes(hidden: Tensor) -> bool:
    return hidden.dtype in FLOATS


def _logits(head: Head, temperature: float, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """(z, softcap_grad): dz/d(hWᵀ + b) is softcap_grad, or 1 for None, over the temperature.

    hidden: (n, D) in the compute dtype. The temperature: what :meth:`Head.cap_and_temperature` makes of it.
    """
    softcap, temperature = head.cap_and_temperature(temperature)
    z = hidden.new_empty(hidden.shape[0], head.weight.shape[0])
    for block, weight in _head_blocks(head.weight, hidden.dtype):
        torch.mm(hidden, weight.t(), out=z[:, block])
    if head.bias is not None:
        z += head.bias.to(z.dtype)
    softcap_grad = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        softcap_grad = 1 - z * z
        z.mul_(softcap)
    return z.div_(temperature), softcap_grad


def _select(hidden: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (n, D) of hidden states (B, T, D), by their flat index."""
    length = hidden.shape[1]
    return hidden[index // length, index % length].to(dtype)


def _log_softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """(log p, in the place of the logits; logsumexp (n,))."""
    # The maximum first: logsumexp itself would be rounded as coarsely as the largest logit is.
    peak = z.amax(1)
    lse = z.sub_(peak[:, None]).logsumexp(1)
    return z.sub_(lse[:, None]), peak + lse


def _target_logp(logp: Tensor, target: Tensor) -> Tensor:
    """log p of the targets (n,), NaN for a target outside the vocabulary."""
    inside = (target >= 0) & (target < logp.shape[1])
    picked = logp.gather(1, torch.where(inside, target, 0)[:, None]).squeeze(1)
    return torch.where(inside, picked, torch.nan)


def _count(rows: Rows, which: int) -> int:
    """How many leading rows to work on: exact on a CPU; elsewhere asking would make the device wait, so all of them."""
    return int(rows.counts[which]) if rows.order.device.type == "cpu" else rows.order.numel()


def _chunks(rows: Rows, head: Head, dtype: torch.dtype, chunk_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, indices) of the valid rows, chunk by chunk; three chunk-sized matrices stay in ``chunk_bytes``."""
    count = _count(rows, 0)
    size = max(1, chunk_bytes // (3 * dtype.itemsize * max(head.weight.shape[0], 1)))
    for first in range(0, count, size):
        yield first, rows.order[first : min(first + size, count)].long()


def _zero_masked(rows: Rows, *values: Tensor) -> None:
    """Zero, in place, the entries of the (N,) ``values`` at masked rows."""
    order = rows.order.long()
    masked = torch.empty_like(order, dtype=torch.bool)
    masked[order] = ~rows.among(0, 0, order.numel())
    for value in values:
        value.masked_fill_(masked, 0)


def statistics(
    head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows, chunk_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, logsumexp), each (N,), in nats, 0 at masked rows."""
    dtype = compute_dtype(hidden.dtype)
    logp_y, entropy, logsumexp = torch.zeros(3, target_ids.numel(), dtype=dtype, device=hidden.device)
    for _, index in _chunks(rows, head, dtype, chunk_bytes):
        z, _ = _logits(head, temperature, _select(hidden, index, dtype))
        logp, logsumexp[index] = _log_softmax(z)
        logp_y[index] = _target_logp(logp, target_ids[index])
        p = logp.exp()
        # p = 0 has no share in the entropy, but 0 · -inf would be NaN.
        entropy[index] = -p.mul_(logp.clamp_(min=torch.finfo(dtype).min)).sum(1)
    _zero_masked(rows, logp_y, entropy, logsumexp)
    return logp_y, entropy, logsumexp


def student_pass(
    head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows, logp: Tensor, credit: Credit,
    needs: Needs, chunk_bytes: int, sparse: Sparse | None = None,
) -> Finish:  # fmt: skip
    """See :meth:`~.protocol.Backend.student_pass`. The gradients are exact: within any tolerance of ``sparse``."""
    dtype = compute_dtype(hidden.dtype)
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs.hidden else None
    d_weight = (
        torch.zeros_like(head.weight, dtype=dtype, memory_format=torch.contiguous_format) if needs.weight else None
    )
    d_bias = torch.zeros_like(head.bias, dtype=dtype) if needs.bias and head.bias is not None else None
    divisor = head.cap_and_temperature(temperature)[1]
    active = _count(rows, 1)
    for first, index in _chunks(rows, head, dtype, chunk_bytes):
        h = _select(hidden, index, dtype)
        z, softcap_grad = _logits(head, temperature, h)
        log_p, _ = _log_softmax(z)
        logp[index] = _target_logp(log_p, target_ids[index])
        g = credit(first, index.numel())[index][: max(0, active - first)]
        if not g.numel():
            continue
        n, index = g.numel(), index[: g.numel()]
        g = torch.where(rows.among(1, first, n), g.to(dtype) / divisor, 0)
        # dL/dz = g (1_y - p)
        dz = log_p[:n].exp_().neg_()
        target = target_ids[index].clamp(0, dz.shape[1] - 1)[:, None]
        # 1 - p_y as the sum of all other p: near p_y = 1 the difference would cancel.
        dz.scatter_(1, target, 0)
        dz.scatter_(1, target, -dz.sum(1, keepdim=True))
        if softcap_grad is not None:
            dz *= softcap_grad[:n]
        dz *= g[:, None]
        # Chosen, not multiplied: where no count was asked for, a masked row may hold anything, NaN included.
        nothing = (g == 0)[:, None]
        dz.masked_fill_(nothing, 0)
        h = h[:n].masked_fill(nothing, 0)
        if d_hidden is not None:
            row_gradient = torch.zeros_like(h)
            for block, weight in _head_blocks(head.weight, dtype):
                row_gradient.addmm_(dz[:, block], weight)
            d_hidden.view(-1, d_hidden.shape[-1])[index] = row_gradient.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight.addmm_(dz.t(), h)
        if d_bias is not None:
            d_bias += dz.sum(0)
    _zero_masked(rows, logp)

    dtypes = hidden.dtype, head.weight.dtype, dtype if head.bias is None else head.bias.dtype

    def finish(factor: Tensor | None) -> Gradients:
        made = zip((d_hidden, d_weight, d_bias), dtypes, strict=True)
        return Gradients(*(scaled(gradient, factor, dtype, multiply) for gradient, dtype in made))

    return finish


def multiply(source: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """out = source * factor (0-d), in the compute dtype and rounded once; ``out`` may be ``source``."""
    step = max(1, UPCAST_BYTES // 4)
    for s, o in zip(source.view(-1).split(step), out.view(-1).split(step), strict=True):
        o.copy_(s.to(compute_dtype(s.dtype)) * factor)
    return out
