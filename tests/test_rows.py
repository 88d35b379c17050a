"""Which tokens are worked on, in which sequence each is, what a loss divides by: the kernels beside plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from egrsd_kernels.backends import power_of_two
from egrsd_kernels.backends import torch as in_torch
from egrsd_kernels.backends import triton as in_triton
from egrsd_kernels.rows import Rows, Sequences
from tests.support.kernel_case import CUDA, DEVICE

pytestmark = pytest.mark.cuda if CUDA else []


def shares(n: int, valid: float, active: float) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    advantages = torch.randn(n, generator=g) * (torch.rand(n, generator=g) < active)
    return (torch.rand(n, generator=g) < valid).to(DEVICE), advantages.to(DEVICE)


@pytest.mark.parametrize("n", [0, 1, 5, 1023, 1024, 3001])
@pytest.mark.parametrize("share", [(0.7, 0.5), (0.0, 1.0), (1.0, 0.0)], ids=str)
def test_rows(n, share):
    """The same permutation, in which each kind keeps its order, and the same counts."""
    valid, advantages = shares(n, *share)
    if n > 4:
        advantages[:2] = torch.tensor([torch.nan, -0.0])  # NaN is an advantage, and -0 is none
    for active in (advantages, advantages != 0, valid):
        want, got = Rows.build(valid, active), in_triton.build_rows(valid, active)
        assert torch.equal(want.order, got.order) and torch.equal(want.counts, got.counts)


def test_rows_by_hand():
    valid = torch.tensor([True, False, True, True, False], device=DEVICE)
    advantages = torch.tensor([0.0, 2.0, -1.0, 3.0, 0.0], device=DEVICE)
    for build in (in_torch.build_rows, in_triton.build_rows):
        order, counts = build(valid, advantages)
        assert order.tolist() == [2, 3, 0, 1, 4] and counts.tolist() == [3, 2]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [[7], [1, 0, 0, 3, 2], [0, 5, 0], [1] * 40, [1500, 0, 600, 1]], ids=len)
def test_packed_sequences(lengths, dtype):
    ends = torch.tensor([0, *lengths], dtype=dtype, device=DEVICE).cumsum(0).to(dtype)
    n, values = sum(lengths), torch.arange(len(lengths), device=DEVICE).double()
    of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    last = torch.tensor(lengths).cumsum(0)[of] - 1
    for by_token in (in_torch.by_token, in_triton.by_token):
        flat, end = by_token(values, n, Sequences(n, ends), torch.float32)
        # As many sequences as tokens are one token each, or the values are one a token.
        assert flat.tolist() == (values.tolist() if len(lengths) == n else of.tolist())
        assert flat.dtype == torch.float32 and end.dtype == torch.int32 and end.tolist() == last.tolist()


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 1), (4, 700)], ids=str)
@pytest.mark.parametrize("per_token", [False, True])
def test_padded_sequences(shape, per_token):
    b, t = shape
    values = torch.randn(b * t if per_token else b, generator=torch.Generator().manual_seed(t)).to(DEVICE)
    want = values if per_token else values.repeat_interleave(t)
    for by_token in (in_torch.by_token, in_triton.by_token):
        flat, end = by_token(values.view(b, t) if per_token else values, b * t, Sequences(t, None), torch.float32)
        assert torch.equal(flat, want)
        assert end.tolist() == [s * t + t - 1 for s in range(b) for _ in range(t)]


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("normalizer", [None, 1.0, 0.75, 3e5, 1e-40, 2.0**-126, 3e38])
def test_scales(normalizer, low):
    """To the bit, with a count, and numbers at the ends of float32; and without a valid token."""
    given = None if normalizer is None else torch.tensor(normalizer, device=DEVICE)
    for counts in ([37, 5], [0, 0]):
        rows = Rows(torch.empty(0), torch.tensor(counts, dtype=torch.int32, device=DEVICE))
        for peak in (0.3, 2.5, torch.nan):
            peak = torch.tensor(peak, device=DEVICE)
            want, got = (backend.scales(peak, 1.0, rows, given, low) for backend in (in_torch, in_triton))
            assert (want.power is None) == (got.power is None) == (not low)
            for x, y in zip(want, got, strict=True):
                assert x is None or torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)), (x, y)
            if low:
                assert got.power == power_of_two(got.normalizer)
