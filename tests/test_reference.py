"""The reference against numbers that can be checked by eye, and against the loop oracle.

Tolerance: 1e-12, relative and absolute. Hidden size, vocabulary and batch stay below 30 and logits near 10, so a log
probability carries some 30 roundings of 1.1e-16 · 10, about 3e-14; a gradient adds a sum of as many terms of size 1 to
10. From logits to loss only exp, log, clip, min and max follow, continuous all of them, with slopes near 1; the one
jump, sign(A), is taken of an exact input. So 1e-12 leaves room for another order of summation, while float32 anywhere
(6e-8) or a wrong term fails. Extreme logits (±1e4, whose last bit is 2e-12) are small integers plus 1e4, hence exact.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import (
    TokenStats,
    direction,
    egrsd_loss,
    entropy,
    entropy_scale,
    gate,
    log_prob,
    log_ratio,
    logits,
    lookahead_entropy,
    magnitude,
    normalised_entropy,
    token_advantage,
)
from tests.support.oracle import egrsd_oracle

INF, NAN = math.inf, math.nan


def f64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_close(actual: torch.Tensor, expected, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64).reshape(actual.shape)
    torch.testing.assert_close(actual.detach().double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def check_against_oracle(case: dict) -> tuple[torch.Tensor, TokenStats]:
    """Loss, every field of the statistics and every gradient of one case; the loss and the statistics come back."""
    learned = {name: case[name] for name in ("student_hidden", "student_weight", "student_bias") if name in case}
    frozen = {name: case[name] for name in ("teacher_hidden", "teacher_weight", "teacher_bias") if name in case}
    inputs = {k: x.clone().requires_grad_() for k, x in (learned | frozen).items() if x is not None}
    loss, stats = egrsd_loss(**case | inputs, return_stats=True)
    loss.backward()

    want = egrsd_oracle(**case)
    assert_close(loss, want.loss)
    assert set(want.stats) == set(TokenStats._fields)
    for name, values in stats._asdict().items():
        assert values.shape == case["target_ids"].shape and not values.requires_grad, name
        assert_close(values, want.stats[name])
    assert_close(inputs["student_hidden"].grad, want.grad_hidden)
    assert_close(inputs["student_weight"].grad, want.grad_weight)
    if "student_bias" in inputs:
        assert_close(inputs["student_bias"].grad, want.grad_bias)
    assert all(inputs[name].grad is None for name in frozen if name in inputs)
    return loss, stats


def make_case(
    seed: int = 0,
    layout: str = "padded",
    lengths: tuple[int, ...] = (5, 5, 5),
    per_token: bool = False,
    masking: str = "holes",
    ignored: bool = False,
    teacher: str = "shared head",
    bias: bool = False,
    **options,
) -> dict:
    """Random float64 inputs. Padded: every length is the first one; "one sequence": packed without cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def chance(p: float, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < p

    if layout == "padded":
        lengths = (lengths[0],) * len(lengths)
        shape = (len(lengths), lengths[0])
    else:
        lengths = lengths if layout == "packed" else (sum(lengths),)
        shape = (sum(lengths),)
    width, vocabulary = 3, 6
    case = dict(options)
    case["student_hidden"] = 1.5 * normal(*shape, width)
    case["student_weight"] = normal(vocabulary, width)
    case["target_ids"] = torch.randint(vocabulary, shape, generator=generator)
    case["advantages"] = normal(*(shape if per_token else (len(lengths),)))
    case["advantages"][chance(0.25, *case["advantages"].shape)] = 0.0
    if layout == "packed":
        case["cu_seqlens"] = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if bias:
        case["student_bias"] = normal(vocabulary)

    case["teacher_hidden"] = case["student_hidden"] + 0.3 * normal(*shape, width)
    if teacher == "other head":
        case["teacher_hidden"] = 1.5 * normal(*shape, width + 2)
        case["teacher_weight"] = normal(vocabulary, width + 2)
        case["teacher_bias"] = normal(vocabulary) if bias else None
    elif teacher == "statistics":
        case["teacher_hidden"] = None
        case["teacher_logp"] = -3 * normal(*shape).abs()
        case["teacher_entropy"] = 2 * normal(*shape).abs()

    if masking != "none":
        mask = chance(0.7, *shape)
        if masking == "all":
            mask[...] = False
        elif masking == "a whole sequence":
            mask.view(-1)[: lengths[0]] = False
        case["mask"] = mask if chance(0.5) else mask.long()
    if ignored:
        case["target_ids"][chance(0.3, *shape)] = -100
    return case


# ------------------------------------------------------------------------------------------------ by eye


def test_logits_cap_before_temperature():
    hidden, weight, bias = f64(1, 2), torch.tensor([[3, 0], [0, -4]]).double(), f64(0.5, 1)
    assert_close(logits(hidden, weight), [3, -8])
    assert_close(logits(hidden, weight, bias), [3.5, -7])
    assert_close(logits(hidden, weight, bias, temperature=2.0), [1.75, -3.5])
    assert_close(logits(hidden, weight, bias, 5.0, 2.0), [2.5 * math.tanh(0.7), 2.5 * math.tanh(-1.4)])


def test_log_prob_and_entropy_of_known_distributions():
    p = f64([0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [1, 0, 0])
    z = p.log() + f64([7], [-3], [0])  # a shift of all logits changes nothing
    assert_close(entropy(z), [1.5 * math.log(2), math.log(3), 0])
    assert_close(log_prob(z, torch.tensor([0, 2, 0])), [-math.log(2), -math.log(3), 0])
    assert log_prob(z, torch.tensor([0, 1, 1]))[2] == -INF


def test_log_prob_and_entropy_at_extreme_logits():
    z = f64([1e4, -1e4, 0], [-1e4, -1e4, -INF], [1e4, 1e4 - 1, -1e4])
    p = 1 / (1 + math.exp(-1))
    assert_close(log_prob(z, torch.tensor([1, 0, 1])), [-2e4, -math.log(2), math.log(1 - p)])
    assert_close(entropy(z), [0, math.log(2), -p * math.log(p) - (1 - p) * math.log(1 - p)])


def test_entropy_keeps_nan():
    assert entropy(f64(0, NAN, 1)).isnan()


@pytest.mark.parametrize("target", [-101, -1, 3, 10**9])
def test_log_prob_of_a_target_outside_the_vocabulary_is_nan(target):
    got = log_prob(torch.zeros(2, 3), torch.tensor([target, 1]))
    assert got[0].isnan() and got[1] == -torch.tensor(3.0).log()


def test_direction_and_log_ratio():
    assert direction(f64(-0.3, 0, 2)).tolist() == [-1, 0, 1]
    assert_close(log_ratio(f64(0.75).log(), f64(0.25).log()), [math.log(3)])


def test_magnitude_by_eye():
    advantage = f64(2, 2, 2, -1, -1, -1, 0)
    teacher_over_student = f64(1.1, 3, 0.5, 1.1, 3, 0.5, 3)
    student_logp = f64(*[0.2] * 7).log()
    w = magnitude(advantage, (0.2 * teacher_over_student).log(), student_logp, 0.2)
    assert_close(w, [1.1, 1.2, 0.8, 1 / 1.1, 0.8, 1.2, 1])


def test_magnitude_at_impossible_tokens():
    advantage, impossible, likely = f64(1, -1, 0), f64(-INF, -INF, -INF), f64(-1, -1, -1)
    assert_close(magnitude(advantage, likely, impossible, 0.2), [1.2, 0.8, 1])
    assert_close(magnitude(advantage, impossible, likely, 0.2), [0.8, 1.2, 1])
    assert_close(magnitude(advantage, impossible, impossible, 0.2), [NAN, NAN, 1])  # no ratio, unless it is not asked


H = f64(5, 3, 4, 1, 2, 0.5, 7)  # two sequences: five tokens and two, whose entropies no window of the first may see
SEQ_END = torch.tensor([4, 4, 4, 4, 4, 6, 6])
ALL = torch.ones(7, dtype=torch.bool)
HOLE = torch.tensor([True, True, True, False, True, True, False])  # 1 and 7 are not valid


@pytest.mark.parametrize(
    ("mask", "window", "expected"),
    [
        (ALL, 0, [5, 3, 4, 1, 2, 0.5, 7]),
        (ALL, 1, [3, 3, 1, 1, 2, 0.5, 7]),
        (ALL, 2, [3, 1, 1, 1, 2, 0.5, 7]),
        (ALL, 3, [1, 1, 1, 1, 2, 0.5, 7]),
        (ALL, 1000, [1, 1, 1, 1, 2, 0.5, 7]),
        (HOLE, 0, [5, 3, 4, 0, 2, 0.5, 0]),
        (HOLE, 1, [3, 3, 4, 0, 2, 0.5, 0]),  # position 2 sees itself and the hole
        (HOLE, 2, [3, 3, 2, 0, 2, 0.5, 0]),  # and here looks over the hole
        (HOLE, 1000, [2, 2, 2, 0, 2, 0.5, 0]),
        (~ALL, 2, [0] * 7),
    ],
)
def test_lookahead_by_eye(mask, window, expected):
    assert_close(lookahead_entropy(H, mask, SEQ_END, window), expected)


def test_lookahead_propagates_nan_of_valid_positions_only():
    h = f64(5, 3, NAN, 1, 2, NAN, 7)
    assert_close(lookahead_entropy(h, ALL, SEQ_END, 1), [3, NAN, NAN, 1, 2, NAN, 7])
    mask = ~h.isnan()
    assert_close(lookahead_entropy(h, mask, SEQ_END, 1), [3, 3, 0, 1, 2, 0, 7])


def test_lookahead_of_nothing():
    empty = torch.zeros(0)
    assert lookahead_entropy(empty, empty.bool(), empty.long(), 3).shape == (0,)


def test_entropy_scale_by_eye():
    h_cl = f64(3, 3, 2, 0, 2, 0.5, 0)
    assert entropy_scale(H, h_cl, ALL) == 7  # the raw maximum, Eq. 8
    assert entropy_scale(H, h_cl, HOLE) == 5  # of valid tokens
    first = torch.arange(7) < 2
    assert entropy_scale(H, h_cl, first, "batch_max") == 5
    assert entropy_scale(H, h_cl, first, "batch_max_lookahead") == 3  # Algorithm 1
    assert entropy_scale(H, h_cl, first, "batch_max", 5.5) == 5.5
    assert entropy_scale(H, h_cl, ~ALL) == 1 and entropy_scale(H, h_cl, ~ALL, "batch_max_lookahead", 0.25) == 0.25
    assert entropy_scale(H, h_cl, ALL, 2.5) == 2.5
    assert entropy_scale(H, h_cl, ALL, torch.tensor(2.5)) == 2.5
    assert entropy_scale(H, h_cl, ALL, 0.5) == 1 and entropy_scale(H, h_cl, ALL, torch.tensor(0.5), 0.75) == 0.75
    assert all(entropy_scale(H, h_cl, ALL, s).shape == () for s in ("batch_max", "batch_max_lookahead", 2, 2.0))
    assert entropy_scale(f64(NAN, 1), f64(NAN, 1), torch.tensor([True, True])).isnan()
    with pytest.raises(ValueError, match="entropy_scale is 'max'"):
        entropy_scale(H, h_cl, ALL, "max")


def test_normalised_entropy_in_both_orders():
    h, h_cl, valid = f64(4, 2), f64(2, 2), torch.tensor([True, True])
    assert_close(normalised_entropy(h, h_cl, valid), [0.5, 0.5])
    assert_close(normalised_entropy(h, h_cl, valid, "batch_max_lookahead"), [1, 1])
    assert_close(normalised_entropy(h, h_cl, valid, 8.0), [0.25, 0.25])


def test_gate_by_eye():
    assert_close(gate(f64(0, 0.5, 1, 2, 3, 10), 0.3, 0.1), [1, 0.85, 0.7, 0.4, 0.1, 0.1])
    assert_close(gate(f64(0, 0.5, 1), 0.0, 0.1), [1, 1, 1])
    assert_close(gate(f64(0, 0.5, 1), 1.0, 0.25), [1, 0.5, 0.25])
    assert_close(gate(f64(0.5), -1.0, 0.1), [1])  # never above 1


def test_token_advantage_by_eye():
    assert_close(token_advantage(f64(2, -1, 0), f64(1.2, 0.8, 1), f64(0.5, 1, 0.5)), [1.2, -0.8, 0])
    assert token_advantage(f64(0, 0), f64(NAN, 1), f64(1, NAN)).tolist() == [0, 0]


def one_token(**options) -> dict:
    """The student says 1/2 : 1/2, the teacher 3/4 : 1/4, and the token is the teacher's favourite."""
    case = {"student_hidden": f64([1.0]), "student_weight": torch.zeros(2, 1, dtype=torch.float64)}
    case |= {"teacher_hidden": f64([1.0]), "teacher_weight": f64([math.log(3)], [0.0])}
    return case | {"target_ids": torch.tensor([0]), "advantages": f64(2.0)} | options


def test_loss_of_one_token_by_hand():
    loss, stats = check_against_oracle(one_token(min_entropy_scale=0.5))
    h = 2 * math.log(2) - 0.75 * math.log(3)  # 0.562 nat, which is the batch maximum
    assert_close(torch.stack(stats)[:, 0], [-math.log(2), math.log(0.75), h, h, 1.2, 0.7, 2 * 1.2 * 0.7])
    assert_close(loss, 1.68 * math.log(2))
    loss, stats = check_against_oracle(one_token())  # at least 1 nat
    assert_close(stats.gate, [1 - 0.3 * h])
    loss, stats = check_against_oracle(one_token(advantages=f64(-2.0), min_entropy_scale=0.5))
    assert_close(loss, -2 * 0.8 * 0.7 * math.log(2))
    loss, _ = check_against_oracle(one_token(advantages=f64(0.0)))
    assert loss == 0


def test_gradient_of_one_token_by_hand():
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    egrsd_loss(**one_token(min_entropy_scale=0.5, student_bias=bias)).backward()
    assert_close(bias.grad, [-1.68 * 0.5, 1.68 * 0.5])  # −Â (1[v = y] − p_v)


# ------------------------------------------------------------------------------------- against the oracle


@settings(max_examples=250)
@given(
    seed=st.integers(0, 2**31),
    layout=st.sampled_from(["padded", "packed", "one sequence"]),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    per_token=st.booleans(),
    masking=st.sampled_from(["none", "holes", "holes", "a whole sequence", "all"]),
    ignored=st.booleans(),
    teacher=st.sampled_from(["shared head", "other head", "statistics"]),
    bias=st.booleans(),
    lookahead=st.one_of(st.integers(0, 8), st.just(100)),
    window=st.sampled_from(
        [
            {},
            *({"lookahead_filter": "discounted", "lookahead_decay": decay} for decay in (1.0, 0.9, 0.4)),
            *({"lookahead_filter": "softmin", "lookahead_temperature": tau} for tau in (0.0, 0.05, 2.0)),
            *({"lookahead_filter": "quantile", "lookahead_quantile": q} for q in (0.0, 0.5, 0.8, 1.0)),
        ]
    ),
    gamma=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    gate_floor=st.sampled_from([0.1, 0.4]),
    clip_eps=st.sampled_from([0.0, 0.2, 0.9]),
    scale=st.sampled_from(["batch_max", "batch_max_lookahead", math.log(6), 0.01, torch.tensor(1.5)]),
    min_entropy_scale=st.sampled_from([1.0, 0.05]),
    temperature=st.sampled_from([1.0, 0.5, 1.7]),
    softcap=st.sampled_from([None, 2.0]),
    normalizer=st.sampled_from([None, 7.5, torch.tensor(40)]),
)
def test_matches_oracle(scale, window, **spec):
    check_against_oracle(make_case(**spec, **window, entropy_scale=scale))


@pytest.mark.parametrize("scale", ["batch_max", "batch_max_lookahead"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("window", [*range(9), 50])
def test_matches_oracle_at_every_window(window, layout, scale):
    case = make_case(3, layout, (7, 1, 4, 7), lookahead=window, entropy_scale=scale, min_entropy_scale=0.1, gamma=1.0)
    check_against_oracle(case)


def test_random_cases_reach_both_ends_of_both_clips():
    """The comparison above would prove little if its magnitudes and gates never left, or never entered, their range."""
    cases = [make_case(seed, per_token=True, masking="none", gamma=2.0, teacher="other head") for seed in range(20)]
    seen = [check_against_oracle(case)[1] for case in cases]
    w, omega, a = (torch.cat([getattr(s, name) for s in seen]) for name in ("magnitude", "gate", "token_advantage"))
    for values, low, high in ((w, 0.8, 1.2), (omega, 0.1, 1.0)):
        inside = (values > low + 1e-6) & (values < high - 1e-6)
        assert inside.any() and (values - low).abs().min() < 1e-12 and values.min() >= low and values.max() <= high
    assert (w == w.max()).any() and w.max() == 1.2 and omega.max() > 0.9
    assert (a > 0).any() and (a < 0).any() and (a == 0).any()


@pytest.mark.parametrize("lengths", [(1, 1, 1), (0, 3, 0, 2), (0, 0, 4)])
@pytest.mark.parametrize("per_token", [False, True])
def test_packed_with_empty_and_single_token_sequences(lengths, per_token):
    check_against_oracle(make_case(5, "packed", lengths, per_token, masking="none", lookahead=3))


def test_as_many_packed_advantages_as_tokens_are_a_tokens():
    case = make_case(5, "packed", (0, 2), masking="none") | {"advantages": f64(1, -1)}  # S = N = 2
    _, stats = check_against_oracle(case)
    assert stats.token_advantage[0] > 0 > stats.token_advantage[1]


def extreme_case(bias: torch.Tensor, **options) -> dict:
    generator = torch.Generator().manual_seed(11)
    case = {"student_hidden": torch.randint(-2, 3, (2, 4, 2), generator=generator).double()}
    case["teacher_hidden"] = torch.randint(-2, 3, (2, 4, 2), generator=generator).double()
    case["student_weight"] = torch.randint(-2, 3, (5, 2), generator=generator).double()
    case["target_ids"] = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
    case["advantages"] = torch.tensor([[1, -1, 0, 2], [-0.5, 0.5, 1, 0]]).double()
    return case | {"student_bias": bias, "teacher_bias": bias.flip(0)} | options


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("window", [0, 2])
def test_matches_oracle_at_logits_of_ten_thousand(window, softcap):
    bias = f64(1e4, -1e4, 1e4, 0, -1e4)
    loss, stats = check_against_oracle(extreme_case(bias, lookahead=window, softcap=softcap))
    assert loss.isfinite() and all(values.isfinite().all() for values in stats)


def test_matches_oracle_where_a_token_is_impossible():
    case = extreme_case(f64(0, -INF, 1, 2, -INF), teacher_bias=f64(0, 1, 1, 2, -INF))
    case["target_ids"] = torch.tensor([[0, 2, 2, 2], [3, 0, 2, 1]])  # the last is impossible for the student: A = 0
    loss, stats = check_against_oracle(case)
    assert stats.student_logp[1, 3] == -INF and stats.token_advantage[1, 3] == 0 and loss.isfinite()
    case["advantages"][1, 3] = 1.0
    loss, stats = check_against_oracle(case)
    assert loss == INF and stats.magnitude[1, 3] == 1.2
    case["target_ids"][1, 3] = 4  # impossible for the teacher too: there is no ratio
    loss, stats = check_against_oracle(case)
    assert loss.isnan() and stats.magnitude[1, 3].isnan()


# ------------------------------------------------------------------------------------ masks, empty batches, NaN


def loss_of(case: dict, **changes):
    return egrsd_loss(**case | changes)


@pytest.mark.parametrize("layout", ["padded", "packed", "one sequence"])
def test_masked_positions_may_hold_anything(layout):
    case = make_case(2, layout, (6, 3, 5), per_token=True, ignored=True, lookahead=3, gamma=1.0)
    clean = {**case, "student_hidden": case["student_hidden"].requires_grad_()}
    loss, stats = loss_of(clean, return_stats=True)
    loss.backward()

    masked = ~(case["mask"].bool() & (case["target_ids"] != -100))
    assert masked.any() and not masked.all()
    dirty = {name: case[name].detach().clone() for name in ("student_hidden", "teacher_hidden", "advantages")}
    for x in dirty.values():
        x[masked] = NAN
    dirty["student_hidden"].requires_grad_()
    dirty["target_ids"] = case["target_ids"].masked_fill(masked & (case["target_ids"] != -100), 10**6)
    dirty_loss, dirty_stats = loss_of(case | dirty, return_stats=True)
    dirty_loss.backward()
    assert dirty_loss.item() == loss.item()
    assert torch.equal(dirty["student_hidden"].grad, clean["student_hidden"].grad)
    for values, dirty_values in zip(stats, dirty_stats, strict=True):
        assert torch.equal(values, dirty_values) and (values[masked] == 0).all()


@pytest.mark.parametrize("how", ["mask", "ignored targets", "no tokens"])
@pytest.mark.parametrize("teacher", ["shared head", "other head", "statistics"])
@pytest.mark.parametrize("normalizer", [None, 0.0, 4.0])
def test_no_valid_token_gives_zero_loss_and_zero_gradients(how, teacher, normalizer):
    lengths = (0, 0) if how == "no tokens" else (4, 4)
    case = make_case(1, "padded", lengths, masking="none", teacher=teacher, bias=True, normalizer=normalizer)
    if how == "mask":
        case["mask"] = torch.zeros_like(case["target_ids"])
    else:
        case["target_ids"][...] = -100
    case["student_hidden"][...] = NAN
    leaves = [case[name].requires_grad_() for name in ("student_hidden", "student_weight", "student_bias")]
    loss, stats = loss_of(case, return_stats=True)
    loss.backward()
    assert loss.item() == 0
    assert all((leaf.grad == 0).all() and leaf.grad.shape == leaf.shape for leaf in leaves)
    assert all((values == 0).all() for values in stats)


def test_bad_values_of_valid_positions_are_not_hidden():
    case = make_case(0, masking="none", per_token=True)
    case["advantages"][0, 0] = 0.0
    target_ids = case["target_ids"].clone()
    target_ids[0, 0] = 6  # V: out of range, even where the advantage is 0
    loss, stats = loss_of(case, target_ids=target_ids, return_stats=True)
    assert loss.isnan() and stats.student_logp.isnan().sum() == 1 and stats.student_logp[0, 0].isnan()
    for name in ("student_hidden", "teacher_hidden", "advantages"):
        bad = case[name].clone()
        bad[1, 2] = NAN
        assert loss_of(case, **{name: bad}).isnan(), name


def test_nan_teacher_entropy_reaches_its_windows_and_the_batch_maximum():
    case = make_case(4, "packed", (4, 3), masking="none", per_token=True, teacher="statistics", lookahead=1)
    case["advantages"] = case["advantages"].abs() + 0.1
    case["teacher_entropy"][2] = NAN
    loss, stats = loss_of(case, return_stats=True)
    assert loss.isnan() and stats.lookahead_entropy.isnan().tolist() == [False, True, True, False, False, False, False]
    assert stats.gate.isnan().all()
    loss, stats = loss_of(case, entropy_scale=2.0, return_stats=True)
    assert loss.isnan() and stats.gate.isnan().sum() == 2
    assert not loss_of(case, mask=~case["teacher_entropy"].isnan()).isnan()


# ------------------------------------------------------------------------------------- layouts, dtypes, special cases


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("per_token", [False, True])
def test_packed_without_padding_equals_padded_with_mask(window, per_token):
    case = make_case(8, "padded", (5, 5, 5), per_token, masking="none", lookahead=window)
    lengths = torch.tensor([5, 2, 3])
    mask = torch.arange(5) < lengths[:, None]
    packed = {name: case[name][mask] for name in ("student_hidden", "teacher_hidden", "target_ids")}
    packed["advantages"] = case["advantages"][mask] if per_token else case["advantages"]
    cu_seqlens = torch.tensor([0, 5, 7, 10], dtype=torch.int32)
    loss, stats = loss_of(case, mask=mask, return_stats=True)
    packed_loss, packed_stats = loss_of(case | packed, cu_seqlens=cu_seqlens, return_stats=True)
    assert_close(packed_loss, loss.item())
    for values, packed_values in zip(stats, packed_stats, strict=True):
        assert_close(packed_values, values[mask])


def test_no_clip_and_no_gate_is_reinforce():
    case = make_case(6, masking="none", gamma=0.0, clip_eps=0.0)
    logp = log_prob(logits(case["student_hidden"], case["student_weight"]), case["target_ids"])
    assert_close(loss_of(case), -(case["advantages"][:, None] * logp).mean())


def test_teacher_statistics_stand_in_for_the_teacher():
    case = make_case(7, teacher="other head", bias=True, lookahead=2)
    loss, stats = loss_of(case, return_stats=True)
    given_stats = {"teacher_logp": stats.teacher_logp, "teacher_entropy": stats.teacher_entropy}
    assert loss_of(case | given_stats, teacher_hidden=None, teacher_weight=None, teacher_bias=None) == loss


def test_shared_head_is_weight_and_bias():
    case = make_case(9, bias=True)
    explicit = loss_of(case, teacher_weight=case["student_weight"], teacher_bias=case["student_bias"])
    assert loss_of(case) == explicit
    assert loss_of(case, teacher_weight=case["student_weight"]) != explicit  # a head of its own: no bias unless given
    zero = torch.zeros_like(case["student_bias"])
    assert loss_of(case, teacher_bias=zero) == loss_of(case, teacher_weight=case["student_weight"])


def test_dtype_upcasts_every_input_and_stays_differentiable():
    case = make_case(10, bias=True, teacher="other head", lookahead=1)
    low = {k: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in case.items()}
    want = egrsd_oracle(**low)
    leaves = {name: low[name].requires_grad_() for name in ("student_hidden", "student_weight", "student_bias")}
    loss, stats = loss_of(low | leaves, dtype=torch.float64, return_stats=True)
    loss.backward()
    assert loss.dtype == torch.float64 and all(values.dtype == torch.float64 for values in stats)
    assert_close(loss, want.loss)
    assert_close(stats.gate, want.stats["gate"])
    expected = (want.grad_hidden, want.grad_weight, want.grad_bias)
    for leaf, gradient in zip(leaves.values(), expected, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert_close(leaf.grad, gradient, 1.2e-7)  # one rounding to float32 on the way back to the leaf


def test_bfloat16_inputs_upcast_exactly():
    case = make_case(12, teacher="statistics")
    low = {k: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in case.items()}
    high = {k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in low.items()}
    assert loss_of(low, dtype=torch.float64) == loss_of(high) != loss_of(case)


def test_constants_get_no_gradient():
    case = make_case(13, teacher="statistics", per_token=True, entropy_scale=torch.tensor(2.0))
    names = ("advantages", "teacher_logp", "teacher_entropy", "entropy_scale")
    leaves = [case[name].requires_grad_() for name in names]
    case["student_hidden"].requires_grad_()
    loss_of(case).backward()
    assert case["student_hidden"].grad.abs().max() > 0 and all(leaf.grad is None for leaf in leaves)


PADDED = make_case(0, "padded", (4, 4), masking="none")
PACKED = make_case(0, "packed", (4, 3), masking="none")


@pytest.mark.parametrize(
    ("case", "wrong", "message"),
    [
        (PADDED, {"advantages": torch.ones(4)}, "advantages is"),
        (PADDED, {"advantages": torch.ones(2, 1)}, "advantages is"),
        (PADDED, {"mask": torch.ones(4)}, "mask is"),
        (PADDED, {"student_hidden": torch.ones(8, 3)}, "student_hidden is"),
        (PADDED, {"teacher_hidden": torch.ones(2, 1, 3)}, "teacher_hidden is"),
        (PADDED, {"cu_seqlens": torch.tensor([0, 8])}, "cu_seqlens is"),
        (PADDED, {"teacher_hidden": None}, "expected either"),
        (PADDED, {"teacher_hidden": None, "teacher_logp": torch.ones(2, 4)}, "expected either"),
        (PADDED, {"teacher_logp": torch.ones(2, 4), "teacher_entropy": torch.ones(2, 4)}, "expected either"),
        (PADDED, {"entropy_scale": "max"}, "entropy_scale is"),
        (PACKED, {"advantages": torch.ones(3)}, "advantages is"),
        (PACKED, {"advantages": torch.ones(7, 1)}, "advantages is"),
        (PACKED, {"cu_seqlens": None}, "advantages is"),
        (PACKED, {"cu_seqlens": torch.tensor([0, 4, 6])}, "cu_seqlens is"),
        (PACKED, {"cu_seqlens": torch.tensor([1, 4, 7])}, "cu_seqlens is"),
        (PACKED, {"cu_seqlens": torch.tensor([0, 8, 7])}, "cu_seqlens is"),
    ],
)
def test_shapes_that_do_not_fit_are_named(case, wrong, message):
    with pytest.raises(ValueError, match=message):
        loss_of(case, **wrong)
