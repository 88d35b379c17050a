"""The backend in Triton: chunk by chunk through the kernels, with every count kept on the device.

One chunk of student rows goes through the files in this order:

    gather.py    hidden states of the chunk's rows, and the logit of each row's target token
    vocab.py     one pass over the vocabulary: softmax statistics, or stored exponentials and their sums
    credit.py    lookahead, gate, magnitude and token advantage: what each row's gradient is worth
    gradient.py  hidden, head and bias gradients from the stored exponentials
    entropy.py   what the exponentials become where entropies have a gradient, too
    kept.py      exponentials of all rows, kept for gradients that the backward pass learns
    sparse/      or sparse ones with a certified bound; the rows that are not sparse gather for gradient.py

plan.py says how large a chunk is, tuning.py which tiles the products take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from egrsd_kernels.head import Head
from egrsd_kernels.rows import Rows

from ..protocol import Credit, EntropyGradient, Finish, Gradients, Kept, Needs
from ..sparsity import Sparse
from .common import ROW_TILE, interpreted
from .credit import lookahead_entropy, token_credit
from .gather import Chunk, gather_kernel
from .gradient import ExactGradients
from .kept import KeptPass
from .plan import ceil_div, kept_plan
from .sparse import SparseGradients
from .tuning import machine
from .vocab import VocabPass

__all__ = ["keep", "lookahead_entropy", "statistics", "student_pass", "takes", "token_credit"]

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
    logp, entropy, logsumexp = (torch.zeros(n, dtype=torch.float32, device=hidden.device) for _ in range(3))
    if n:
        chunk = Chunk(head, temperature, min(STATISTICS_ROWS, ceil_div(n, ROW_TILE) * ROW_TILE), machine(head.weight))
        vocab = VocabPass(chunk)
        for first_row in range(0, n, chunk.rows):
            chunk.gather(hidden, target_ids, rows, first_row)
            vocab.statistics(rows.order[first_row:], logp, entropy, logsumexp)
    return logp, entropy, logsumexp


def student_pass(
    head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows, logp: Tensor, credit: Credit,
    needs: Needs, chunk_bytes: int, sparse: Sparse | None = None, entropy: Tensor | None = None,
    entropy_gradient: EntropyGradient | None = None,
) -> Finish:  # fmt: skip
    """See :meth:`..protocol.Backend.student_pass`."""
    if not target_ids.numel():
        return _zeros(head, hidden, needs)
    problem = head, temperature, hidden, machine(head.weight), chunk_bytes, needs
    if entropy_gradient is not None:
        known = ExactGradients(*problem, known=True)
        for first_row in range(0, target_ids.numel(), known.chunk.rows):
            known.chunk.gather(hidden, target_ids, rows, first_row)
            known.again(rows.order[first_row:], credit(first_row, known.chunk.rows), entropy_gradient)
        return known.finish()
    returned = entropy is not None
    work = ExactGradients(*problem, returned) if sparse is None else SparseGradients(*problem, sparse, returned)
    for first_row in range(0, target_ids.numel(), work.chunk.rows):
        order = rows.order[first_row:]
        work.chunk.gather(hidden, target_ids, rows, first_row)
        work.forward(order, logp, entropy)
        work.backward(order, credit(first_row, work.chunk.rows))
    return work.finish()


def keep(
    head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows,
    statistics: tuple[Tensor, Tensor, Tensor], needs: Needs, entropy_gradient: bool, keep_bytes: int,
) -> Kept | None:  # fmt: skip
    """See :meth:`..protocol.Backend.keep`."""
    if not target_ids.numel():
        return lambda head, hidden, *_: _zeros(head, hidden, needs)
    how, (V, D) = machine(head.weight), head.weight.shape
    plan, size = kept_plan(ceil_div(target_ids.numel(), ROW_TILE), V, D, hidden.dtype.itemsize, how, needs)
    if size > keep_bytes:
        return None
    return KeptPass(head, temperature, hidden, target_ids, rows, statistics, how, plan, needs, entropy_gradient)


def _zeros(head: Head, hidden: Tensor, needs: Needs) -> Finish:
    """Of no row at all."""
    columns = head.weight[:, needs.first_column :]
    return lambda factor: Gradients(
        *(None if x is None or not needed else torch.zeros(x.shape, dtype=x.dtype, device=x.device)
          for x, needed in zip((hidden, columns, head.bias), needs[:3], strict=True))
    )  # fmt: skip
