"""A chunk of rows of student and teacher: from hidden states to the entries of dL/dz, and on to gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from egrsd_kernels.backends.protocol import DivergenceStatistics, Needs, Pair, PairCredit
from egrsd_kernels.rows import Rows

from ..common import Config, Machine, ceil_div, device_limits
from ..gather import Chunk
from ..gradient import ChunkGradients
from ..plan import Plan
from ..tuning import machine
from ..vocab import NOTHING, ROW_BLOCK, TILE_BLOCK, VocabPass, Wanted
from .entries import LARGEST_RATIO, balance_kernel, entries_kernel, row_factor_kernel
from .offsets import MeanRow, make_offsets
from .pair import TILES, PairPass, Sums, pair_config
from .sums import BLOCK, SLOTS, VALUES, WARPS, combine, jsd, recentre


@dataclass(frozen=True)
class PairMachine:
    """How both products run: ``student`` and ``teacher`` beside each other by ``pair``'s tiles."""

    student: Machine
    teacher: Machine
    pair: Config

    @classmethod
    def of(cls, pair: Pair) -> PairMachine:
        student, teacher = machine(pair.student.weight), machine(pair.teacher.weight)
        if student.tma != teacher.tma:  # one kernel has one family
            student, teacher = student._replace(tma=False), teacher._replace(tma=False)
        shared = device_limits(pair.student.weight.device)[1]
        return cls(student, teacher, pair_config(pair.student, pair.teacher, shared))


class Stored(NamedTuple):
    """What :class:`~..gradient.ChunkGradients` knows of a pass whose entries lie in ``exponentials`` (rows, width)."""

    exponentials: Tensor
    logits: None = None
    wanted: Wanted = NOTHING
    what: str = "exponentials"


class PairGradients(ChunkGradients):
    """Gradients out of the entries of dL/dz: those of log p, but for what each row is multiplied by.

    size: (rows,) float32, what a row's entries are in units of.
    """

    def __init__(
        self, chunk: Chunk, partial_tiles: int, out_hidden: Tensor | None, needs: Needs, entries: Tensor
    ):  # fmt: skip
        plan = Plan(chunk.rows, 0, partial_tiles)
        super().__init__(chunk, plan, out_hidden, needs.head, needs.first_column, Stored(entries))  # type: ignore[arg-type]
        self.size = chunk.floats(chunk.rows)

    def factors(self, order: Tensor, gradient: Tensor | None) -> None:
        """gradient: what is not in the entries yet (N,) float32; None for 1."""
        chunk = self.chunk
        row_factor_kernel[(ceil_div(chunk.rows, SLOTS),)](
            self.size, gradient, order, chunk.row_counts, self.factor, self.entry, self.head_factor, chunk.rows,
            chunk.temperature, 2.0**self.shift, BLOCK=SLOTS,
        )  # fmt: skip


class PairChunk:
    """Up to ``rows`` rows of student and teacher at work.

    hidden, teacher_hidden: memory for gathered rows. entries: for what is stored, (rows, whole tiles) in the student's
    dtype, and ratios beside it; both None for sums alone.
    """

    def __init__(
        self, pair: Pair, how: PairMachine, means: tuple[MeanRow, MeanRow], rows: int, targets: bool,
        out: DivergenceStatistics, entries: Tensor | None, ratios: Tensor | None, hidden: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
    ):  # fmt: skip
        self.which, self.means, self.targets = pair.divergence, means, targets
        self.student = Chunk(pair.student, pair.temperature, rows, how.student, hidden)
        self.teacher = Chunk(pair.teacher, pair.temperature, rows, how.teacher, teacher_hidden)
        self.pair = PairPass(self.student, self.teacher, how.pair, sums_of(pair, out), entries, ratios)
        # Statistics of an exact offset are used up before anything is stored.
        memory = None if entries is None else entries.view(torch.uint8).view(-1)
        self.exact = VocabPass(self.student, memory=memory), VocabPass(self.teacher, memory=memory)
        self.values = self.student.floats(VALUES, rows)
        # Tiles of rows: all, and those whose r' is rounded too coarsely.
        self.tiles, self.again = torch.ones(2, TILES.value, dtype=torch.int32, device=self.values.device).unbind()

    def forward(self, pair: Pair, target_ids: Tensor, rows: Rows, first_row: int, out: DivergenceStatistics) -> None:
        """Gather the rows from ``first_row`` on, store M and r', and write ``out``.

        Should the offsets not suit a row, all are done again with exact ones; the device decides.
        """
        order = rows.order[first_row:]
        self.student.gather(pair.student_hidden, target_ids, rows, first_row)
        self.teacher.gather(pair.teacher_hidden, target_ids, rows, first_row)
        make_offsets(self.student, self.teacher, self.means, self.targets)
        self._attempt(self.student.row_counts, order, out, self.student.retry)
        for vocab in self.exact:
            vocab.exact_offset(self.student.retry, 0.0)
        self._attempt(self.student.retry, order, out)

    def _attempt(self, row_counts, order, out: DivergenceStatistics, retry=None, tiles=None) -> None:
        tiles = self.tiles if tiles is None else tiles
        self.pair(row_counts, tiles)
        combine(self.pair, self.targets, order, row_counts, tiles, self.values, out, retry)
        if self.which.kind == "jsd":
            jsd(self.pair, self.which.beta, order, row_counts, tiles, self.values, out)

    def make_entries(
        self, order: Tensor, credit: PairCredit | None, gradients: PairGradients, out: DivergenceStatistics
    ) -> None:
        """Of what is stored make the entries of dL/dz, in units of ``gradients.size``; credit: None for D alone.

        Tiles with a row whose r' is rounded too coarsely are done again, and ``out`` with them.
        """
        counts, again = self.student.row_counts, self.again
        if gradients.chunk.hidden.dtype == torch.float32:  # and so is r'
            return self._entries(self.tiles, order, credit, gradients, None)
        self._entries(self.tiles, order, credit, gradients, again)
        recentre(self.pair, self.values, counts, again)
        self._attempt(counts, order, out, tiles=again)
        self._entries(again, order, credit, gradients, None)

    def _entries(self, tiles, order, credit: PairCredit | None, gradients: PairGradients, again) -> None:
        student, (rows, width) = self.student, gradients.exponentials.shape
        of_divergence, of_logp = (None, None) if credit is None else credit
        blocks, cap = ceil_div(width, BLOCK), (student.softcap or 0.0) * student.logit_scale
        parts = student.floats(5, blocks, rows)
        entries_kernel[(rows, blocks)](
            self.pair.magnitudes, gradients.exponentials, self.pair.ratios, self.values, of_divergence, of_logp,
            student.target, order, student.row_counts, tiles, again, gradients.size, parts, rows, width,
            2.0**gradients.shift, cap, self.which.beta, KIND=self.which.kind, HALF=self.which.beta == 0.5,
            SOFTCAP=student.softcap is not None, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        balance_kernel[(ceil_div(rows, ROW_BLOCK),)](
            gradients.exponentials, self.values, student.row_counts, tiles, again, parts, rows, blocks, width, cap,
            LARGEST_RATIO, SOFTCAP=student.softcap is not None, ROW_BLOCK=ROW_BLOCK, TILE_BLOCK=TILE_BLOCK,
        )  # fmt: skip


def sums_of(pair: Pair, out: DivergenceStatistics) -> Sums:
    kind = pair.divergence.kind
    entropies = out.student_entropy is not None, out.teacher_entropy is not None
    return Sums(kind != "forward_kl", kind != "reverse_kl", *entropies)


def ratio_dtype(pair: Pair) -> torch.dtype:
    """Of r'."""
    return torch.float32 if pair.student_hidden.dtype == torch.float32 else torch.float16
