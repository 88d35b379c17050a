"""Dense rows of several chunks, set aside until there are enough of them for the exact kernels."""

import torch
import triton.language as tl

from ..common import ROW_TILE, block_of, ceil_div
from ..gather import Chunk
from ..gradient import ChunkGradients
from ..launch import kernel
from ..plan import Plan
from .planes import SLOT, TOKEN, at, planes_of

TILE = tl.constexpr(ROW_TILE)


@kernel
def set_aside_kernel(
    exponentials, hidden, floats, ints, row_counts, stored, to_exponentials, to_hidden, to_floats, to_ints,
    rows, room, width, D, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, max(width, D) / BLOCK): each row with a SLOT goes there, its E (width,), hidden states (D,) and
    planes; E = 0 after the last of the ``stored`` rows, to the end of a tile of rows.
    """
    r = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(stored)
    if end + r < tl.cdiv(end, TILE) * TILE:
        zeros = tl.zeros([BLOCK], to_exponentials.dtype.element_ty)
        tl.store(to_exponentials + (end + r).to(tl.int64) * width + column, zeros, mask=column < width)
    if r < tl.load(row_counts + 1):
        slot = tl.load(at(ints, SLOT, rows, r))
        if slot >= 0:
            e = tl.load(exponentials + r.to(tl.int64) * width + column, mask=column < width, other=0.0)
            tl.store(to_exponentials + slot.to(tl.int64) * width + column, e, mask=column < width)
            h = tl.load(hidden + r.to(tl.int64) * D + column, mask=column < D, other=0.0)
            tl.store(to_hidden + slot.to(tl.int64) * D + column, h, mask=column < D)
            if tl.program_id(1) == 0:
                for which in tl.static_range(3):  # SOFTCAP_GRAD, OTHERS, TOTAL
                    tl.store(at(to_floats, which, room, slot), tl.load(at(floats, which, rows, r)))
                for which in tl.static_range(2):  # TARGET, TOKEN
                    tl.store(at(to_ints, which, room, slot), tl.load(at(ints, which, rows, r)))


class Reserve:
    """Room for the dense rows of chunks like ``chunk``, and their exact gradients. The outputs are filled or added to.

    flush (4,) int32: twice how many rows are made next. stored (1,) int32: how many wait.
    """

    def __init__(self, chunk: Chunk, plan: Plan, out_hidden, out_weight, out_bias, first_column: int = 0):
        self.out_hidden, self.out_weight, self.out_bias = out_hidden, out_weight, out_bias
        self.chunk = chunk.another(plan.rows)
        trained = out_weight is not None or out_bias is not None
        self.exact = ChunkGradients(self.chunk, plan, out_hidden, trained, first_column)
        self.floats, self.ints = planes_of(self.exact)
        self.flush, self.stored = self.chunk.row_counts, torch.zeros_like(self.ints[0, :1])

    def make(self, gradient: torch.Tensor) -> None:
        """The exact gradients of the first ``flush`` rows, for dL/dlogp ``gradient`` (N,) float32."""
        if self.out_hidden is not None:
            self.exact.hidden_product(self.flush, 0)
        self.exact.backward(self.ints[TOKEN.value], gradient)
        self.exact.head(self.out_weight, self.out_bias, accumulate=True)

    def set_aside(self, seen: ChunkGradients, floats: torch.Tensor, ints: torch.Tensor) -> None:
        """Take the dense rows of the chunk of ``seen``, whose planes are given."""
        chunk, e = seen.chunk, seen.exponentials
        block = block_of(e.shape[1], 8192)
        set_aside_kernel[(chunk.rows, ceil_div(max(e.shape[1], chunk.D), block))](
            e, chunk.hidden, floats, ints, chunk.row_counts, self.stored, self.exact.exponentials, self.chunk.hidden,
            self.floats, self.ints, chunk.rows, self.chunk.rows, e.shape[1], chunk.D, BLOCK=block,
        )  # fmt: skip
