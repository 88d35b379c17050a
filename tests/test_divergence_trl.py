"""``linear_divergence`` against the losses of TRL's own trainers, on full logits."""

from __future__ import annotations

import pytest
import torch

from egrsd_kernels import linear_divergence
from tests.support.cases import Draw, draw_head, draw_hidden

losses = pytest.importorskip("trl.experimental.sdpo.loss_utils", reason="TRL is not installed")


def operands():
    draw = Draw(3)
    weight, other = draw_head(draw, 61, 16).double(), draw_head(draw, 61, 24).double()
    student, teacher = (draw_hidden(draw, "peaked", w.float(), 3, 5).double() for w in (weight, other))
    return student.requires_grad_(), weight, teacher, other


def ours(alpha: float, **more):
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(alpha, "jsd")
    hidden, *others = operands()
    d = linear_divergence(hidden, *others, kind=kind, **({"beta": alpha} if kind == "jsd" else {}), **more)
    return d.detach(), torch.autograd.grad(d.sum(), hidden)[0]


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
def test_sdpo_and_sdft(alpha):
    """Their distillation_alpha is the kind, and β."""
    hidden, weight, teacher, other = operands()
    theirs = losses.compute_full_logit_self_distillation_loss(
        hidden @ weight.T, teacher @ other.T, distillation_alpha=alpha
    )
    d, gradient = ours(alpha)
    torch.testing.assert_close(d, theirs.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs.sum(), hidden)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gkd(beta):
    from trl.experimental.gkd import GKDTrainer

    hidden, weight, teacher, other = operands()
    theirs = GKDTrainer.generalized_jsd_loss(
        hidden @ weight.T, teacher @ other.T, beta=beta, temperature=0.8, reduction="none"
    )
    d, gradient = ours(beta, temperature=0.8)
    torch.testing.assert_close(d, theirs.detach().sum(-1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs.sum(), hidden)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_top_k_and_a_tail(alpha):
    """Where student and teacher have the same k likeliest entries, TRL's tail bucket is ours."""
    hidden, weight, _, _ = operands()
    teacher = (0.9 * hidden).detach()  # of the same order
    theirs = losses.compute_topk_self_distillation_loss(
        hidden @ weight.T, teacher @ weight.T, distillation_topk=4, distillation_alpha=alpha, distillation_add_tail=True
    )
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(alpha, "jsd")
    d = linear_divergence(hidden, weight, teacher, weight, kind=kind, top_k=4)
    torch.testing.assert_close(d, theirs, rtol=1e-6, atol=1e-9)
    mine, their = (torch.autograd.grad(x.sum(), hidden)[0] for x in (d, theirs))
    torch.testing.assert_close(mine, their, rtol=1e-6, atol=1e-8)
