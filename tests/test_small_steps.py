"""What a small step costs the host: launches, plans, and kernels compiled for row counts not seen before."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from egrsd_kernels import checks, fused_egrsd_loss, linear_logp, token_statistics
from tests.support.devices import INTERPRETED
from tests.support.launches import TensorWork, launches

interpreted = pytest.mark.skipif(not INTERPRETED, reason="launches are counted in Triton's interpreter")
WIDTH, VOCABULARY = 64, 5000


def step(n: int, trained: bool, **options) -> None:
    """One call of everything, and its backward pass, on fresh operands of n tokens in 1 to 3 sequences."""
    g = torch.Generator().manual_seed(n)
    student, teacher = (torch.randn(n, WIDTH, generator=g) for _ in range(2))
    weight = torch.randn(VOCABULARY, WIDTH, generator=g)
    ids = torch.randint(VOCABULARY, (n,), generator=g)
    mask, advantages = torch.rand(n, generator=g) < 0.8, torch.randn(n, generator=g)
    student.requires_grad_()
    weight.requires_grad_(trained)
    cu_seqlens = torch.tensor(sorted({0, n // 3, n // 2, n}), dtype=torch.int32)
    loss = fused_egrsd_loss(
        student, weight, teacher, ids, advantages, mask=mask, cu_seqlens=cu_seqlens, backend="triton", **options
    )
    logp, entropy = linear_logp(
        student, weight, ids, mask=mask, backend="triton", return_entropy=True, entropy_grad=trained
    )
    (loss + (logp * advantages).sum() + (entropy * advantages).sum()).backward()
    token_statistics(teacher, weight, ids, mask=mask, backend="triton", extras=("is_top1", "mean_logits"))
    with torch.no_grad():
        fused_egrsd_loss(student, weight, teacher, ids, advantages, mask=mask, backend="triton", **options)


@interpreted
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_new_number_of_rows_compiles_nothing(trained):
    with launches() as seen:
        step(500, trained, lookahead=2)
        step(16, trained, lookahead=2)
    known = set(seen)
    for n in (1, 16, 17, 130, 512, 1000, 4100, 9001):
        with launches() as more:
            step(n, trained, lookahead=n % 5)
        new = {launch.kernel for launch in set(more) - known}
        assert not new, (n, new)


@interpreted
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_launches_of_a_step(trained, layout):
    """The loss and its backward pass at N = 512, in one slice of the vocabulary: at most 30 launches."""
    n = 512
    shape = (4, n // 4) if layout == "padded" else (n,)
    student, teacher = (torch.randn(*shape, WIDTH) for _ in range(2))
    weight, ids = torch.randn(VOCABULARY, WIDTH), torch.randint(VOCABULARY, shape)
    mask, advantages = torch.rand(shape) < 0.9, torch.randn(4)
    student.requires_grad_()
    weight.requires_grad_(trained)
    ends = {"cu_seqlens": torch.tensor([0, 5, 200, 300, n], dtype=torch.int32)} if layout == "packed" else {}
    given = student, weight, teacher, ids, advantages

    def work() -> int:
        with launches() as kernels, TensorWork() as torch_s:
            fused_egrsd_loss(*given, mask=mask, lookahead=3, backend="triton", **ends).backward()
        print([launch.kernel for launch in kernels], torch_s.found, sep="\n")
        return len(kernels) + len(torch_s.found)

    with mock.patch.object(checks, "values_checked", lambda _: False):  # as on a GPU
        assert work() <= 30
