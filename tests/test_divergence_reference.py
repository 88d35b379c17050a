"""The reference's divergences against 60 digits, and what is true of every divergence.

Tolerance: 1e-12, as in test_reference.py: sums of at most 12 terms, logits near 10.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import divergence
from tests.support.divergence_oracle import oracle

KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.93)]
by_kind = pytest.mark.parametrize("kind, beta", KINDS, ids=str)


def check(z_s: list[float], z_t: list[float], kind: str, beta: float, top_k: int | None = None) -> float:
    student, teacher = torch.tensor([z_s, z_t], dtype=torch.float64)
    student.requires_grad_()
    got = divergence(student, teacher, kind, beta, top_k)
    want, slopes = oracle(z_s, z_t, kind, beta, top_k)
    assert got.item() == pytest.approx(want, rel=1e-12, abs=1e-12)
    if math.isfinite(want):
        (gradient,) = torch.autograd.grad(got, student)
        assert gradient.tolist() == pytest.approx(slopes, rel=1e-12, abs=1e-12)
    return want


logits = st.lists(st.floats(-12, 12), min_size=1, max_size=8)


@by_kind
@given(data=st.data())
@settings(max_examples=25)
def test_any_two_distributions(kind, beta, data):
    z_s = data.draw(logits)
    z_t = data.draw(st.permutations(range(len(z_s))))  # no two alike: of two equal ones either may be the k-th
    z_t = [data.draw(st.floats(0, 0.4)) + 1.3 * x - 4 for x in z_t]
    top_k = data.draw(st.one_of(st.none(), st.integers(1, len(z_s))))
    assert check(z_s, z_t, kind, beta, top_k) >= -1e-30


@by_kind
@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
def test_excluded_entries(kind, beta, top_k):
    """Where neither has an entry, it is not there; where only one has it, a KL is infinite and the JSD is not."""
    both = [1.0, -math.inf, 0.5, 2.0, -math.inf], [0.2, -math.inf, 1.5, 0.1, -math.inf]
    assert math.isfinite(check(*both, kind, beta, top_k))
    student_lacks = [1.0, 0.5, 2.0, -math.inf], [0.2, 1.5, 0.1, 2.0]
    assert math.isinf(check(*student_lacks, kind, beta, top_k)) == (kind == "forward_kl")
    teacher_lacks = student_lacks[::-1]
    seen = top_k in (None, 4)  # among the rest, the entry that the teacher lacks is not seen
    assert math.isinf(check(*teacher_lacks, kind, beta, top_k)) == (kind == "reverse_kl" and seen)


@by_kind
def test_numbers_to_check_by_eye(kind, beta):
    """A fair coin against a certain one, and against itself."""
    fair, sure = [0.0, 0.0], [0.0, -math.inf]
    half = math.log(2)
    want = {"reverse_kl": math.inf, "forward_kl": half}
    m = (1 - beta) / 2
    want["jsd"] = -(m * math.log(m) + (1 - m) * math.log1p(-m)) - (1 - beta) * half
    assert check(fair, sure, kind, beta) == pytest.approx(want[kind])
    assert check(fair, fair, kind, beta) == pytest.approx(0, abs=1e-30)


@by_kind
@given(seed=st.integers(0, 10**6))
@settings(max_examples=20)
def test_a_coarser_partition_is_nearer(kind, beta, seed):
    z_s, z_t = 3 * torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    by_k = [divergence(z_s, z_t, kind, beta, k).item() for k in range(1, 10)]
    assert all(finer >= coarser - 1e-13 for coarser, finer in itertools.pairwise(by_k))
    assert by_k[-1] == pytest.approx(by_k[-2])  # whose rest is one entry
    assert by_k[-1] == divergence(z_s, z_t, kind, beta).item()


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="kind is 'kl'"):
        divergence(torch.zeros(2), torch.zeros(2), "kl")
