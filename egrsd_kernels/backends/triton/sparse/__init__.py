"""Sparse gradients with a certified bound, from the exponentials that the vocabulary pass stores. Experimental.

plan.py says how large a chunk is, planes.py what is known of a row. select.py lists the entries that rows keep,
certify.py has the last word on which rows are sparse, lists.py makes their gradients, and reserve.py those of the dense
rows, with the exact kernels. docs/sparse.md says how, and proves the bound.
"""

from functools import partial

import torch

from egrsd_kernels.head import Head

from ...protocol import Finish, Needs, VocabularyStatistics
from ...sparsity import Sparse
from ..common import ROW_TILE, Machine, ceil_div
from ..gather import Chunk
from ..gradient import ChunkGradients, Outputs, finishing
from ..plan import Plan
from ..vocab import NOTHING, StoringPass, Wanted
from . import certify
from .lists import add_rows, add_to_head, sort_entries
from .plan import SparsePlan, sparse_plan
from .planes import FACTOR, N_ENTRIES, TOKEN, planes_of
from .reserve import Reserve
from .select import list_entries

__all__ = ["SparseGradients", "SparsePlan", "sparse_plan"]


class SparseGradients:
    """Log p and gradients of all rows, one ``chunk`` after another, in the order that these are gathered in.

    hidden: all hidden states, (B, T, D). needs: which gradients will be asked for. sparse: takes what tokens drop.
    wanted: what is asked for beside log p.
    """

    def __init__(
        self, head: Head, temperature: float, hidden: torch.Tensor, how: Machine, chunk_bytes: int, needs: Needs,
        sparse: Sparse, wanted: Wanted = NOTHING,
    ):  # fmt: skip
        (V, D), n = head.weight.shape, hidden.shape[0] * hidden.shape[1]
        shape = ceil_div(n, ROW_TILE), V, D, hidden.dtype.itemsize
        plan = sparse_plan(*shape, how, chunk_bytes, needs, wanted.stored)
        chunk = self.chunk = Chunk(head, temperature, plan.rows, how)
        self.hidden, self.sparse, self.trained = hidden[..., needs.first_column :], sparse, needs.head
        self.d_hidden = hidden.new_zeros(hidden.shape) if needs.hidden else None
        self.d_weight = chunk.floats(V, D - needs.first_column).zero_() if needs.weight else None
        self.d_bias = chunk.floats(V).zero_() if needs.bias else None
        tiles = ceil_div(V, chunk.configs.vocab.cols)
        stored = StoringPass(chunk, tiles, wanted=wanted)
        self.stored_pass = ChunkGradients(chunk, Plan(chunk.rows, tiles, 0), None, head=False, stored=stored)
        whole = Plan(plan.reserve, tiles, plan.partial_tiles)
        outputs = self.d_hidden, self.d_weight, self.d_bias
        self.reserve = Reserve(chunk, whole, *outputs, needs.first_column)
        self.floats, self.ints = planes_of(self.stored_pass)
        self.budget, self.tile_of = chunk.floats(2), self.ints.new_empty(chunk.rows, tiles)
        # Of several chunks: to read and write the head's gradient takes long. N_ENTRIES and TOKEN of the rows, too.
        self.entry_of = self.ints.new_empty(plan.listed, plan.entries)
        self.value_of = self.floats.new_empty(plan.listed, plan.entries)
        self.listed, self.end = self.ints.new_empty(2, plan.listed), 0
        self.first_of = torch.arange(chunk.rows, dtype=torch.int32, device=hidden.device) * plan.entries

    def forward(self, order: torch.Tensor, out: VocabularyStatistics) -> None:
        """Write what is wanted of row i of the chunk at order[i] of ``out``; leave exponentials behind."""
        self.stored_pass.forward(order, out)

    def backward(self, order: torch.Tensor, gradient: torch.Tensor) -> None:
        """Turn dL/dlogp, ``gradient`` (N,) float32 up to the chunk's last row, into its sparse rows' gradients."""
        chunk, floats, ints, weight, reserve = self.chunk, self.floats, self.ints, self.chunk.head.weight, self.reserve
        self.gradient = gradient
        if self.end + chunk.rows > len(self.entry_of):
            if self.trained:
                add_to_head(self._sorted(), self.hidden, self.d_weight, self.d_bias)
            self.end = 0
        rows = slice(self.end, self.end + chunk.rows)
        self.end += chunk.rows
        lists = self.entry_of[rows], self.value_of[rows]
        given = order, gradient, self.sparse.tolerance
        list_entries(self.stored_pass, floats, ints, self.budget, *given, self.tile_of, *lists)
        certify.certify_kernel[(1,)](
            chunk.row_counts, floats, ints, self.budget, self.sparse.dropped, self.sparse.mass, self.sparse.dense,
            reserve.flush, reserve.stored, chunk.rows, reserve.chunk.rows, chunk.temperature, certify.ROW_SHARE,
            num_warps=8,
        )  # fmt: skip
        lists[1].mul_(floats[FACTOR.value, :, None])
        self.listed[:, rows] = ints[TOKEN.value : N_ENTRIES.value + 1]
        if self.d_hidden is not None:
            ends = self.first_of + ints[N_ENTRIES.value]
            add_rows((self.first_of, ends, *lists), weight, *weight.stride(), D=chunk.D, to=order, out=self.d_hidden)
        reserve.make(gradient)
        reserve.set_aside(self.stored_pass, floats, ints)

    def finish(self) -> Finish:
        """Make the gradients of the rows that wait; what a trained head's still need holds no exponentials."""
        self.reserve.flush.copy_(self.reserve.stored)
        self.reserve.make(self.gradient)
        if not self.trained:
            return finishing(self.chunk.head, Outputs(self.d_hidden, None, None))
        dtype = self.hidden.dtype
        weight = partial(add_to_head, self._sorted(), self.hidden, self.d_weight, self.d_bias, dtype)
        return finishing(self.chunk.head, Outputs(self.d_hidden, None, self.d_bias), weight)

    def _sorted(self) -> tuple[torch.Tensor, ...]:
        rows = slice(self.end)
        token_of, n_entries = self.listed[:, rows]
        return sort_entries(self.entry_of[rows], self.value_of[rows], n_entries, token_of, self.hidden, self.chunk.V)
