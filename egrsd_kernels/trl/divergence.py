"""What a divergence needs of the teacher when the loss is made: its hidden states and the head that reads them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from egrsd_kernels import Head
from egrsd_kernels.checks import autocast

from .packed_rows import Part
from .teacher import AdaptersOff, SeparateModel, Teacher


class TeacherStates:
    """Keeps what enters the teacher's head while something else reads it there, part of a batch after part."""

    def __init__(self, teacher: Teacher, device: torch.device):
        self.device = device
        # The weights of any other teacher are the student's again when the loss reads them.
        self._lasting = isinstance(teacher, (AdaptersOff, SeparateModel))
        self._parts: list[Tensor] = []
        self._head: Head | None = None

    def keeping(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` of (hidden, head), which are kept."""

        def keep(hidden: Tensor, head: Head) -> Any:
            self._parts.append(autocast(hidden)[0].detach().to(self.device))
            if self._head is None:
                self._head = self._kept(head)
            return function(hidden, head)

        return keep

    def place(self, parts: Sequence[Part], rows: int, columns: int) -> None:
        """Of packs: what was kept of each, (M, D), to its places in the batch, and 0 elsewhere."""
        hidden = self._parts[0].new_zeros(rows, columns, self._parts[0].shape[-1])
        for part, states in zip(parts, self._parts, strict=True):
            part.put(hidden, states)
        self._parts = [hidden]

    def take(self) -> tuple[Tensor, Head]:
        """The hidden states (B, T, D) of all parts, in the dtype that the head reads them in; and the head."""
        hidden, head = torch.cat(self._parts), self._head
        assert head is not None
        self._parts, self._head = [], None
        return hidden, head

    def _kept(self, head: Head) -> Head:
        def kept(x: Tensor) -> Tensor:
            there = x.detach().to(self.device)
            return there if self._lasting or there.device != x.device else there.clone()

        low_rank = None
        if head.low_rank is not None:
            a, b, scale = head.low_rank
            low_rank = kept(a), kept(b), scale
        return head.frame(kept(head.weight), None if head.bias is None else kept(head.bias), low_rank=low_rank)
