"""How exact divergences of 16-bit operands are, row by row, against float64 of the same operands.

Models that differ by 3e-5, 2e-3 and 0.1 nat on average, and nearly equal ones that find one target 5 nats likelier or
less likely. The kernels run in Triton's interpreter where there is no GPU, bfloat16 among them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from egrsd_kernels import Head, linear_divergence
from egrsd_kernels.backends.triton.divergence.sums import log2_of_share
from reference import divergence as exact_divergence
from tests.support import bfloat16
from tests.support.cases import Draw, draw_head, draw_hidden
from tests.support.devices import CPU_COMBOS, CUDA_COMBOS, INTERPRETED, Combo
from tests.support.tolerances import assert_within

INTERPRETER = pytest.mark.skipif(not INTERPRETED, reason="a GPU is there")
COMBOS = [
    CPU_COMBOS[2],
    pytest.param(Combo("torch", "cpu", torch.float16), id="torch-cpu-float16"),
    pytest.param(Combo("triton", "cpu", torch.bfloat16), id="interpreter", marks=[pytest.mark.slow, INTERPRETER]),
    *CUDA_COMBOS[:2],
]
combos = pytest.mark.parametrize("combo", COMBOS)
kinds = pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])

ROWS = 8  # of each group
FEATURES, VOCABULARY, TARGET = 64, 1027, 7
# Of logits, and the mean KL that makes.
NOISE = {"near": (8e-3, 3e-5), "apart": (0.065, 2e-3), "far": (0.45, 0.1)}


class Operands(NamedTuple):
    student: torch.Tensor
    teacher: torch.Tensor
    head: torch.Tensor
    targets: torch.Tensor
    groups: dict[str, slice]


def draw(combo: Combo) -> Operands:
    """One head for both. One direction of its features is the target's logit alone: it moves, and nothing else does."""
    draw = Draw(11)
    head = torch.zeros(VOCABULARY, FEATURES + 1)
    head[:, :FEATURES] = draw_head(draw, VOCABULARY, FEATURES)
    head[TARGET] = 0
    head[TARGET, FEATURES] = 1
    groups = [*NOISE, "likelier", "less likely"]
    student = torch.zeros(len(groups), ROWS, FEATURES + 1)
    student[..., :FEATURES] = draw_hidden(draw, "peaked", head[:, :FEATURES], len(groups), ROWS)
    logsumexp = (student @ head.T).logsumexp(-1)
    student[..., FEATURES] = logsumexp - torch.linspace(1, 9, ROWS)  # log p of the target, from -1.3 to -9
    teacher = student.clone()
    for index, group in enumerate(groups):
        noise, _ = NOISE.get(group, NOISE["near"])
        teacher[index, :, :FEATURES] += noise * draw.normal(ROWS, FEATURES)
    teacher[-2, :, FEATURES] += 5
    teacher[-1, :, FEATURES] -= 5
    targets = torch.full((len(groups) * ROWS,), TARGET)
    turned = torch.linalg.qr(draw.normal(FEATURES + 1, FEATURES + 1)).Q  # no feature is a single entry's
    made = ((x.reshape(-1, FEATURES + 1) @ turned).to(combo.device, combo.dtype) for x in (student, teacher, head))
    where = {group: slice(index * ROWS, (index + 1) * ROWS) for index, group in enumerate(groups)}
    return Operands(*made, targets.to(combo.device), where)


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce:RuntimeWarning")  # past the last row
@combos
@kinds
def test_row_by_row(monkeypatch, combo, kind):
    """A divergence within max(1e-3 of it, 4e-6 nat), a row's gradient within 5e-3 of its norm, and a head's.

    A gradient that is returned in float16 is off by its smallest number beside that, in each feature.
    """
    if combo.interpreted:
        bfloat16.as_on_a_gpu(monkeypatch)
    given = draw(combo)
    exact = [x.double().requires_grad_() for x in (given.student, given.head)]
    logits = exact[0] @ exact[1].T, given.teacher.double() @ exact[1].detach().T
    want = exact_divergence(*logits, kind)
    want.sum().backward()
    want, hidden, head = (x.detach().cpu() for x in (want, *(x.grad for x in exact)))
    for name, (_, size) in NOISE.items():
        assert kind == "jsd" or 0.4 < want[given.groups[name]].mean() / size < 2.5, name
    delta = (logits[1].log_softmax(-1) - logits[0].log_softmax(-1)).detach()[:, TARGET]
    assert (delta[given.groups["likelier"]] > 1).all() and (delta[given.groups["less likely"]] < -3).all()

    smallest = 2.0**-24 * math.sqrt(FEATURES + 1) if combo.dtype == torch.float16 else 0.0
    for targets, trained in ((given.targets, False), (None, True)):
        leaves = given.student.clone().requires_grad_(), given.head.clone().requires_grad_(trained)
        got = linear_divergence(*leaves, given.teacher, leaves[1], kind=kind, target_ids=targets, backend=combo.backend)
        got.sum().backward()
        off = got.detach().cpu().double() - want
        assert_within("divergence", off, torch.zeros_like(off), (1e-3 * want).clamp(min=4e-6))
        for name in NOISE:
            mean, where = off[given.groups[name]].mean(), given.groups[name]
            assert_within(f"mean of {name}", mean, torch.zeros_like(mean), max(1e-6, 1e-4 * want[where].mean().item()))
        rows = (leaves[0].grad.cpu().double() - hidden).norm(dim=1)
        assert_within("a row's gradient", rows, torch.zeros_like(rows), 5e-3 * hidden.norm(dim=1) + smallest)
        if trained:
            assert_within(
                "head's gradient", (leaves[1].grad.cpu().double() - head).norm(), 0 * rows[0], 5e-3 * head.norm()
            )


@pytest.mark.parametrize("combo", [*CPU_COMBOS[1:5], *CUDA_COMBOS[:3]])
@pytest.mark.parametrize("excluding", ["student", "teacher"])
@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_a_jsd_of_what_one_model_excludes(combo, excluding, beta):
    """An entry that the other finds likely makes it as large as it gets: exact, not finite alone."""
    draw = Draw(3)
    head, hidden = draw.normal(70, 24) / 4, draw.normal(2, 6, 24)
    heads = {"student": draw.normal(70), "teacher": draw.normal(70)}
    heads[excluding][9], heads["teacher" if excluding == "student" else "student"][9] = -math.inf, 3.0
    hidden, head = (x.to(combo.device, combo.dtype) for x in (hidden, head))
    biases = [heads[name].to(combo.device, combo.dtype) for name in ("student", "teacher")]
    got = linear_divergence(
        hidden[0], Head(head, biases[0]), hidden[1], Head(head, biases[1]), kind="jsd", beta=beta, backend=combo.backend
    )
    logits = [x.double() @ head.double().T + bias.double() for x, bias in zip(hidden, biases, strict=True)]
    want = exact_divergence(*logits, "jsd", beta)
    assert_within("divergence", got, want, 1e-3 * want.cpu())


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce:RuntimeWarning")  # past the last row
@pytest.mark.parametrize("combo", [*CPU_COMBOS[1:5], *CUDA_COMBOS[:3]])
@pytest.mark.parametrize("kind, beta", [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)])
def test_an_entry_that_is_nearly_sure(combo, kind, beta):
    """To both models, by 16, 30 or 45 nats: what is left of a divergence is rounding, and is no more than that."""
    draw, n = Draw(3), 120
    rows = draw.normal(2, n, 8)
    entry = torch.randint(8, (n,), generator=draw.generator)
    rows[:, torch.arange(n), entry] += torch.tensor([16.0, 30, 45]).repeat(n // 3)
    student, teacher = rows.to(combo.device, combo.dtype)
    weight, entry = torch.eye(8, device=combo.device, dtype=combo.dtype), entry.to(combo.device)
    options = {"kind": kind, "beta": beta, "target_ids": entry, "backend": combo.backend}
    found = linear_divergence(student, weight, teacher, weight, **options)
    want = exact_divergence(student.double(), teacher.double(), kind, beta)
    assert_within("divergence", found, want, (1e-3 * want.cpu()).clamp(min=4e-6))


@triton.jit
def _log2_kernel(x, out, HALF: tl.constexpr, BLOCK: tl.constexpr):
    v = tl.arange(0, BLOCK)
    tl.store(out + v, log2_of_share(tl.load(x + v), HALF))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("half", [True, False])
def test_the_logarithm_of_a_share(half, device):
    """Off by 2e-6 of itself, and beyond 2/3 to 4/3 by the rounding of 1 + x, unless x is at least -1/2."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("a GPU is there")
    sizes = torch.cat([torch.logspace(-7, 0, 1022), Draw(5).uniform(1024), torch.zeros(2)])
    x = torch.cat([-0.5 * sizes] * 2 if half else [(2.0**-23 - 1) * sizes, sizes]).to(device)
    out = torch.empty_like(x)
    _log2_kernel[(1,)](x, out, HALF=half, BLOCK=len(x))
    want = torch.log1p(x.double()) / math.log(2)
    rounded = 1 + x.double()
    rounding = 0.0 if half else (2.0**-24 / math.log(2) / rounded).where((rounded < 0.67) | (rounded > 1.33), 0)
    assert ((out - want).abs() <= 2e-6 * want.abs() + rounding).all()
    assert (out[x == 0] == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce:RuntimeWarning")  # past the last row
@pytest.mark.parametrize("combo", [*CPU_COMBOS[1:5], *CUDA_COMBOS[:3]])
@pytest.mark.parametrize("beta", [1e-3, 0.02, 0.98])
def test_a_jsd_with_a_small_share_of_one_model(combo, beta):
    """Whose divergence and gradient are a small part of its logarithms: a row's is within 5e-3 all the same."""
    given = draw(combo)
    exact = given.student.double().requires_grad_()
    head = given.head.double()
    want = exact_divergence(exact @ head.T, given.teacher.double() @ head.T, "jsd", beta)
    want.sum().backward()
    hidden = given.student.clone().requires_grad_()
    got = linear_divergence(
        hidden, given.head, given.teacher, given.head, kind="jsd", beta=beta, target_ids=given.targets,
        backend=combo.backend,
    )  # fmt: skip
    got.sum().backward()
    assert_within("divergence", got.detach(), want.detach(), (1e-3 * want.detach().cpu()).clamp(min=4e-6))
    smallest = 2.0**-24 * math.sqrt(FEATURES + 1) if combo.dtype == torch.float16 else 0.0
    rows, exact_rows = (hidden.grad.double() - exact.grad).norm(dim=1).cpu(), exact.grad.norm(dim=1).cpu()
    assert_within("a row's gradient", rows, torch.zeros_like(rows), 5e-3 * exact_rows + smallest)
