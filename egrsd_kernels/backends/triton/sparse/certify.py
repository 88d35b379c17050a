"""The last word on which rows are sparse: the bound hangs on this kernel alone. docs/sparse.md has the proof."""

from __future__ import annotations

import triton
import triton.language as tl

from .planes import DENSE, DROPPED, FACTOR, GRADIENT, MASS, N_ENTRIES, SLOT, SLOTS, TOKEN, WEIGHT, at

SLACK = tl.constexpr(2.0**-7)  # covers the rounding of sums
ROW_SHARE = 1.0  # of the budget, for what sparse rows drop
LEAST = tl.constexpr(2.0**-126)  # that a mass counts as that is not 0


@triton.jit
def load_rows(floats, ints, rows, r, n, limit):
    """(active, exact, lost) of rows r: whether a > 0, whether it is dense or a δ above the limit, and a δ."""
    a = tl.load(at(floats, WEIGHT, rows, r), mask=r < n, other=0.0)
    exact = tl.load(at(ints, DENSE, rows, r), mask=r < n, other=0) > 0
    lost = tl.load(at(floats, DROPPED, rows, r), mask=(r < n) & (a > 0) & (exact == 0), other=0.0)
    lost = tl.where(lost > 0, tl.maximum(a * lost, LEAST), 0.0)
    return a > 0, exact | (lost > limit), lost


@triton.jit
def certify_kernel(
    live, floats, ints, budget, token_dropped, token_mass, token_dense, flush, stored, rows, room, temperature, share
):
    """Grid (1,): which of the n rows are sparse. Those that drop least, so that Σ a δ <= share · budget; and none, should
    Σ a δ (1 + 2 SLACK) <= tolerance Σ a M not hold for them, whose right side is the budget times 1 + 4 SLACK.

    FACTOR, N_ENTRIES: 0 for the others. SLOT: a dense row's place in the reserve, which has ``room``, else -1. stored:
    (1,) int32, how many rows are there. flush: (2,) int32, twice how many it is to be emptied of before: all, if there is
    no room for the chunk's. token_dropped, token_mass: (N,) float32, token_dense: (N,) int32: δ (1 + SLACK), M, and
    whether it is dense, of each token.
    """
    n = tl.load(live + 1)
    budget = tl.load(budget)
    # The largest limit up to the budget, in eighths of a factor of 2, down to 2^-32 of it: bit by bit of the float.
    bits = tl.maximum(budget.to(tl.int32, bitcast=True) - 255 * (1 << 20), 0)
    for k in tl.static_range(8):
        higher = bits + (1 << (27 - k))
        spent = tl.zeros([SLOTS], tl.float32)
        for start in range(0, n, SLOTS):
            r = start + tl.arange(0, SLOTS)
            _, exact, lost = load_rows(floats, ints, rows, r, n, higher.to(tl.float32, bitcast=True))
            spent += tl.where(exact, 0.0, lost)
        bits = tl.where(tl.sum(spent, 0) <= share * budget, higher, bits)
    limit = bits.to(tl.float32, bitcast=True)
    spent = tl.zeros([SLOTS], tl.float32)
    n_exact = 0
    n_either = 0
    for start in range(0, n, SLOTS):
        active, exact, lost = load_rows(floats, ints, rows, start + tl.arange(0, SLOTS), n, limit)
        spent += tl.where(exact, 0.0, lost)
        n_exact += tl.sum(exact.to(tl.int32), 0)
        n_either += tl.sum((exact | active).to(tl.int32), 0)
    holds = tl.sum(spent, 0) * (1.0 + 2.0 * SLACK) <= budget * (1.0 + 4.0 * SLACK)
    held = tl.load(stored)
    full = held + tl.where(holds, n_exact, n_either) > room
    end = tl.where(full, 0, held)
    for start in range(0, rows, SLOTS):
        r = start + tl.arange(0, SLOTS)
        active, exact, _ = load_rows(floats, ints, rows, r, n, limit)
        one = (exact | (active & (holds == 0))).to(tl.int32)
        sparse = active & (one == 0)
        t = tl.load(at(ints, TOKEN, rows, r), mask=r < n, other=0)
        g = tl.load(at(floats, GRADIENT, rows, r), mask=sparse, other=0.0)
        entries = tl.load(at(ints, N_ENTRIES, rows, r), mask=sparse, other=0)
        lost = tl.load(at(floats, DROPPED, rows, r), mask=sparse, other=0.0)
        tl.store(at(floats, FACTOR, rows, r), g / temperature, mask=r < rows)
        tl.store(at(ints, N_ENTRIES, rows, r), entries, mask=r < rows)
        tl.store(at(ints, SLOT, rows, r), tl.where(one > 0, end + tl.cumsum(one, 0) - one, -1), mask=r < rows)
        tl.store(token_dropped + t, lost * (1.0 + SLACK), mask=r < n)
        tl.store(token_mass + t, tl.load(at(floats, MASS, rows, r), mask=r < n, other=0.0), mask=r < n)
        tl.store(token_dense + t, one, mask=r < n)
        end += tl.sum(one, 0)
    for which in tl.static_range(2):
        tl.store(flush + which, tl.where(full, held, 0))
    tl.store(stored, end)
