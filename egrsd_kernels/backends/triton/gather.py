"""A chunk: rows gathered out of the full hidden states, with the logit of each row's target token."""

from __future__ import annotations

import torch
import triton.language as tl

from egrsd_kernels.head import Head

from .common import LOG2E, NEG, Machine, block_of, logits_of, rows_in_chunk, tiled
from .launch import kernel


@kernel(do_not_specialize=["length", "target_ids", "order", "row_counts", "first_row"])
def gather_kernel(
    hidden, stride_hb, stride_ht, stride_hd, length, weight, stride_wv, stride_wd, bias, target_ids, order, row_counts,
    out_hidden, out_logit, out_softcap_grad, out_offset, out_target, chunk_counts, retry,
    first_row, n_slots, D, V, softcap, scale, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """logit = h W_y of a row, and its hidden states, out of (B, length, D) into slot ``program`` of the chunk.

    Grid: (n_slots,). out_hidden: (n_slots, D). out_logit, out_softcap_grad, out_offset: (n_slots,) float32; the offset
    begins as the logit. out_target: (n_slots,) int32, -1 outside the vocabulary. chunk_counts, retry: (2,) int32.
    """
    slot = tl.program_id(0)
    n_valid = rows_in_chunk(row_counts, 0, first_row, n_slots)
    if slot == 0:
        tl.store(chunk_counts, n_valid)
        tl.store(chunk_counts + 1, rows_in_chunk(row_counts, 1, first_row, n_slots))
        tl.store(retry, 0)
        tl.store(retry + 1, 0)
    if slot < n_valid:
        row = tl.load(order + first_row + slot).to(tl.int64)
        target = tl.load(target_ids + row).to(tl.int64)
        inside = (target >= 0) & (target < V)
        head = weight + tl.where(inside, target, 0) * stride_wv
        states = hidden + (row // length) * stride_hb + (row % length) * stride_ht
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)
            h = tl.load(states + d.to(tl.int64) * stride_hd, mask=d < D, other=0.0)
            w = tl.load(head + d.to(tl.int64) * stride_wd, mask=d < D, other=0.0)
            tl.store(out_hidden + slot.to(tl.int64) * D + d, h, mask=d < D)
            total += h.to(tl.float32) * w.to(tl.float32)
        product = tl.sum(total, 0)
        if BIAS:
            product += tl.load(bias + tl.where(inside, target, 0)).to(tl.float32)
        z, softcap_grad = logits_of(product, softcap, scale, SOFTCAP)
        z = tl.where(z == float("-inf"), NEG, z)
        z = tl.where(inside, z, float("nan"))
        tl.store(out_logit + slot, z)
        tl.store(out_softcap_grad + slot, softcap_grad)
        tl.store(out_offset + slot, z)
        tl.store(out_target + slot, tl.where(inside, target, -1).to(tl.int32))


class Chunk:
    """Up to ``rows`` rows (whole tiles) at work, in the order that a :class:`~egrsd_kernels.rows.Rows` gives.

    Attributes:
        hidden: (rows, D). logit: (rows,) float32, of the target, in units of ln 2; NaN for a target outside the
            vocabulary, whose ``target`` (rows,) int32 is -1. softcap_grad: (rows,) float32, 1 - tanh^2 of its softcap.
        offset: (rows,) float32, what exponentials are relative to: the target's logit, or what replaces it.
        row_counts: (n_valid, n_active), how many leading rows are valid and how many of those have a gradient, int32 on
            the device. retry: the same for a second attempt: 0 until the first one sets them.

    Rows past the valid ones hold anything. hidden: memory for them, or None.
    """

    def __init__(
        self, head: Head, temperature: float, rows: int, machine: Machine, hidden: torch.Tensor | None = None
    ):  # fmt: skip
        self.head, self.rows = head, rows
        self.given_temperature = temperature
        self.softcap, self.temperature = head.cap_and_temperature(temperature)
        self.programs, self.tma, self.configs = machine
        self.V, self.D = head.weight.shape
        device = head.weight.device
        if hidden is None:
            hidden = torch.empty(rows, self.D, dtype=head.weight.dtype, device=device)
        self.hidden = hidden
        self.logit, self.softcap_grad, self.offset = self.floats(3, rows).unbind()
        # 16 bytes apart: Triton compiles a kernel again for a pointer that is less aligned.
        ints = torch.empty(rows + 8, dtype=torch.int32, device=device)
        self.target, self.row_counts, self.retry = ints.split_with_sizes((rows, 4, 4))

    def another(self, rows: int) -> Chunk:
        """A chunk of other rows of the same problem."""
        return Chunk(self.head, self.given_temperature, rows, Machine(self.programs, self.tma, self.configs))

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.hidden.device)

    def tiled(self, matrix: torch.Tensor, rows: int, cols: int):
        """What the kernels read and write tiles of rows x cols through: a descriptor, or without TMA the matrix."""
        return tiled(matrix, rows, cols, self.tma)

    @property
    def logit_scale(self) -> float:
        """What a product is multiplied by to become a logit in units of ln 2."""
        return LOG2E.value / self.temperature

    def gather(self, hidden: torch.Tensor, target_ids: torch.Tensor, rows, first_row: int) -> None:
        """Fill the chunk with the rows from ``first_row`` of the order on, out of hidden states (B, T, D).

        The target's dot product is accumulated in float32 from the operands as they are. A target outside the
        vocabulary is never used as an address.
        """
        head = self.head
        gather_kernel[(self.rows,)](
            hidden, *hidden.stride(), hidden.shape[1], head.weight, head.weight.stride(0), head.weight.stride(1),
            head.bias, target_ids, rows.order, rows.counts,
            self.hidden, self.logit, self.softcap_grad, self.offset, self.target, self.row_counts, self.retry,
            first_row, self.rows, self.D, self.V, self.softcap or 0.0, self.logit_scale,
            BIAS=head.bias is not None, SOFTCAP=self.softcap is not None,
            BLOCK=block_of(self.D, 1024), num_warps=4,
        )  # fmt: skip
