"""A forward pass that keeps what it stores, for gradients that only the backward pass knows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from egrsd_kernels.head import Head
from egrsd_kernels.rows import Rows

from ..protocol import EntropyGradient, Finish, Needs, VocabularyStatistics
from .common import Machine
from .gather import Chunk
from .gradient import ChunkGradients, HeadProduct, Outputs, finishing
from .plan import Plan
from .vocab import StoringPass, Wanted


class KeptPass:
    """``rows``, with room for n, in chunks of ``plan.rows`` whose exponentials lie one after another in one matrix: the
    head's gradient is one product then. For entropies with a gradient logits are kept instead.

    Attributes:
        matrix: (n, whole tiles of the vocabulary), in the operands' dtype, exponentials in the end.
        hidden: a trained head's gathered hidden states (n, D); a frozen one's chunks share memory for theirs.
    """

    def __init__(
        self, head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows, n: int, how: Machine,
        plan: Plan, needs: Needs, entropy_gradient: bool, out: VocabularyStatistics,
    ):  # fmt: skip
        """Write ``out`` of the rows, entropies among it."""
        self.rows, self.plan, self.needs = rows, plan, needs
        self.matrix = hidden.new_empty(n, plan.slice_tiles * how.configs.vocab.cols)
        self.hidden = hidden.new_empty(n if needs.head else plan.rows, hidden.shape[-1])
        self.chunks: list[ChunkGradients] = []
        what, wanted = "logits" if entropy_gradient else "exponentials", Wanted.of(out)
        for first_row in range(0, n, plan.rows):
            part = slice(first_row, min(first_row + plan.rows, n))
            size = part.stop - part.start
            chunk = Chunk(head, temperature, size, how, self.hidden[part if needs.head else slice(size)])
            memory = self.matrix[part].view(torch.uint8).view(-1)
            stored = StoringPass(chunk, plan.slice_tiles, what, wanted, memory)
            gradients = ChunkGradients(chunk, Plan(size, plan.slice_tiles, 0), None, needs.head, stored=stored)
            chunk.gather(hidden, target_ids, rows, first_row)
            gradients.forward(rows.order[first_row:], out)
            gradients.let_go()
            self.chunks.append(gradients)

    def gradients(
        self, head: Head, gradient: Tensor, of_entropy: EntropyGradient | None, out: Outputs
    ) -> HeadProduct | None:
        """Hidden states' and bias's gradients go to ``out``; what makes the weight's comes back, where it is needed."""
        first, plan = self.chunks[0], self.plan
        c = first.configs.hidden
        parts = None if out.hidden is None else first.chunk.floats(plan.partial_tiles * c.rows * c.cols)
        for i, gradients in enumerate(self.chunks):
            order = self.rows.order[i * plan.rows :]
            gradients.chunk.head = head
            gradients.aim(out.hidden, plan.partial_tiles, parts)
            if of_entropy is not None:
                gradients.turn(order, gradient, of_entropy)
            if out.hidden is not None:
                gradients.hidden_product(gradients.chunk.row_counts, 0)
            gradients.backward(order, gradient)
            if self.needs.head and of_entropy is None:
                gradients.clear()
            gradients.head(None, out.bias, accumulate=i > 0)
        if not self.needs.weight:
            return None
        return HeadProduct(first.chunk, self.matrix, self.hidden, self.rows.counts, self.needs.first_column)

    def finish(
        self, head: Head, hidden: Tensor, gradient: Tensor, of_entropy: EntropyGradient | None,
        rest: Callable[[Outputs], Finish] | None,
    ) -> Finish:  # fmt: skip
        """The gradients of the rows; ``rest`` adds those of others, where there are any."""
        sums = Outputs.of(head, hidden, self.needs, whole=rest is None)
        product = self.gradients(head, gradient, of_entropy, sums)
        if rest is None:
            return finishing(head, sums, None if product is None else product.rounded)
        if product is not None and sums.weight is not None:
            product(sums.weight)
        del product
        # The others' take the memory.
        self.chunks.clear()
        del self.matrix, self.hidden
        return rest(sums)
