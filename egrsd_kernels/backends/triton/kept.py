"""A forward pass that keeps what it stores of all rows, for gradients that only the backward pass knows."""

from __future__ import annotations

import torch
from torch import Tensor

from egrsd_kernels.head import Head
from egrsd_kernels.rows import Rows

from ..protocol import EntropyGradient, Finish, Needs
from .common import Machine
from .gather import Chunk
from .gradient import ChunkGradients, HeadProduct, finishing
from .plan import Plan
from .vocab import StoringPass


class KeptPass:
    """Chunks of ``plan.rows`` rows each, whose exponentials lie one after another in one matrix: the head's gradient is
    one product. For entropies with a gradient the logits are kept instead.

    Attributes:
        matrix: (all rows, whole tiles of the vocabulary), in the operands' dtype, exponentials in the end. hidden: the
            gathered hidden states (all rows, D) of a trained head; a frozen one's chunks share memory for theirs.
    """

    def __init__(
        self, head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows,
        statistics: tuple[Tensor, Tensor, Tensor], how: Machine, plan: Plan, needs: Needs, entropy_gradient: bool,
    ):  # fmt: skip
        """Write (logp, entropy, logsumexp)."""
        self.rows, self.needs, self.plan, self.entropy_gradient = rows, needs, plan, entropy_gradient
        firsts = range(0, target_ids.numel(), plan.rows)
        total, width = len(firsts) * plan.rows, plan.slice_tiles * how.configs.vocab.cols
        self.matrix = hidden.new_empty(total, width)
        self.hidden = hidden.new_empty(total if needs.head else plan.rows, hidden.shape[-1])
        self.chunks: list[ChunkGradients] = []
        for i, first_row in enumerate(firsts):
            part = slice(i * plan.rows, (i + 1) * plan.rows)
            chunk = Chunk(head, temperature, plan.rows, how, self.hidden[part] if needs.head else self.hidden)
            memory = self.matrix[part].view(torch.uint8).view(-1)
            what = "logits" if entropy_gradient else "exponentials"
            stored = StoringPass(chunk, plan.slice_tiles, what, moment=True, memory=memory)
            gradients = ChunkGradients(chunk, Plan(plan.rows, plan.slice_tiles, 0), None, needs.head, stored=stored)
            chunk.gather(hidden, target_ids, rows, first_row)
            gradients.forward(rows.order[first_row:], *statistics)
            gradients.let_go()
            self.chunks.append(gradients)

    def __call__(self, head: Head, hidden: Tensor, gradient: Tensor, of_entropy: EntropyGradient | None) -> Finish:
        """See :data:`...protocol.Kept`."""
        needs, plan, first = self.needs, self.plan, self.chunks[0]
        d_hidden = hidden.new_zeros(hidden.shape) if needs.hidden else None
        d_bias = first.chunk.floats(head.weight.shape[0]) if needs.bias else None
        c = first.configs.hidden
        parts = first.chunk.floats(plan.partial_tiles * c.rows * c.cols) if needs.hidden else None
        for i, gradients in enumerate(self.chunks):
            order = self.rows.order[i * plan.rows :]
            gradients.chunk.head = head
            gradients.aim(d_hidden, plan.partial_tiles, parts)
            if of_entropy is not None:
                gradients.turn(order, gradient, of_entropy)
            if d_hidden is not None:
                gradients.hidden_product(gradients.chunk.row_counts, 0)
            gradients.backward(order, gradient)
            if needs.head and of_entropy is None:
                gradients.clear()
            gradients.head(None, d_bias, accumulate=i > 0)
        if not needs.weight:
            return finishing(head, d_hidden, lambda factor: None, d_bias)
        product = HeadProduct(first.chunk, self.matrix, self.hidden, self.rows.counts, needs.first_column)
        return finishing(head, d_hidden, product.rounded, d_bias)
