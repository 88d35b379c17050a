"""Token credit: the lookahead over entropies, then each token's gate, magnitude, advantage and loss term."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from egrsd_kernels.credit import CreditOptions, Lookahead, TokenStats
from egrsd_kernels.rows import Rows

from .common import rows_in_chunk

BLOCK = 256


@triton.jit
def ahead(entropy, distance, log2_decay, FILTER: tl.constexpr):
    """What H_j counts for a token ``distance`` positions before it: the twin of the filters in egrsd_kernels.credit."""
    if FILTER == "discounted":
        # In two factors: one alone leaves float32's range while the product with a tiny entropy does not.
        half = tl.exp2(tl.minimum(distance.to(tl.float32) * (-0.5 * log2_decay), 127.0))
        entropy = tl.where(entropy > 0, entropy * half * half, entropy)
    return entropy


@triton.jit
def lookahead_kernel(entropy, valid, seq_end, out, n, window, log2_decay, FILTER: tl.constexpr, BLOCK: tl.constexpr):
    """out (N,) = H^CL of BLOCK tokens a program: min over valid j in [t, min(t + window, seq_end_t)] of
    ahead(H_j, j - t); 0 where t is not valid. Grid: (n / BLOCK,)."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = tl.load(valid + t, mask=t < n, other=0) != 0
    end = tl.minimum(tl.load(seq_end + t, mask=t < n, other=0), t + window)
    lowest = tl.load(entropy + t, mask=here, other=float("inf"))
    reach = tl.max(tl.where(here, end - t, 0), 0)
    for step in range(1, reach + 1):
        j = t + step
        seen = here & (j <= end)
        seen = seen & (tl.load(valid + j, mask=seen, other=0) != 0)
        following = tl.load(entropy + j, mask=seen, other=float("inf"))
        following = ahead(following, j - t, log2_decay, FILTER)
        lowest = tl.minimum(lowest, following, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + t, tl.where(here, lowest, 0.0), mask=t < n)


def lookahead_entropy(entropy: Tensor, valid: Tensor, seq_end: Tensor, lookahead: Lookahead) -> Tensor:
    """See :func:`egrsd_kernels.credit.lookahead_entropy`; entropies are float32, ``seq_end`` is int32."""
    n = entropy.numel()
    out = torch.empty_like(entropy)
    # A window longer than the batch sees no more than one as long as it; the bound keeps t + W inside int32.
    window = min(lookahead.window, n)
    lookahead_kernel[(triton.cdiv(n, BLOCK),)](
        entropy, valid, seq_end, out, n, window, math.log2(lookahead.decay), FILTER=lookahead.filter, BLOCK=BLOCK
    )
    return out


@triton.jit
def credit_kernel(
    advantages, teacher_logp, student_logp, lookahead_entropy, scale, order, row_counts,
    magnitude, gate, token_advantage, loss, first_row, n_slots, gamma, gate_floor, clip_eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """w, omega, A w omega and -A w omega log p_S, as in egrsd_kernels.credit, of the valid rows among n_slots.

    Grid: (n_slots / BLOCK,). order: (N,) and row_counts: (2,) int32. scale: 0-d. The rest is (N,) float32, in the order
    of the caller.
    """
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ours = slot < rows_in_chunk(row_counts, 0, first_row, n_slots)
    t = tl.load(order + first_row + slot, mask=ours, other=0)
    a = tl.load(advantages + t, mask=ours, other=0.0)
    logp = tl.load(student_logp + t, mask=ours, other=0.0)
    log_ratio = tl.load(teacher_logp + t, mask=ours, other=0.0) - logp
    direction = (a > 0).to(tl.float32) - (a < 0).to(tl.float32)
    # sign(0) * inf would be NaN; direction 0 means a ratio of 1.
    ratio = tl.where(direction == 0, 1.0, tl.exp(direction * log_ratio))
    w = tl.clamp(ratio, 1.0 - clip_eps, 1.0 + clip_eps, propagate_nan=tl.PropagateNan.ALL)
    normalised = tl.load(lookahead_entropy + t, mask=ours, other=0.0) / tl.load(scale)
    omega = tl.clamp(1.0 - gamma * normalised, gate_floor, 1.0, propagate_nan=tl.PropagateNan.ALL)
    credit = tl.where(a == 0, 0.0, a * w * omega)
    tl.store(magnitude + t, w, mask=ours)
    tl.store(gate + t, omega, mask=ours)
    tl.store(token_advantage + t, credit, mask=ours)
    # Without an advantage log p = -inf costs nothing, but the NaN of a target outside the vocabulary must be seen.
    tl.store(loss + t, tl.where((credit == 0) & (logp == logp), 0.0, -credit * logp), mask=ours)


def token_credit(
    rows: Rows, first_row: int, n_rows: int, advantages: Tensor, scale: Tensor, options: CreditOptions,
    stats: TokenStats, loss: Tensor,
) -> None:  # fmt: skip
    """See :func:`egrsd_kernels.credit.token_credit`; all tensors are float32."""
    credit_kernel[(triton.cdiv(n_rows, BLOCK),)](
        advantages, stats.teacher_logp, stats.student_logp, stats.lookahead_entropy, scale, rows.order, rows.counts,
        stats.magnitude, stats.gate, stats.token_advantage, loss, first_row, n_rows,
        float(options.gamma), float(options.gate_floor), float(options.clip_eps), BLOCK=BLOCK,
    )  # fmt: skip
