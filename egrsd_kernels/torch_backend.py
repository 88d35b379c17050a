"""The backend in plain PyTorch: for CPUs, for GPUs without Triton, and for float64.

The same functions as ``triton_backend``, over chunks of rows, so that full logits never exist here either. Logits are
computed in float32 from the operands as they are: a half-precision head is upcast block by block, never as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .problem import Finish, Head, Options, Rows, TokenStats, compute_dtype, scaled

UPCAST_BYTES = 64 << 20


def _head_blocks(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """The head in ``dtype``, in blocks of vocabulary rows; one block, and no copy, where it has that dtype already."""
    v, d = weight.shape
    step = max(v, 1) if weight.dtype == dtype else max(1, UPCAST_BYTES // (max(d, 1) * dtype.itemsize))
    for start in range(0, v, step):
        block = slice(start, min(start + step, v))
        yield block, weight[block].to(dtype)


def _logits(head: Head, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(z, dz/d(hWᵀ + b) · temperature), the second None where it is 1. hidden: (n, D) in the compute dtype."""
    z = hidden.new_empty(hidden.shape[0], head.weight.shape[0])
    for block, weight in _head_blocks(head.weight, hidden.dtype):
        torch.mm(hidden, weight.t(), out=z[:, block])
    if head.bias is not None:
        z += head.bias.to(z.dtype)
    damping = None
    if head.softcap is not None:
        z.div_(head.softcap).tanh_()
        damping = 1 - z * z
        z.mul_(head.softcap)
    return z.div_(head.temperature), damping


def _select(hidden: torch.Tensor, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows (n, D) of hidden states (B, T, D), by their flat index."""
    length = hidden.shape[1]
    return hidden[index // length, index % length].to(dtype)


def _log_softmax(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p, in the place of the logits; logsumexp (n,))."""
    # The maximum first: logsumexp itself would be rounded as coarsely as the largest logit is.
    peak = z.amax(1)
    lse = z.sub_(peak[:, None]).logsumexp(1)
    return z.sub_(lse[:, None]), peak + lse


def _target_logp(logp: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """log p of the targets (n,), NaN for a target outside the vocabulary."""
    inside = (target >= 0) & (target < logp.shape[1])
    picked = logp.gather(1, torch.where(inside, target, 0)[:, None]).squeeze(1)
    return torch.where(inside, picked, torch.nan)


def _count(rows: Rows, which: int) -> int:
    """How many leading rows to work on: exact on a CPU; elsewhere asking would make the device wait, so all of them."""
    return int(rows.counts[which]) if rows.order.device.type == "cpu" else rows.order.numel()


def _chunks(rows: Rows, head: Head, dtype: torch.dtype, chunk_bytes: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, indices) of the valid rows, chunk by chunk; three chunk-sized matrices stay in ``chunk_bytes``."""
    count = _count(rows, 0)
    size = max(1, chunk_bytes // (3 * dtype.itemsize * max(head.weight.shape[0], 1)))
    for first in range(0, count, size):
        yield first, rows.order[first : min(first + size, count)].long()


def _among(rows: Rows, which: int, first: int, n: int) -> torch.Tensor:
    """Which of the rows first, ..., first + n - 1 of the order are among the leading ``counts[which]``."""
    return torch.arange(first, first + n, device=rows.order.device) < rows.counts[which]


def _zero_masked(rows: Rows, *values: torch.Tensor) -> None:
    """Zero, in place, the entries of the (N,) ``values`` at masked rows."""
    order = rows.order.long()
    masked = torch.empty_like(order, dtype=torch.bool)
    masked[order] = ~_among(rows, 0, 0, order.numel())
    for value in values:
        value.masked_fill_(masked, 0)


def statistics(head: Head, hidden, target_ids, rows: Rows, chunk_bytes: int):
    """(logp, entropy, logsumexp), each (N,), in nats, 0 at masked rows."""
    dtype = compute_dtype(hidden.dtype)
    logp_y, entropy, logsumexp = torch.zeros(3, target_ids.numel(), dtype=dtype, device=hidden.device)
    for _, index in _chunks(rows, head, dtype, chunk_bytes):
        z, _ = _logits(head, _select(hidden, index, dtype))
        logp, logsumexp[index] = _log_softmax(z)
        logp_y[index] = _target_logp(logp, target_ids[index])
        p = logp.exp()
        # p = 0 has no share in the entropy, but 0 · -inf would be NaN.
        entropy[index] = -p.mul_(logp.clamp_(min=torch.finfo(dtype).min)).sum(1)
    _zero_masked(rows, logp_y, entropy, logsumexp)
    return logp_y, entropy, logsumexp


def lookahead_entropy(entropy, valid, seq_end, lookahead: int) -> torch.Tensor:
    """H^CL (N,): the minimum of H over valid positions in [t, min(t + W, seq_end_t)]; 0 where t is not valid.

    A window of ``span`` positions is two windows of the largest power of two in it, one at each end; minima over those
    come from doubling. A NaN in the window is kept.
    """
    n = entropy.numel()
    position = torch.arange(n, device=entropy.device)
    last = torch.minimum(seq_end.long(), position + min(lookahead, n))
    span = last - position + 1
    lowest = torch.where(valid, entropy, torch.inf)  # over [t, t + width)
    result, width = lowest, 1
    while width <= min(lookahead + 1, n):
        tail = lowest[(last - width + 1).clamp(min=0)]
        result = torch.where((span >= width) & (span < 2 * width), torch.minimum(lowest, tail), result)
        lowest = torch.minimum(lowest, torch.cat([lowest[width:], lowest.new_full((width,), torch.inf)])[:n])
        width *= 2
    return torch.where(valid, result, 0)


def token_credit(
    rows: Rows, first_row: int, chunk: int, advantages, teacher_logp, student_logp, lookahead_entropy, scale,
    options: Options, stats: TokenStats, loss,
) -> None:  # fmt: skip
    """Write magnitude, gate and token advantage into ``stats``, and -token_advantage · log p_S into ``loss``.

    For the valid rows of the chunk; all tensors are (N,) in the callers' order, ``scale`` is 0-d (nats).
    """
    t = rows.order[first_row : min(first_row + chunk, _count(rows, 0))].long()
    # Where no count was asked for, masked tokens are here too; they get nothing.
    valid = _among(rows, 0, first_row, t.numel())
    a, logp = torch.where(valid, advantages[t], 0), torch.where(valid, student_logp[t], 0)
    log_ratio = teacher_logp[t] - logp
    # sign(0) · inf would be NaN; direction 0 means a ratio of 1.
    ratio = torch.where(a == 0, 1, torch.exp(a.sign() * log_ratio))
    magnitude = ratio.clamp(1 - options.clip_eps, 1 + options.clip_eps)
    gate = (1 - options.gamma * (lookahead_entropy[t] / scale)).clamp(options.gate_floor, 1)
    credit = torch.where(a == 0, 0, a * magnitude * gate)
    outputs = stats.magnitude, stats.gate, stats.token_advantage
    for out, value in zip(outputs, (magnitude, gate, credit), strict=True):
        out[t] = torch.where(valid, value, 0)
    # Without an advantage log p = -inf costs nothing, but the NaN of a target outside the vocabulary must be seen.
    loss[t] = torch.where((credit == 0) & ~logp.isnan(), 0, -credit * logp)


def sparse_tolerance(grad_mode: str, sparse_tol: float, head: Head, needs: tuple[bool, bool, bool]) -> None:
    """None, for exact gradients, whatever is asked for: they are within any tolerance."""


def student_pass(
    head: Head, hidden, target_ids, rows: Rows, logp, gradient_of: Callable[[int, int], torch.Tensor],
    needs: tuple[bool, bool, bool], chunk_bytes: int, sparse: None = None,
) -> Finish:  # fmt: skip
    """Write log p of the targets into ``logp`` (N,), and leave the gradients of (hidden, weight, bias) that are needed.

    gradient_of: called with (first row, number of rows) once their ``logp`` is there; gives dL/dlogp, an (N,) tensor.
    sparse: nothing is left out here; see :func:`sparse_tolerance`.
    """
    dtype = compute_dtype(hidden.dtype)
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
    d_weight = torch.zeros_like(head.weight, dtype=dtype, memory_format=torch.contiguous_format) if needs[1] else None
    d_bias = torch.zeros_like(head.bias, dtype=dtype) if needs[2] else None
    active = _count(rows, 1)
    for first, index in _chunks(rows, head, dtype, chunk_bytes):
        h = _select(hidden, index, dtype)
        z, damping = _logits(head, h)
        log_p, _ = _log_softmax(z)
        logp[index] = _target_logp(log_p, target_ids[index])
        g = gradient_of(first, index.numel())[index][: max(0, active - first)]
        if not g.numel():
            continue
        n, index = g.numel(), index[: g.numel()]
        g = torch.where(_among(rows, 1, first, n), g.to(dtype) / head.temperature, 0)
        # dL/dz = g (1_y - p)
        dz = log_p[:n].exp_().neg_()
        target = target_ids[index].clamp(0, dz.shape[1] - 1)[:, None]
        # 1 - p_y as the sum of all other p: near p_y = 1 the difference would cancel.
        dz.scatter_(1, target, 0)
        dz.scatter_(1, target, -dz.sum(1, keepdim=True))
        if damping is not None:
            dz *= damping[:n]
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

    dtypes = hidden.dtype, head.weight.dtype, head.bias.dtype if needs[2] else None

    def finish(factor: torch.Tensor | None):
        pairs = zip((d_hidden, d_weight, d_bias), dtypes, strict=True)
        return tuple(scaled(gradient, factor, dtype, multiply) for gradient, dtype in pairs)

    return finish


def multiply(source: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = source * factor (0-d), in the compute dtype and rounded once; ``out`` may be ``source``."""
    step = max(1, UPCAST_BYTES // 4)
    for s, o in zip(source.view(-1).split(step), out.view(-1).split(step), strict=True):
        o.copy_(s.to(compute_dtype(s.dtype)) * factor)
    return out
