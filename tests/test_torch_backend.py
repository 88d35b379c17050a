"""What the PyTorch backend does where it may not ask for counts: on a GPU that would make the host wait."""

from __future__ import annotations

import math

import pytest
import torch

from egrsd_kernels import checks, fused_egrsd_loss, linear_logp, token_statistics
from egrsd_kernels.backends import torch as torch_backend
from reference import egrsd_loss


@pytest.fixture(params=[1 << 30, 1], ids=["one chunk", "a row a chunk"])
def call(request, monkeypatch):
    """Run twice, with and without the counts, on inputs whose masked rows are NaN; both results."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 16, generator=g)
    weight = torch.randn(50, 16, generator=g)
    target_ids = torch.randint(0, 50, (3, 11), generator=g)
    mask = torch.rand(3, 11, generator=g) < 0.6
    hidden[~mask] = math.nan
    target_ids[~mask] = -100
    advantages = torch.tensor([1.0, 0.0, -0.5])

    def run(function):
        results = []
        for counted in (True, False):
            with monkeypatch.context() as patch:
                if not counted:
                    patch.setattr(torch_backend, "count", lambda rows, which: rows.order.numel())
                leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
                out = function(*leaves, target_ids, mask, advantages, request.param)
                results.append([*out, *torch.autograd.grad(out[0].sum(), leaves, allow_unused=True)])
        return results

    return run


def same(pair):
    for a, b in zip(*pair, strict=True):
        # Chunks hold other rows, so sums over rows are taken in another order.
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_loss(call):
    def loss(hidden, weight, target_ids, mask, advantages, chunk_bytes):
        out, stats = fused_egrsd_loss(
            hidden, weight, hidden + 0.1, target_ids, advantages,
            mask=mask, lookahead=2, backend="torch", return_stats=True, chunk_bytes=chunk_bytes,
        )  # fmt: skip
        return out, *stats

    same(call(loss))


@pytest.mark.parametrize("keep_bytes", [0, 8 * 50 * 4, 1 << 30], ids=["nothing kept", "8 rows kept", "all kept"])
@pytest.mark.parametrize("entropy_grad", [False, True], ids=["logp", "entropy"])
def test_linear_logp(call, keep_bytes, entropy_grad):
    def logp(hidden, weight, target_ids, mask, advantages, chunk_bytes):
        options = {"backend": "torch", "chunk_bytes": chunk_bytes, "keep_bytes": keep_bytes}
        out = linear_logp(
            hidden, weight, target_ids, mask=mask, return_entropy=True, entropy_grad=entropy_grad, **options
        )
        # Some rows have no gradient.
        return [(out[0] + out[1] * entropy_grad)[:, ::2], *out]

    same(call(logp))


def test_statistics(call):
    def statistics(hidden, weight, target_ids, mask, advantages, chunk_bytes):
        out = token_statistics(hidden, weight, target_ids, mask=mask, backend="torch", chunk_bytes=chunk_bytes)
        return (hidden * 0).nan_to_num().sum(), *out

    same(call(statistics))


@pytest.mark.parametrize("student, teacher", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)])
def test_teacher_of_another_dtype(student, teacher):
    """Each head in its own dtype; what they share is in the student's compute dtype."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(2, 9, 16, generator=g).to(student), torch.randn(40, 16, generator=g).to(student)
    own = torch.randn(2, 9, 24, generator=g).to(teacher), torch.randn(40, 24, generator=g).to(teacher)
    target_ids = torch.randint(0, 40, (2, 9), generator=g)
    arguments = hidden, weight, own[0], target_ids, torch.tensor([1.0, -0.5])
    options = {"teacher_weight": own[1], "lookahead": 2, "return_stats": True}
    loss, stats = fused_egrsd_loss(*arguments, **options)
    expected, expected_stats = egrsd_loss(*arguments, **options, dtype=torch.float64)
    assert loss.dtype == torch.float32 and torch.isclose(loss.double(), expected, rtol=1e-5)
    for a, b in zip(stats[: len(expected_stats)], expected_stats, strict=True):
        assert a.dtype == torch.float32 and torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep_bytes", [1 << 30, 0], ids=["kept", "again"])
def test_a_target_outside_the_vocabulary_makes_nan(keep_bytes, monkeypatch):
    """Where values are not looked at, as on a GPU. An invented gradient would be taken for a real one."""
    monkeypatch.setattr(checks, "values_checked", lambda value: False)
    monkeypatch.setattr(torch_backend, "count", lambda rows, which: rows.order.numel())
    hidden, weight = (torch.randn(*shape).requires_grad_() for shape in ((3, 4), (7, 4)))
    logp = linear_logp(hidden, weight, torch.tensor([2, 9, 6]), backend="torch", keep_bytes=keep_bytes)
    logp.sum().backward()
    assert logp.isnan().tolist() == [False, True, False]
    assert hidden.grad.isnan().all(1).tolist() == [False, True, False] and weight.grad.isnan().all()
