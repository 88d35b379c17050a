"""``fused_egrsd_loss`` with a divergence, against the reference in float64 and against its own two parts."""

from __future__ import annotations

import math

import pytest
import torch

from egrsd_kernels import fused_egrsd_loss, linear_divergence, linear_logp, token_statistics
from reference import egrsd_divergence_loss
from tests.support.cases import make_case as plain_case
from tests.support.devices import CPU_COMBOS, CUDA_COMBOS, INTERPRETED, Combo
from tests.support.tolerances import LEARNED, assert_gradient, assert_within, gradient_tolerance

combos = pytest.mark.parametrize("combo", [*CPU_COMBOS[:3], *CUDA_COMBOS])
few = pytest.mark.parametrize("combo", [CPU_COMBOS[1], *CUDA_COMBOS[:3:2], CUDA_COMBOS[3]])
FLOAT = Combo("torch", "cpu", torch.float32)


def make_case(combo: Combo, **options) -> dict:
    options = {"gamma": 0.7, "gate_floor": 0.2, "divergence": "reverse_kl", "divergence_weight": 0.4} | options
    return plain_case(combo, **options)


def leaves_of(case: dict, double: bool = False) -> dict:
    tensors = {k: case[k].detach() for k in LEARNED if case.get(k) is not None}
    return {k: (x.cpu().double() if double else x.clone()).requires_grad_() for k, x in tensors.items()}


def reference_result(case: dict):
    case = {k: x.detach().cpu() if isinstance(x, torch.Tensor) else x for k, x in case.items()}
    leaves = leaves_of(case, double=True)
    loss, stats, d = egrsd_divergence_loss(**{**case, **leaves})
    loss.backward()
    return loss.detach(), stats, d, {k: x.grad for k, x in leaves.items()}


def package_result(combo: Combo, case: dict, frozen: bool = False, factor: float = 1.0, **more):
    leaves = leaves_of(case)
    if frozen:
        for name in LEARNED[1:]:
            leaves.get(name, torch.zeros(())).requires_grad_(False)
    loss, stats = fused_egrsd_loss(**{**case, **leaves, **more}, backend=combo.backend, return_stats=True)
    loss.backward(torch.full_like(loss, factor))
    return loss.detach().cpu(), stats, {k: x.grad.cpu() for k, x in leaves.items() if x.requires_grad}


def check(combo: Combo, case: dict, **more) -> None:
    """With a trained and a frozen head. Log p and D are those of tests that bound them; here they are put together."""
    want, signals, d, expected = reference_result(case)
    # Operands of float32 logits: log p to 1e-5 nat here, and D likewise; of float64 to 1e-12.
    tolerance = 1e-11 if combo.dtype == torch.float64 else 2e-5
    for frozen in (False, True):
        got, stats, gradients = package_result(combo, case, frozen, **more)
        assert_within("loss", got, want, tolerance * (1 + want.abs()))
        assert_within("divergence", stats.divergence, d, tolerance * (1 + d))
        for name in signals._fields:
            x = getattr(signals, name)
            assert_within(name, getattr(stats, name), x, tolerance * (1 + x.abs().nan_to_num(0, posinf=0)))
        for name, gradient in gradients.items():
            # The magnitude is e^δ of a log ratio, which is off by twice log p.
            assert_gradient(name, gradient, expected[name], 2 * gradient_tolerance(combo) + 4 * tolerance)


KINDS = [
    {"divergence": "reverse_kl"},
    {"divergence": "forward_kl", "divergence_weight": 3.0, "policy_weight": 0.25},
    {"divergence": "jsd", "divergence_beta": 0.2},
    {"divergence": "jsd", "divergence_top_k": 4, "policy_weight": 0},
    {"divergence": "forward_kl", "divergence_top_k": 9},
]


@combos
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_parity(combo, kind):
    if combo.backend == "triton" and "divergence_top_k" in kind:
        pytest.skip("top_k is the torch backend's")
    check(combo, make_case(combo, bias=True, lookahead=2, **kind))


@combos
@pytest.mark.parametrize(
    "options",
    [
        {"layout": "packed", "lengths": (5, 0, 9), "mask": "holes", "normalizer": 7.5},
        {"layout": "one sequence", "lengths": (11,), "teacher": "own head", "temperature": 1.3, "softcap": 8.0},
        {"mask": "a sequence", "ignored": True, "teacher": "own head", "bias": True},
        {"per_token": True, "entropy_scale": 2.0, "chunk_bytes": 1},
    ],
    ids=str,
)
def test_layouts(combo, options):
    more = {"chunk_bytes": options.pop("chunk_bytes")} if "chunk_bytes" in options else {}
    check(combo, make_case(combo, **options), **more)


@pytest.mark.parametrize("combo", CPU_COMBOS[3:])
@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_parity_in_the_interpreter(combo, kind):
    """Packed, one sequence of it empty, with holes in the mask and a normalizer: all that meets in one pass."""
    packed = {"layout": "packed", "lengths": (5, 0, 6), "mask": "holes", "normalizer": 7.5}
    check(combo, make_case(combo, bias=True, lookahead=2, **packed, **kind))


@pytest.mark.heavy
@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("kind", [KINDS[2], KINDS[4]], ids=str)
def test_kernels_beside_a_divergence_in_pytorch(monkeypatch, kind):
    """As "auto" is on a GPU: credit, gate and teacher's statistics are the kernels', the student's pass is not."""
    from egrsd_kernels.backends import triton

    monkeypatch.setattr("egrsd_kernels.loss.choose", lambda *_: triton)
    case = make_case(Combo("auto", "cpu", torch.float32), mask="holes", lookahead=2, lengths=(9, 9), **kind)
    check(Combo("auto", "cpu", torch.float32), case, chunk_bytes=1)


@few
def test_it_is_its_two_parts(combo):
    """As token weights on the two differentiable functions: the same gradient, by another way."""
    case = make_case(combo, bias=False, divergence="jsd")
    loss, stats, gradients = package_result(combo, case, frozen=True)
    hidden = case["student_hidden"].clone().requires_grad_()
    weight, n = case["student_weight"], case["target_ids"].numel()
    logp = linear_logp(hidden, weight, case["target_ids"], backend=combo.backend)
    d = linear_divergence(hidden, weight, case["teacher_hidden"], weight, kind="jsd", backend=combo.backend)
    parts = (-stats.token_advantage * logp + 0.4 * stats.gate * d).sum() / n
    parts.backward()
    assert_within("loss", parts.detach().cpu(), loss, 1e-6)
    assert_gradient("student_hidden", gradients["student_hidden"], hidden.grad.cpu(), 2 * gradient_tolerance(combo))


@few
def test_statistics_beside_the_hidden_states(combo):
    """Made earlier, they give the same loss, and spare a pass."""
    case = make_case(combo, lookahead=1)
    operands = case["teacher_hidden"], case["student_weight"], case["target_ids"]
    made = token_statistics(*operands, backend=combo.backend)
    want, got = (
        package_result(combo, case, **more)
        for more in ({}, {"teacher_logp": made.logp, "teacher_entropy": made.entropy})
    )
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(x, got[2][k]) for k, x in want[2].items())


@few
def test_advantages_of_nothing(combo):
    """Where A is 0 the divergence remains, and has the gate that the teacher's entropy gives it."""
    case = make_case(combo)
    case["advantages"] = torch.zeros_like(case["advantages"])
    check(combo, case)
    loss, stats, gradients = package_result(combo, case)
    assert loss > 0 and not stats.token_advantage.any() and gradients["student_hidden"].any()
    alone = package_result(combo, make_case(combo, policy_weight=0))
    assert_within("loss", alone[0], loss, 1e-6)


@few
def test_a_teacher_that_is_the_student(combo):
    """The policy's term alone is left."""
    case = make_case(combo)
    case["teacher_hidden"] = case["student_hidden"].clone()
    got = package_result(combo, case)
    without = {k: x for k, x in case.items() if not k.startswith("divergence")}
    want = package_result(combo, without)
    assert not got[1].divergence.any()
    assert_within("loss", got[0], want[0], 1e-6)
    for name, x in want[2].items():
        assert_gradient(name, got[2][name], x, gradient_tolerance(combo))


@few
def test_nothing_to_learn(combo):
    case = make_case(combo, mask="all")
    loss, stats, gradients = package_result(combo, case)
    assert loss == 0 and not stats.divergence.any() and not any(x.any() for x in gradients.values())
    with torch.no_grad():
        again = make_case(combo)
        assert fused_egrsd_loss(**again, backend=combo.backend).isfinite()


@few
def test_without_gradient_it_is_the_same_number(combo):
    case = make_case(combo)
    want = package_result(combo, case)[0]
    assert_within("loss", fused_egrsd_loss(**case, backend=combo.backend), want, 1e-6)


@few
def test_backward_twice(combo):
    leaves = leaves_of(make_case(combo))
    loss = fused_egrsd_loss(**{**make_case(combo), **leaves}, backend=combo.backend)
    first, second = (torch.autograd.grad(loss, leaves["student_hidden"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_shut_gate_costs_nothing():
    """Where ω = 0, so does an infinite divergence."""
    case = make_case(FLOAT, bias=True, teacher="own head", gamma=1e9, gate_floor=0.0)
    case["teacher_bias"][int((case["target_ids"].flatten().bincount(minlength=61) == 0).nonzero()[0])] = -math.inf
    loss, stats, gradients = package_result(FLOAT, case)
    assert stats.divergence.isinf().all() and not stats.gate.any()
    assert loss.isfinite() and all(x.isfinite().all() for x in gradients.values())


@pytest.mark.parametrize("wrong", ["a target", "a hidden state"])
def test_what_is_no_number_is_seen_through_a_shut_gate(monkeypatch, wrong):
    """A target outside the vocabulary that nobody checked, or NaN of a model: neither loss nor gradient hides it."""
    from egrsd_kernels import checks

    monkeypatch.setattr(checks, "values_checked", lambda tensor: False)
    case = make_case(FLOAT, gamma=1e9, gate_floor=0.0, policy_weight=0)
    if wrong == "a target":
        case["target_ids"][0, 1] = 10**6
    else:
        case["student_hidden"][0, 1] = math.nan
    loss, stats, gradients = package_result(FLOAT, case, frozen=True)
    assert not stats.gate.any() and loss.isnan() and stats.divergence.isnan().sum() == 1
    assert gradients["student_hidden"].isnan().all(-1).sum() == 1


def test_without_the_policy_log_p_is_of_no_account():
    """Also where it is -inf."""
    case = make_case(FLOAT, bias=True, teacher="own head", policy_weight=0)
    case["student_bias"][case["target_ids"][0, 0]] = -math.inf
    loss, stats, gradients = package_result(FLOAT, case)
    assert stats.student_logp[0, 0] == -math.inf and all(x.isfinite().all() for x in gradients.values())
    assert_within("loss", loss, 0.4 * (stats.gate * stats.divergence).mean(), 1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradcheck(kind):
    combo = Combo("torch", "cpu", torch.float64)
    size = {"width": 3, "vocabulary": 12, "lengths": (2, 2)}
    case = make_case(combo, **size, clip_eps=0.0, bias=True, teacher="own head", **kind)
    leaves = list(leaves_of(case).values())

    def loss(*tensors):
        return fused_egrsd_loss(**{**case, **dict(zip(LEARNED, tensors, strict=False))})

    assert torch.autograd.gradcheck(loss, leaves)
    for wanted in (leaves[:1], leaves):
        for slope in torch.autograd.grad(loss(*wanted), wanted, create_graph=True):
            with pytest.raises(RuntimeError, match="fused_egrsd_loss is differentiable once only"):
                torch.autograd.grad(slope.sum(), wanted, retain_graph=True)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"divergence": "kl"}, 'divergence: expected "reverse_kl" or "forward_kl" or "jsd", got'),
        ({"divergence_weight": 0}, "divergence_weight: expected a finite number above 0"),
        ({"policy_weight": -1}, "policy_weight: expected a finite number at least 0"),
        ({"divergence_beta": 0.3}, 'divergence_beta: expected 0.5, since the kind is "reverse_kl"'),
        ({"divergence": "jsd", "divergence_beta": 1.0}, "divergence_beta: expected a number above 0 and below 1"),
        ({"divergence_top_k": 62}, "divergence_top_k: expected at most the vocabulary's size, 61, got 62"),
        ({"grad_mode": "sparse"}, 'grad_mode: expected "exact", since there is a divergence'),
        ({"teacher_hidden": None}, "teacher_hidden: expected a tensor, since there is a divergence, got None"),
        ({"teacher_logp": torch.zeros(3, 6)}, "teacher_entropy: expected a tensor, since the other statistic is given"),
        ({"divergence": None}, "divergence_weight: expected 1, since divergence is None, got 0.4"),
        ({"divergence": None, "divergence_weight": 1, "policy_weight": 0.5}, "policy_weight: expected 1, since"),
        ({"divergence": None, "divergence_weight": 1, "divergence_top_k": 3}, "divergence_top_k: expected None, since"),
    ],
    ids=str,
)
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message):
        fused_egrsd_loss(**make_case(FLOAT) | wrong)


def test_the_gate_weighs_the_divergence():
    """Twice the weight is twice the term; the gradient of ω is none of it."""
    case = make_case(FLOAT, policy_weight=0, gamma=1.0)
    one, two = (package_result(FLOAT, case | {"divergence_weight": x}) for x in (1.0, 2.0))
    torch.testing.assert_close(2 * one[0], two[0])
    gate, d = one[1].gate, one[1].divergence
    assert gate.min() < 0.9 and torch.allclose(one[0], (gate * d).mean())
