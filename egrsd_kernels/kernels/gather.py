"""Rows of a chunk, gathered out of the full hidden states, and the logit of each row's target token."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LOG2E, NEG, chunk_rows, logits_of


@triton.jit
def gather_kernel(
    hidden, stride_hb, stride_ht, stride_hd, length, weight, stride_wv, stride_wd, bias, target_ids, order, counts,
    out_hidden, out_logit, first_row, chunk, D, V, softcap, scale,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    if slot < chunk_rows(counts, 0, first_row, chunk):
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
        z, _ = logits_of(product, softcap, scale, SOFTCAP)
        z = tl.where(z == float("-inf"), NEG, z)
        tl.store(out_logit + slot, tl.where(inside, z, float("nan")))


def gather_rows(head, hidden, target_ids, rows, first_row, out_hidden, out_logit) -> None:
    """From hidden states (B, T, D), fill ``out_hidden`` (C, D) and ``out_logit`` (C,) for the chunk's rows.

    Logits are float32, in units of ln 2; the dot product is accumulated in float32 from the operands as they are.
    A target outside the vocabulary gives NaN and is never used as an address. Rows past ``rows.counts[0]`` are left
    alone.
    """
    chunk, size = out_hidden.shape
    gather_kernel[(chunk,)](
        hidden, *hidden.stride(), hidden.shape[1], head.weight, head.weight.stride(0), head.weight.stride(1),
        head.bias, target_ids, rows.order, rows.counts,
        out_hidden, out_logit, first_row, chunk, size, head.weight.shape[0],
        head.softcap or 0.0, LOG2E.value / head.temperature,
        BIAS=head.bias is not None, SOFTCAP=head.softcap is not None, BLOCK=min(1024, triton.next_power_of_2(size)),
        num_warps=4,
    )  # fmt: skip
