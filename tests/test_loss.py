"""``fused_egrsd_loss`` against the reference: loss, every field of the statistics, every gradient, on every backend."""

from __future__ import annotations

import math

import pytest
import torch

from egrsd_kernels import fused_egrsd_loss
from egrsd_kernels.backends import triton as triton_backend
from tests.support.cases import SPARSE, Draw, draw_head, make_case
from tests.support.devices import CPU_COMBOS, Combo, all_combos, cuda_combos, few_combos, sparse_combos
from tests.support.tolerances import (
    LEARNED,
    assert_gradient,
    check_parity,
    gradient_tolerance,
    loss_scale,
    package_result,
    reference_result,
)

LN61 = math.log(61)
MIXED = {"layout": "packed", "lengths": (1, 6, 0, 1, 9)}  # sequences of length 1 and 0 among others
DISCOUNTED = {"lookahead_filter": "discounted", "lookahead_decay": 0.7}
SOFTMIN = {"lookahead_filter": "softmin", "lookahead_temperature": 0.2}
QUANTILE = {"lookahead_filter": "quantile", "lookahead_quantile": 0.4}

CASES = {
    # what `make test` runs in Triton's interpreter
    "all at once": dict(
        **MIXED,
        lookahead=3,
        **DISCOUNTED,
        mask="holes",
        ignored=True,
        teacher="own head",
        bias=True,
        softcap=6.0,
        temperature=0.8,
    ),
    # lookahead and layout
    "padded": {},
    "padded, W 1, bias": {"lookahead": 1, "bias": True},
    "padded, W 2, holes": {"lookahead": 2, "mask": "holes"},
    "padded, W 5": {"lookahead": 5, "bias": True, "temperature": 1.3},
    "padded, W past the end": {"lookahead": 50, "mask": "holes", "ignored": True},
    "packed": dict(**MIXED),
    "packed, W 3, holes": dict(**MIXED, lookahead=3, mask="holes", bias=True),
    "packed, W 4": dict(**MIXED, lookahead=4, per_token=True),
    "packed, W 6, ignored": dict(**MIXED, lookahead=6, ignored=True),
    "packed, W 7": dict(**MIXED, lookahead=7, entropy_scale="batch_max_lookahead"),
    "packed, W 8": dict(**MIXED, lookahead=8),
    "packed, W 10^9": dict(**MIXED, lookahead=10**9, mask="holes"),
    "packed, W 3, discounted": dict(**MIXED, lookahead=3, **DISCOUNTED, mask="holes", gamma=1.0),
    "packed, W 3, softmin": dict(**MIXED, lookahead=3, **SOFTMIN, mask="holes", gamma=1.0),
    "packed, W 5, quantile": dict(**MIXED, lookahead=5, **QUANTILE, mask="holes", gamma=1.0),
    "padded, W 50, discounted": {"lookahead": 50, **DISCOUNTED, "entropy_scale": "batch_max_lookahead", "gamma": 1.0},
    "one sequence, W 3": {"layout": "one sequence", "lengths": (13,), "lookahead": 3},
    "sequences of length 1, W 2": {"lengths": (1,) * 5, "lookahead": 2},
    "one token": {"lengths": (1,)},
    # masks and advantages
    "a masked sequence": {"mask": "a sequence", "lookahead": 3},
    "ignored targets": {"ignored": True},
    "ignored and masked": {"ignored": True, "mask": "a sequence", "per_token": True, "lookahead": 1},
    "per-token advantages": {"per_token": True, "mask": "holes"},
    # sizes
    "V 257, D 40": {"vocabulary": 257, "width": 40, "lookahead": 3, "bias": True},
    "V 1003, D 17": {"vocabulary": 1003, "width": 17, "lengths": (4, 4)},
    "V 130, D 100": {"vocabulary": 130, "width": 100, "lengths": (4, 4), "bias": True},
    "V 2, D 1": {"vocabulary": 2, "width": 1, "bias": True},
    # logits
    "flat": {"kind": "flat", "bias": False, "lookahead": 3},
    "temperature": {"temperature": 0.6, "bias": True},
    "softcap": {"softcap": 6.0, "bias": True},
    "softcap 1e5": {"softcap": 1e5, "bias": True},
    "softcap, temperature": {"softcap": 4.0, "temperature": 1.7, "bias": True, "vocabulary": 257},
    # teachers
    "own head": {"teacher": "own head", "lookahead": 3},
    "own head, biases": dict(teacher="own head", bias=True, **MIXED),
    "statistics": {"teacher": "statistics", "lookahead": 3},
    "statistics, packed": dict(teacher="statistics", mask="holes", **MIXED, lookahead=2, gamma=1.0),
}
CREDIT = {  # what comes after log p and H is float32 for operands of every half-precision dtype
    "gamma 0": {"gamma": 0.0},
    "gamma 1, W 5": dict(gamma=1.0, lookahead=5, **MIXED),
    "the gate's floor": {"gamma": 3.0, "gate_floor": 0.25},
    "floor 0": {"gamma": 2.0, "gate_floor": 0.0},
    "floor 1": {"gate_floor": 1.0},
    "clip_eps 0": {"clip_eps": 0.0},
    "clip_eps 0.7": {"clip_eps": 0.7, "teacher": "own head"},
    "batch_max_lookahead": {"entropy_scale": "batch_max_lookahead", "lookahead": 3, "min_entropy_scale": 0.01},
    "entropy_scale float": {"entropy_scale": LN61, "lookahead": 2},
    "entropy_scale int": {"entropy_scale": 3},
    "entropy_scale tensor": {"entropy_scale": torch.tensor(2.5)},
    "min_entropy_scale above": {"min_entropy_scale": 6.0, "entropy_scale": 2.0},
    "min_entropy_scale below": {"min_entropy_scale": 1e-3, "kind": "peaked"},
    "normalizer": {"normalizer": 37},
    "normalizer tensor": {"normalizer": torch.tensor(12.5)},
    "integer normalizer tensor, masked": {"normalizer": torch.tensor(5), "mask": "holes"},
}
SPARSE_CASES = [  # of CASES: what the gradients depend on
    "padded, W 1, bias", "packed, W 3, holes", "one token", "ignored and masked", "per-token advantages",
    "V 257, D 40", "V 1003, D 17", "V 2, D 1", "flat", "softcap, temperature", "own head, biases", "statistics, packed",
]  # fmt: skip
EXTREME = {
    "extreme": {"kind": "extreme", "vocabulary": 130},
    "extreme, bias": dict(kind="extreme", bias=True, lookahead=3, **MIXED),
    "extreme, softcap": {"kind": "extreme", "softcap": 30.0},
    "extreme, own head": {"kind": "extreme", "teacher": "own head", "mask": "holes", "temperature": 0.5},
}


@all_combos
def test_a_student_that_is_its_own_teacher(combo):
    """Both log p make the same errors in the logits: what is left of their difference are roundings of log p itself."""
    draw = Draw(11)
    weight = draw_head(draw, 300, 24).to(combo.device, combo.dtype)
    hidden = (40 * draw.normal(256, 24)).to(combo.device, combo.dtype)
    targets = (hidden.double() @ weight.double().T).topk(2).indices[torch.arange(256), torch.arange(256) % 2]
    advantages = torch.ones(1, device=combo.device)
    hidden.requires_grad_()
    _, s = fused_egrsd_loss(hidden, weight, hidden, targets, advantages, backend=combo.backend, return_stats=True)
    u = 2.0**-53 if combo.compute_dtype == torch.float64 else 2.0**-24
    assert (s.teacher_logp <= 0).all() and (s.student_logp <= 0).all()
    assert ((s.teacher_logp - s.student_logp).abs() <= 32 * u * (1 + s.student_logp.abs())).all()


@all_combos
@pytest.mark.parametrize("name", [*CASES, *CREDIT])
def test_parity(combo, name):
    if name in CREDIT and combo.interpreted and combo.dtype == torch.float16:
        pytest.skip("float32 shows it")
    got, want = check_parity(make_case(combo, **(CASES | CREDIT)[name]), combo)
    assert want.loss != 0 and want.gradients["student_hidden"].norm() > 0, "the case shows nothing"
    assert got.loss.isfinite()


@sparse_combos
@pytest.mark.parametrize("name", SPARSE_CASES)
def test_sparse_parity(combo, name):
    check_parity(make_case(combo, **CASES[name], **SPARSE), combo)


@sparse_combos
@pytest.mark.parametrize("name", ["extreme, bias", "extreme, softcap"])
def test_sparse_parity_at_extreme_logits(combo, name):
    check_parity(make_case(combo, **EXTREME[name], **SPARSE), combo, ordinary=False)


@all_combos
def test_a_vocabulary_of_one(combo):
    """p = 1: nothing to learn. What is left of 1 - p is rounding, a few times the unit roundoff."""
    case = make_case(combo, vocabulary=1, bias=True)
    got = package_result(case, combo)
    small = 64 * combo.unit_roundoff * case["student_hidden"].abs().max().item()
    assert all(x.abs().max() <= small for x in (got.loss, *got.stats[:4], *got.gradients.values()))


@all_combos
@pytest.mark.parametrize("name", EXTREME)
def test_parity_at_extreme_logits(combo, name):
    case = make_case(combo, **EXTREME[name])
    got, _ = check_parity(case, combo, ordinary=False)
    assert got.loss.isfinite()
    assert all(x.isfinite().all() for x in (*got.stats, *got.gradients.values()))


@all_combos
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_minus_infinity(combo, sign):
    """-inf through the bias, for a third of the vocabulary and for two targets: log p = -inf there, and no NaN."""
    case = make_case(combo, bias=True, teacher="own head", lengths=(6, 6), vocabulary=150)
    case["advantages"] = torch.tensor([sign * 0.7, sign * -1.1], device=combo.device)
    case["student_bias"][::3] = -math.inf
    case["target_ids"][case["target_ids"] % 3 == 0] += 1
    case["target_ids"][0, 2], case["target_ids"][1, 4] = 3, 6
    case["teacher_bias"][5::7] = -math.inf
    case["target_ids"][case["target_ids"] % 7 == 5] -= 1
    case["target_ids"][0, 0], case["target_ids"][1, 1] = 5, 19  # impossible for the teacher
    # The other sequence's infinity has the other sign; the sum of both would be NaN, in the reference as well.
    case["mask"] = torch.ones(2, 6, dtype=torch.int64, device=combo.device)
    case["mask"][1, 4] = 0
    got, want = check_parity(case, combo)
    assert got.loss == want.loss == sign * math.inf
    assert got.stats.student_logp[0, 2] == -math.inf and got.stats.teacher_logp[0, 0] == -math.inf
    assert all(x.isfinite().all() for x in got.gradients.values())
    assert got.gradients["student_hidden"][0, 2].norm() > 0

    # Without an advantage an impossible token costs nothing.
    case["advantages"] = torch.tensor([0.0, 1.0], device=combo.device)
    got, want = check_parity(case, combo)
    assert got.loss.isfinite() and got.loss == pytest.approx(want.loss.item(), rel=1e-5)


@all_combos
def test_a_target_impossible_for_both(combo):
    """Teacher and student share a head and its -inf: δ = -inf + inf is NaN there, and nowhere else."""
    case = make_case(combo, bias=True)
    case["student_bias"][7] = -math.inf
    case["target_ids"][case["target_ids"] == 7] = 8
    case["target_ids"][1, 3] = 7
    got, want = check_parity(case, combo)
    assert got.loss.isnan() and want.loss.isnan()
    finite = torch.ones(3, 6, dtype=torch.bool)
    finite[1, 3] = False
    assert got.gradients["student_hidden"][finite].isfinite().all()
    case["advantages"][1] = 0
    got, _ = check_parity(case, combo)
    assert got.loss.isfinite()


@all_combos
def test_an_extreme_hidden_state_beside_ordinary_ones(combo):
    """One row with logits of ±1e4 and an unlikely target: its p_y underflows; its neighbours keep their accuracy."""
    case = make_case(combo, lengths=(5, 5), teacher="own head")
    direction = case["student_hidden"][0, 1].float()
    case["student_hidden"][0, 1] = (direction / direction.norm() * 1e4).to(combo.dtype)
    z = case["student_weight"].double() @ case["student_hidden"][0, 1].double()
    case["target_ids"][0, 1] = z.argmin()
    got, want = check_parity(case, combo, ordinary=False)
    assert want.stats.student_logp[0, 1] < -5000
    others = torch.ones(2, 5, dtype=torch.bool)
    others[0, 1] = False
    assert_gradient(
        "student_hidden",
        got.gradients["student_hidden"][others],
        want.gradients["student_hidden"][others],
        gradient_tolerance(combo),
    )


@all_combos
def test_nan_in_one_valid_hidden_state_stays_there(combo):
    case = make_case(combo, teacher="own head", lookahead=2)
    case["student_hidden"][1, 2] = math.nan
    got, want = package_result(case, combo), reference_result(case)
    assert got.loss.isnan() and want.loss.isnan()
    others = torch.ones(3, 6, dtype=torch.bool)
    others[1, 2] = False
    for name, x in want.stats._asdict().items():
        assert torch.equal(getattr(got.stats, name).isnan(), x.isnan())
    assert_gradient(
        "student_hidden",
        got.gradients["student_hidden"][others],
        want.gradients["student_hidden"][others],
        gradient_tolerance(combo),
    )


# ------------------------------------------------------------------------------------------------ advantages


@all_combos
@pytest.mark.parametrize(
    "advantages", [(1.5, 0.25, 3.0), (-1.5, -0.25, -3.0), (0.0, 0.0, 0.0), (0.0, -2.0, 0.0), (1e-3, -1e3, 0.0)]
)
def test_signs_of_sequence_advantages(combo, advantages):
    case = make_case(combo, teacher="own head", bias=True)
    case["advantages"] = torch.tensor(advantages, device=combo.device)
    got, _ = check_parity(case, combo)
    for row, a in enumerate(advantages):
        assert got.gradients["student_hidden"][row].any() == (a != 0)
    if not any(advantages):
        assert got.loss == 0 and not any(x.any() for x in got.gradients.values())
        assert (got.stats.magnitude == 1).all() and (got.stats.student_logp < 0).all()


@all_combos
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_advantages_of_another_dtype(combo, dtype):
    case = make_case(combo)
    case["advantages"] = case["advantages"].to(dtype)
    check_parity(case, combo)


@all_combos
def test_a_sequence_advantage_is_that_of_each_of_its_tokens(combo):
    case = make_case(combo, **MIXED, lookahead=2)
    lengths = case["cu_seqlens"].diff().long()
    by_sequence = package_result(case, combo)
    case["advantages"] = case["advantages"].repeat_interleave(lengths)
    by_token = package_result(case, combo)
    assert torch.equal(by_sequence.loss, by_token.loss)
    assert all(torch.equal(by_sequence.gradients[k], by_token.gradients[k]) for k in by_token.gradients)


@all_combos
def test_packed_is_padded_without_the_padding(combo):
    lengths = torch.tensor([6, 2, 5], device=combo.device)
    padded = make_case(combo, lookahead=3, bias=True)
    padded["mask"] = torch.arange(6, device=combo.device) < lengths[:, None]
    packed = dict(padded)
    for name in ("student_hidden", "teacher_hidden", "target_ids"):
        packed[name] = padded[name][padded["mask"]]
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    packed["mask"], packed["cu_seqlens"] = None, bounds.to(torch.int32)
    a, b = package_result(padded, combo), package_result(packed, combo)
    keep = padded["mask"].cpu()
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=1e-6)
    for x, y in zip(a.stats, b.stats, strict=True):
        torch.testing.assert_close(x[keep], y, rtol=1e-6, atol=1e-6)
    tolerance = gradient_tolerance(combo)
    assert_gradient("student_hidden", a.gradients["student_hidden"][keep], b.gradients["student_hidden"], tolerance)
    for name in ("student_weight", "student_bias"):
        assert_gradient(name, a.gradients[name], b.gradients[name], tolerance)


@few_combos
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_integer_dtypes_of_targets(combo, dtype):
    case = make_case(combo, lengths=(4, 4))
    want = package_result(case, combo)
    case["target_ids"] = case["target_ids"].to(dtype)
    got = package_result(case, combo)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.gradients["student_hidden"], want.gradients["student_hidden"])


@few_combos
def test_ids_that_look_like_the_ignored_one(combo):
    """156 is the byte of -100: a token like any other."""
    case = make_case(combo, vocabulary=257, lengths=(4, 4))
    case["target_ids"] = torch.tensor([[156, 0, 255, 156], [100, 156, 3, 7]], device=combo.device)
    want = package_result(case, combo)
    assert (want.stats.student_logp < 0).all()
    case["target_ids"] = case["target_ids"].to(torch.uint8)
    assert torch.equal(package_result(case, combo).loss, want.loss)


@few_combos
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_dtypes_of_masks(combo, dtype):
    case = make_case(combo, lengths=(4, 4), mask="holes", lookahead=2)
    assert 0 < case["mask"].sum() < 8
    case["mask"] = case["mask"].to(dtype)
    check_parity(case, combo)


@few_combos
def test_int64_boundaries(combo):
    case = make_case(combo, **MIXED)
    want = package_result(case, combo)
    case["cu_seqlens"] = case["cu_seqlens"].long()
    assert torch.equal(package_result(case, combo).loss, want.loss)


# ------------------------------------------------------------------------------------------------ nothing to learn from


@all_combos
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("by", ["mask", "ignored"])
def test_no_valid_token(combo, layout, by):
    """Loss 0 and zero gradients, whatever the masked hidden states hold and whatever they are divided by."""
    case = make_case(combo, layout=layout, lengths=(3, 3), bias=True, lookahead=2, mask="all" if by == "mask" else None)
    if by == "ignored":
        case["target_ids"][...] = -100
    case["student_hidden"].fill_(math.nan)
    case["teacher_hidden"].fill_(math.nan)
    for normalizer in (None, 4.0):
        got, _ = check_parity({**case, "normalizer": normalizer}, combo)
        assert got.loss == 0 and not any(x.any() for x in (*got.stats, *got.gradients.values()))


@all_combos
@pytest.mark.parametrize("teacher", ["shared head", "statistics"])
def test_masked_positions_are_never_looked_at(combo, teacher):
    """NaN hidden states, NaN statistics and targets outside the vocabulary change no bit where mask = 0."""
    case = make_case(combo, mask="holes", lookahead=3, bias=True, teacher=teacher, lengths=(8, 8))
    check_parity(case, combo)
    want = package_result(case, combo)
    masked = ~case["mask"]
    assert masked.any() and not masked.all()
    case["student_hidden"][masked] = math.nan
    case["target_ids"][masked] = 10**6
    if teacher == "statistics":
        case["teacher_logp"][masked] = math.nan
        case["teacher_entropy"][masked] = math.nan
    else:
        case["teacher_hidden"][masked] = math.inf
    got = package_result(case, combo)
    assert torch.equal(got.loss, want.loss)
    assert all(torch.equal(x, y) for x, y in zip(got.stats, want.stats, strict=True))
    assert all(torch.equal(got.gradients[k], want.gradients[k]) for k in want.gradients)


@all_combos
@pytest.mark.parametrize(
    "sizes",
    [
        {"lengths": ()},
        {"lengths": (0, 0, 0)},
        {"layout": "packed", "lengths": (0,)},
        {"layout": "packed", "lengths": (0, 0)},
        {"layout": "one sequence", "lengths": (0,)},
    ],
    ids=["B 0", "T 0", "packed N 0", "packed S 2 N 0", "N 0"],
)
@pytest.mark.parametrize("teacher", ["shared head", "statistics"])
def test_no_token(combo, sizes, teacher):
    case = make_case(combo, **sizes, bias=True, lookahead=3, teacher=teacher)
    assert case["target_ids"].numel() == 0
    got, _ = check_parity(case, combo)
    assert got.loss == 0 and not any(x.any() for x in got.gradients.values())
    per_token = {**case, "advantages": torch.zeros(case["target_ids"].shape, device=combo.device)}
    assert package_result(per_token, combo).loss == 0


# ------------------------------------------------------------------------------------------------ what comes back


@all_combos
def test_the_loss_without_statistics_or_gradient_is_the_same(combo):
    case = make_case(combo, lookahead=2, mask="holes")
    want = package_result(case, combo)
    bare = fused_egrsd_loss(**case, backend=combo.backend)
    assert bare.ndim == 0 and bare.dtype == combo.compute_dtype and not bare.requires_grad
    # Without gradients log p comes from the statistics pass, which sums in another order.
    torch.testing.assert_close(bare.cpu(), want.loss, rtol=1e-5, atol=1e-5)
    hidden = case["student_hidden"].clone().requires_grad_()
    loss = fused_egrsd_loss(**{**case, "student_hidden": hidden}, backend=combo.backend)
    assert torch.equal(loss.detach().cpu(), want.loss)


@few_combos
def test_the_teacher_gets_no_gradient(combo):
    case = make_case(combo, teacher="own head", bias=True)
    for name in ("teacher_hidden", "teacher_weight", "teacher_bias", "advantages"):
        case[name].requires_grad_()
    case["student_hidden"].requires_grad_()
    loss, stats = fused_egrsd_loss(**case, backend=combo.backend, return_stats=True)
    loss.backward()
    assert case["student_hidden"].grad.any()
    assert all(case[k].grad is None for k in ("teacher_hidden", "teacher_weight", "teacher_bias", "advantages"))
    assert not any(x.requires_grad for x in stats)

    case = make_case(combo, teacher="statistics")
    for name in ("student_hidden", "teacher_logp", "teacher_entropy"):
        case[name].requires_grad_()
    fused_egrsd_loss(**case, backend=combo.backend).backward()
    assert case["teacher_logp"].grad is None and case["teacher_entropy"].grad is None


@all_combos
def test_teacher_statistics_given_are_used_as_they_are(combo):
    """Passing on what a first call reports gives that call's result again."""
    case = make_case(combo, lookahead=3, mask="holes")
    first = package_result(case, combo)
    given = {"teacher_logp": first.stats.teacher_logp, "teacher_entropy": first.stats.teacher_entropy}
    case |= {"teacher_hidden": None} | {k: x.to(combo.device) for k, x in given.items()}
    second = package_result(case, combo)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.gradients["student_hidden"], second.gradients["student_hidden"])


@all_combos
def test_a_teacher_bias_of_its_own_with_the_shared_head(combo):
    case = make_case(combo, bias=True)
    shared = package_result(case, combo)
    case["teacher_bias"] = case["student_bias"].flip(0)
    got, _ = check_parity(case, combo)
    assert not torch.equal(got.stats.teacher_logp, shared.stats.teacher_logp)


@few_combos
def test_auto_backend(combo):
    case = make_case(combo)
    loss = fused_egrsd_loss(**case)
    expected = "triton" if combo.device == "cuda" else "torch"
    assert torch.equal(loss, fused_egrsd_loss(**case, backend=expected))


@all_combos
def test_bit_for_bit_the_same(combo):
    size = {} if combo.device == "cpu" else {"lengths": (700, 700), "width": 512, "vocabulary": 5003}
    case = make_case(combo, **size, bias=True, lookahead=3, mask="holes")
    first = package_result(case, combo)
    for _ in range(1 if combo.interpreted else 4):
        again = package_result(case, combo)
        assert torch.equal(first.loss, again.loss)
        assert all(torch.equal(x, y) for x, y in zip(first.stats, again.stats, strict=True))
        assert all(torch.equal(first.gradients[k], again.gradients[k]) for k in first.gradients)


# ------------------------------------------------------------------------------------------------ chunks


@all_combos
def test_many_chunks(combo, monkeypatch):
    """A chunk of one tile of rows (triton) or of one row (torch): N spans two (18) chunks, masked rows at their end."""
    size = {"lengths": (70, 70)} if combo.backend == "triton" else {"lengths": (9, 9)}
    monkeypatch.setattr(triton_backend, "STATISTICS_ROWS", triton_backend.ROW_TILE)
    options = {"vocabulary": 37, "bias": True, "lookahead": 3, "softcap": 9.0, "per_token": True}
    case = make_case(combo, **size, **options)
    case["mask"] = torch.ones_like(case["target_ids"])
    case["mask"][0, 3] = 0
    many, _ = check_parity({**case, "chunk_bytes": 1}, combo)
    if not combo.interpreted:
        one = package_result(case, combo, loss_scale(case, combo))
        torch.testing.assert_close(many.loss, one.loss, rtol=1e-6, atol=1e-6)
        for name in many.gradients:
            assert_gradient(name, many.gradients[name], one.gradients[name], gradient_tolerance(combo))


@few_combos
def test_chunks_without_a_row_to_learn_from(combo):
    """Behind the first chunk all rows are masked, or have no advantage: nothing is added, nothing is left unwritten."""
    t = 65 if combo.backend == "triton" else 6
    case = make_case(combo, lengths=(t, t, t), vocabulary=19, bias=True)
    case["advantages"] = torch.tensor([0.0, 1.5, 0.0], device=combo.device)
    case["mask"] = torch.ones(3, t, dtype=torch.bool, device=combo.device)
    case["mask"][2] = False
    got, _ = check_parity({**case, "chunk_bytes": 1}, combo)
    assert (got.stats.student_logp[0] < 0).all()


@few_combos
def test_what_fresh_memory_holds_does_not_matter(combo):
    """Buffers that nobody initialised are filled with NaN here."""
    if (combo.backend, combo.device) == ("torch", "cuda"):
        pytest.skip("cuBLAS would need CUBLAS_WORKSPACE_CONFIG before the process starts")
    case = make_case(combo, **MIXED, lookahead=2, mask="holes", bias=True, vocabulary=257)
    want = package_result(case, combo)
    torch.use_deterministic_algorithms(True)
    try:
        got = package_result(case, combo)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(got.loss, want.loss)
    assert all(torch.equal(got.gradients[k], want.gradients[k]) for k in want.gradients)


# ------------------------------------------------------------------------------------------------ on the GPU, at size


@pytest.mark.cuda
@cuda_combos
@pytest.mark.parametrize(
    "options",
    [
        {"lengths": (512,) * 4, "width": 1024, "vocabulary": 8209, "lookahead": 3, "bias": True, "mask": "holes"},
        {"lengths": (300,) * 5, "width": 4096, "vocabulary": 4099, "lookahead": 5, "per_token": True},
        {"lengths": (256,) * 2, "width": 5120, "vocabulary": 2053, "softcap": 30.0, "temperature": 0.8},
        {
            "layout": "packed",
            "lengths": (1, 777, 0, 1500, 33, 1),
            "width": 2560,
            "vocabulary": 6007,
            "lookahead": 8,
            "gamma": 1.0,
        },
        {
            "layout": "packed",
            "lengths": (3000, 1, 1234),
            "width": 129,
            "vocabulary": 1003,
            "lookahead": 5000,
            "ignored": True,
        },
        {"lengths": (256, 256), "width": 512, "vocabulary": 151936, "kind": "flat", "lookahead": 3},
        {
            "lengths": (640,) * 2,
            "width": 768,
            "vocabulary": 9001,
            "teacher": "own head",
            "chunk_bytes": 1 << 20,
            "bias": True,
        },
    ],
    ids=lambda o: f"{o['lengths']}-D{o['width']}-V{o['vocabulary']}",
)
def test_parity_at_size(combo, options):
    check_parity(make_case(combo, **options), combo)


@pytest.mark.cuda
@cuda_combos
def test_extreme_logits_at_size(combo):
    case = make_case(combo, lengths=(200, 200), width=256, vocabulary=5003, kind="extreme")
    got, _ = check_parity(case, combo, ordinary=False)
    assert got.loss.isfinite() and all(x.isfinite().all() for x in got.gradients.values())


# ------------------------------------------------------------------------------------------------ properties


def check_credit_properties(combo: Combo, examples: int) -> None:
    """Random sequences, masks, advantages, teacher statistics and options, through the whole loss."""
    hypothesis = pytest.importorskip("hypothesis")
    st = pytest.importorskip("hypothesis.strategies")

    @st.composite
    def cases(draw):
        padded = draw(st.booleans())
        if padded:
            shape = draw(st.integers(1, 3)), draw(st.integers(1, 7))
            lengths = [shape[1]] * shape[0]
        else:
            lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
            shape = (sum(lengths),)
        n = sum(lengths)
        # As many sequences as tokens, some of them empty: which of both the advantages count is refused as unclear.
        hypothesis.assume(padded or n != len(lengths) or 0 not in lengths)
        per_token = draw(st.booleans())

        def floats(low, high, *often):
            value = st.floats(low, high, width=32) | st.sampled_from(often)
            return torch.tensor(draw(st.lists(value, min_size=n, max_size=n)))

        # Products with a number below 2^-100 may leave float32; that is no matter of the credit.
        size = st.floats(2**-100, 4, width=32)
        value = st.sampled_from([0.0, 1.0, -1.0]) | size | size.map(lambda x: -x)
        count = n if per_token else len(lengths)
        advantages = torch.tensor(draw(st.lists(value, min_size=count, max_size=count)))
        mask = draw(st.lists(st.sampled_from([True, True, False]), min_size=n, max_size=n))
        scale = draw(st.sampled_from(["batch_max", "batch_max_lookahead"]) | st.floats(0.1, 20))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
        return {
            "student_hidden": (3 * torch.randn(*shape, 2, generator=generator)).to(combo.dtype),
            "student_weight": torch.randn(5, 2, generator=generator).to(combo.dtype),
            "teacher_hidden": None,
            "target_ids": torch.randint(5, shape, generator=generator),
            "advantages": advantages.view(shape) if per_token else advantages,
            "mask": torch.tensor(mask, dtype=torch.bool).view(shape),
            "cu_seqlens": None if padded else torch.tensor([0, *lengths]).cumsum(0),
            "teacher_logp": floats(-20, 0, -math.inf, 0.0).view(shape),
            "teacher_entropy": floats(0, 12, 0.0, 1.0).view(shape),
            "gamma": draw(st.sampled_from([0.0, 0.3, 1.0]) | st.floats(0, 5)),
            "gate_floor": draw(st.sampled_from([0.0, 0.1, 1.0])),
            "lookahead": draw(st.integers(0, 9)),
            "clip_eps": draw(st.sampled_from([0.0, 0.2, 1.0])),
            "entropy_scale": scale,
            "min_entropy_scale": draw(st.sampled_from([0.1, 1.0, 5.0])),
        }

    @hypothesis.settings(
        max_examples=examples,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases())
    def check(case):
        got, want = check_parity(case, combo)
        # And what holds whatever the reference says.
        keep, eps, slack = case["mask"], case["clip_eps"], 4 * combo.unit_roundoff
        w, gate = got.stats.magnitude[keep], got.stats.gate[keep]
        assert ((w >= 1 - eps - slack) & (w <= 1 + eps + slack)).all()
        assert ((gate >= case["gate_floor"] - slack) & (gate <= 1)).all()
        assert (got.stats.lookahead_entropy[keep] <= got.stats.teacher_entropy[keep]).all()
        pushed = got.stats.token_advantage != 0
        assert torch.equal(got.stats.token_advantage[pushed].sign(), want.stats.token_advantage[pushed].sign().to(w))

    check()


@pytest.mark.parametrize("combo", CPU_COMBOS[:2])
def test_credit_properties(combo):
    check_credit_properties(combo, examples=200)


@pytest.mark.slow
@pytest.mark.parametrize("combo", CPU_COMBOS[3:4])
def test_credit_properties_of_the_kernels(combo):
    check_credit_properties(combo, examples=8)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}, {"chunk_bytes": 1}])
def test_gradcheck(options):
    """With w = 1 and the teacher's statistics given, Â is a constant, and the loss a function like any other."""
    combo = Combo("torch", "cpu", torch.float64)
    case = make_case(combo, teacher="statistics", bias=True, width=3, vocabulary=7, lengths=(3, 3), mask="holes")
    leaves = [case.pop(k).requires_grad_() for k in LEARNED]

    def loss(*operands):
        return fused_egrsd_loss(**dict(zip(LEARNED, operands, strict=True)), **case, clip_eps=0.0, **options)

    assert torch.autograd.gradcheck(loss, leaves)
