"""Divergences of student and teacher, with their gradients, out of one pass over the vocabulary for both.

A chunk of rows goes through the files in this order:

    offsets.py   what exponentials are relative to, from target logits and the head's mean row
    pair.py      both logits of a tile beside each other: stored magnitudes and ratios, and their sums
    sums.py      divergence, log p and entropies of a row
    entries.py   the entries of dL/dz in place of the magnitudes
    chunk.py     all of these in turn; products with them are those of ..gradient
    kept.py      entries kept for gradients that the backward pass learns

The divergence of a token is off by max(1e-3 of it, 4e-6 nat) at most, and the gradient of a row beside 16-bit operands
by 3e-3 of its norm in the root mean square, 8e-3 at worst where the models are not nearly alike: entries.py says why.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from egrsd_kernels.backends.protocol import DivergenceStatistics, Finish, KeptDivergence, Needs, Pair, PairCredit
from egrsd_kernels.rows import Rows

from .. import no_gradients
from .. import takes as takes_hidden
from ..common import ROW_TILE, ceil_div
from ..gradient import Outputs, finishing
from ..plan import Plan
from .chunk import PairChunk, PairGradients, PairMachine, ratio_dtype, sums_of
from .kept import KeptPairs
from .offsets import MeanRow
from .plan import pair_plan

__all__ = ["divergence_pass", "keep_divergence", "takes"]


def takes(pair: Pair) -> bool:
    """Operands that kernels take, and divergences of the full vocabulary."""
    return all(map(takes_hidden, (pair.student_hidden, pair.teacher_hidden))) and pair.divergence.top_k is None


def divergence_pass(
    pair: Pair, target_ids: Tensor | None, rows: Rows, out: DivergenceStatistics,
    credit: Callable[[int, int], PairCredit], needs: Needs, chunk_bytes: int,
) -> Finish:  # fmt: skip
    """See :meth:`egrsd_kernels.backends.protocol.DivergenceBackend.divergence_pass`."""
    return _pass(pair, _means(pair), target_ids, rows, out, credit, needs, chunk_bytes)


def _means(pair: Pair) -> tuple[MeanRow, MeanRow]:
    return MeanRow(pair.student), MeanRow(pair.teacher)


def _plan(
    pair: Pair, how: PairMachine, n: int, out: DivergenceStatistics, needs: Needs, chunk_bytes: int, stores: bool
) -> Plan:
    hidden = pair.student_hidden, pair.teacher_hidden
    return pair_plan(
        ceil_div(n, ROW_TILE), len(pair.student.weight), tuple(h.shape[-1] for h in hidden),
        tuple(h.dtype.itemsize for h in hidden), how.student, how.pair, chunk_bytes, needs,
        sums_of(pair, out).planes, stores,
    )  # fmt: skip


def _pass(
    pair: Pair, means: tuple[MeanRow, MeanRow], target_ids: Tensor | None, rows: Rows, out: DivergenceStatistics,
    credit: Callable[[int, int], PairCredit], needs: Needs, chunk_bytes: int, begun: Outputs | None = None,
) -> Finish:  # fmt: skip
    """begun: the gradients of other rows, to be added to."""
    n, head, hidden, some = len(rows.order), pair.student, pair.student_hidden, any(needs[:3])
    if not n:
        return no_gradients(head, hidden, needs) if begun is None else finishing(head, begun)
    how, stores = PairMachine.of(pair), some or pair.divergence.kind == "jsd"
    plan = _plan(pair, how, n, out, needs, chunk_bytes, stores)
    shape = plan.rows, plan.slice_tiles * how.pair.cols
    entries = hidden.new_empty(shape) if stores else None
    ratios = hidden.new_empty(shape, dtype=ratio_dtype(pair)) if stores else None
    work = PairChunk(pair, how, means, plan.rows, target_ids is not None, out, entries, ratios)
    # All rows in one chunk: its product is the whole gradient, and is rounded to the head's dtype on its way out.
    sums = Outputs.of(head, hidden, needs, whole=n <= plan.rows, fill=True) if begun is None else begun
    gradients = None
    if some:
        assert entries is not None
        gradients = PairGradients(work.student, plan.partial_tiles, sums.hidden, needs, entries)
    targets = rows.order if target_ids is None else target_ids  # without any, nothing is made of them
    for first_row in range(0, n, plan.rows):
        order = rows.order[first_row:]
        work.forward(pair, targets, rows, first_row, out)
        if gradients is not None:
            work.make_entries(order, credit(first_row, plan.rows), gradients, out)
            if sums.hidden is not None:
                gradients.hidden_product(work.student.row_counts, 0)
            gradients.backward(order, None, fill=begun is None)
            gradients.head(sums.weight, sums.bias, accumulate=first_row > 0 or begun is not None)
    product = None if gradients is None else gradients.head_product
    if product is None or not needs.weight or sums.weight is not None:
        return finishing(head, sums)
    return finishing(head, sums, product.rounded)


def keep_divergence(
    pair: Pair, target_ids: Tensor | None, rows: Rows, out: DivergenceStatistics, needs: Needs, keep_bytes: int,
    chunk_bytes: int,
) -> KeptDivergence:  # fmt: skip
    """See :meth:`egrsd_kernels.backends.protocol.DivergenceBackend.keep_divergence`."""
    if not len(rows.order):
        return lambda pair, *_: no_gradients(pair.student, pair.student_hidden, needs)
    how, means = PairMachine.of(pair), _means(pair)
    plan = _plan(pair, how, len(rows.order), out, needs, chunk_bytes, True)
    hidden, width = pair.student_hidden, plan.slice_tiles * how.pair.cols
    row = (width + (hidden.shape[-1] if needs.head else 0)) * hidden.dtype.itemsize + 64
    room = min(ceil_div(len(rows.order), ROW_TILE), keep_bytes // (ROW_TILE * row)) * ROW_TILE
    first, others = rows.split(room)
    passed = KeptPairs(pair, target_ids, first, room, how, means, plan, needs, out) if room else None
    nothing = Needs(False, False, False)

    def no_credit(first_row: int, n_rows: int) -> PairCredit:
        raise AssertionError("a pass without gradients asks for no credit")

    _pass(pair, means, target_ids, others, out, no_credit, nothing, chunk_bytes)

    def kept(pair: Pair, gradient: Tensor, needed: Tensor, chunk_bytes: int) -> Finish:
        left, weights = len(others.order), PairCredit(gradient)

        def rest(begun: Outputs | None) -> Finish:
            again = needed.index_fill(0, first.order.long(), False)
            left_rows = Rows.build(again, again).split(left)[0]
            known = DivergenceStatistics(torch.zeros_like(gradient))
            return _pass(pair, means, target_ids, left_rows, known, lambda *_: weights, needs, chunk_bytes, begun)

        if passed is None:
            return rest(None)
        return passed.finish(pair.student, pair.student_hidden, gradient, None, rest if left else None)

    return kept
