"""``linear_logp`` against float64: values and gradients under any incoming gradient, on every backend."""

from __future__ import annotations

import math

import pytest
import torch

from egrsd_kernels import linear_logp, token_statistics
from egrsd_kernels.backends import triton as triton_backend
from reference import log_prob, logits
from tests.support.cases import SPARSE, Draw, draw_head, draw_hidden, draw_targets
from tests.support.devices import Combo, all_combos, cuda_combos, few_combos, sparse_combos
from tests.support.tolerances import (
    LOGP_TOLERANCE,
    OURS,
    assert_gradient,
    assert_within,
    gradient_tolerance,
    logit_error,
    logp_error,
)

NAMES = ("hidden", "weight", "bias")


def make_operands(
    combo: Combo,
    *shape: int,
    width: int = 16,
    vocabulary: int = 61,
    kind: str = "peaked",
    bias: bool = False,
    seed: int = 0,
):
    """(operands, target_ids, incoming gradient) on the combo's device; a quarter of the gradient is 0."""
    draw = Draw(seed)
    weight = draw_head(draw, vocabulary, width)
    hidden = draw_hidden(draw, kind, weight, *shape)
    targets = draw_targets(draw, hidden, weight)
    operands = {"hidden": hidden, "weight": weight} | ({"bias": draw.normal(vocabulary)} if bias else {})
    operands = {k: x.to(combo.dtype).to(combo.device) for k, x in operands.items()}
    incoming = draw.normal(*shape).to(combo.compute_dtype)
    incoming[draw.uniform(*shape) < 0.25] = 0
    return operands, targets.to(combo.device), incoming.to(combo.device)


def package_logp(combo: Combo, operands: dict, targets, incoming, frozen: bool = False, **options):
    leaves = {k: x.detach().clone().requires_grad_(k == "hidden" or not frozen) for k, x in operands.items()}
    logp = linear_logp(**leaves, target_ids=targets, backend=combo.backend, **options)
    logp.backward(incoming)
    return logp.detach().cpu(), {k: x.grad.cpu() for k, x in leaves.items() if x.requires_grad}


def reference_logp(operands: dict, targets, incoming, mask=None, softcap=None, temperature=1.0):
    leaves = {k: x.detach().cpu().double().requires_grad_() for k, x in operands.items()}
    targets, incoming = targets.cpu(), incoming.cpu().double()
    valid = targets != -100
    if mask is not None:
        valid &= mask.cpu() != 0
    z = logits(leaves["hidden"][valid], leaves["weight"], leaves.get("bias"), softcap, temperature)
    picked = log_prob(z, targets[valid])
    logp = torch.zeros_like(incoming).masked_scatter(valid, picked)
    (picked * incoming[valid]).sum().backward()
    return logp.detach(), {k: x.grad for k, x in leaves.items()}


def check(combo: Combo, operands: dict, targets, incoming, ordinary: bool = True, **options) -> None:
    """With a trained head and with a frozen one."""
    results = [package_logp(combo, operands, targets, incoming, frozen, **options) for frozen in (False, True)]
    options = {name: value for name, value in options.items() if name not in OURS}
    want, expected = reference_logp(operands, targets, incoming, **options)
    options.pop("mask", None)
    dz = logit_error(combo, **operands, **options).nan_to_num(0)
    silent = ((incoming == 0) | (targets == -100)).cpu()
    for frozen, (got, gradients) in enumerate(results):
        tolerance = gradient_tolerance(combo, targets.numel(), rounded_again=bool(frozen))
        tolerance += 0.0 if ordinary else 2 * float(dz.max())
        assert got.dtype == combo.compute_dtype and got.shape == targets.shape
        assert_within("logp", got, want, logp_error(combo, dz, ordinary))
        for name, gradient in gradients.items():
            assert gradient.dtype == operands[name].dtype
            assert_gradient(name, gradient, expected[name], tolerance)
        assert not gradients["hidden"][silent].any()
    assert results[1][1].keys() == {"hidden"}


@all_combos
@pytest.mark.parametrize(
    "shape, size, options",
    [
        ((7,), {"width": 40, "vocabulary": 130, "bias": True}, {"softcap": 5.0}),
        ((3, 5), {}, {}),
        ((7,), {"bias": True}, {}),
        ((3, 5), {"width": 17, "vocabulary": 257}, {"temperature": 0.7}),
        ((2, 4), {"width": 100, "vocabulary": 70, "bias": True}, {"temperature": 1.5}),
        ((7,), {"width": 2, "vocabulary": 3}, {}),
        ((1, 1), {"kind": "flat", "vocabulary": 200}, {}),
    ],
    ids=str,
)
def test_parity(combo, shape, size, options):
    check(combo, *make_operands(combo, *shape, **size), **options)


@sparse_combos
@pytest.mark.parametrize(
    "shape, size, options",
    [
        ((3, 5), {"width": 17, "vocabulary": 257}, {"temperature": 0.7}),
        ((7,), {"width": 40, "vocabulary": 130, "bias": True}, {"softcap": 5.0}),
        ((1, 1), {"kind": "flat", "vocabulary": 200}, {}),
        ((0, 4), {"bias": True}, {}),
    ],
    ids=str,
)
def test_sparse_parity(combo, shape, size, options):
    check(combo, *make_operands(combo, *shape, **size), **options, **SPARSE)


@all_combos
def test_a_saturated_target_leaves_the_others_accurate(combo):
    """Under a softcap the target's own entry may be too small for its dtype, and the others' are not."""
    weight = torch.eye(61, device=combo.device, dtype=combo.dtype)
    hidden = (12 + 8 * Draw(3).uniform(9, 61)).to(combo.device, combo.dtype)
    hidden[:, 7] = torch.linspace(90, 270, 9)
    operands = {"hidden": hidden, "weight": weight, "bias": torch.zeros_like(weight[0])}
    targets = torch.full((9,), 7, device=combo.device)
    for row in range(9):
        incoming = torch.zeros(9, device=combo.device, dtype=combo.compute_dtype)
        incoming[row] = 30000.0
        _, got = package_logp(combo, operands, targets, incoming, softcap=30.0)
        _, want = reference_logp(operands, targets, incoming, softcap=30.0)
        others = torch.arange(61) != 7
        # A probability is as good as its logit.
        tolerance = gradient_tolerance(combo, 1) + 2 * float(logit_error(combo, **operands, softcap=30.0).max())
        assert want["bias"][others].abs().min() > 1e-4, "the case shows nothing"
        assert_gradient("bias", got["bias"][others], want["bias"][others], tolerance)


@all_combos
def test_a_loss_scale_beside_an_outlier(combo):
    """dL/dlogp times hidden is beyond what float16 holds, as under a gradient scaler; the gradients are not."""
    operands, *_ = make_operands(combo, 40, width=24)
    operands["hidden"] *= 8
    operands["hidden"][:, 5], operands["weight"][:, 5] = 1500.0, 0.0
    targets = (operands["hidden"].double() @ operands["weight"].double().T).argmax(1)
    incoming = torch.full((40,), 60.0, device=combo.device, dtype=combo.compute_dtype)
    _, expected = reference_logp(operands, targets, incoming)
    assert all(0 < x.abs().max() < 65504 for x in expected.values()), "the case shows nothing"
    check(combo, operands, targets, incoming)


@all_combos
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"temperature": 0.5}], ids=str)
def test_extreme_logits(combo, options):
    operands, targets, incoming = make_operands(combo, 3, 5, kind="extreme", bias=True)
    check(combo, operands, targets, incoming, ordinary=False, **options)


@all_combos
def test_minus_infinity_through_the_bias(combo):
    operands, targets, incoming = make_operands(combo, 3, 5, vocabulary=150, bias=True)
    operands["bias"][::3] = -math.inf
    targets[targets % 3 == 0] += 1
    targets[1, 2], incoming[1, 2] = 6, -0.5
    check(combo, operands, targets, incoming)
    got, gradients = package_logp(combo, operands, targets, incoming)
    assert got[1, 2] == -math.inf and gradients["hidden"][1, 2].any()
    assert all(x.isfinite().all() for x in gradients.values())


@all_combos
def test_masks(combo):
    operands, targets, incoming = make_operands(combo, 3, 6, bias=True)
    targets[0, 1:4] = -100
    mask = torch.ones(3, 6, dtype=torch.bool, device=combo.device)
    mask[1], mask[2, 3] = False, False
    hidden = operands["hidden"]
    hidden[~mask] = math.nan
    targets[1, 0] = 10**9
    for frozen in (False, True):
        got, gradients = package_logp(combo, operands, targets, incoming, frozen, mask=mask)
        assert not got[~mask.cpu()].any() and not got[0, 1:4].any()
        assert not gradients["hidden"][~mask.cpu()].any()
    hidden[~mask] = 0
    check(combo, operands, targets, incoming, mask=mask)


@all_combos
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_no_token(combo, shape):
    operands, targets, incoming = make_operands(combo, *shape, bias=True)
    for frozen in (False, True):
        logp, gradients = package_logp(combo, operands, targets, incoming, frozen)
        assert logp.shape == shape and not any(x.any() for x in gradients.values())
        assert gradients["hidden"].shape == (*shape, 16)


@all_combos
@pytest.mark.parametrize("nothing", ["masked", "no gradient"])
def test_nothing_to_learn(combo, nothing):
    operands, targets, incoming = make_operands(combo, 2, 3, bias=True)
    mask = torch.full((2, 3), nothing != "masked", device=combo.device)
    for frozen in (False, True):
        logp, gradients = package_logp(combo, operands, targets, incoming * (nothing == "masked"), frozen, mask=mask)
        assert not any(x.any() for x in gradients.values()) and logp.any() == (nothing != "masked")


@all_combos
def test_many_chunks(combo, monkeypatch):
    monkeypatch.setattr(triton_backend, "STATISTICS_ROWS", triton_backend.ROW_TILE)
    shape = (2, 70) if combo.backend == "triton" else (2, 9)
    check(combo, *make_operands(combo, *shape, vocabulary=37, bias=True), chunk_bytes=1)


@few_combos
def test_bit_for_bit_the_same(combo):
    shape = (3, 5) if combo.device == "cpu" else (2, 800)
    arguments = make_operands(combo, *shape, vocabulary=257, bias=True)
    for frozen in (False, True):
        first, gradients = package_logp(combo, *arguments, frozen)
        for _ in range(1 if combo.interpreted else 4):
            again, others = package_logp(combo, *arguments, frozen)
            assert torch.equal(first, again) and all(torch.equal(x, others[k]) for k, x in gradients.items())


@all_combos
def test_any_loss_can_use_it(combo):
    """A clipped policy-gradient loss with a KL penalty: the incoming gradient is what autograd makes of it."""
    operands, targets, advantage = make_operands(combo, 3, 5)
    old = linear_logp(**operands, target_ids=targets, backend=combo.backend).cpu().double() + 0.1

    def objective(logp, advantage):
        ratio = (logp - old.to(logp)).exp()
        clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return -clipped.mean() + 0.05 * (logp - old.to(logp)).square().mean()

    leaves = {k: x.clone().requires_grad_() for k, x in operands.items()}
    objective(linear_logp(**leaves, target_ids=targets, backend=combo.backend), advantage).backward()
    exact = {k: x.detach().cpu().double().requires_grad_() for k, x in operands.items()}
    objective(log_prob(logits(**exact), targets.cpu()), advantage.cpu().double()).backward()
    for name, x in leaves.items():
        assert_gradient(name, x.grad, exact[name].grad, gradient_tolerance(combo))


@few_combos
@pytest.mark.parametrize("learned", NAMES)
def test_only_what_requires_a_gradient_gets_one(combo, learned):
    operands, targets, incoming = make_operands(combo, 2, 3, bias=True)
    _, expected = package_logp(combo, operands, targets, incoming, frozen=learned == "hidden")
    operands[learned].requires_grad_()
    linear_logp(**operands, target_ids=targets, backend=combo.backend).backward(incoming)
    assert torch.equal(operands[learned].grad.cpu(), expected[learned])
    assert all(operands[k].grad is None for k in NAMES if k != learned)


@few_combos
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_backward_twice(combo, frozen):
    operands, targets, incoming = make_operands(combo, 2, 3)
    leaves = {k: x.clone().requires_grad_(k == "hidden" or not frozen) for k, x in operands.items()}
    logp = linear_logp(**leaves, target_ids=targets, backend=combo.backend)
    first, second = (
        torch.autograd.grad(logp, leaves["hidden"], factor * incoming, retain_graph=True)[0] for factor in (1, 2)
    )
    assert torch.equal(second, 2 * first)


@cuda_combos
def test_a_target_outside_without_gradient(combo):
    """Its log p is NaN; where the loss leaves it out, so does the gradient."""
    operands, targets, incoming = make_operands(combo, 2, 3)
    targets[0, 1], incoming[0, 1] = 10**6, 0
    for frozen in (False, True):
        logp, gradients = package_logp(combo, operands, targets, incoming, frozen)
        assert logp.isnan().sum() == 1 and all(x.isfinite().all() for x in gradients.values())


@few_combos
def test_it_agrees_with_the_statistics(combo):
    operands, targets, _ = make_operands(combo, 3, 5, bias=True)
    options = {"target_ids": targets, "softcap": 9.0, "backend": combo.backend}
    assert torch.equal(linear_logp(**operands, **options), token_statistics(**operands, **options).logp)


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0}, {"temperature": 0.6}, {"softcap": 3.0, "temperature": 1.4, "chunk_bytes": 1}]
)
def test_gradcheck(options):
    combo = Combo("torch", "cpu", torch.float64)
    operands, targets, _ = make_operands(combo, 2, 3, width=3, vocabulary=7, bias=True)
    targets[0, 1] = -100

    def logp(hidden, weight, bias):
        return linear_logp(hidden, weight, targets, bias=bias, backend="torch", **options)

    assert torch.autograd.gradcheck(logp, [x.requires_grad_() for x in operands.values()])


# ------------------------------------------------------------------------------------------------ on the GPU


@pytest.mark.cuda
@cuda_combos
@pytest.mark.parametrize("size", [{"width": 1024, "vocabulary": 8209}, {"width": 333, "vocabulary": 5003}], ids=str)
def test_parity_at_size(combo, size):
    check(combo, *make_operands(combo, 3, 500, bias=True, **size), chunk_bytes=1 << 22)


@pytest.mark.cuda
def test_float32_logits_are_worth_it(record_property):
    """bfloat16 at a model's size: |Δ log p| ≤ 2e-4 nat; logits rounded to bfloat16 do ten times worse, or more."""
    combo = Combo("triton", "cuda", torch.bfloat16)
    operands, targets, _ = make_operands(combo, 2048, width=4096, vocabulary=32768)
    hidden, weight = operands.values()
    # In float64 on the GPU: the reference's own formula, a fifth of a TFLOP.
    exact = log_prob(logits(hidden.double(), weight.double()), targets)
    ours = (linear_logp(hidden, weight, targets, backend="triton") - exact).abs().max().item()
    statistics = (token_statistics(hidden, weight, targets, backend="triton").logp - exact).abs().max().item()
    rounded = (log_prob((hidden @ weight.T).double(), targets) - exact).abs().max().item()
    figures = {"linear_logp": ours, "token_statistics": statistics, "bfloat16 logits": rounded}
    print("largest |Δ log p|, nat:", figures)
    for name, value in figures.items():
        record_property(name, value)
    assert max(ours, statistics) <= LOGP_TOLERANCE
    assert rounded >= 10 * max(ours, statistics)
