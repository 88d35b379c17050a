"""The backend in Triton: chunk by chunk through the kernels, with every count kept on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .automatic import Automatic
from .kernels.common import ROW_TILE, interpreted
from .kernels.credit import lookahead_entropy, token_credit
from .kernels.gather import Chunk, gather_kernel
from .kernels.gradient import ChunkGradients, multiply
from .kernels.plan import break_even, ceil_div, chunk_plan, sparse_plan
from .kernels.sparse import SparseGradients
from .kernels.tuning import machine
from .kernels.vocab import VocabPass
from .problem import Finish, Head, Rows, Sparse, scaled

__all__ = [
    "DTYPES", "lookahead_entropy", "multiply", "runs_on", "sparse_tolerance", "statistics", "student_pass",
    "token_credit",
]  # fmt: skip

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
AUTOMATIC = Automatic()
STATISTICS_ROWS = 4096  # nothing logits-sized is kept there: enough rows to fill any GPU


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on tensors of this device: a GPU, or a CPU under TRITON_INTERPRET=1."""
    return device.type == "cuda" or (device.type == "cpu" and interpreted(gather_kernel))


def statistics(head: Head, hidden, target_ids, rows: Rows, chunk_bytes: int):
    """(logp, entropy, logsumexp), each (N,) float32, in nats, 0 at masked rows."""
    n = target_ids.numel()
    logp, entropy, logsumexp = torch.zeros(3, n, dtype=torch.float32, device=hidden.device)
    if n:
        chunk = Chunk(head, min(STATISTICS_ROWS, ceil_div(n, ROW_TILE) * ROW_TILE), machine(head.weight))
        vocab = VocabPass(chunk)
        for first_row in range(0, n, chunk.rows):
            chunk.gather(hidden, target_ids, rows, first_row)
            vocab.statistics(rows.order[first_row:], logp, entropy, logsumexp)
    return logp, entropy, logsumexp


def sparse_tolerance(grad_mode: str, sparse_tol: float, head: Head, needs: tuple[bool, bool, bool]) -> float | None:
    """The tolerance of the gradients that ``grad_mode`` asks for ("exact", "sparse" or "auto"); None for exact ones."""
    if grad_mode == "auto":
        most_dense = break_even(head.weight.shape[1], needs[1] or needs[2])
        grad_mode = "sparse" if AUTOMATIC.sparse(_kind(head, needs), most_dense) else "exact"
    return sparse_tol if grad_mode == "sparse" else None


def _kind(head: Head, needs: tuple[bool, bool, bool]) -> tuple:
    """What the density of gradients is remembered by: with a trained head rows may keep fewer entries."""
    return head.weight.device, head.weight.dtype, *head.weight.shape, needs[1] or needs[2]


def student_pass(
    head: Head, hidden, target_ids, rows: Rows, logp, gradient_of: Callable[[int, int], torch.Tensor],
    needs: tuple[bool, bool, bool], chunk_bytes: int, sparse: Sparse | None = None,
) -> Finish:  # fmt: skip
    """Write log p of the targets into ``logp`` (N,), and leave the gradients all but done.

    gradient_of: called with (first row, number of rows) once their ``logp`` is there; gives dL/dlogp, an (N,) tensor.
    needs: gradients of (hidden, weight, bias).
    sparse: what may be left out of them; takes what was. None: exact gradients.

    Returns:
        What gives the gradients, those that are needed, in the operands' dtypes: a function of a 0-d float32 tensor
        that multiplies them, or None for 1. It can be called once.
    """
    n, device, dtype = target_ids.numel(), hidden.device, hidden.dtype
    d_hidden = torch.zeros(hidden.shape, dtype=dtype, device=device) if needs[0] else None
    d_weight = d_bias = head_gradient = None
    if not n:
        d_weight = torch.zeros_like(head.weight, memory_format=torch.contiguous_format) if needs[1] else None
        d_bias = torch.zeros_like(head.bias) if needs[2] else None
    else:
        how = machine(head.weight)
        shape, whole = (ceil_div(n, ROW_TILE), *head.weight.shape, dtype.itemsize), needs[1] or needs[2]
        if sparse is not None:
            if needs[1]:
                d_weight = torch.empty(head.weight.shape, dtype=torch.float32, device=device)
            if needs[2]:
                d_bias = torch.zeros(head.bias.shape, dtype=torch.float32, device=device)
            plan = sparse_plan(*shape, how, chunk_bytes, needs)
            chunk = Chunk(head, plan.rows, how)
            gradients = SparseGradients(chunk, plan, hidden, (d_hidden, d_weight, d_bias), sparse)
        else:
            plan = chunk_plan(*shape, how, chunk_bytes, needs)
            chunk = Chunk(head, plan.rows, how)
            gradients = ChunkGradients(chunk, plan, d_hidden, head=whole)
            if needs[1] and n > plan.rows:
                d_weight = torch.empty(head.weight.shape, dtype=torch.float32, device=device)
            if needs[2]:
                d_bias = torch.empty(head.bias.shape, dtype=torch.float32, device=device)
        for first_row in range(0, n, chunk.rows):
            order = rows.order[first_row:]
            chunk.gather(hidden, target_ids, rows, first_row)
            gradients.forward(order, logp)
            gradients.backward(order, gradient_of(first_row, chunk.rows))
            if sparse is None and d_weight is not None:
                gradients.head_product(d_weight, accumulate=first_row > 0)
            if sparse is None and d_bias is not None:
                gradients.bias(d_bias, accumulate=first_row > 0)
        if sparse is not None:
            head_gradient = gradients.finish()
            AUTOMATIC.observe(_kind(head, needs), torch.stack([sparse.dense.sum(), rows.counts[1]]))
        elif needs[1] and d_weight is None:
            # All rows in one chunk: its product is the whole gradient, so it waits for the factor and is rounded to the
            # head's dtype on its way out. That spares a float32 gradient, more memory than the chunk that waits.
            head_gradient = gradients.head_product.rounded

    def finish(factor: torch.Tensor | None):
        weight = scaled(d_weight, factor, dtype, multiply) if head_gradient is None else head_gradient(factor)
        bias = None if d_bias is None else scaled(d_bias, factor, head.bias.dtype, multiply)
        return scaled(d_hidden, factor, dtype, multiply), weight, bias

    return finish
