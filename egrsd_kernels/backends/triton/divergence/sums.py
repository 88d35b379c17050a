"""From the sums of tiles to what is said of a row: divergences, log p and entropies, and what its gradient needs."""

from __future__ import annotations

import triton
import triton.language as tl

from egrsd_kernels.backends.protocol import DivergenceStatistics

from ..common import LN2, NEG, ceil_div
from ..vocab import ROW_BLOCK, TILE_BLOCK
from .pair import TILE, PairPass, load_stored, rows_at

# Between these sums of exponentials a row's offsets are suited: M has a place for all that is 2^-40 of a sum or more.
LEAST_SUM = 2.0**-24
SUM_LIMIT = 2.0**63
# In units of ln 2, what takes the place of an infinite KL where gradients are made: times a weight of 0 it is 0.
LARGEST = tl.constexpr(1.0e15)
# Of Σ (p_S - p_T) r in nats.
FAR = tl.constexpr(10.0)
# Of a float32: the bits of 2/3, and those of its power of two.
TWO_THIRDS = tl.constexpr(0x3F2AAAAB)
EXPONENT = tl.constexpr(-0x800000)
# Of entries: where K is nothing but rounding errors, of 4e-6 nat, its root is not 0.
ROUNDING = tl.constexpr(2.0e-3)
# What a row has in ``values``, in units of ln 2: log2(1/S_S), log2(S_S/S_T), what its gradient takes off (KL,
# or Σ p_S u, and before that Σ (p_S - p_T) r), a bound of its entries, and the student's logsumexp.
VALUES = 5
# Entries of a row that a program of an elementwise pass takes: at once; and for sums alone STEP at a time, one after
# another, so that four running sums and what an entry needs fit into the registers of 4 warps.
BLOCK, STRIPE, STEP, WARPS = 2048, 8192, 1024, 4
SLOTS = 128


@triton.jit
def entry_bound(k):
    """Of p |ln(p/q) - K| and of |p - q|, with K = KL(p, q) in nats: the smaller K, the smaller are a row's entries.

    |p - q| <= sqrt(K/2), by Pinsker's inequality, and p |ln(p/q)| <= K + |p - q|, of two entries and all others as one.
    """
    k = tl.where(k < 0, 0.0, k)
    return 2.0 * k + tl.sqrt(0.5 * k) + ROUNDING


@triton.jit(do_not_specialize=["order", *DivergenceStatistics._fields])
def combine_pairs_kernel(
    sums, student_logit, teacher_logit, student_offset, teacher_offset, order, row_counts, tiles, retry, values,
    divergence, student_logp, teacher_logp, student_entropy, teacher_entropy, n_slots, col_tiles, least, limit,
    REVERSE: tl.constexpr, FORWARD: tl.constexpr, ROW_BLOCK: tl.constexpr, TILE_BLOCK: tl.constexpr,
):  # fmt: skip
    """values (VALUES, n_slots) float32 of each slot, and what is said of it at its place in ``order``, (N,) or None.

    Grid: (n_slots / ROW_BLOCK,). sums: as pair_kernel leaves them. logits: (n_slots,) float32, NaN for a target outside
    the vocabulary, or None without targets. retry: becomes row_counts if offsets do not suit a row; or None.
    REVERSE, FORWARD: which sums there are: of one, the divergence is made here; both are what jsd_kernel needs.
    """
    n_valid = rows_at(tl.program_id(0) * ROW_BLOCK, row_counts, tiles)
    r = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    ours = r < n_valid
    if tl.program_id(0) * ROW_BLOCK < n_valid:
        plane = col_tiles * n_slots
        p = tl.zeros([ROW_BLOCK], tl.float32)
        q = tl.zeros([ROW_BLOCK], tl.float32)
        by_p = tl.zeros([ROW_BLOCK], tl.float32)
        by_q = tl.zeros([ROW_BLOCK], tl.float32)
        student_u = tl.zeros([ROW_BLOCK], tl.float32)
        teacher_u = tl.zeros([ROW_BLOCK], tl.float32)
        of_student: tl.constexpr = 2 + REVERSE + FORWARD
        of_teacher: tl.constexpr = of_student + (student_entropy is not None)
        for start in range(0, col_tiles, TILE_BLOCK):
            tile = start + tl.arange(0, TILE_BLOCK)
            inside = (tile < col_tiles)[:, None] & ours[None, :]
            at = sums + tile[:, None] * n_slots + r[None, :]
            p += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
            q += tl.sum(tl.load(at + plane, mask=inside, other=0.0), 0)
            if REVERSE:
                by_p += tl.sum(tl.load(at + 2 * plane, mask=inside, other=0.0), 0)
            if FORWARD:
                by_q += tl.sum(tl.load(at + (2 + REVERSE) * plane, mask=inside, other=0.0), 0)
            if student_entropy is not None:
                student_u += tl.sum(tl.load(at + of_student * plane, mask=inside, other=0.0), 0)
            if teacher_entropy is not None:
                teacher_u += tl.sum(tl.load(at + of_teacher * plane, mask=inside, other=0.0), 0)
        if retry is not None:
            # A NaN fails every comparison: no offset would help it.
            unsuited = (p >= limit) | (p <= least) | (q >= limit) | (q <= least)
            unsuited = tl.max((ours & unsuited).to(tl.int32), 0)
            # Every program that has such a row stores the same two numbers.
            tl.store(retry, n_valid, mask=unsuited > 0)
            tl.store(retry + 1, tl.load(row_counts + 1), mask=unsuited > 0)
        student_base = tl.load(student_offset + r, mask=ours, other=0.0)
        teacher_base = tl.load(teacher_offset + r, mask=ours, other=0.0)
        row = tl.load(order + r, mask=ours, other=0)
        # A model that forbids every word has no probabilities; exponentials relative to that would all be 1.
        p = tl.where(student_base <= NEG / 2, float("nan"), p)
        q = tl.where(teacher_base <= NEG / 2, float("nan"), q)
        if student_logit is not None:
            z = tl.load(student_logit + r, mask=ours, other=0.0)
            y = tl.load(teacher_logit + r, mask=ours, other=0.0)
            p = tl.where(z == z, p, float("nan"))
            q = tl.where(z == z, q, float("nan"))
            if student_logp is not None:
                logp = (z - student_base - tl.log2(p)) * LN2
                tl.store(student_logp + row, tl.where(z == NEG, float("-inf"), logp), mask=ours)
            if teacher_logp is not None:
                logp = (y - teacher_base - tl.log2(q)) * LN2
                tl.store(teacher_logp + row, tl.where(y == NEG, float("-inf"), logp), mask=ours)
        if student_entropy is not None:
            tl.store(student_entropy + row, (tl.log2(p) - student_u / p) * LN2, mask=ours)
        if teacher_entropy is not None:
            tl.store(teacher_entropy + row, (tl.log2(q) - teacher_u / q) * LN2, mask=ours)
        c = tl.log2(tl.div_rn(p, q))  # 0 exactly where both models are the same
        log_p = tl.log2(p)
        tl.store(values + r, -log_p, mask=ours)
        tl.store(values + n_slots + r, c, mask=ours)
        tl.store(values + 4 * n_slots + r, student_base + log_p, mask=ours)
        if REVERSE and FORWARD:
            tl.store(values + 2 * n_slots + r, by_p / p - by_q / q, mask=ours)
        else:
            if REVERSE:
                kl = by_p / p - c
                tl.store(values + 2 * n_slots + r, tl.where(kl > LARGEST, LARGEST, kl), mask=ours)
            else:
                kl = c - by_q / q
            kl = tl.where(kl < 0, 0.0, kl * LN2)
            tl.store(divergence + row, kl, mask=ours)
            bound = entry_bound(kl)
            if FORWARD:
                bound = tl.where(bound > 1, 1.0, bound)
            tl.store(values + 3 * n_slots + r, bound, mask=ours)


@triton.jit
def recentre_kernel(values, student_offset, teacher_offset, row_counts, tiles, n_slots):
    """Make both offsets (n_slots,) float32 the logsumexps that the sums gave. Grid: (n_slots / TILE,)."""
    r = tl.program_id(0) * TILE + tl.arange(0, TILE)
    ours = r < rows_at(tl.program_id(0) * TILE, row_counts, tiles)
    log_p = -tl.load(values + r, mask=ours, other=0.0)
    log_q = log_p - tl.load(values + n_slots + r, mask=ours, other=0.0)
    tl.store(student_offset + r, tl.load(student_offset + r, mask=ours, other=0.0) + log_p, mask=ours)
    tl.store(teacher_offset + r, tl.load(teacher_offset + r, mask=ours, other=0.0) + log_q, mask=ours)


@triton.jit
def both_of(exponent, ratio, c):
    """(the larger of p_S and p_T, the smaller over the larger, r) of M + log2(1/S_S), r' and log2(S_S/S_T).

    All of these logarithms in units of ln 2. Off by 2^-21 of the larger, whatever they differ by; equal ones are equal.
    """
    r = ratio - c
    larger = tl.exp2(exponent + tl.maximum(tl.minimum(ratio, 0.0), c - tl.maximum(ratio, 0.0)))
    return larger, tl.exp2(-tl.abs(r)), r


@triton.jit
def log2_of_share(x, HALF: tl.constexpr):
    """log2(1 + x) for -1 < x <= 1, off by 2e-6 of it, and by the rounding of 1 + x where that is beyond 2/3 to 4/3.

    HALF: -1/2 <= x <= 0.
    """
    if HALF:
        s = tl.fma(x, 1.39601874351, 0.86689776182)
        s = tl.fma(x, s, 0.72105395794)
        s = tl.fma(x, s, -0.28036400676)
        s = tl.fma(x, s, 0.48754110932)
        s = tl.fma(x, s, -0.72116798162)
        return x * tl.fma(x, s, 1.44269504089)
    else:
        bits = (1.0 + x).to(tl.int32, bitcast=True)
        power = (bits - TWO_THIRDS) & EXPONENT
        f = tl.where(power == 0, x, (bits - power).to(tl.float32, bitcast=True) - 1.0)
        s = tl.fma(f, 0.24550306797, -0.27970358729)
        s = tl.fma(f, s, 0.28584620357)
        s = tl.fma(f, s, -0.35843503475)
        s = tl.fma(f, s, 0.48095050454)
        s = tl.fma(f, s, -0.72137826681)
        s = tl.fma(f, s, 1.44269504089)
        return tl.fma(power.to(tl.float32), 2.0**-23, f * s)


@triton.jit
def log_shares(less, r, beta, HALF: tl.constexpr):
    """log2(larger / m) and log2(smaller / m), of the smaller over the larger and r = log2(p_S / p_T).

    Never as one less the other where that is the smaller number: of a word that one model excludes r has no last
    digits, and where m is nearly p_S, for a small beta, neither has its logarithm over m. HALF: beta = 1/2.
    """
    distance = tl.abs(r)
    if HALF:
        of_larger = -log2_of_share(0.5 * (less - 1.0), HALF)
        return of_larger, of_larger - distance
    else:
        student_near = (r < 0) & (less >= beta)  # p_S is the smaller, and at least half of m
        x = tl.where(r < 0, 1.0 - beta, beta) * (less - 1.0)
        x = tl.where(student_near, beta * (tl.exp2(distance) - 1.0), x)
        share = -log2_of_share(x, HALF)
        return tl.where(student_near, share + distance, share), tl.where(student_near, share, share - distance)


@triton.jit
def jsd_kernel(
    magnitudes, ratios, values, row_counts, tiles, parts, n_slots, width, beta, HALF: tl.constexpr,
    STRIPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts (4, stripes, n_slots) float32: of each STRIPE of a row Σ p_S, Σ p_S u, its share of the divergence,
    Σ (1 - beta) p_S u + beta p_T (u - r), in units of ln 2, and Σ (p_S - p_T) r, or Σ p_T where that is beyond FAR.

    Grid: (n_slots, stripes). BLOCK: entries at a time. HALF: beta = 1/2.
    """
    i = tl.program_id(0)
    if i < rows_at(i, row_counts, tiles):
        log_p = tl.load(values + i)
        c = tl.load(values + n_slots + i)
        far = tl.load(values + 2 * n_slots + i) * LN2 >= FAR
        p = tl.zeros([BLOCK], tl.float32)
        by_u = tl.zeros([BLOCK], tl.float32)
        jsd = tl.zeros([BLOCK], tl.float32)
        last = tl.zeros([BLOCK], tl.float32)
        begin = tl.program_id(1) * STRIPE
        for start in range(begin, tl.minimum(begin + STRIPE, width), BLOCK):
            exponent, ratio = load_stored(magnitudes, ratios, i.to(tl.int64) * width, start, width, log_p, BLOCK)
            larger, less, r = both_of(exponent, ratio, c)
            of_larger, of_smaller = log_shares(less, r, beta, HALF)
            weight = tl.where(r < 0, beta, 1.0 - beta)
            p += larger * tl.where(r < 0, less, 1.0)
            by_u += larger * tl.where(r < 0, less * of_smaller, of_larger)
            jsd += larger * (weight * of_larger + (1.0 - weight) * less * of_smaller)
            if far:
                last += larger * tl.where(r < 0, 1.0, less)
            else:
                last += larger * ((1.0 - less) * tl.abs(r))
        at = parts + tl.program_id(1) * n_slots + i
        plane = tl.num_programs(1) * n_slots
        tl.store(at, tl.sum(p, 0))
        tl.store(at + plane, tl.sum(by_u, 0))
        tl.store(at + 2 * plane, tl.sum(jsd, 0))
        tl.store(at + 3 * plane, tl.sum(last, 0))


@triton.jit(do_not_specialize=["order", "divergence"])
def combine_jsd_kernel(
    parts, values, order, row_counts, tiles, divergence, n_slots, stripes, beta, ROW_BLOCK: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
):  # fmt: skip
    """divergence (N,) and, in ``values``, Σ p_S u and the bound of entries. Grid: (n_slots / ROW_BLOCK,).

    The rounding of M would leave some 1e-3 of it where few entries make it up. J = Σ (p_S - p_T) r is known from
    float32 sums, and near proportional to it, term by term: so the ratio of the two is taken of what is stored, and J
    makes the divergence of it. Where J is beyond FAR, perhaps infinite, it is not: there each model's share is a mean
    over what is stored of its probabilities, which takes off the rounding that all of these have.
    """
    r = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    n_valid = rows_at(tl.program_id(0) * ROW_BLOCK, row_counts, tiles)
    if tl.program_id(0) * ROW_BLOCK < n_valid:
        ours = r < n_valid
        plane = stripes * n_slots
        p = tl.zeros([ROW_BLOCK], tl.float32)
        by_u = tl.zeros([ROW_BLOCK], tl.float32)
        jsd = tl.zeros([ROW_BLOCK], tl.float32)
        last = tl.zeros([ROW_BLOCK], tl.float32)
        for start in range(0, stripes, TILE_BLOCK):
            stripe = start + tl.arange(0, TILE_BLOCK)
            inside = (stripe < stripes)[:, None] & ours[None, :]
            at = parts + stripe[:, None] * n_slots + r[None, :]
            p += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
            by_u += tl.sum(tl.load(at + plane, mask=inside, other=0.0), 0)
            jsd += tl.sum(tl.load(at + 2 * plane, mask=inside, other=0.0), 0)
            last += tl.sum(tl.load(at + 3 * plane, mask=inside, other=0.0), 0)
        exact = tl.load(values + 2 * n_slots + r, mask=ours, other=0.0) * LN2
        mean = tl.where(exact == exact, by_u / p, exact)  # log2_of_share knows no NaN
        # From 0 to beta (1 - beta) of J, since KL is convex: where J is nothing but rounding, so is this.
        most = beta * (1.0 - beta)
        share = tl.minimum(tl.maximum(jsd / last, 0.0), most)
        near = tl.maximum(exact, 0.0) * tl.where(last > 0, share, 0.0)
        of_student = (1.0 - beta) * by_u
        far = ((1.0 - beta) * mean + (jsd - of_student) / last) * LN2
        jsd = tl.where(exact < FAR, near, far)
        row = tl.load(order + r, mask=ours, other=0)
        tl.store(divergence + row, tl.where(jsd < 0, 0.0, jsd), mask=ours)
        tl.store(values + 2 * n_slots + r, mean, mask=ours)
        tl.store(values + 3 * n_slots + r, entry_bound(mean * LN2), mask=ours)


def combine(
    pair: PairPass, targets: bool, order, row_counts, tiles, values, out: DivergenceStatistics,
    retry=None,
) -> None:  # fmt: skip
    """Write ``values`` (VALUES, rows) float32, and ``out`` of row i at order[i], but for a jsd. See the kernel."""
    student, teacher = pair.student, pair.teacher
    combine_pairs_kernel[(ceil_div(student.rows, ROW_BLOCK),)](
        pair.sums, student.logit if targets else None, teacher.logit if targets else None, student.offset,
        teacher.offset, order, row_counts, tiles, retry, values, *out, student.rows, pair.col_tiles, LEAST_SUM,
        SUM_LIMIT,
        REVERSE=pair.wanted.reverse, FORWARD=pair.wanted.forward, ROW_BLOCK=ROW_BLOCK, TILE_BLOCK=TILE_BLOCK,
    )  # fmt: skip


def recentre(pair: PairPass, values, row_counts, tiles) -> None:
    """Make the offsets of rows that are to be done again exact; see the kernel."""
    student, teacher = pair.student, pair.teacher
    recentre_kernel[(ceil_div(student.rows, TILE.value),)](
        values, student.offset, teacher.offset, row_counts, tiles, student.rows
    )


def jsd(pair: PairPass, beta: float, order, row_counts, tiles, values, out: DivergenceStatistics) -> None:
    """Write the jsd of row i at order[i] of ``out``, out of what is stored; see the kernel."""
    assert pair.magnitudes is not None
    rows, width = pair.magnitudes.shape
    stripes = ceil_div(width, STRIPE)
    parts = pair.student.floats(4, stripes, rows)
    jsd_kernel[(rows, stripes)](
        pair.magnitudes, pair.ratios, values, row_counts, tiles, parts, rows, width, beta, HALF=beta == 0.5,
        STRIPE=STRIPE, BLOCK=STEP, num_warps=WARPS,
    )  # fmt: skip
    combine_jsd_kernel[(ceil_div(rows, ROW_BLOCK),)](
        parts, values, order, row_counts, tiles, out.divergence, rows, stripes, beta, ROW_BLOCK=ROW_BLOCK,
        TILE_BLOCK=TILE_BLOCK,
    )  # fmt: skip
