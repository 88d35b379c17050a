"""Weights by a token's place: against the reference, TRL's IW-OPD, and through the loss."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from egrsd_kernels import fused_egrsd_loss
from egrsd_kernels.rl import TOKEN_ADVANTAGES, apply_token_advantage, position_weights, token_stats
from tests.test_token_advantages import close, rollouts

UNIT = 2.0**-32  # nats in which disagreement is counted


def responses(rows: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(mask with holes, and a row without a token; δ from far below to far above a nat, 0 in places)."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=g) < 0.7
    mask[-1] = rows == 1
    delta = torch.randn(rows, length, generator=g, dtype=torch.float64)
    return mask, delta * 10 ** (4 * torch.rand(rows, length, generator=g) - 3) * (torch.rand(rows, length) < 0.9)


@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 17),
    seed=st.integers(0, 2**20),
    position=st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-1, 1)),
    prefix=st.sampled_from([0.0, 0.5, 3.0]),
)
def test_the_weights_are_the_references(rows, length, seed, position, prefix):
    mask, delta = responses(rows, length, seed)
    got = position_weights(mask, position=position, prefix=prefix, log_ratio=delta)
    want = torch.stack([reference.position_weights(m, d, position, prefix) for m, d in zip(mask, delta, strict=True)])
    # Each token's share is off by half a unit in the numerator and in the denominator, which is a sum of them.
    total = (delta * mask).abs().sum(1, keepdim=True)
    off = 2 * prefix * length * UNIT / total.clamp(min=UNIT)
    assert ((got - want).abs() <= 1e-13 * want + off).all()
    assert (got[mask] > 0).all() and (got[~mask] == 1).all()
    if not prefix and mask.any():  # 1 on average over each response
        means = [row[m].mean() for row, m in zip(got, mask, strict=True) if m.any()]
        assert max(abs(mean - 1) for mean in means) < 1e-13


def test_what_the_weights_say():
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 0, 0]])
    got = position_weights(mask, position=0.8)
    assert got.dtype == torch.float32
    want = [[0.4, 0.8, 1, 1.2, 1.6], [1, 0.6, 1.4, 1, 1]]
    torch.testing.assert_close(got, torch.tensor(want))
    torch.testing.assert_close(position_weights(mask, position=-0.8).flip(1)[0, [0, 1, 3, 4]], got[0, [0, 1, 3, 4]])
    delta = torch.tensor([[0.3, -0.1, 9.0, 0.4, 0.2], [5.0, 0.0, 0.0, 5.0, 5.0]])
    got = position_weights(mask, prefix=0.5, log_ratio=delta)
    torch.testing.assert_close(got, torch.tensor([[1.5, 1.35, 1, 1.3, 1.1], [1, 1.5, 1.5, 1, 1]]))


def test_disagreement_that_is_no_number():
    """An impossible token counts for all that comes before it; NaN spoils its own response, if it is valid."""
    mask = torch.tensor([[True] * 4, [True] * 4, [True, False, True, True]])
    delta = torch.tensor([[0.1, -math.inf, 0.1, 0.1], [0.1, math.nan, 0.1, 0.1], [0.1, math.nan, 0.1, 0.2]])
    got = position_weights(mask, prefix=1.0, log_ratio=delta)
    torch.testing.assert_close(got[0], torch.tensor([2.0, 2.0, 1.0, 1.0]), rtol=0, atol=4e-4)
    assert got[1].isnan().all()
    torch.testing.assert_close(got[2], torch.tensor([2.0, 1.0, 1.75, 1.5]))


@pytest.mark.slow  # it imports TRL
def test_prefix_weights_are_those_of_trls_iw_opd():
    """Its loss −Σ log p · ρ · δ / Σm, whose gradient by log p has the weights."""
    trl = pytest.importorskip("trl.experimental.iw_opd.iw_opd_trainer")
    mask, delta = responses(4, 9, seed=5)
    ids = torch.randint(7, mask.shape)
    logits = torch.randn(*mask.shape, 7, dtype=torch.float64, requires_grad=True)
    logp = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    self = SimpleNamespace(
        temperature=1.0, iw_opd_gamma=0.5, iw_opd_epsilon=1e-8, model=torch.nn.Identity(),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    labels = torch.where(mask, ids, -100)
    theirs = trl.IWOPDTrainer._compute_iw_opd_loss(self, logits, ids, labels, delta + logp.detach())
    rho = position_weights(mask, prefix=0.5, log_ratio=delta)
    ours = -(logp * rho * delta * mask).sum() / mask.sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    (by_theirs,) = torch.autograd.grad(theirs, logits, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], by_theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["rlsd", "egrsd", "cl_egrsd"])
def test_token_advantages_by_name_are_weighed(name):
    """Â is ρ times what it is without; every other signal is the same."""
    evidence, _ = rollouts(4, 21, 3, {"lookahead": 3})
    weighed = replace(evidence, position_weight=0.6, prefix_weight=0.5)
    plain, got = (apply_token_advantage(TOKEN_ADVANTAGES[name], x) for x in (evidence, weighed))
    delta = evidence.teacher.logp - evidence.student_logp
    rho = position_weights(evidence.mask, position=0.6, prefix=0.5, log_ratio=delta)
    close(got, plain * rho)
    before, after = token_stats(evidence)._asdict(), token_stats(weighed)._asdict()
    assert all(torch.equal(before[key], after[key]) for key in before if key != "token_advantage")


def test_the_loss_of_weighed_advantages_has_weighed_token_advantages():
    """ρ leaves direction, magnitude and gate alone, so A · ρ is all that the fused loss has to be given."""
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(3, 8, 5, generator=g), torch.randn(11, 5, generator=g)
    teacher = hidden + 0.3 * torch.randn(3, 8, 5, generator=g)
    ids, mask = torch.randint(11, (3, 8), generator=g), torch.rand(3, 8, generator=g) < 0.8
    advantages = torch.tensor([1.3, -0.4, 0.0])
    rho = position_weights(mask, position=-0.7)
    options = {"mask": mask, "lookahead": 2, "return_stats": True}
    _, plain = fused_egrsd_loss(hidden, head, teacher, ids, advantages, **options)
    loss, stats = fused_egrsd_loss(hidden, head, teacher, ids, advantages[:, None] * rho, **options)
    torch.testing.assert_close(stats.token_advantage, plain.token_advantage * rho * mask, rtol=1e-6, atol=1e-7)
    assert torch.equal(stats.magnitude, plain.magnitude) and torch.equal(stats.gate, plain.gate)
    torch.testing.assert_close(loss, -(stats.token_advantage * stats.student_logp).sum() / mask.sum())


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        ({"position": 1.5}, ValueError, "position: expected a finite number at least -1 and at most 1, got 1.5"),
        ({"prefix": -1}, ValueError, "prefix: expected a finite number at least 0, got -1"),
        ({"prefix": 1}, TypeError, "log_ratio: expected a tensor, since prefix is not 0, got None"),
        ({"mask": torch.ones(3)}, ValueError, "mask: expected a (B, T) tensor, got a torch.bool tensor of shape (3,)"),
        (
            {"prefix": 1, "log_ratio": torch.ones(2)}, ValueError,
            "log_ratio: expected shape (2, 3), got a torch.float32 tensor of shape (2,) on cpu",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(arguments, error, says):
    with pytest.raises(error) as caught:
        position_weights(**{"mask": torch.ones(2, 3)} | arguments)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
