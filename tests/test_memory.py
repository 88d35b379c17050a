"""Kernels touch what they are given and nothing else, and use no number that nobody wrote."""

from __future__ import annotations

import pytest
import torch

from egrsd_kernels import Head, fused_egrsd_loss, linear_divergence, linear_logp, token_statistics
from egrsd_kernels.backends import EXTRAS
from tests.support.devices import INTERPRETED

pytestmark = [pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter"), pytest.mark.heavy]


def loss(mode):
    def step(hidden, weight, bias, target_ids):
        arguments = hidden, weight, hidden + 1, target_ids, torch.ones(len(hidden))
        options = {"student_bias": bias, "softcap": 5.0, "lookahead": 5, "grad_mode": mode, "sparse_tol": 0.05}
        fused_egrsd_loss(*arguments, **options, backend="triton").backward()

    return step


def logp(hidden, weight, bias, target_ids):
    linear_logp(hidden, weight, target_ids, bias=bias, backend="triton").sum().backward()
    # Of 1/p_y beyond float32, which is done again.
    linear_logp(hidden, weight * 200, target_ids, backend="triton").sum().backward()


def statistics(hidden, weight, bias, target_ids):
    token_statistics(hidden, weight, target_ids, bias=bias, backend="triton")


def extras(hidden, weight, bias, target_ids):
    options = {"bias": bias, "backend": "triton", "extras": EXTRAS}
    found = [linear_logp(hidden, head, target_ids, **options) for head in (weight.detach(), weight, weight * 200)]
    for statistics in (*found, token_statistics(hidden, weight, target_ids, **options)):
        assert all(x.isfinite().all() for x in statistics if x is not None)


def divergence(hidden, weight, bias, target_ids):
    """Of a trained head that is kept, and of a frozen one, and with and without targets."""
    head, far = Head(weight, bias, softcap=5.0), hidden.detach() + 1
    for kind in ("reverse_kl", "jsd"):
        linear_divergence(hidden, head, far, head, kind=kind, target_ids=target_ids, backend="triton").sum().backward()
        linear_divergence(hidden, weight.detach(), far, weight * 2, kind=kind, backend="triton").sum().backward()


NAMES = ["sparse", "exact", "logp", "", "extras", "divergence"]


@pytest.mark.parametrize("step", [loss("sparse"), loss("exact"), logp, statistics, extras, divergence], ids=NAMES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [126, 131])  # rows: the last tile all but full, and all but empty
@pytest.mark.parametrize("family", ["tma", "pointer"])
def test_in_bounds_whatever_memory_holds(step, n, seed, family, monkeypatch):
    from tests.support.memory import Used, watched

    monkeypatch.setenv("EGRSD_KERNELS_TMA", "1" if family == "tma" else "0")
    random = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*shape, generator=random) for shape in ((n, 24), (130, 24), (130,)))
    target_ids = torch.randint(130, (n,), generator=random)
    target_ids[5] = -100
    with watched(), Used("cpu", seed):
        step(hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), target_ids)
    for gradient in (hidden.grad, weight.grad, bias.grad):
        assert gradient is None or gradient.isfinite().all()
