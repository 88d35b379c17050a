"""``linear_divergence`` against float64: values and gradients under any incoming gradient.

How near is near enough, beside tests/support/tolerances.py: a divergence moves by Σ |dD/dz| Δz for each model, with
both derivatives taken in float64, and by the roundings of log p and of the sums, 4 u |log p| of each entry and
32 u (1 + D). A gradient's row moves by Σ_v |Δ(dD/dz)_v| <= 4 e (1 + Σ_v |dD/dz_v|) with e = Δz_S + Δz_T + 16 u, since a
ratio r is off by e and dz by p Δr; operands are multiplied by that, and rounded as those of log p are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from egrsd_kernels import DivergenceStatistics, Head, linear_divergence, token_statistics
from egrsd_kernels.backends import torch as torch_backend
from reference import divergence as exact_divergence
from reference import linear_divergence as reference_divergence
from reference import logits
from tests.support.cases import Draw, draw_head, draw_hidden, draw_targets
from tests.support.devices import CPU_COMBOS, CUDA_COMBOS, Combo
from tests.support.tolerances import assert_within, gradient_tolerance, logit_error

HALF = pytest.param(Combo("torch", "cpu", torch.float16), id="torch-cpu-float16")
# The kernels in the interpreter have tests/test_pair_kernels.py, and here one case of each kind.
IN_TORCH, KERNELS = [*CPU_COMBOS[:3], HALF, *CUDA_COMBOS[3:]], CUDA_COMBOS[:3]
combos = pytest.mark.parametrize("combo", IN_TORCH + KERNELS)
only_torch = pytest.mark.parametrize("combo", IN_TORCH)
few = pytest.mark.parametrize("combo", [CPU_COMBOS[1], *KERNELS[::2], CUDA_COMBOS[3]])
KINDS = [{"kind": "reverse_kl"}, {"kind": "forward_kl"}, {"kind": "jsd"}, {"kind": "jsd", "beta": 0.1}]
TOP = [{"kind": "reverse_kl", "top_k": 5}, {"kind": "forward_kl", "top_k": 5}, {"kind": "jsd", "top_k": 5}]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


class Case(NamedTuple):
    """Operands on the combo's device, in its dtype."""

    student: dict[str, torch.Tensor]  # hidden, weight, and bias or none
    teacher: dict[str, torch.Tensor]
    targets: torch.Tensor
    incoming: torch.Tensor  # a quarter of it is 0


def make_case(
    combo: Combo, *shape: int, width: int = 16, teacher_width: int | None = None, vocabulary: int = 61,
    kind: str = "peaked", bias: bool = False, apart: float = 0.3, seed: int = 0,
) -> Case:  # fmt: skip
    """teacher_width: of a head of its own; None: the student's head, and hidden states ``apart`` from the student's."""
    draw = Draw(seed)
    weight = draw_head(draw, vocabulary, width)
    hidden = draw_hidden(draw, kind, weight, *shape)
    student = {"hidden": hidden, "weight": weight} | ({"bias": draw.normal(vocabulary)} if bias else {})
    if teacher_width is None:
        noise = apart * hidden.norm(dim=-1, keepdim=True) / math.sqrt(width) * draw.normal(*hidden.shape)
        teacher = {**student, "hidden": hidden + noise}
    else:
        weight = draw_head(draw, vocabulary, teacher_width)
        teacher = {"hidden": draw_hidden(draw, kind, weight, *shape), "weight": weight}
        teacher |= {"bias": draw.normal(vocabulary)} if bias else {}
    targets = draw_targets(draw, hidden, student["weight"])
    incoming = draw.normal(*shape).to(combo.compute_dtype)
    incoming[draw.uniform(*shape) < 0.25] = 0

    def there(operands: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: x.to(combo.device, combo.dtype) for k, x in operands.items()}

    return Case(there(student), there(teacher), targets.to(combo.device), incoming.to(combo.device))


def head(operands: dict[str, torch.Tensor], softcap: float | None = None) -> Head:
    return Head(operands["weight"], operands.get("bias"), softcap=softcap)


def package(combo: Combo, case: Case, frozen: bool, softcap=None, **options):
    """(DivergenceStatistics, gradients by name) on the CPU."""
    leaves = {k: x.detach().clone().requires_grad_(k == "hidden" or not frozen) for k, x in case.student.items()}
    found = linear_divergence(
        leaves["hidden"], head(leaves, softcap), case.teacher["hidden"], head(case.teacher, softcap),
        return_stats=True, backend=combo.backend, **options,
    )  # fmt: skip
    found.divergence.backward(case.incoming)
    stats = DivergenceStatistics(*(None if x is None else x.detach().cpu() for x in found))
    return stats, {k: x.grad.cpu() for k, x in leaves.items() if x.requires_grad}


def float64(operands: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: x.detach().cpu().double() for k, x in operands.items()}


class Expected(NamedTuple):
    stats: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    tolerances: dict[str, torch.Tensor]  # of the statistics
    rows: torch.Tensor  # Σ_v |Δ dz_v| of each row, at most


def expected(combo: Combo, case: Case, target_ids=None, mask=None, softcap=None, temperature=1.0, **kind) -> Expected:
    leaves = {k: x.requires_grad_() for k, x in float64(case.student).items()}
    teacher = float64(case.teacher)
    options = {"softcap": softcap, "temperature": temperature}
    where = {"target_ids": target_ids, "mask": mask}
    where = {k: None if x is None else x.cpu() for k, x in where.items()}
    stats = reference_divergence(
        leaves["hidden"], leaves["weight"], teacher["hidden"], teacher["weight"], **where, **options, **kind,
        student_bias=leaves.get("bias"), teacher_bias=teacher.get("bias"),
    )  # fmt: skip
    stats["divergence"].backward(case.incoming.cpu().double())

    u, vocabulary = combo.unit_roundoff, case.student["weight"].shape[0]
    errors, slopes, log_p, z = [], [], [], []
    for operands in (leaves, teacher):
        operands = {k: x.detach().nan_to_num(0, neginf=-torch.inf) for k, x in operands.items()}
        errors.append(logit_error(combo, **operands, **options))
        made = logits(operands["hidden"], operands["weight"], operands.get("bias"), softcap, temperature)
        z.append(made.requires_grad_())
        log_p.append(made.detach().log_softmax(-1))
    d = exact_divergence(*z, **{"kind": "reverse_kl"} | kind)
    slopes = torch.autograd.grad(d.sum(), z)
    tolerance = 32 * u * (1 + d.detach().nan_to_num(0, posinf=0))
    for error, slope, lp in zip(errors, slopes, log_p, strict=True):
        size = slope.abs().nan_to_num(0, posinf=0)
        tolerance = tolerance + (size * (error[..., None] + 4 * u * lp.abs().nan_to_num(0, posinf=0))).sum(-1)
    tolerance = tolerance + sum(errors) ** 2
    if combo.backend == "triton" and kind.get("kind") == "jsd":  # of stored magnitudes and ratios
        tolerance = tolerance.maximum((1e-3 * d.detach().nan_to_num(0, posinf=0)).clamp(min=4e-6))
        if combo.dtype != torch.float32:
            tolerance = tolerance + stored_ratio_error(z[0].detach() - z[1].detach(), slopes[0])
    tolerances = {"divergence": tolerance}
    for name, error, lp in zip(("student", "teacher"), errors, log_p, strict=True):
        entropy = -(lp.exp() * lp.clamp(min=-1e4)).sum(-1)
        tolerances[f"{name}_entropy"] = (1 + 4 * entropy) * error + 32 * u * (1 + math.log(vocabulary))
        tolerances[f"{name}_logp"] = 2 * error + 32 * u * (1 + entropy)
    rows = 4 * (sum(errors) + 16 * u) * (1 + slopes[0].abs().sum(-1).nan_to_num(0, posinf=0))
    return Expected(
        {k: x.detach() for k, x in stats.items()}, {k: x.grad for k, x in leaves.items()}, tolerances,
        rows * case.incoming.cpu().double().abs() / temperature,
    )  # fmt: skip


def stored_ratio_error(ratio: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """What float16 does to D of r', relative to its mean over the vocabulary; slope: dD/dz_S, which is dD/dr'."""
    both = ratio.isfinite()
    ratio = ratio.where(both, 0)
    ratio = ratio - ratio.sum(-1, keepdim=True) / both.sum(-1, keepdim=True).clamp(min=1)
    return 2**-11 * (slope * ratio).where(both, 0).nan_to_num(0).abs().sum(-1)


# Of a gradient's row that few entries make up and few features hold, nothing averages: an entry's rounding, the
# result's, that of M, 7e-4, and of r', 2e-3, by the root of their squares; of a single entry and feature by their sum.
FEW_FEATURES = {torch.bfloat16: 6e-3, torch.float16: 2.3e-3, torch.float32: 5e-3, torch.float64: 5e-3}
ONE_ENTRY = {torch.bfloat16: 1.1e-2, torch.float16: 3.7e-3}


def check(
    combo: Combo, case: Case, keep_bytes: tuple[int, ...] = (0, 1 << 30), one_entry: bool = False, **options
) -> None:
    """With a frozen head, and with a trained one of which nothing, some and all is kept."""
    ours = {k: options.pop(k) for k in ("chunk_bytes",) if k in options}
    want = expected(combo, case, **options)
    row = case.student["weight"].shape[0] * combo.compute_dtype.itemsize
    for frozen, kept in [(True, 0), *((False, x) for x in (*keep_bytes, 2 * row))]:
        got, gradients = package(combo, case, frozen, keep_bytes=kept, **ours, **options)
        for name, value in want.stats.items():
            found = getattr(got, name)
            assert found.dtype == combo.compute_dtype and found.shape == case.incoming.shape
            assert_within(name, found, value, want.tolerances[name])
        assert (got.divergence >= 0).all()
        assert_gradients(combo, case, gradients, want, frozen, one_entry)


def assert_gradients(
    combo: Combo, case: Case, gradients: dict, want: Expected, frozen: bool, one_entry: bool = False
) -> None:
    student = float64(case.student)
    hidden = student["hidden"].nan_to_num(0).norm(dim=-1)
    more = {"hidden": want.rows.norm() * student["weight"].norm(dim=-1).max(), "weight": (want.rows * hidden).sum()}
    more["bias"] = want.rows.sum()
    for name, gradient in gradients.items():
        assert gradient.dtype == case.student[name].dtype
        exact = want.gradients[name]
        tolerance = gradient_tolerance(combo, case.targets.numel(), frozen)
        if one_entry and combo.backend == "triton":
            tolerance = ONE_ENTRY.get(combo.dtype, tolerance)
        allowed = tolerance * exact.norm() + more[name]
        assert_within(f"gradient of {name}, in norm", (gradient.double() - exact).norm(), torch.zeros(()), allowed)
    assert not gradients["hidden"][(case.incoming == 0).cpu()].any()


SHAPES = [
    ((3, 5), {}, {}),
    ((7,), {"width": 40, "vocabulary": 130, "bias": True}, {"softcap": 5.0}),
    ((2, 4), {"width": 17, "vocabulary": 70, "bias": True, "teacher_width": 24}, {"temperature": 1.7}),
    pytest.param((5,), {"width": 2, "vocabulary": 6}, {}, marks=pytest.mark.slow),
    pytest.param((1, 1), {"kind": "flat", "vocabulary": 200}, {"temperature": 0.7}, marks=pytest.mark.slow),
]


@combos
@kinds
@pytest.mark.parametrize("shape, size, options", SHAPES, ids=str)
def test_parity(combo, kind, shape, size, options):
    case = make_case(combo, *shape, **size)
    check(combo, case, **kind, **options)


@pytest.mark.slow
@pytest.mark.parametrize("combo", CPU_COMBOS[3:])
@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_parity_in_the_interpreter(combo, kind):
    check(combo, make_case(combo, 2, 4, width=40, vocabulary=130, bias=True), keep_bytes=(0,), **kind)


@only_torch
@pytest.mark.parametrize("kind", TOP, ids=str)
@pytest.mark.parametrize("shape, size, options", SHAPES, ids=str)
def test_top_k(combo, kind, shape, size, options):
    check(combo, make_case(combo, *shape, **size), **kind, **options)


@only_torch
@pytest.mark.parametrize("kind", TOP, ids=str)
def test_top_k_of_a_student_that_has_nothing_else(combo, kind):
    """All that the teacher has beside its k likeliest counts, although the student has none of it."""
    case = make_case(combo, 1, 4, bias=True)
    case.teacher["hidden"][:] = case.teacher["hidden"][0, 0]  # one set of k for all rows
    operands = float64(case.teacher)
    z = operands["hidden"][0, 0] @ operands["weight"].T + operands["bias"]
    likeliest = z.topk(5).indices.to(combo.device)
    bias = torch.full_like(case.student["bias"], -math.inf)
    case.student["bias"] = bias.index_copy(0, likeliest, case.student["bias"][likeliest])
    if kind["kind"] == "forward_kl":
        assert package(combo, case, True, **kind)[0].divergence.isinf().all()
    else:
        check(combo, case, **kind)


@combos
@kinds
def test_with_targets_and_without(combo, kind):
    """They change nothing but what is said of them."""
    case = make_case(combo, 3, 4, bias=True)
    check(combo, case, target_ids=case.targets, **kind)
    for frozen in (False, True):
        (with_them, gradients), (without, others) = (
            package(combo, case, frozen, target_ids=x, **kind) for x in (case.targets, None)
        )
        assert without.student_logp is None
        if combo.backend == "torch":  # kernels have them as an offset
            assert torch.equal(with_them.divergence, without.divergence)
            assert all(torch.equal(x, others[k]) for k, x in gradients.items())


@few
def test_what_is_said_of_a_token(combo):
    """As token_statistics says it of each model."""
    case = make_case(combo, 3, 4, bias=True, teacher_width=20)
    found, _ = package(combo, case, True, target_ids=case.targets, temperature=0.8)
    for name, operands in (("student", case.student), ("teacher", case.teacher)):
        one = token_statistics(**operands, target_ids=case.targets, temperature=0.8, backend=combo.backend)
        assert_within("log p", getattr(found, f"{name}_logp"), one.logp, 4e-6)
        assert_within("entropy", getattr(found, f"{name}_entropy"), one.entropy, 4e-6)


@combos
@kinds
def test_a_teacher_that_is_the_student(combo, kind):
    """Exactly 0, and the gradient as well."""
    case = make_case(combo, 3, 5, apart=0.0, bias=True)
    for frozen in (False, True):
        found, gradients = package(combo, case, frozen, **kind)
        assert not found.divergence.any() and not any(x.any() for x in gradients.values())


@combos
@kinds
@pytest.mark.parametrize("apart", [4e-3, 3e-2])
def test_two_that_are_nearly_alike(combo, kind, apart):
    """Near 1e-5 and 1e-3 nat on average: each token's within 1e-3 or 4e-6 nat, and each row's gradient."""
    case = make_case(combo, 4, 8, width=32, vocabulary=300, apart=apart)
    want = expected(combo, case, **kind)
    assert 0 < want.stats["divergence"].mean() < 0.01
    got, gradients = package(combo, case, True, **kind)
    exact = want.stats["divergence"]
    assert_within("divergence", got.divergence, exact, (1e-3 * exact).clamp(min=4e-6))
    rows = case.incoming.cpu() != 0
    error = (gradients["hidden"].double() - want.gradients["hidden"])[rows].norm(dim=-1)
    size = want.gradients["hidden"][rows].norm(dim=-1)
    smallest = torch.finfo(combo.dtype).smallest_normal * torch.finfo(combo.dtype).eps  # float16's result may be that
    allowed = FEW_FEATURES[combo.dtype] * size + 6 * smallest
    assert_within("relative error of a row", error, torch.zeros_like(error), allowed)


@combos
@kinds
def test_targets_that_are_off(combo, kind):
    """The teacher finds one entry of each row 5 nats likelier or less likely: each row's gradient stays as near."""
    case = make_case(combo, 2, 8, width=62, vocabulary=61)
    case.student["weight"][:, 61] = 0  # a feature that only one entry reads
    case.student["weight"][7] = 0
    case.student["weight"][7, 61] = 1
    case.student["hidden"][:, :, 61] = 3
    case.teacher["weight"] = case.student["weight"]
    case.teacher["hidden"].copy_(case.student["hidden"] * 1.001)
    case.teacher["hidden"][0, :, 61] = 8
    case.teacher["hidden"][1, :, 61] = -2
    case.incoming.fill_(1)
    want = expected(combo, case, **kind)
    got, gradients = package(combo, case, True, **kind)
    assert_within("divergence", got.divergence, want.stats["divergence"], want.tolerances["divergence"])
    error = (gradients["hidden"].double() - want.gradients["hidden"]).norm(dim=-1)
    allowed = FEW_FEATURES[combo.dtype] * want.gradients["hidden"].norm(dim=-1)
    assert_within("a row's", error, torch.zeros_like(error), allowed)


@combos
@kinds
def test_certain_and_uniform(combo, kind):
    """One-hot at one entry, at another, and uniform: each pair of them, within rounding of what can be said by hand."""
    vocabulary, logit = 8, 40.0
    weight = torch.eye(vocabulary, device=combo.device, dtype=combo.dtype)
    rows = [logit * weight[1], logit * weight[2], torch.zeros_like(weight[0])]
    student = torch.stack([s for s in rows for _ in rows])
    teacher = torch.stack([t for _ in rows for t in rows])
    nothing = torch.zeros(9, dtype=torch.long, device=combo.device)
    incoming = torch.ones(9, dtype=combo.compute_dtype, device=combo.device)
    check(
        combo,
        Case({"hidden": student, "weight": weight}, {"hidden": teacher, "weight": weight}, nothing, incoming),
        one_entry=True,
        **kind,
    )


@combos
@kinds
def test_excluded_by_both(combo, kind):
    case = make_case(combo, 3, 5, bias=True)
    case.student["bias"][::3] = -math.inf
    case.teacher["bias"][::3] = -math.inf
    check(combo, case, **kind)


@few
def test_excluded_by_one(combo):
    """Infinite, and silent where its weight is 0; the Jensen-Shannon divergence is finite."""
    case = make_case(combo, 2, 3, bias=True, teacher_width=16)
    case.incoming[:] = torch.tensor([[0.0, 1, 1], [0, 1, 1]])
    sides = {"reverse_kl": case.teacher, "forward_kl": case.student}
    for kind, side in sides.items():
        before = side["bias"].clone()
        side["bias"][4] = -math.inf
        for name in sides:
            for frozen in (False, True):
                found, gradients = package(combo, case, frozen, kind=name)
                assert found.divergence.isinf().all() == (name == kind)
                assert not gradients["hidden"][:, 0].any()
        check(combo, case, kind="jsd")
        side["bias"].copy_(before)


@pytest.mark.parametrize("combo", IN_TORCH + KERNELS + CPU_COMBOS[3:])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_gradients_of_an_infinite_row(combo, name):
    """NaN in it alone for a reverse KL, also where the student says nothing else; a forward KL's is p_S - p_T.

    Rows of one model: certain of a word that the other forbids, never saying it, and saying it among others.
    """
    forbids = torch.zeros(8).index_fill(0, torch.tensor(5), -math.inf)
    one = {"hidden": 0.3 * Draw(1).normal(3, 8), "bias": torch.zeros(8), "weight": torch.eye(8)}
    one["hidden"][:, 5] = torch.tensor([1000.0, -1000.0, 0.0])
    other = {**one, "hidden": 0.3 * Draw(2).normal(3, 8), "bias": forbids}
    pair = (other, one) if name == "forward_kl" else (one, other)

    def case_of(weights: list[float], **more: torch.Tensor) -> Case:
        sides = ({k: x.to(combo.device, combo.dtype) for k, x in (side | more).items()} for side in pair)
        incoming = torch.tensor(weights, dtype=combo.compute_dtype, device=combo.device)
        return Case(*sides, torch.zeros(3, dtype=torch.long), incoming)

    infinite = torch.tensor([True, False, True]) & (name != "jsd")
    for weights in ([1.0, 1, 1], [0.0, 1, 0]):
        case = case_of(weights)
        want = expected(combo, case, kind=name)
        rows, bounds = want.gradients["hidden"], want.rows
        # To the reference 0 · inf is no number: there the row that never says it, which both then forbid.
        both = expected(combo, case_of(weights, bias=forbids), kind=name)
        rows[1], bounds[1] = both.gradients["hidden"][1], both.rows[1]
        lost = infinite & (torch.tensor(weights) != 0) & (name == "reverse_kl")
        assert rows[lost].isnan().all()
        rows[torch.tensor(weights) == 0] = 0
        for frozen in (False, True):
            found, gradients = package(combo, case, frozen, kind=name)
            assert torch.equal(found.divergence.isinf(), infinite) and not found.divergence.isnan().any()
            got = gradients.pop("hidden")
            assert_within("rows", got, rows, 5e-3 * rows.abs() + bounds.nan_to_num(0)[:, None])
            for x in gradients.values():  # of the head
                assert x.isnan().all() if lost.any() else x.isfinite().all()


@combos
@kinds
def test_masks(combo, kind):
    """Masked positions are never read."""
    case = make_case(combo, 3, 6, bias=True)
    mask = torch.ones(3, 6, dtype=torch.bool, device=combo.device)
    mask[1], mask[2, 3] = False, False
    targets = case.targets.clone()
    targets[0, 1:4] = -100
    case.incoming[:] = torch.where(mask & (targets != -100), case.incoming, 0)
    check(combo, case, mask=mask, target_ids=targets, **kind)
    for operands in (case.student, case.teacher):
        operands["hidden"][~mask] = math.nan
    found, gradients = package(combo, case, False, mask=mask, target_ids=targets, **kind)
    for x in found:
        assert not x[~mask.cpu()].any() and not x[0, 1:4].any()
    assert all(x.isfinite().all() for x in gradients.values())


@combos
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_no_token(combo, shape):
    case = make_case(combo, *shape, bias=True)
    for frozen in (False, True):
        found, gradients = package(combo, case, frozen)
        assert found.divergence.shape == shape and gradients["hidden"].shape == (*shape, 16)
        assert not any(x.any() for x in gradients.values())


@combos
@kinds
def test_many_chunks(combo, kind):
    check(combo, make_case(combo, 2, 9, bias=True), chunk_bytes=1, **kind)


def test_divergences_that_are_made_again(monkeypatch):
    """Rows may be, once their direction is made: what the direction was multiplied by stays what it was."""
    from egrsd_kernels import divergence as module
    from egrsd_kernels.backends import torch_divergence

    combo = Combo("torch", "cpu", torch.float16)
    case = make_case(combo, 8, apart=3e-3)
    _, want = package(combo, case, True, chunk_bytes=1)

    class MadeAgain:
        @staticmethod
        def divergence_pass(pair, target_ids, rows, out, credit, needs, chunk_bytes):
            def then_again(first_row, n_rows):
                made = credit(first_row, n_rows)
                made = made._replace(of_divergence=made.of_divergence.clone())
                out.divergence[rows.order[first_row : first_row + n_rows].long()] *= 16
                return made

            return torch_divergence.divergence_pass(pair, target_ids, rows, out, then_again, needs, chunk_bytes)

    monkeypatch.setattr(module, "choose_divergence", lambda *_: MadeAgain)
    _, got = package(combo, case, True, chunk_bytes=1)
    assert torch.equal(got["hidden"], want["hidden"])


def test_auto_takes_kernels_for_what_they_make(monkeypatch):
    """Where the loss would take them: the choice for a pair is that for its hidden states, but for a top_k."""
    pytest.importorskip("triton")
    import egrsd_kernels.backends as backends
    from egrsd_kernels.backends import torch_divergence
    from egrsd_kernels.backends.triton import divergence as kernels

    monkeypatch.setattr(kernels, "takes_hidden", lambda x: x.dtype != torch.float64)
    case = make_case(Combo("torch", "cpu", torch.float32), 2, 3)
    operands = case.student["hidden"], head(case.student), case.teacher["hidden"], head(case.teacher)

    def chosen(which: backends.Divergence, there: object = backends.triton, name: str = "auto"):
        monkeypatch.setattr(backends, "choose", lambda *_: there)
        return backends.choose_divergence(name, backends.Pair(*operands, 1.0, which))

    assert chosen(backends.Divergence("jsd")) is kernels
    assert chosen(backends.Divergence("jsd", top_k=4)) is torch_divergence
    assert chosen(backends.Divergence("jsd"), torch_backend) is torch_divergence
    with pytest.raises(ValueError, match='backend: expected "auto" or "torch", since top_k is given'):
        chosen(backends.Divergence("jsd", top_k=4), name="triton")


def test_counts_that_nobody_asked_for(monkeypatch):
    """On a GPU no count is asked for: all rows are worked on, and only those that count come out."""
    combo = Combo("torch", "cpu", torch.float32)
    case = make_case(combo, 2, 9, bias=True)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 4:6] = False
    want = package(combo, case, False, mask=mask)
    from egrsd_kernels.backends import torch_divergence

    for module in (torch_backend, torch_divergence):
        monkeypatch.setattr(module, "count", lambda rows, which: rows.order.numel())
    for chunk_bytes, keep_bytes in ((1, 0), (1 << 30, 1 << 30), (61 * 4 * 9 * 5, 61 * 4 * 7)):
        got = package(combo, case, False, mask=mask, chunk_bytes=chunk_bytes, keep_bytes=keep_bytes)
        torch.testing.assert_close(got[0].divergence, want[0].divergence)
        torch.testing.assert_close(got[1], want[1])


@few
def test_memory_of_any_layout(combo):
    """Transposed and strided operands."""
    case = make_case(combo, 4, 6, bias=True)
    want = package(combo, case, False)
    case = case._replace(
        student={k: x.t().contiguous().t() if x.ndim == 2 else x for k, x in case.student.items()},
        teacher={k: torch.stack([x, x], -1)[..., 0] for k, x in case.teacher.items()},
        incoming=case.incoming.t().contiguous().t(),
    )
    got = package(combo, case, False)
    torch.testing.assert_close(got[0].divergence, want[0].divergence)
    torch.testing.assert_close(got[1], want[1])


@few
def test_a_teacher_of_another_dtype(combo):
    case = make_case(combo, 3, 4, teacher_width=24)
    case = case._replace(teacher={k: x.to(torch.float16) for k, x in case.teacher.items()})
    check(combo, case)


@few
@kinds
def test_low_rank_parts(combo, kind):
    """Of both heads: as with the weights that they make; A and B learn, and the teacher's do not."""
    case, draw = make_case(combo, 3, 4, teacher_width=20), Draw(5)

    def parts(width: int) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = draw.normal(3, width) / 4, draw.normal(61, 3) / 4
        return a.to(combo.device, combo.dtype), b.to(combo.device, combo.dtype)

    a, b = (x.requires_grad_() for x in parts(16))
    a_t, b_t = (x.requires_grad_() for x in parts(20))
    student, teacher = case.student, case.teacher
    hidden = student["hidden"].clone().requires_grad_()
    got = linear_divergence(
        hidden, Head(student["weight"], low_rank=(a, b, 0.5)), teacher["hidden"],
        Head(teacher["weight"], low_rank=(a_t, b_t, 2.0)), backend=combo.backend, **kind,
    )  # fmt: skip
    gradients = torch.autograd.grad((got * case.incoming).sum(), [hidden, a, b, a_t, b_t], allow_unused=True)
    assert gradients[3] is gradients[4] is None
    whole = linear_divergence(
        hidden, student["weight"] + 0.5 * b @ a, teacher["hidden"], teacher["weight"] + 2 * b_t @ a_t,
        backend=combo.backend, **kind,
    )  # fmt: skip
    # In 16 bits the weights that they make, and products with A, are rounded: each moves logits of a few nats by 2 eps.
    eps = torch.finfo(combo.dtype).eps if combo.dtype.itemsize == 2 else 0
    torch.testing.assert_close(got, whole, rtol=1e-4 + 4 * eps, atol=1e-5 + 4 * eps)
    for x, y in zip(gradients, torch.autograd.grad((whole * case.incoming).sum(), [hidden, a, b]), strict=False):
        torch.testing.assert_close(x, y, rtol=1e-3 + 4 * eps, atol=1e-4 + 4 * eps * y.abs().max().item())


@few
def test_the_teacher_gets_no_gradient(combo):
    case = make_case(combo, 2, 3, bias=True, teacher_width=24)
    for operands in (case.student, case.teacher):
        for x in operands.values():
            x.requires_grad_()
    linear_divergence(
        case.student["hidden"], head(case.student), case.teacher["hidden"], head(case.teacher), backend=combo.backend
    ).sum().backward()
    assert all(x.grad is not None for x in case.student.values())
    assert all(x.grad is None for x in case.teacher.values())


@few
@pytest.mark.parametrize("learned", ["hidden", "weight", "bias"])
def test_only_what_requires_a_gradient_gets_one(combo, learned):
    case = make_case(combo, 2, 3, bias=True)
    _, want = package(combo, case, frozen=learned == "hidden")
    case.student[learned].requires_grad_()
    found = linear_divergence(
        case.student["hidden"], head(case.student), case.teacher["hidden"], head(case.teacher), backend=combo.backend
    )
    found.backward(case.incoming)
    assert torch.equal(case.student[learned].grad.cpu(), want[learned])
    assert all(x.grad is None for k, x in case.student.items() if k != learned)


@few
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_backward_twice(combo, frozen):
    case = make_case(combo, 2, 3)
    leaves = {k: x.clone().requires_grad_(k == "hidden" or not frozen) for k, x in case.student.items()}
    d = linear_divergence(
        leaves["hidden"], leaves["weight"], case.teacher["hidden"], case.teacher["weight"], backend=combo.backend
    )
    first, second = (
        torch.autograd.grad(d, leaves["hidden"], factor * case.incoming, retain_graph=True)[0] for factor in (1, 2)
    )
    torch.testing.assert_close(second, 2 * first)  # of the rows that need it, so in other products
    (slope,) = torch.autograd.grad(d.sum(), leaves["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_divergence is differentiable once only"):
        torch.autograd.grad(slope.sum(), leaves["hidden"])


@few
def test_bit_for_bit_the_same(combo):
    case = make_case(combo, 3, 50, vocabulary=257, bias=True)
    for frozen in (False, True):
        (first, gradients), (again, others) = (package(combo, case, frozen, kind="jsd") for _ in range(2))
        assert torch.equal(first.divergence, again.divergence)
        assert all(torch.equal(x, others[k]) for k, x in gradients.items())


@pytest.mark.parametrize("combo", [HALF])
@pytest.mark.parametrize("scale", [1.0, 2.0**14])
def test_a_loss_scale(combo, scale):
    """float16 holds a direction that is small, and gradients that a scaler has made large."""
    case = make_case(combo, 4, 8, apart=2e-3, width=32)
    case = case._replace(incoming=case.incoming * scale)
    want = expected(combo, case)
    for frozen in (False, True):
        _, gradients = package(combo, case, frozen)
        exact = want.gradients["hidden"]
        smallest = 6e-8 * math.sqrt(exact.numel())  # what the result itself is rounded to
        assert (gradients["hidden"].double() - exact).norm() <= 3e-3 * exact.norm() + smallest


@few
def test_autocast(combo):
    """As a linear layer would: operands in the low precision, gradients in the operands' own."""
    case = make_case(combo, 3, 4, bias=True)
    low = {k: x.to(torch.bfloat16) for k, x in case.student.items()}
    hidden = case.student["hidden"].clone().requires_grad_()
    with torch.autocast(combo.device, dtype=torch.bfloat16):
        got = linear_divergence(hidden, head(case.student), case.teacher["hidden"], head(case.teacher))
    (gradient,) = torch.autograd.grad(got, hidden, case.incoming)
    rounded = low["hidden"].requires_grad_()
    bias = case.student["bias"]
    want = linear_divergence(
        rounded, Head(low["weight"], bias), case.teacher["hidden"].to(torch.bfloat16), Head(low["weight"], bias)
    )
    assert torch.equal(got, want) and gradient.dtype == combo.dtype
    assert torch.equal(gradient, torch.autograd.grad(want, rounded, case.incoming)[0].to(combo.dtype))


@pytest.mark.parametrize("kind", [*KINDS, *({**kind, "top_k": 3} for kind in KINDS)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0, "temperature": 1.4, "chunk_bytes": 1, "keep_bytes": 60}], ids=str
)
def test_gradcheck(kind, options):
    combo, options = Combo("torch", "cpu", torch.float64), dict(options)
    case = make_case(combo, 1, 3, width=3, vocabulary=7, bias=True, teacher_width=4)
    softcap = options.pop("softcap", None)

    def d(hidden, weight, bias):
        student, teacher = Head(weight, bias, softcap=softcap), head(case.teacher, softcap)
        return linear_divergence(hidden, student, case.teacher["hidden"], teacher, **kind, **options)

    # A second backward pass makes what was kept again, in other products.
    leaves = [x.requires_grad_() for x in case.student.values()]
    assert torch.autograd.gradcheck(d, leaves, nondet_tol=1e-13)
    for wanted in (leaves[:1], leaves):  # what is made ahead for a frozen head, and what waits for a trained one
        given = [x if i < len(wanted) else x.detach() for i, x in enumerate(leaves)]
        slopes = torch.autograd.grad(d(*given).sum(), wanted, create_graph=True)
        for slope in slopes:
            with pytest.raises(RuntimeError, match="linear_divergence is differentiable once only"):
                torch.autograd.grad(slope.sum(), wanted, retain_graph=True)


@pytest.mark.slow
@pytest.mark.parametrize("combo", [CPU_COMBOS[2], *KERNELS[:2]])
@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
@pytest.mark.parametrize("apart", [1.1e-2, 0.08, 0.6])
def test_at_a_models_vocabulary(combo, kind, apart):
    """Alike to 4e-5, 2e-3 and 0.1 nat: a token within 1e-3 or 4e-6 nat, the mean within 1e-6 or 1e-4, a row 5e-3."""
    case = make_case(combo, 24, width=128, vocabulary=151936, apart=apart)
    case.incoming.fill_(1)
    exact = {k: x.detach().to(combo.device).double() for k, x in case.student.items()}
    hidden = exact["hidden"].requires_grad_()
    z_s, z_t = hidden @ exact["weight"].T, case.teacher["hidden"].double() @ exact["weight"].T
    want = exact_divergence(z_s, z_t, **kind)
    (gradient,) = torch.autograd.grad(want.sum(), hidden)
    want, gradient = want.detach().cpu(), gradient.cpu()
    got, gradients = package(combo, case, True, target_ids=case.targets, **kind)
    assert_within("divergence", got.divergence, want, (1e-3 * want).clamp(min=4e-6))
    assert_within("their mean", got.divergence.double().mean(), want.mean(), max(1e-6, 1e-4 * want.mean().item()))
    error = (gradients["hidden"].double() - gradient).norm(dim=-1)
    # Half of the smallest number that a result is rounded to, for each feature.
    half = 2.0**-25 * math.sqrt(128) if combo.dtype == torch.float16 else 0.0
    assert_within("a row's gradient", error, torch.zeros_like(error), 5e-3 * gradient.norm(dim=-1) + half)
    rows = (error / gradient.norm(dim=-1)).max()
    print(f"{kind}: mean {want.mean():.1e}, off by {(got.divergence - want).abs().max():.1e}; gradient {rows:.1e}")


# ------------------------------------------------------------------------------------------------ what is refused


def arguments(**more):
    x, w = torch.zeros(2, 3, 4), torch.zeros(5, 4)
    return {"student_hidden": x, "student_head": w, "teacher_hidden": x, "teacher_head": w} | more


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"kind": "kl"}, ValueError, r'kind: expected "reverse_kl" or "forward_kl" or "jsd", got \'kl\''),
        ({"kind": None}, ValueError, "kind: expected"),
        ({"kind": "jsd", "beta": 0.0}, ValueError, "beta: expected a finite number above 0"),
        ({"kind": "jsd", "beta": 1}, ValueError, "beta: expected a number above 0 and below 1, got 1"),
        ({"beta": 0.3}, ValueError, 'beta: expected 0.5, since the kind is "reverse_kl"'),
        ({"top_k": 0}, ValueError, "top_k: expected at least 1, got 0"),
        ({"top_k": 6}, ValueError, "top_k: expected at most the vocabulary's size, 5, got 6"),
        ({"top_k": 2.0}, TypeError, "top_k: expected an integer"),
        ({"temperature": 0}, ValueError, "temperature: expected"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes: expected"),
        ({"keep_bytes": -1}, ValueError, "keep_bytes: expected"),
        ({"return_stats": 1}, TypeError, "return_stats: expected True or False"),
        ({"backend": "cuda"}, ValueError, "backend: expected"),
        ({"student_head": torch.zeros(5, 3)}, ValueError, "student_head: expected 4 columns"),
        ({"student_head": Head(torch.zeros(5, 3))}, ValueError, "student_head.weight: expected 4 columns"),
        ({"student_head": None}, TypeError, "student_head: expected a tensor, got None"),
        ({"teacher_head": torch.zeros(6, 4)}, ValueError, "teacher_head: expected the student's vocabulary, 5 rows"),
        ({"teacher_head": torch.zeros(5, 4).half()}, TypeError, "teacher_head: expected the dtype of teacher_hidden"),
        ({"teacher_head": Head(torch.zeros(5, 4), torch.zeros(4))}, ValueError, "teacher_head.bias: expected shape"),
        ({"teacher_hidden": torch.zeros(6, 4)}, ValueError, r"teacher_hidden: expected shape \(2, 3, 'D'\)"),
        ({"teacher_hidden": torch.zeros(2, 3, 4, dtype=torch.long)}, TypeError, "teacher_hidden: expected a floating"),
        ({"student_hidden": torch.zeros(4)}, ValueError, "student_hidden: expected shape"),
        ({"mask": torch.ones(3, 2)}, ValueError, r"mask: expected shape \(2, 3\)"),
        ({"mask": torch.full((2, 3), 2)}, ValueError, "mask: expected only 0 and 1"),
        ({"target_ids": torch.full((2, 3), 5)}, ValueError, r"target_ids: expected ids in \[0, 5\), got 5"),
        ({"target_ids": torch.zeros(2, 3)}, TypeError, "target_ids: expected an integer tensor"),
    ],
    ids=str,
)  # fmt: skip
def test_refusals(wrong, error, message):
    with pytest.raises(error, match=message) as raised:
        linear_divergence(**arguments(**wrong))
    assert "\n" not in str(raised.value)


def test_an_unchecked_target_outside_the_vocabulary(monkeypatch):
    """All that is said of its token is NaN; where the loss leaves it out, the gradient does."""
    from egrsd_kernels import checks

    monkeypatch.setattr(checks, "values_checked", lambda tensor: False)
    combo = Combo("torch", "cpu", torch.float32)
    case = make_case(combo, 2, 3, bias=True)
    targets = case.targets.clone()
    targets[0, 1] = 10**6
    for weight in (0.0, 1.0):
        case.incoming[:] = 1
        case.incoming[0, 1] = weight
        for frozen in (False, True):
            found, gradients = package(combo, case, frozen, target_ids=targets)
            for x in found:
                assert x[0, 1].isnan() and x.isnan().sum() == 1
            assert gradients["hidden"][0, 1].isnan().all() == bool(weight)
            assert gradients["hidden"].isfinite().all() == (not weight)
