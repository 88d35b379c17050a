"""The backend in Triton: chunk by chunk through the kernels, with every count kept on the device.

One chunk of student rows goes through the files in this order:

    gather.py    hidden states of the chunk's rows, and the logit of each row's target token
    vocab.py     one pass over the vocabulary: softmax statistics, or stored exponentials and their sums
    credit.py    lookahead, gate, magnitude and token advantage: what each row's gradient is worth
    gradient.py  hidden, head and bias gradients from the stored exponentials
    sparse/      or sparse ones with a certified bound; the rows that are not sparse gather for gradient.py

plan.py says how large a chunk is, tuning.py which tiles the products take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from egrsd_kernels.head import Head
from egrsd_kernels.rows import Rows

from ..protocol import Credit, Finish, Gradients, Needs
from ..scaling import scaled
from ..sparsity import Sparse
from .common import ROW_TILE, interpreted
from .credit import lookahead_entropy, token_credit
from .gather import Chunk, gather_kernel
from .gradient import ChunkGradients, multiply
from .plan import ceil_div, chunk_plan
from .sparse import SparseGradients, sparse_plan
from .tuning import machine
from .vocab import VocabPass

__all__ = ["lookahead_entropy", "statistics", "student_pass", "takes", "token_credit"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STATISTICS_ROWS = 4096  # nothing logits-sized is kept there: enough rows to fill any GPU


def takes(hidden: Tensor) -> bool:
    """Operands on a GPU, or on a CPU under TRITON_INTERPRET=1."""
    device = hidden.device.type
    return hidden.dtype in DTYPES and (device == "cuda" or (device == "cpu" and interpreted(gather_kernel)))


def statistics(
    head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows, chunk_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See :meth:`..protocol.Backend.statistics`."""
    n = target_ids.numel()
    logp, entropy, logsumexp = torch.zeros(3, n, dtype=torch.float32, device=hidden.device)
    if n:
        chunk = Chunk(head, temperature, min(STATISTICS_ROWS, ceil_div(n, ROW_TILE) * ROW_TILE), machine(head.weight))
        vocab = VocabPass(chunk)
        for first_row in range(0, n, chunk.rows):
            chunk.gather(hidden, target_ids, rows, first_row)
            vocab.statistics(rows.order[first_row:], logp, entropy, logsumexp)
    return logp, entropy, logsumexp


def student_pass(
    head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows, logp: Tensor, credit: Credit,
    needs: Needs, chunk_bytes: int, sparse: Sparse | None = None,
) -> Finish:  # fmt: skip
    """See :meth:`..protocol.Backend.student_pass`."""
    n, device, dtype = target_ids.numel(), hidden.device, hidden.dtype
    d_hidden = torch.zeros(hidden.shape, dtype=dtype, device=device) if needs.hidden else None
    d_weight = d_bias = head_gradient = None
    if not n:
        d_weight = torch.zeros_like(head.weight, memory_format=torch.contiguous_format) if needs.weight else None
        d_bias = torch.zeros_like(head.bias) if needs.bias else None
    else:
        how = machine(head.weight)
        shape = ceil_div(n, ROW_TILE), *head.weight.shape, dtype.itemsize
        if sparse is not None:
            if needs.weight:
                d_weight = torch.zeros(head.weight.shape, dtype=torch.float32, device=device)
            if needs.bias:
                d_bias = torch.zeros(head.bias.shape, dtype=torch.float32, device=device)
            plan = sparse_plan(*shape, how, chunk_bytes, needs)
            chunk = Chunk(head, temperature, plan.rows, how)
            gradients = SparseGradients(chunk, plan, hidden, (d_hidden, d_weight, d_bias), sparse)
        else:
            plan = chunk_plan(*shape, how, chunk_bytes, needs)
            chunk = Chunk(head, temperature, plan.rows, how)
            gradients = ChunkGradients(chunk, plan, d_hidden, head=needs.head)
            if needs.weight and n > plan.rows:
                d_weight = torch.empty(head.weight.shape, dtype=torch.float32, device=device)
            if needs.bias:
                d_bias = torch.empty(head.bias.shape, dtype=torch.float32, device=device)
        for first_row in range(0, n, chunk.rows):
            order = rows.order[first_row:]
            chunk.gather(hidden, target_ids, rows, first_row)
            gradients.forward(order, logp)
            gradients.backward(order, credit(first_row, chunk.rows))
            if sparse is None and d_weight is not None:
                gradients.head_product(d_weight, accumulate=first_row > 0)
            if sparse is None and d_bias is not None:
                gradients.bias(d_bias, accumulate=first_row > 0)
        if sparse is not None:
            head_gradient = gradients.finish()
        elif needs.weight and d_weight is None:
            # All rows in one chunk: its product is the whole gradient, so it waits for the factor and is rounded to the
            # head's dtype on its way out. That spares a float32 gradient, more memory than the chunk that waits.
            head_gradient = gradients.head_product.rounded

    def finish(factor: Tensor | None) -> Gradients:
        weight = scaled(d_weight, factor, dtype, multiply) if head_gradient is None else head_gradient(factor)
        bias = None if d_bias is None else scaled(d_bias, factor, head.bias.dtype, multiply)
        return Gradients(scaled(d_hidden, factor, dtype, multiply), weight, bias)

    return finish
