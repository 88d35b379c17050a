"""Sparse gradients with a certified bound, from the exponentials that the vocabulary pass stores. Experimental.

plan.py says how large a chunk is, planes.py what is known of a row. select.py lists the entries that rows keep,
certify.py has the last word on which rows are sparse, lists.py makes their gradients, and reserve.py those of the dense
rows, with the exact kernels. docs/sparse.md says how, and proves the bound.
"""

from collections.abc import Callable
from functools import partial

import torch

from ..gather import Chunk
from ..gradient import ChunkGradients
from ..plan import Plan
from . import certify
from .lists import add_rows, add_to_head, sort_entries
from .plan import SparsePlan, sparse_plan
from .planes import FACTOR, N_ENTRIES, TOKEN, planes_of
from .reserve import Reserve
from .select import list_entries

__all__ = ["SparseGradients", "SparsePlan", "sparse_plan"]


class SparseGradients:
    """Log p and gradients of one chunk after another, in order; the last rows with :meth:`finish`.

    hidden: all hidden states, (B, T, D), N = B T. outputs: zeros, the gradients of hidden, (N, D) in its dtype, of the
    head, (V, D) float32, and of its bias, (V,) float32, or None where not needed. sparse: takes what tokens drop.
    """

    def __init__(self, chunk: Chunk, plan: SparsePlan, hidden: torch.Tensor, outputs, sparse):
        self.chunk, self.hidden, self.sparse = chunk, hidden, sparse
        self.out_hidden, *self.out_head = outputs
        self.trained = any(x is not None for x in self.out_head)
        tiles = -(-chunk.V // chunk.configs.vocab.cols)
        self.stored_pass = ChunkGradients(chunk, Plan(chunk.rows, tiles, 0), None, head=False)
        self.reserve = Reserve(chunk, Plan(plan.reserve, tiles, plan.partial_tiles), *outputs)
        self.floats, self.ints = planes_of(self.stored_pass)
        self.budget, self.tile_of = chunk.floats(2), self.ints.new_empty(chunk.rows, tiles)
        # Of several chunks: to read and write the head's gradient takes long. N_ENTRIES and TOKEN of the rows, too.
        self.entry_of = self.ints.new_empty(plan.listed, plan.entries)
        self.value_of = self.floats.new_empty(plan.listed, plan.entries)
        self.listed, self.end = self.ints.new_empty(2, plan.listed), 0
        self.first_of = torch.arange(chunk.rows, dtype=torch.int32, device=hidden.device) * plan.entries

    def forward(self, order: torch.Tensor, logp: torch.Tensor) -> None:
        """Write log p (nats) of row i at order[i] of ``logp`` (N,), and leave exponentials and their sums behind."""
        self.stored_pass.forward(order, logp)

    def backward(self, order: torch.Tensor, gradient: torch.Tensor) -> None:
        """Turn dL/dlogp, ``gradient`` (N,) float32 up to the chunk's last row, into its sparse rows' gradients."""
        chunk, floats, ints, weight, reserve = self.chunk, self.floats, self.ints, self.chunk.head.weight, self.reserve
        self.gradient = gradient
        if self.end + chunk.rows > len(self.entry_of):
            if self.trained:
                add_to_head(self._sorted(), self.hidden, *self.out_head)
            self.end = 0
        rows = slice(self.end, self.end + chunk.rows)
        self.end += chunk.rows
        lists = self.entry_of[rows], self.value_of[rows]
        given = order, gradient, self.sparse.tolerance
        list_entries(self.stored_pass, floats, ints, self.budget, *given, self.tile_of, *lists)
        certify.certify_kernel[(1,)](
            chunk.live, floats, ints, self.budget, self.sparse.dropped, self.sparse.mass, self.sparse.dense,
            reserve.flush, reserve.stored, chunk.rows, reserve.chunk.rows, chunk.temperature, certify.ROW_SHARE,
            num_warps=8,
        )  # fmt: skip
        lists[1].mul_(floats[FACTOR.value, :, None])
        self.listed[:, rows] = ints[TOKEN.value : N_ENTRIES.value + 1]
        if self.out_hidden is not None:
            ends = self.first_of + ints[N_ENTRIES.value]
            add_rows((self.first_of, ends, *lists), weight, *weight.stride(), D=chunk.D, to=order, out=self.out_hidden)
        reserve.make(gradient)
        reserve.set_aside(self.stored_pass, floats, ints)

    def finish(self) -> Callable[[torch.Tensor | None], torch.Tensor | None]:
        """Make the gradients of the rows that still wait, all but those of a trained head.

        Returns:
            What gives the head's gradient in its dtype, times a 0-d float32 tensor or 1, and completes its bias's. It
            holds no exponentials. It can be called once.
        """
        self.reserve.flush.copy_(self.reserve.stored)
        self.reserve.make(self.gradient)
        if not self.trained:
            return lambda factor: None
        return partial(add_to_head, self._sorted(), self.hidden, *self.out_head, self.chunk.head.weight.dtype)

    def _sorted(self) -> tuple[torch.Tensor, ...]:
        rows = slice(self.end)
        token_of, n_entries = self.listed[:, rows]
        return sort_entries(self.entry_of[rows], self.value_of[rows], n_entries, token_of, self.hidden, self.chunk.V)
