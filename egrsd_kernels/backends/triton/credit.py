"""Token credit: the lookahead over entropies, then each token's gate, magnitude, advantage and loss term."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from egrsd_kernels.credit import CreditOptions, Lookahead, TokenStats
from egrsd_kernels.rows import Rows

from ..scaling import Scales
from .common import ceil_div, rows_in_chunk
from .launch import kernel

BLOCK = 256


@triton.jit
def entropy_ahead(entropy, valid, t, end, here, step):
    """H of the token ``step`` positions after t; +inf where nothing is seen."""
    j = t + step
    seen = here & (j <= end)
    seen = seen & (tl.load(valid + j, mask=seen, other=0) != 0)
    return tl.load(entropy + j, mask=seen, other=float("inf"))


# The filters, each the twin of that name in egrsd_kernels.credit: over the tokens from t to t + reach that end allows.


@triton.jit
def minimum(entropy, valid, t, end, here, reach):
    lowest = entropy_ahead(entropy, valid, t, end, here, 0)
    for step in range(1, reach + 1):
        following = entropy_ahead(entropy, valid, t, end, here, step)
        lowest = tl.minimum(lowest, following, propagate_nan=tl.PropagateNan.ALL)
    return lowest


@triton.jit
def discounted(entropy, valid, t, end, here, reach, log2_decay):
    lowest = entropy_ahead(entropy, valid, t, end, here, 0)
    for step in range(1, reach + 1):
        following = entropy_ahead(entropy, valid, t, end, here, step)
        # In two factors: one alone leaves float32's range while the product with a tiny entropy does not.
        half = tl.exp2(tl.minimum(step * (-0.5 * log2_decay), 127.0))
        following = tl.where(following > 0, following * half * half, following)
        lowest = tl.minimum(lowest, following, propagate_nan=tl.PropagateNan.ALL)
    return lowest


@triton.jit
def softmin(entropy, valid, t, end, here, reach, temperature):
    lowest = minimum(entropy, valid, t, end, here, reach)
    # A logarithm near 1 is off by its dtype's last place, times the temperature: hence float64.
    total = tl.zeros_like(lowest).to(tl.float64)
    seen = tl.zeros_like(total)
    for step in range(0, reach + 1):
        following = entropy_ahead(entropy, valid, t, end, here, step)
        excess = (following - lowest).to(tl.float64)
        # 1 also where a temperature of 0 makes 0 / 0.
        weight = tl.where(excess > 0, tl.exp(-excess / temperature), 1.0)
        total += tl.where(following != float("inf"), weight, 0.0)
        seen += tl.where(following != float("inf"), 1.0, 0.0)
    return (lowest.to(tl.float64) - temperature * tl.log(total / seen)).to(tl.float32)


@triton.jit
def in_order(x):
    """The bits of float32 numbers to int32 that compare as those do, and back again: it is its own inverse."""
    return x ^ ((x >> 31) & 0x7FFFFFFF)


@triton.jit
def count_before(entropy, valid, t, end, here, reach, candidate):
    """How many of the window come before ``candidate``, in the order of :func:`in_order`."""
    before = tl.zeros_like(t)
    for step in range(0, reach + 1):
        following = entropy_ahead(entropy, valid, t, end, here, step)
        before += (in_order(following.to(tl.int32, bitcast=True)) < candidate).to(tl.int32)
    return before


@triton.jit
def quantile(entropy, valid, t, end, here, reach, q):
    lowest = minimum(entropy, valid, t, end, here, reach)
    infinity = in_order(tl.full(t.shape, float("inf"), tl.float32).to(tl.int32, bitcast=True))
    seen = count_before(entropy, valid, t, end, here, reach, infinity)
    rank = q * tl.maximum(seen - 1, 0).to(tl.float32)
    below = rank.to(tl.int32)
    # The entropy that ``below`` others precede, found bit by bit as the largest number with at most so many before it:
    # 32 readings of the window, however long that is.
    low = tl.zeros_like(t)
    low = tl.where(count_before(entropy, valid, t, end, here, reach, low) <= below, 0, -(2**31))
    bit = 1 << 30
    for _ in range(0, 31):
        candidate = low + bit
        bit = bit >> 1
        low = tl.where(count_before(entropy, valid, t, end, here, reach, candidate) <= below, candidate, low)
    # The next one in order, which is the same where it is there twice.
    through = count_before(entropy, valid, t, end, here, reach, low + 1)
    high = tl.full(t.shape, float("inf"), tl.float32)
    for step in range(0, reach + 1):
        following = entropy_ahead(entropy, valid, t, end, here, step)
        later = in_order(following.to(tl.int32, bitcast=True)) > low
        high = tl.minimum(high, tl.where(later, following, float("inf")))
    low_entropy = in_order(low).to(tl.float32, bitcast=True)
    high = tl.where((through > below + 1) | (through >= seen), low_entropy, high)
    value = low_entropy + (high - low_entropy) * (rank - below.to(tl.float32))
    return tl.where(lowest != lowest, lowest, value)


@kernel(do_not_specialize=["entropy", "valid", "n", "window"])
def lookahead_kernel(
    entropy, valid, seq_end, out, n, window, log2_decay, temperature, q, FILTER: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out (N,) = H^CL of BLOCK tokens a program: min(H_t, the filter over valid j in [t, min(t + window, seq_end_t)]);
    0 where t is not valid. Grid: (n / BLOCK,)."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = tl.load(valid + t, mask=t < n, other=0) != 0
    end = tl.minimum(tl.load(seq_end + t, mask=t < n, other=0), t + window)
    reach = tl.max(tl.where(here, end - t, 0), 0)
    if FILTER == "discounted":
        filtered = discounted(entropy, valid, t, end, here, reach, log2_decay)
    elif FILTER == "softmin":
        filtered = softmin(entropy, valid, t, end, here, reach, temperature)
    elif FILTER == "quantile":
        filtered = quantile(entropy, valid, t, end, here, reach, q)
    else:
        tl.static_assert(FILTER == "minimum")
        filtered = minimum(entropy, valid, t, end, here, reach)
    own = tl.load(entropy + t, mask=here, other=0.0)
    tl.store(out + t, tl.where(here, tl.minimum(own, filtered, propagate_nan=tl.PropagateNan.ALL), 0.0), mask=t < n)


def lookahead_entropy(entropy: Tensor, valid: Tensor, seq_end: Tensor, lookahead: Lookahead) -> Tensor:
    """See :func:`egrsd_kernels.credit.lookahead_entropy`; entropies are float32, ``seq_end`` is int32."""
    n = entropy.numel()
    out = torch.empty_like(entropy)
    # A window longer than the batch sees no more than one as long as it; the bound keeps t + W inside int32.
    window = min(lookahead.window, n)
    lookahead_kernel[(ceil_div(n, BLOCK),)](
        entropy, valid, seq_end, out, n, window, math.log2(lookahead.decay), lookahead.temperature, lookahead.quantile,
        FILTER=lookahead.filter, BLOCK=BLOCK,
    )  # fmt: skip
    return out


@triton.jit
def power_of_two(x):
    """The power of two in a float32 number, as egrsd_kernels.backends.scaling has it."""
    x = tl.where(x > 0, x, 1.0)
    tiny = x < 2.0**-126  # has its digits where others have the exponent
    bits = tl.where(tiny, x * 2.0**32, x).to(tl.int32, bitcast=True)
    power = (((bits >> 23) + 1) << 23).to(tl.float32, bitcast=True)
    return tl.where(tiny, power * 2.0**-32, power)


@kernel(do_not_specialize=["peak", "normalizer"])
def scales_kernel(peak, row_counts, normalizer, out, least, LOW: tl.constexpr):
    """out (4,) float32 = the fields of egrsd_kernels.backends.scaling.Scales. Grid: (1,). peak, normalizer: 0-d."""
    tl.store(out, tl.maximum(tl.load(peak), least, propagate_nan=tl.PropagateNan.ALL))
    n_valid = tl.load(row_counts)
    divisor = n_valid.to(tl.float32) if normalizer is None else tl.load(normalizer)
    divisor = tl.where(n_valid == 0, 1.0, divisor)
    power = power_of_two(divisor) if LOW else 1.0
    tl.store(out + 1, divisor)
    tl.store(out + 2, power)
    tl.store(out + 3, -tl.math.div_rn(power, divisor))


def scales(peak: Tensor, least: float, rows: Rows, normalizer: Tensor | None, low: bool) -> Scales:
    """See :func:`egrsd_kernels.backends.scaling.scales`; all tensors are float32."""
    out = torch.empty(4, dtype=torch.float32, device=peak.device)
    scales_kernel[(1,)](peak, rows.counts, normalizer, out, float(least), LOW=low)
    entropy, divisor, power, share = out.unbind()
    return Scales(entropy, divisor, power if low else None, share)


@kernel(do_not_specialize=[
    "advantages", "teacher_logp", "student_logp", "lookahead_entropy", "scale", "share", "order", "magnitude", "gate",
    "token_advantage", "loss", "gradient", "first_row", "n_slots",
])  # fmt: skip
def credit_kernel(
    advantages, teacher_logp, student_logp, lookahead_entropy, scale, share, order, row_counts, magnitude, gate,
    token_advantage, loss, gradient, first_row, n_slots, gamma, gate_floor, clip_eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """w, omega, A w omega, -A w omega log p_S and share A w omega, as in egrsd_kernels.credit, of the valid rows among
    n_slots.

    Grid: (n_slots / BLOCK,). order: (N,) and row_counts: (2,) int32. scale, share: 0-d. The rest is (N,) float32, in
    the order of the caller.
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
    tl.store(gradient + t, credit * tl.load(share), mask=ours)
    tl.store(loss + t, tl.where((credit == 0) & (logp == logp), 0.0, -credit * logp), mask=ours)


def token_credit(
    rows: Rows, first_row: int, n_rows: int, advantages: Tensor, scale: Tensor, share: Tensor, options: CreditOptions,
    stats: TokenStats, loss: Tensor, gradient: Tensor,
) -> None:  # fmt: skip
    """See :func:`egrsd_kernels.credit.token_credit`; all tensors are float32."""
    credit_kernel[(ceil_div(n_rows, BLOCK),)](
        advantages, stats.teacher_logp, stats.student_logp, stats.lookahead_entropy, scale, share,
        rows.order, rows.counts, stats.magnitude, stats.gate, stats.token_advantage, loss, gradient, first_row, n_rows,
        float(options.gamma), float(options.gate_floor), float(options.clip_eps), BLOCK=BLOCK,
    )  # fmt: skip
