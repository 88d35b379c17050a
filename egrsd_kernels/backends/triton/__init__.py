"""The backend in Triton: chunk by chunk through the kernels, with every count kept on the device.

One chunk of student rows goes through the files in this order:

    rows.py      which tokens are worked on, in which order, and which sequence each is of
    gather.py    hidden states of the chunk's rows, and the logit of each row's target token
    vocab.py     one pass over the vocabulary: softmax statistics, or stored exponentials and their sums
    credit.py    lookahead, gate, magnitude and token advantage: what each row's gradient is worth
    gradient.py  hidden, head and bias gradients from the stored exponentials
    entropy.py   what the exponentials become where entropies have a gradient, too
    kept.py      exponentials of all rows, kept for gradients that the backward pass learns
    sparse/      or sparse ones with a certified bound; the rows that are not sparse gather for gradient.py

Divergences of student and teacher have a pass of their own for both, in divergence/.

plan.py says how large a chunk is, tuning.py which tiles the products take, and launch.py launches the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from egrsd_kernels.head import Head
from egrsd_kernels.rows import Rows

from ..protocol import Credit, EntropyGradient, Finish, Gradients, Kept, Needs, VocabularyStatistics
from ..sparsity import Sparse
from .common import ROW_TILE, ceil_div, interpreted
from .credit import lookahead_entropy, scales, token_credit
from .gather import Chunk, gather_kernel
from .gradient import ExactGradients, Outputs
from .kept import KeptPass
from .plan import kept_plan
from .rows import build_rows, by_token
from .sparse import SparseGradients
from .tuning import machine
from .vocab import VocabPass, Wanted

__all__ = [
    "build_rows", "by_token", "keep", "lookahead_entropy", "scales", "statistics", "student_pass", "takes",
    "token_credit",
]  # fmt: skip

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STATISTICS_ROWS = 4096  # nothing logits-sized is kept there: enough rows to fill any GPU


def takes(hidden: Tensor) -> bool:
    """Operands on a GPU, or on a CPU under TRITON_INTERPRET=1."""
    device = hidden.device.type
    return hidden.dtype in DTYPES and (device == "cuda" or (device == "cpu" and interpreted(gather_kernel)))


def statistics(
    head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows, out: VocabularyStatistics,
    chunk_bytes: int,
) -> None:  # fmt: skip
    """See :meth:`..protocol.Backend.statistics`."""
    n = len(rows.order)
    if n:
        chunk = Chunk(head, temperature, min(STATISTICS_ROWS, ceil_div(n, ROW_TILE) * ROW_TILE), machine(head.weight))
        vocab = VocabPass(chunk, Wanted.of(out))
        for first_row in range(0, n, chunk.rows):
            chunk.gather(hidden, target_ids, rows, first_row)
            vocab.statistics(rows.order[first_row:], out)


def student_pass(
    head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows, out: VocabularyStatistics,
    credit: Credit, needs: Needs, chunk_bytes: int, sparse: Sparse | None = None,
    entropy_gradient: EntropyGradient | None = None,
) -> Finish:  # fmt: skip
    """See :meth:`..protocol.Backend.student_pass`."""
    n = target_ids.numel()
    if not n:
        return no_gradients(head, hidden, needs)
    problem, wanted = (head, temperature, hidden, machine(head.weight), chunk_bytes, needs), Wanted.of(out)
    if sparse is None:
        work = ExactGradients(*problem, n, wanted, entropy_gradient)
        return work_through(work, hidden, target_ids, rows, n, out, credit)
    return work_through(SparseGradients(*problem, sparse, wanted), hidden, target_ids, rows, n, out, credit)


def work_through(
    work: ExactGradients | SparseGradients, hidden: Tensor, target_ids: Tensor, rows: Rows, n: int,
    out: VocabularyStatistics, credit: Credit,
) -> Finish:  # fmt: skip
    """The first n rows, chunk by chunk."""
    for first_row in range(0, n, work.chunk.rows):
        order = rows.order[first_row:]
        work.chunk.gather(hidden, target_ids, rows, first_row)
        work.forward(order, out)
        work.backward(order, credit(first_row, work.chunk.rows))
    return work.finish()


def keep(
    head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows,
    out: VocabularyStatistics, needs: Needs, entropy_gradient: bool, keep_bytes: int, chunk_bytes: int,
) -> Kept:  # fmt: skip
    """See :meth:`..protocol.Backend.keep`."""
    if not target_ids.numel():
        return lambda head, hidden, *_: no_gradients(head, hidden, needs)
    how, (V, D) = machine(head.weight), head.weight.shape
    shape = ceil_div(target_ids.numel(), ROW_TILE), V, D, hidden.dtype.itemsize
    plan, room = kept_plan(*shape, how, keep_bytes, needs)
    first, others = rows.split(room)
    problem = head, temperature, hidden, target_ids
    passed = KeptPass(*problem, first, room, how, plan, needs, entropy_gradient, out) if room else None
    statistics(*problem, others, out, chunk_bytes)

    def kept(
        head: Head, hidden: Tensor, gradient: Tensor, of_entropy: EntropyGradient | None, needed: Tensor,
        chunk_bytes: int,
    ) -> Finish:  # fmt: skip
        left = len(others.order)

        def rest(begun: Outputs | None) -> Finish:
            again = needed.index_fill(0, first.order.long(), False)
            known = VocabularyStatistics(torch.zeros_like(gradient))
            work = ExactGradients(
                head, temperature, hidden, how, chunk_bytes, needs, left, Wanted.of(known), of_entropy, begun
            )
            left_rows = build_rows(again, again)
            return work_through(work, hidden, target_ids, left_rows, left, known, lambda *_: gradient)

        if passed is None:
            return rest(None)
        return passed.finish(head, hidden, gradient, of_entropy, rest if left else None)

    return kept


def no_gradients(head: Head, hidden: Tensor, needs: Needs) -> Finish:
    """Of no row at all."""
    columns = head.weight[:, needs.first_column :]
    return lambda factor: Gradients(
        *(None if x is None or not needed else torch.zeros(x.shape, dtype=x.dtype, device=x.device)
          for x, needed in zip((hidden, columns, head.bias), needs[:3], strict=True))
    )  # fmt: skip
