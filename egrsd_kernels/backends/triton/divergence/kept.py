"""A forward pass that keeps the entries of dD/dz, for gradients that only the backward pass knows."""

from __future__ import annotations

from torch import Tensor

from egrsd_kernels.backends.protocol import DivergenceStatistics, Needs, Pair
from egrsd_kernels.rows import Rows

from ..kept import KeptPass
from ..plan import Plan
from .chunk import PairChunk, PairGradients, PairMachine, ratio_dtype
from .offsets import MeanRow


class KeptPairs(KeptPass):
    """:class:`~..kept.KeptPass` of ``rows``, with room for n, whose matrix has the entries of dD/dz."""

    def __init__(
        self, pair: Pair, target_ids: Tensor | None, rows: Rows, n: int, how: PairMachine,
        means: tuple[MeanRow, MeanRow], plan: Plan, needs: Needs, out: DivergenceStatistics,
    ):  # fmt: skip
        """Write ``out`` of the rows."""
        self.rows, self.plan, self.needs, hidden = rows, plan, needs, pair.student_hidden
        targets = rows.order if target_ids is None else target_ids
        width = plan.slice_tiles * how.pair.cols
        self.matrix = hidden.new_empty(n, width)
        self.hidden = hidden.new_empty(n if needs.head else plan.rows, hidden.shape[-1])
        teacher_hidden = pair.teacher_hidden.new_empty(plan.rows, pair.teacher_hidden.shape[-1])
        ratios = hidden.new_empty(plan.rows, width, dtype=ratio_dtype(pair))
        self.chunks = []
        for first_row in range(0, n, plan.rows):
            part = slice(first_row, min(first_row + plan.rows, n))
            size = part.stop - part.start
            work = PairChunk(
                pair, how, means, size, target_ids is not None, out, self.matrix[part], ratios[:size],
                self.hidden[part if needs.head else slice(size)], teacher_hidden[:size],
            )  # fmt: skip
            gradients = PairGradients(work.student, 0, None, needs, self.matrix[part])
            work.forward(pair, targets, rows, first_row, out)
            work.make_entries(rows.order[first_row:], None, gradients, out)
            gradients.let_go()
            self.chunks.append(gradients)
