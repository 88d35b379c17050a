"""The token advantages by name against the reference, and what becomes of one's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import reference
from egrsd_kernels.credit import CreditOptions, Lookahead
from egrsd_kernels.rl import (
    TOKEN_ADVANTAGES,
    ContextStatistics,
    TokenEvidence,
    apply_token_advantage,
    token_stats,
)

VOCABULARY, WIDTH = 37, 8
# δ is off by roundings of two log p of less than 2^6 nats, and exp() multiplies what it is off by.
OFF = 2**8 * torch.finfo(torch.float64).eps


def rollouts(rows: int, length: int, seed: int, options: dict) -> tuple[TokenEvidence, reference.TokenStats]:
    """(the evidence, what the reference says of it): masked in the middle, all of one row too, and A = 0 somewhere."""
    g = torch.Generator().manual_seed(seed)
    shape = rows, length

    def draw(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    mask = torch.rand(shape, generator=g) < 0.7
    mask[0] = rows == 1
    advantages = draw(rows)
    advantages[-1] = 0
    entropy = 3 * draw(shape).abs() ** 3
    spread = torch.where(torch.rand(shape, generator=g) < 0.5, 0.05, 2.0)
    hidden, head = draw(rows, length, WIDTH), draw(VOCABULARY, WIDTH)
    ids = torch.randint(VOCABULARY, shape, generator=g)
    own = reference.log_prob(reference.logits(hidden, head), ids)
    logp = (own + spread * draw(shape)).clamp(max=0)
    _, stats = reference.egrsd_loss(
        hidden, head, None, ids, advantages, mask=mask, teacher_logp=logp, teacher_entropy=entropy, return_stats=True,
        **options,
    )  # fmt: skip
    peak = entropy[mask].max() if mask.any() else entropy.new_zeros(())
    gamma, eps = options.get("gamma", 0.3), options.get("clip_eps", 0.2)
    context = ContextStatistics(logp.masked_fill(~mask, 0), entropy.masked_fill(~mask, 0))
    evidence = TokenEvidence(
        mask=mask,
        student_logp=stats.student_logp,
        advantages=advantages,
        rewards=advantages,
        contexts={"teacher": context},
        entropy_scale=peak.clamp(min=1.0),
        options=CreditOptions(gamma, 0.1, eps),
        lookahead=Lookahead(
            **{name.removeprefix("lookahead_"): options[name] for name in options if "ahead_" in name},
            window=options.get("lookahead", 0),
        ),
    )
    return evidence, stats


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=OFF, atol=OFF)


CASES = {
    "rlsd": {"gamma": 0.0},
    "egrsd": {"gamma": 0.8},
    "cl_egrsd": {"gamma": 0.8, "lookahead": 3},
}


@pytest.mark.parametrize("rows, length", [(1, 1), (5, 23), (2, 200)])
@pytest.mark.parametrize("name", CASES)
def test_each_is_the_references(name, rows, length):
    evidence, stats = rollouts(rows, length, length, CASES[name])
    # What a method has not, it does not read.
    foreign = replace(
        evidence,
        options=evidence.options._replace(gamma=0.5) if name == "rlsd" else evidence.options,
        lookahead=evidence.lookahead if name == "cl_egrsd" else Lookahead(7),
    )
    close(apply_token_advantage(TOKEN_ADVANTAGES[name], foreign), stats.token_advantage)


FILTERED = [
    {"lookahead": 5, "lookahead_filter": "discounted", "lookahead_decay": 0.8, "clip_eps": 0.5},
    {"lookahead": 5, "lookahead_filter": "softmin", "lookahead_temperature": 0.1},
    {"lookahead": 4, "lookahead_filter": "quantile", "lookahead_quantile": 0.3},
]


@pytest.mark.parametrize("options", [*CASES.values(), *FILTERED])
def test_the_signals_are_the_references(options):
    evidence, stats = rollouts(4, 31, 3, options)
    got = token_stats(evidence)
    for name, want in stats._asdict().items():
        close(getattr(got, name), want)
    assert not got.gradient_error_bound.any()


@pytest.mark.parametrize("name", ["grpo", "reinforce"])
def test_without_a_teacher_each_token_has_its_sequences_advantage(name):
    evidence, _ = rollouts(3, 9, 0, {})
    evidence = replace(evidence, contexts={})
    got = apply_token_advantage(TOKEN_ADVANTAGES[name], evidence)
    assert torch.equal(got, evidence.advantages[:, None] * evidence.mask)


def test_zero_gamma_and_no_magnitude_are_reinforce():
    evidence, _ = rollouts(3, 9, 1, {"gamma": 0.0, "clip_eps": 0.0})
    of = {name: apply_token_advantage(function, evidence) for name, function in TOKEN_ADVANTAGES.items()}
    assert all(torch.equal(of[name], of["grpo"]) for name in of)


def test_a_named_one_wants_one_context():
    evidence, _ = rollouts(2, 3, 0, {})
    with pytest.raises(ValueError, match=r"^contexts: expected one, which teaches, got None$"):
        TOKEN_ADVANTAGES["rlsd"](replace(evidence, contexts={}))
    two = dict.fromkeys(("right", "wrong"), evidence.teacher)
    with pytest.raises(ValueError, match=r"^contexts: expected one, which teaches, got 'right, wrong'$"):
        TOKEN_ADVANTAGES["egrsd"](replace(evidence, contexts=two))


def mine(evidence):
    return evidence.advantages[:, None] - 0.1 * evidence.teacher.entropy.exp()


def test_ones_own_counts_where_the_mask_is_and_has_no_gradient():
    evidence, _ = rollouts(3, 9, 2, {})
    scale = torch.ones((), dtype=torch.float32, requires_grad=True)

    def own(evidence):
        return torch.where(evidence.mask, mine(evidence).float() * scale, torch.nan)

    got = apply_token_advantage(own, evidence)
    assert got.dtype == torch.float64 and not got.requires_grad
    assert torch.equal(got, torch.where(evidence.mask, mine(evidence).float().double(), 0))


@pytest.mark.parametrize(
    "function, error, says",
    [
        (lambda e: e.advantages, ValueError, r"<lambda>: expected shape \(3, 9\), got a torch.float64 tensor of shape"),
        (lambda e: e.mask, TypeError, r"<lambda>: expected a floating-point tensor \(.*\), got a torch.bool tensor"),
        (lambda e: None, TypeError, r"<lambda>: expected a tensor, got None$"),
        (lambda e: e.student_logp / 0, ValueError, r"<lambda>: expected no NaN and no infinity at a valid position, "),
    ],
)
def test_what_ones_own_should_not_return(function, error, says):
    evidence, _ = rollouts(3, 9, 2, {})
    with pytest.raises(error, match=rf"^token_advantage: .*{says}") as caught:
        apply_token_advantage(function, evidence)
    assert "\n" not in str(caught.value)
