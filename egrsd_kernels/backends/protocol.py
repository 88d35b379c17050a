"""What a backend is: a module with the functions of :class:`Backend`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from egrsd_kernels.credit import CreditOptions, Lookahead, TokenStats
from egrsd_kernels.head import Head
from egrsd_kernels.rows import Rows

from .sparsity import Sparse

DEFAULT_CHUNK_BYTES = 1 << 30  # the most logits-sized memory that a call holds at a time


class Needs(NamedTuple):
    """Which gradients will be asked for."""

    hidden: bool
    weight: bool
    bias: bool

    @classmethod
    def of(cls, *operands: Tensor | None) -> Needs:
        return cls(*(torch.is_grad_enabled() and x is not None and x.requires_grad for x in operands))

    @property
    def head(self) -> bool:
        return self.weight or self.bias


class Gradients(NamedTuple):
    """In the operands' dtypes; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


Finish = Callable[[Tensor | None], Gradients]
"""What a student pass leaves: the gradients times a 0-d factor in the compute dtype, or times 1 for None. Once."""

Credit = Callable[[int, int], Tensor]
"""dL/dlogp (N,) in the compute dtype, of (first row of the order, number of rows) whose log p has been written, and of
the rows before them."""


class Backend(Protocol):
    """All (N,) tensors are contiguous and in the callers' order; ``hidden`` is (B, T, D) with N = B T, of any strides.

    Numbers are float32, float64 for float64 operands. Nothing here waits for the device.
    """

    def takes(self, hidden: Tensor) -> bool:
        """Whether it works on operands of this dtype and device."""

    def statistics(
        self, head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows, chunk_bytes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logp, entropy, logsumexp), each (N,), in nats, 0 at masked rows."""

    def lookahead_entropy(self, entropy: Tensor, valid: Tensor, seq_end: Tensor, lookahead: Lookahead) -> Tensor:
        """See :func:`egrsd_kernels.credit.lookahead_entropy`."""

    def token_credit(
        self, rows: Rows, first_row: int, n_rows: int, advantages: Tensor, scale: Tensor, options: CreditOptions,
        stats: TokenStats, loss: Tensor,
    ) -> None:  # fmt: skip
        """See :func:`egrsd_kernels.credit.token_credit`."""

    def student_pass(
        self, head: Head, temperature: float, hidden: Tensor, target_ids: Tensor, rows: Rows, logp: Tensor,
        credit: Credit, needs: Needs, chunk_bytes: int, sparse: Sparse | None = None,
    ) -> Finish:  # fmt: skip
        """Write log p of the targets into ``logp`` (N,), 0 at masked rows, and leave the gradients all but done.

        credit: called chunk by chunk, in the order of ``rows``, once the chunk's ``logp`` is there.
        sparse: what may be left out of the gradients; takes what was. None: exact gradients. A backend whose gradients
            are always exact leaves it alone.
        """
