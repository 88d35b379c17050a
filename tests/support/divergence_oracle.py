"""Divergences in 60 digits, by other routes than the reference's: what that is tested against.

A divergence comes from entropies: KL(p ‖ q) = -H(p) - Σ p ln q, and the Jensen-Shannon divergence is
H((1 - β) p_S + β p_T) - (1 - β) H(p_S) - β H(p_T). A gradient is a central difference in the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mpmath

STEP = mpmath.mpf(10) ** -20  # the difference is off by its square
DIGITS = 60


def softmax(z: Sequence[float]) -> list[mpmath.mpf]:
    weights = [mpmath.exp(x) if x != -math.inf else mpmath.mpf(0) for x in z]
    return [w / mpmath.fsum(weights) for w in weights]


def entropy(p: Sequence[mpmath.mpf]) -> mpmath.mpf:
    return -mpmath.fsum(x * mpmath.log(x) for x in p if x)


def cross_entropy(p: Sequence[mpmath.mpf], q: Sequence[mpmath.mpf]) -> mpmath.mpf:
    if any(x and not y for x, y in zip(p, q, strict=True)):
        return mpmath.inf
    return -mpmath.fsum(x * mpmath.log(y) for x, y in zip(p, q, strict=True) if x)


def divergence(s: Sequence[mpmath.mpf], t: Sequence[mpmath.mpf], kind: str, beta: float) -> mpmath.mpf:
    if kind == "reverse_kl":
        return cross_entropy(s, t) - entropy(s)
    if kind == "forward_kl":
        return cross_entropy(t, s) - entropy(t)
    m = [(1 - mpmath.mpf(beta)) * x + beta * y for x, y in zip(s, t, strict=True)]
    return entropy(m) - (1 - mpmath.mpf(beta)) * entropy(s) - beta * entropy(t)


def oracle(
    z_s: Sequence[float], z_t: Sequence[float], kind: str, beta: float = 0.5, top_k: int | None = None
) -> tuple[float, list[float]]:
    """(D, dD/dz_S) of one row, of Python floats."""
    with mpmath.workdps(DIGITS):
        teacher = softmax(z_t)
        top = set(sorted(range(len(z_t)), key=lambda v: -z_t[v])[:top_k])

        def parts(p: Sequence[mpmath.mpf]) -> list[mpmath.mpf]:
            if top_k is None:
                return list(p)
            rest = mpmath.fsum(x for v, x in enumerate(p) if v not in top)
            return [p[v] for v in sorted(top)] + ([rest] if len(top) < len(p) else [])

        def value(z: Sequence[mpmath.mpf]) -> mpmath.mpf:
            return divergence(parts(softmax(z)), parts(teacher), kind, beta)

        z = [mpmath.mpf(x) for x in z_s]
        at = value(z)
        if not mpmath.isfinite(at):
            return math.inf, []
        slopes = []
        for v in range(len(z)):
            if z_s[v] == -math.inf:
                slopes.append(0.0)
                continue
            up, down = ([*z[:v], z[v] + step, *z[v + 1 :]] for step in (STEP, -STEP))
            slopes.append(float((value(up) - value(down)) / (2 * STEP)))
        return float(at), slopes
