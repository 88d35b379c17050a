"""The last word on which rows are sparse: the bound hangs on this kernel alone. docs/sparse.md has the proof."""

import triton
import triton.language as tl

from ..launch import kernel
from .planes import DENSE, DROPPED, FACTOR, GRADIENT, MASS, N_ENTRIES, SLACK, SLOT, SLOTS, TINY, TOKEN, WEIGHT, at

ROW_SHARE = 1.0  # of the budget, for what sparse rows drop


@triton.jit
def load_rows(floats, ints, rows, r, n, limit):
    """(active, exact, lost) of rows r: whether a > 0, whether it is dense or a δ above the limit, and a δ."""
    a = tl.load(at(floats, WEIGHT, rows, r), mask=r < n, other=0.0)
    exact = tl.load(at(ints, DENSE, rows, r), mask=r < n, other=0) > 0
    lost = tl.load(at(floats, DROPPED, rows, r), mask=(a > 0) & (exact == 0), other=0.0)
    lost = tl.where(lost > 0, tl.maximum(a * lost, TINY), 0.0)
    return a > 0, exact | (lost > limit), lost


@triton.jit
def spent_of(floats, ints, rows, n, limit):
    """(Σ a δ of the other rows, how many are exact, how many are that or active)."""
    spent = tl.zeros([SLOTS], tl.float32)
    n_exact = 0
    n_either = 0
    for start in range(0, n, SLOTS):
        active, exact, lost = load_rows(floats, ints, rows, start + tl.arange(0, SLOTS), n, limit)
        spent += tl.where(exact, 0.0, lost)
        n_exact += tl.sum(exact.to(tl.int32), 0)
        n_either += tl.sum((exact | active).to(tl.int32), 0)
    return tl.sum(spent, 0), n_exact, n_either


@kernel(do_not_specialize=["token_dropped", "token_mass", "token_dense"])
def certify_kernel(
    row_counts,
    floats,
    ints,
    budget,
    token_dropped,
    token_mass,
    token_dense,
    flush,
    stored,
    rows,
    room,
    temperature,
    share,
):
    """Grid (1,): which of the n rows are sparse. Those that drop least, with Σ a δ <= share · budget; but none, unless
    Σ a δ (1 + 2 SLACK) <= tolerance Σ a M holds for them, whose right side is the budget times 1 + 4 SLACK.

    FACTOR, N_ENTRIES: 0 for the others. SLOT: a dense row's place in the reserve, which has ``room``, else -1. stored
    (1,) int32: how many rows are there. flush (2,) int32: twice how many are to leave it first, all or none. By token
    (N,): token_dropped δ (1 + SLACK), token_mass M, both float32; token_dense int32, whether it is dense.
    """
    n = tl.load(row_counts + 1)
    budget = tl.load(budget)
    # The largest limit up to the budget, in eighths of a factor of 2, down to 2^-32 of it: bit by bit of the float.
    bits = tl.maximum(budget.to(tl.int32, bitcast=True) - 255 * (1 << 20), 0)
    for k in tl.static_range(8):
        higher = bits + (1 << (27 - k))
        spent, _, _ = spent_of(floats, ints, rows, n, higher.to(tl.float32, bitcast=True))
        bits = tl.where(spent <= share * budget, higher, bits)
    limit = bits.to(tl.float32, bitcast=True)
    spent, n_exact, n_either = spent_of(floats, ints, rows, n, limit)
    holds = spent * (1.0 + 2.0 * SLACK) <= budget * (1.0 + 4.0 * SLACK)
    held = tl.load(stored)
    full = held + tl.where(holds, n_exact, n_either) > room
    end = tl.where(full, 0, held)
    for start in range(0, rows, SLOTS):
        r = start + tl.arange(0, SLOTS)
        active, exact, _lost = load_rows(floats, ints, rows, r, n, limit)
        one = (exact | (active & (holds == 0))).to(tl.int32)
        sparse = active & (one == 0)
        t = tl.load(at(ints, TOKEN, rows, r), mask=r < n, other=0)
        dropped = tl.load(at(floats, DROPPED, rows, r), mask=sparse, other=0.0)
        g = tl.load(at(floats, GRADIENT, rows, r), mask=sparse, other=0.0)
        tl.store(at(floats, FACTOR, rows, r), g / temperature, mask=r < rows)
        kept = tl.load(at(ints, N_ENTRIES, rows, r), mask=sparse, other=0)
        tl.store(at(ints, N_ENTRIES, rows, r), kept, mask=r < rows)
        tl.store(at(ints, SLOT, rows, r), tl.where(one > 0, end + tl.cumsum(one, 0) - one, -1), mask=r < rows)
        tl.store(token_dropped + t, dropped * (1.0 + SLACK), mask=r < n)
        tl.store(token_mass + t, tl.load(at(floats, MASS, rows, r), mask=r < n, other=0.0), mask=r < n)
        tl.store(token_dense + t, one, mask=r < n)
        end += tl.sum(one, 0)
    tl.store(flush + tl.arange(0, 2), tl.where(full, held, 0))
    tl.store(stored, end)
