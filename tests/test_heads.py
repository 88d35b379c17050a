"""A Head wherever a weight is taken: scale, softcap, bias and low-rank part, against the reference on plain weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from egrsd_kernels import Head, fused_egrsd_loss, linear_logp, token_statistics
from egrsd_kernels.backends import torch as torch_backend
from egrsd_kernels.backends.triton.gradient import HeadProduct
from reference import egrsd_loss, entropy, log_prob, logits
from tests.support.cases import Draw, make_case
from tests.support.devices import Combo, all_combos, few_combos, sparse_combos
from tests.support.tolerances import (
    LEARNED,
    assert_gradient,
    assert_within,
    entropy_error,
    gradient_tolerance,
    logit_error,
    logp_error,
    loss_scale,
)

RANKS = [3, 16]


def make_head(combo: Combo, case: dict, rank: int, seed: int = 3, scale: float = 0.5) -> Head:
    """The case's weight and bias with scale, softcap and, for a rank, a low-rank part that moves logits by about 1."""
    draw = Draw(seed)
    weight = case["student_weight"]
    vocabulary, width = weight.shape
    low_rank = None
    if rank:
        a = draw.normal(rank, width) / math.sqrt(width)
        b = draw.normal(vocabulary, rank) / math.sqrt(rank)
        low_rank = a.to(weight), b.to(weight), scale
    return Head(weight, case.get("student_bias"), 1.3, 12.0, low_rank)


def leaves_of(head: Head, *, trained: bool) -> tuple[Head, dict[str, torch.Tensor]]:
    """The same head of fresh leaves: A and B, and with ``trained`` all else, require a gradient."""

    def leaf(x, learned):
        return None if x is None else x.detach().clone().requires_grad_(learned)

    found = {"weight": leaf(head.weight, trained), "bias": leaf(head.bias, trained)}
    low_rank = None
    if head.low_rank is not None:
        found["A"], found["B"] = (leaf(x, True) for x in head.low_rank[:2])
        low_rank = found["A"], found["B"], head.low_rank[2]
    made = Head(found["weight"], found["bias"], head.logit_scale, head.softcap, low_rank)
    return made, {k: x for k, x in found.items() if x is not None and x.requires_grad}


def plain(head: Head, hidden: torch.Tensor, leaves: dict[str, torch.Tensor]):
    """(hidden states, weight, bias) in float64 whose logits, under the softcap, are the head's; of float64 ``leaves``.

    u and the low-rank part are rounded as the head's dtype has them, which a gradient passes by.
    """
    s = head.logit_scale
    weight, bias = leaves["weight"], leaves.get("bias")
    states = leaves["hidden"]
    if head.low_rank is not None:
        a, b, scale = (x.detach() if isinstance(x, torch.Tensor) else x for x in head.low_rank)
        rounded = F.linear(hidden, (scale * a).to(hidden.dtype)).cpu().double()
        u = scale * (states @ leaves["A"].t())
        states = torch.cat([states, u + (rounded - u).detach()], -1)
        weight = torch.cat([weight, leaves["B"] + (b.to(head.weight.dtype).cpu().double() - leaves["B"]).detach()], 1)
    return states, s * weight, None if bias is None else s * bias


def exact_leaves(head: Head, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    if head.low_rank is not None:
        tensors |= {"A": head.low_rank[0], "B": head.low_rank[1]}
    return {k: x.detach().cpu().double().requires_grad_() for k, x in tensors.items() if x is not None}


def check_gradients(combo: Combo, got: dict, want: dict, tokens: int, more: float = 2.0) -> None:
    """more: for what PyTorch multiplies and rounds after the package."""
    for name, x in got.items():
        assert x.grad.dtype == x.dtype and x.grad.shape == x.shape
        assert_gradient(name, x.grad, want[name].grad, more * gradient_tolerance(combo, tokens))


@all_combos
@pytest.mark.parametrize("rank", [*RANKS, 0])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_loss(combo, rank, trained):
    case = make_case(combo, bias=True, lookahead=2, mask="holes", lengths=(6,) * 6, width=24, vocabulary=130)
    case["temperature"] = 0.8
    student = make_head(combo, case, rank)
    teacher = make_head(combo, case, rank and 5, seed=8)
    rest = {k: x for k, x in case.items() if k not in LEARNED}
    head, leaves = leaves_of(student, trained=trained)
    leaves["hidden"] = case["student_hidden"].clone().requires_grad_()
    factor = loss_scale(case, combo)
    loss, stats = fused_egrsd_loss(
        leaves["hidden"], head, **rest, teacher_weight=teacher, backend=combo.backend, return_stats=True
    )
    (loss * factor).backward()
    assert trained or head.weight.grad is None

    want = exact_leaves(student, case["student_hidden"])
    hidden, weight, bias = plain(student, case["student_hidden"], want)
    with torch.no_grad():
        of_teacher = plain(teacher, case["teacher_hidden"], exact_leaves(teacher, case["teacher_hidden"]))
    rest = {k: x.cpu() if isinstance(x, torch.Tensor) else x for k, x in rest.items()}
    rest |= {"teacher_hidden": of_teacher[0], "teacher_weight": of_teacher[1], "teacher_bias": of_teacher[2]}
    expected, signals = egrsd_loss(
        hidden, weight, **rest, student_bias=bias, softcap=12.0, return_stats=True, dtype=torch.float64
    )
    (expected * factor).backward()
    dz = logit_error(combo, hidden, weight, bias, softcap=12.0, temperature=0.8)
    for name in ("student_logp", "teacher_logp"):
        assert_within(name, getattr(stats, name), getattr(signals, name), 2 * logp_error(combo, dz))
    tolerance = 1e-4 if combo.compute_dtype == torch.float32 else 1e-12
    torch.testing.assert_close(loss.detach().cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    check_gradients(combo, leaves, want, int(case["mask"].sum()))


@all_combos
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("keep_bytes", [1 << 30, 0], ids=["kept", "again"])
@pytest.mark.parametrize("entropy_grad", [False, True], ids=["logp", "entropy"])
def test_linear_logp(combo, rank, keep_bytes, entropy_grad):
    case = make_case(combo, bias=True, lengths=(7, 7), width=24, vocabulary=130)
    student = make_head(combo, case, rank)
    targets = case["target_ids"]
    g, h = torch.randn(2, *targets.shape, generator=torch.Generator().manual_seed(1)).to(combo.device)
    for trained in (False, True):
        head, leaves = leaves_of(student, trained=trained)
        leaves["hidden"] = case["student_hidden"].clone().requires_grad_()
        options = {"return_entropy": True, "entropy_grad": entropy_grad, "keep_bytes": keep_bytes, "temperature": 0.8}
        logp, found = linear_logp(leaves["hidden"], head, targets, backend=combo.backend, **options)
        loss = (logp * g).sum() + ((found * h).sum() if entropy_grad else 0)
        loss.backward()
        want = exact_leaves(student, case["student_hidden"])
        z = logits(*plain(student, case["student_hidden"], want), softcap=12.0, temperature=0.8)
        expected, of_entropy = log_prob(z, targets.cpu()), entropy(z)
        g, h = g.cpu(), h.cpu()
        ((expected * g).sum() + ((of_entropy * h).sum() if entropy_grad else 0)).backward()
        g, h = g.to(combo.device), h.to(combo.device)
        dz = logit_error(combo, *plain(student, case["student_hidden"], want), softcap=12.0, temperature=0.8)
        assert_within("logp", logp, expected, 2 * logp_error(combo, dz))
        assert_within("entropy", found, of_entropy, 2 * entropy_error(combo, dz, of_entropy.detach(), 130))
        check_gradients(combo, leaves, want, targets.numel(), more=3.0)


@few_combos
def test_rows_that_do_not_count_may_hold_anything(combo):
    """Beside a low-rank part, too, whose product with hidden states is made of all rows at once."""
    case = make_case(combo, bias=True, lengths=(7, 7), width=24, vocabulary=130)
    hidden, targets = case["student_hidden"].detach().clone(), case["target_ids"]
    mask = torch.ones_like(targets, dtype=torch.bool)
    mask[0, 1:3] = False
    student, advantages = make_head(combo, case, 3), torch.randn(targets.shape, device=combo.device)
    found = []
    for value in (0.0, math.nan):
        hidden[~mask] = value
        head, leaves = leaves_of(student, trained=True)
        leaves["hidden"] = hidden.clone().requires_grad_()
        options = {"mask": mask, "backend": combo.backend}
        linear_logp(leaves["hidden"], head, targets, **options).sum().backward()
        teacher = {"teacher_weight": make_head(combo, case, 0)}
        fused_egrsd_loss(leaves["hidden"], head, hidden, targets, advantages, **teacher, **options).backward()
        found.append({name: leaf.grad for name, leaf in leaves.items()})
    assert all(torch.equal(gradient, found[0][name]) for name, gradient in found[1].items())


@all_combos
@pytest.mark.parametrize("rank", [*RANKS, 0])
def test_statistics(combo, rank):
    case = make_case(combo, bias=True, lengths=(7, 7), width=24, vocabulary=130)
    head = make_head(combo, case, rank)
    hidden, targets = case["student_hidden"], case["target_ids"]
    got = token_statistics(hidden, head, targets, temperature=0.8, backend=combo.backend)
    operands = plain(head, hidden, exact_leaves(head, hidden))
    z = logits(*operands, softcap=12.0, temperature=0.8).detach()
    dz = logit_error(combo, *operands, softcap=12.0, temperature=0.8)
    assert_within("logp", got.logp, log_prob(z, targets.cpu()), 2 * logp_error(combo, dz))
    assert_within("entropy", got.entropy, entropy(z), 2 * entropy_error(combo, dz, entropy(z), 130))


@few_combos
def test_a_plain_head_is_its_weight(combo):
    """Bit for bit: the same call by other words."""
    case = make_case(combo, bias=True, softcap=5.0, lookahead=2)
    weight, bias, softcap = (case.pop(k) for k in ("student_weight", "student_bias", "softcap"))
    by_parts, stats = fused_egrsd_loss(
        **case, student_weight=weight, student_bias=bias, softcap=softcap, return_stats=True, backend=combo.backend
    )
    head = Head(weight, bias, softcap=softcap)
    by_head, others = fused_egrsd_loss(**case, student_weight=head, return_stats=True, backend=combo.backend)
    assert torch.equal(by_parts, by_head) and all(torch.equal(x, y) for x, y in zip(stats, others, strict=True))


@sparse_combos
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_sparse(combo, trained):
    case = make_case(combo, lengths=(7, 7), width=24, vocabulary=130)
    student = make_head(combo, case, 16)
    targets = case["target_ids"]
    head, leaves = leaves_of(student, trained=trained)
    leaves["hidden"] = case["student_hidden"].clone().requires_grad_()
    options = {"grad_mode": "sparse", "sparse_tol": 1e-6, "backend": combo.backend}
    linear_logp(leaves["hidden"], head, targets, **options).sum().backward()
    want = exact_leaves(student, case["student_hidden"])
    log_prob(logits(*plain(student, case["student_hidden"], want), softcap=12.0), targets.cpu()).sum().backward()
    check_gradients(combo, leaves, want, targets.numel())


@few_combos
def test_a_frozen_weight_gets_no_product(combo, monkeypatch):
    """Beside it only the low-rank part's columns of the head's gradient are made."""
    made = []
    if combo.backend == "triton":
        product = HeadProduct.__call__

        def spy(self, out, *args, **options):
            made.append(out.shape[1])
            product(self, out, *args, **options)

        monkeypatch.setattr(HeadProduct, "__call__", spy)
    else:
        finish = torch_backend.Sums.finish

        def spy(self):
            made.append(self.d_weight.shape[1])
            return finish(self)

        monkeypatch.setattr(torch_backend.Sums, "finish", spy)
    case = make_case(combo, lengths=(7, 7), width=24, vocabulary=130)
    for keep_bytes in (0, 1 << 30):
        head, leaves = leaves_of(make_head(combo, case, 5), trained=False)
        options = {"keep_bytes": keep_bytes, "backend": combo.backend}
        logp = linear_logp(case["student_hidden"], head, case["target_ids"], **options)
        logp.sum().backward()
        assert leaves["B"].grad.any() and leaves["B"].grad.shape == (130, 5)
    assert made == [8, 8]  # a rank of 5, filled up


def test_autocast_reads_a_head_as_a_linear_layer_would():
    combo = Combo("torch", "cpu", torch.float32)
    case = make_case(combo, bias=True, width=24)
    head, leaves = leaves_of(make_head(combo, case, 5), trained=True)
    hidden, targets = case["student_hidden"], case["target_ids"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = linear_logp(hidden, head, targets)
    logp.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves.values())
    low = Head(head.weight.bfloat16(), head.bias, head.logit_scale, head.softcap, head.low_rank)
    assert torch.equal(logp, linear_logp(hidden.bfloat16(), low, targets))


def zeros(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(*shape, **options)


LOW_RANK = (zeros(2, 3), zeros(5, 2), 1.0)
OWN = "None, since weight is a Head, which has its own"


@pytest.mark.parametrize("function", [linear_logp, token_statistics])
@pytest.mark.parametrize(
    "head, options, error, words",
    [
        (Head(zeros(5, 3)), {"softcap": 2.0}, ValueError, f"softcap: expected {OWN}, got 2.0"),
        (Head(zeros(5, 3)), {"bias": zeros(5)}, ValueError, f"bias: expected {OWN}, got a torch.float32 tensor of"),
        (Head(zeros(5, 4)), {}, ValueError, "weight.weight: expected 3 columns, the hidden size of hidden"),
        (Head(zeros(5, 3), zeros(4)), {}, ValueError, "weight.bias: expected shape (5,)"),
        (Head(zeros(5, 3), softcap=-1.0), {}, ValueError, "weight.softcap: expected a finite number above 0, got -1.0"),
        (Head(zeros(5, 3), logit_scale=0), {}, ValueError, "weight.logit_scale: expected a finite number above 0"),
        (Head(zeros(5, 3), low_rank=3), {}, TypeError, "weight.low_rank: expected (A, B, scale), with A (r, D)"),
        (
            Head(zeros(5, 3), low_rank=(zeros(2, 4), zeros(5, 2), 1.0)),
            {},
            ValueError,
            "weight.low_rank A: expected shape (2, 3)",
        ),
        (
            Head(zeros(5, 3), low_rank=(zeros(2, 3), zeros(5, 3), 1.0)),
            {},
            ValueError,
            "weight.low_rank B: expected shape (5, 2)",
        ),
        (
            Head(zeros(5, 3), low_rank=(zeros(2, 3), zeros(5, 2).int(), 1.0)),
            {},
            TypeError,
            "weight.low_rank B: expected a floating-point tensor",
        ),
        (
            Head(zeros(5, 3), low_rank=(zeros(2, 3), zeros(5, 2), math.nan)),
            {},
            ValueError,
            "weight.low_rank scale: expected a finite number, got nan",
        ),
    ],
    ids=str,
)
def test_refused(function, head, options, error, words):
    with pytest.raises(error) as found:
        function(zeros(2, 3), head, torch.zeros(2, dtype=torch.long), **options)
    assert str(found.value).startswith(words) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"student_weight": Head(zeros(5, 3), low_rank=LOW_RANK)},
            "teacher_weight: expected the teacher's own Head, since the student's has a low-rank part, got None",
        ),
        (
            {"student_weight": Head(zeros(5, 3)), "teacher_weight": zeros(5, 3)},
            "teacher_weight: expected a Head, as student_weight is, got a torch.float32 tensor of shape (5, 3) on cpu",
        ),
        (
            {"student_weight": zeros(5, 3), "teacher_weight": Head(zeros(5, 3))},
            "teacher_weight: expected a tensor, as student_weight is, got Head(",
        ),
        (
            {"student_weight": Head(zeros(5, 3)), "teacher_bias": zeros(5)},
            "teacher_bias: expected None, since student_weight is a Head, which has its own, got a torch",
        ),
        (
            {"student_weight": Head(zeros(5, 3)), "student_bias": zeros(5)},
            "student_bias: expected None, since student_weight is a Head, which has its own, got a torch",
        ),
        (
            {"student_weight": Head(zeros(5, 3)), "softcap": 3.0},
            "softcap: expected None, since student_weight is a Head, which has its own, got 3.0",
        ),
    ],
    ids=str,
)
def test_heads_that_the_loss_refuses(options, words):
    arguments = {
        "student_hidden": zeros(2, 3), "teacher_hidden": zeros(2, 3), "target_ids": torch.zeros(2, dtype=torch.long),
        "advantages": torch.ones(1),
    }  # fmt: skip
    with pytest.raises(ValueError) as found:
        fused_egrsd_loss(**arguments, **options)
    assert str(found.value).startswith(words) and "\n" not in str(found.value)


def test_a_low_rank_student_beside_earlier_statistics():
    """Nothing of the teacher is read then, so nothing of it has to be known."""
    arguments = {
        "student_hidden": zeros(2, 3), "teacher_hidden": None, "target_ids": torch.zeros(2, dtype=torch.long),
        "advantages": torch.ones(1), "teacher_logp": -torch.ones(2), "teacher_entropy": torch.ones(2),
    }  # fmt: skip
    loss = fused_egrsd_loss(**arguments, student_weight=Head(zeros(5, 3), low_rank=LOW_RANK))
    assert loss.isfinite()
