"""The Triton kernels of divergences: both families, all kinds, odd shapes, poisoned buffers, against float64.

How near is near enough. A divergence is within max(1e-3 of it, 4e-6 nat), as the package promises. Of a row's gradient
an entry dz is off by its own rounding and by that of M, 7e-4 beside 16-bit operands; by p |r'| 2^-11 from
that of the ratio r', whose mean over the vocabulary is 0; and by p times what two float32 logits are off. What the
operands' product makes of these is the bound, entry by entry; the norm over all rows has them in the root mean square.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from egrsd_kernels import DivergenceStatistics, Head, linear_divergence
from egrsd_kernels.backends import Divergence, Needs, Pair, PairCredit
from egrsd_kernels.backends.triton import divergence as kernels
from egrsd_kernels.rows import Rows
from reference import divergence as exact_divergence
from tests.support.kernel_case import CUDA, DEVICE, DTYPES, UNIT, relative

pytestmark = pytest.mark.cuda if CUDA else []

MAGNITUDE = {torch.float32: 2.0**-19, torch.float16: 7e-4, torch.bfloat16: 7e-4}
RATIO = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-11}
# Over all rows: M, the entry, the result and, of the head's gradient, the scaled row, at 0.42 of their units in the
# root mean square; that of r', which is 2e-3 at most; and, in a norm that a few entries decide, half as much again.
GRADIENT_ERROR = {torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 5e-3}
KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)]
FAMILIES = ["tma", "pointer"]
N = 24  # rows take the interpreter's time
SHAPES = [(N, 40, 300), (1, 16, 1), (3, 17, 33), (140, 72, 515), (N, 72, 256)]  # the last: whole tiles
if CUDA:
    SHAPES += [(1000, 1000, 5003), (300, 5120, 2049), (2049, 256, 32_003)]
TRANSFORMS = [{}, {"bias": True, "softcap": 4.0, "temperature": 0.7, "logit_scale": 1.6}]


def chosen(names: str, *values, few: list):
    """All combinations of the values on a GPU; in the interpreter a few of them, of which the first one is quick."""
    if CUDA:
        return pytest.mark.parametrize(names, list(itertools.product(*values)), ids=str)
    first, *others = few
    return pytest.mark.parametrize(names, [first, *(pytest.param(*x, marks=pytest.mark.slow) for x in others)], ids=str)


EVERYWHERE = SHAPES, TRANSFORMS, KINDS, DTYPES, FAMILIES
everywhere = chosen(
    "shape, transform, kind, dtype, family", *EVERYWHERE,
    few=[
        (SHAPES[0], TRANSFORMS[1], KINDS[0], torch.float16, "tma"),
        (SHAPES[1], TRANSFORMS[1], KINDS[2], torch.float16, "pointer"),
        (SHAPES[2], TRANSFORMS[0], KINDS[3], torch.float32, "tma"),
        (SHAPES[3], TRANSFORMS[1], KINDS[1], torch.float16, "pointer"),
        (SHAPES[0], TRANSFORMS[0], KINDS[1], torch.float32, "pointer"),
        (SHAPES[4], TRANSFORMS[0], KINDS[0], torch.float16, "tma"),
    ],
)  # fmt: skip
by_kind = chosen(
    "kind, dtype, family", KINDS, DTYPES, FAMILIES,
    few=[(k, DTYPES[1 - i % 2], FAMILIES[i // 2]) for i, k in enumerate(KINDS)],
)  # fmt: skip
special = (lambda test: test) if CUDA else pytest.mark.slow


@pytest.fixture(autouse=True)
def poisoned_buffers():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def chosen_family(request, monkeypatch):
    monkeypatch.setenv("EGRSD_KERNELS_TMA", "0" if request.getfixturevalue("family") == "pointer" else "1")


class Case:
    """Random operands on the device, of a student and of a teacher ``apart`` from it, and their float64 divergence.

    own: (D, dtype) of a teacher with a head of its own; None: one head for both.
    """

    def __init__(
        self, n, d, v, dtype, *, apart=0.1, own=None, bias=False, softcap=None, temperature=1.0, logit_scale=1.0
    ):
        g = torch.Generator().manual_seed(1000 * n + d)

        def normal(*shape, dtype=dtype):
            return torch.randn(*shape, generator=g).to(dtype).to(DEVICE)

        self.hidden, self.temperature, self.dtype = normal(n, d), temperature, dtype
        frame = {"logit_scale": logit_scale, "softcap": softcap}
        self.student = Head(normal(v, d) * (3 / math.sqrt(d)), normal(v) if bias else None, **frame)
        if own is None:
            self.teacher, self.teacher_hidden = self.student, (self.hidden.float() + apart * normal(n, d)).to(dtype)
        else:
            size, other = own
            self.teacher = Head(normal(v, size, dtype=other) * (3 / math.sqrt(size)), **frame)
            self.teacher_hidden = normal(n, size, dtype=other)
        self.targets = torch.randint(0, v, (n,), generator=g).to(DEVICE)
        self.mask = (torch.rand(n, generator=g) < 0.8).to(DEVICE)
        self.mask[0] = True
        self.incoming = torch.randn(n, generator=g).to(DEVICE)
        self.incoming[1::3] = 0

    def logits(self, head, leaves):
        z = leaves[0] @ leaves[1].t()
        if len(leaves) > 2:
            z = z + leaves[2]
        product = z
        product.retain_grad()
        z = z * head.logit_scale
        if head.softcap is not None:
            z = head.softcap * torch.tanh(z / head.softcap)
        return product, z / self.temperature

    def reference(self, kind, beta):
        """(D, gradients of Σ incoming D over the valid rows), in float64; how far the latter may be off."""
        leaves = [[h, *(x for x in (head.weight, head.bias) if x is not None)]
                  for h, head in ((self.hidden, self.student), (self.teacher_hidden, self.teacher))]  # fmt: skip
        leaves = [[x.detach().double().requires_grad_() for x in part] for part in leaves]
        (_, s), (_, t) = (self.logits(*x) for x in zip((self.student, self.teacher), leaves, strict=True))
        s.retain_grad()
        d = exact_divergence(s, t, **{"kind": kind} | ({"beta": beta} if kind == "jsd" else {}))
        (d * self.incoming)[self.mask].sum().backward()
        with torch.no_grad():
            size = max(float((h[0].abs() @ h[1].abs().t()).max()) for h in leaves) / self.temperature
            logit = (4 if CUDA else 1) * 4 * 2.0**-24 * size * math.sqrt(leaves[0][0].shape[1]) + 4e-6
            p, q = s.softmax(-1), t.softmax(-1)
            # By how much an entry moves with r, at most.
            slope = {"reverse_kl": p, "forward_kl": q, "jsd": torch.minimum(p, q)}[kind]
            ratio = (s - t).nan_to_num(0, 0, 0)
            ratio -= ratio.mean(-1, keepdim=True)
            weight = (self.incoming.abs() * self.mask)[:, None]
            unit = UNIT[self.dtype]
            error = (MAGNITUDE[self.dtype] + 2 * unit) * s.grad.nan_to_num(0).abs()
            error += weight * (slope * ratio.abs() * RATIO[self.dtype] + 4 * (p + q) * logit)
            error /= self.temperature / self.student.logit_scale
            bounds = [error @ leaves[0][1].abs(), error.t() @ leaves[0][0].abs(), error.sum(0)]
            gradients = [x.grad for x in leaves[0]]
            bounds = [b + 2 * unit * g.abs() + 1e-7 for b, g in zip(bounds, gradients, strict=False)]
        return d.detach(), gradients, bounds

    def package(self, kind, beta, trained=True, targets=True, keep_bytes=1 << 30, chunk_bytes=1 << 30):
        hidden = self.hidden.detach().requires_grad_()
        weight, bias = (
            x if x is None else x.detach().requires_grad_(trained) for x in (self.student.weight, self.student.bias)
        )
        found = linear_divergence(
            hidden, self.student.frame(weight, bias), self.teacher_hidden,
            self.teacher.frame(weight.detach(), bias) if self.teacher is self.student else self.teacher,
            kind=kind, beta=beta, target_ids=self.targets if targets else None, temperature=self.temperature,
            mask=self.mask, return_stats=True, backend="triton", keep_bytes=keep_bytes, chunk_bytes=chunk_bytes,
        )  # fmt: skip
        found.divergence.backward(self.incoming)
        leaves = [hidden, weight, *([] if bias is None else [bias])]
        return found, [x.grad for x in (leaves if trained else leaves[:1])]

    def check(self, kind, beta, **how):
        d, expected, bounds = self.reference(kind, beta)
        found, gradients = self.package(kind, beta, **how)
        off = (found.divergence.detach() - d)[self.mask].abs()
        assert (off <= torch.clamp(1e-3 * d[self.mask], min=4e-6)).all()
        assert (found.divergence[~self.mask] == 0).all()
        for name, a, e, bound in zip(("hidden", "weight", "bias"), gradients, expected, bounds, strict=False):
            assert ((a - e).abs() <= bound).all(), name
            if len(d) >= N:
                half = 2.0**-25 if self.dtype == torch.float16 else 0.0  # of the smallest number that it is rounded to
                smallest = half * math.sqrt(e.numel()) / e.norm()
                assert relative(a, e) <= GRADIENT_ERROR[self.dtype] + smallest, name
        assert (gradients[0][~self.mask | (self.incoming == 0)] == 0).all()
        return found


@everywhere
def test_trained_head(shape, transform, kind, dtype, family):
    """Of several chunks, one of them kept; of all kept; and of none."""
    case = Case(*shape, dtype, **transform)
    row = 2 * (-(-shape[2] // 128) * 128 + shape[1]) * dtype.itemsize
    for keep_bytes, chunk_bytes in ((128 * row, 1), (0, 1 << 30))[: 1 if shape[0] == N else 2]:
        case.check(*kind, keep_bytes=keep_bytes, chunk_bytes=chunk_bytes)


@everywhere
def test_frozen_head(shape, transform, kind, dtype, family):
    case = Case(*shape, dtype, **transform)
    case.check(*kind, trained=False)
    case.check(*kind, trained=False, targets=False, chunk_bytes=1)


@special
@by_kind
def test_statistics(kind, dtype, family):
    case = Case(N, 40, 300, dtype, bias=True)
    found, _ = case.package(*kind, trained=False)
    for hidden, head, logp, entropy in (
        (case.hidden, case.student, found.student_logp, found.student_entropy),
        (case.teacher_hidden, case.teacher, found.teacher_logp, found.teacher_entropy),
    ):
        exact = (hidden.double() @ head.weight.double().t() + head.bias.double()).log_softmax(-1)
        target = exact.gather(1, case.targets[:, None]).squeeze(1)
        assert (logp - target)[case.mask].abs().max() <= 2e-4
        assert (entropy + (exact.exp() * exact).sum(-1))[case.mask].abs().max() <= 2e-4


@special
@pytest.mark.parametrize("own", [(24, torch.float32), (72, None), (17, None)], ids=["float32", "wider", "pointers"])
@by_kind
def test_a_teacher_with_a_head_of_its_own(own, kind, dtype, family):
    case = Case(N, 40, 300, dtype, own=(own[0], own[1] or dtype))
    case.check(*kind, trained=False)


@by_kind
def test_the_same_model_twice(kind, dtype, family):
    """Exactly 0, and so is the gradient, for one tensor of the head and for two."""
    case = Case(N, 40, 300, dtype, apart=0.0, bias=True)
    for teacher in (case.teacher, case.teacher.frame(case.teacher.weight.clone(), case.teacher.bias.clone())):
        case.teacher = teacher
        found, gradients = case.package(*kind)
        assert (found.divergence == 0).all()
        assert all((g == 0).all() for g in gradients)
        assert torch.equal(found.student_logp, found.teacher_logp)


@special
@pytest.mark.parametrize("delta", [-5.0, 5.0])
@by_kind
def test_targets_whose_ratio_is_far_off(delta, kind, dtype, family):
    """Rows alike but for the target's probability, which is small: no rounding of the other ratios shows."""
    case = Case(N, 64, 500, dtype, apart=0.003)
    target = case.student.weight[case.targets].double()
    towards = (delta / target.square().sum(1, keepdim=True)) * target
    case.teacher_hidden = (case.teacher_hidden.double() + towards).to(dtype)
    d, expected, _ = case.reference(*kind)
    found, (hidden,) = case.package(*kind, trained=False)
    assert (found.divergence.detach() - d)[case.mask].abs().max() <= max(1e-3 * d.max(), 4e-6)
    moving = case.mask & (case.incoming != 0)
    off = (hidden - expected[0])[moving].norm(dim=1) / expected[0][moving].norm(dim=1)
    assert off.square().mean().sqrt() <= GRADIENT_ERROR[dtype] * 1.4
    assert off.max() <= (1e-3 if dtype == torch.float32 else 1e-2)


@special
@by_kind
def test_unlikely_targets_are_done_again(kind, dtype, family):
    """1/p_y beyond float32's range, of half of the rows."""
    case = Case(N, 32, 300, dtype, bias=True)
    case.student.bias[7] = -300.0
    case.targets[::2] = 7  # p_y < 1e-100
    case.check(*kind)


@special
@by_kind
def test_ratios_far_from_their_mean_are_done_again(kind, dtype, family):
    """Ratios of unlikely tokens put the mean far from those of likely ones, which are all but the same."""
    case = Case(N, 32, 300, dtype, apart=1e-3, bias=True)
    bias = case.student.bias
    bias[20:] -= 30.0
    case.teacher = case.student.frame(case.student.weight, torch.cat([bias[:20], bias[20:] - 25.0]))
    case.targets %= 20
    d, expected, _ = case.reference(*kind)
    leaf = case.hidden.detach().requires_grad_()
    found = linear_divergence(
        leaf, case.student, case.teacher_hidden, case.teacher, kind=kind[0], beta=kind[1],
        target_ids=case.targets, mask=case.mask, backend="triton",
    )  # fmt: skip
    found.backward(case.incoming)
    # float32 ratios need not be done again, and their mean, 25 nats off, takes the last digits of the divergence.
    assert (found.detach() - d)[case.mask].abs().max() <= (1e-5 if dtype == torch.float32 else 4e-6)
    if dtype != torch.float32:  # whose logits do not tell such models apart
        assert relative(leaf.grad, expected[0]) <= 1.4 * GRADIENT_ERROR[dtype]


@special
@by_kind
def test_one_such_row_has_its_own_tile_alone_done_again(kind, dtype, family):
    """Rows of the other tiles, before and behind, keep every bit."""
    case, row = Case(300, 32, 300, dtype, apart=1e-3), 200
    case.student.weight[:, 31] = torch.where(torch.arange(300, device=DEVICE) < 20, 0.0, -8.0)
    case.hidden[:, 31] = case.teacher_hidden[:, 31] = 4.0  # 32 nats from the likely 20 to the others
    case.targets %= 20
    case.incoming[:], case.mask[:] = 1, True
    ordinary, plain = case.package(*kind, trained=False)
    case.teacher_hidden[row, 31] = 7.0  # 24 more
    found, gradients = case.package(*kind, trained=False)
    d, expected, _ = case.reference(*kind)
    assert (found.divergence.detach() - d).abs().max() <= (1e-5 if dtype == torch.float32 else 4e-6)
    if dtype != torch.float32:
        assert relative(gradients[0][row], expected[0][row]) <= 1.4 * GRADIENT_ERROR[dtype]
        assert not gradients[0][row].equal(plain[0][row])
    others = torch.tensor([*range(128), *range(256, 300)], device=DEVICE)
    assert found.divergence[others].equal(ordinary.divergence[others])
    assert gradients[0][others].equal(plain[0][others])


@special
@by_kind
def test_logits_of_minus_infinity(kind, dtype, family):
    """Words forbidden to both, whole tiles of them; and one that is forbidden to the student alone."""
    case = Case(N, 32, 700, dtype, bias=True)
    case.student.bias[100:600] = -math.inf
    case.targets = torch.where((case.targets >= 100) & (case.targets < 600), 5, case.targets)
    found = case.check(*kind)
    assert found.divergence.isfinite().all()
    case.teacher = case.student.frame(case.student.weight, case.student.bias.clone())
    case.teacher.bias[300] = 0.5
    if kind[0] == "forward_kl":
        found, gradients = case.package(*kind, trained=False)
        assert found.divergence[case.mask].isinf().all() and gradients[0].isfinite().all()
    else:
        assert case.check(*kind, trained=False).divergence.isfinite().all()


@special
@by_kind
def test_logits_of_minus_infinity_beside_an_unlikely_one(kind, dtype, family):
    """KL is infinite by it, although the other model's probability is e^-66; the JSD does not notice."""
    case = Case(8, 16, 40, dtype, bias=True)
    case.mask[:] = True
    biases = [case.student.bias.clone() for _ in range(2)]
    biases[0][5], biases[1][5] = -66.0, -math.inf
    for infinite, (ours, theirs) in (("reverse_kl", biases), ("forward_kl", biases[::-1])):
        case.student, case.teacher = (case.student.frame(case.student.weight, bias) for bias in (ours, theirs))
        found, gradients = case.package(*kind, trained=False, targets=False)
        if kind[0] == infinite:
            assert found.divergence.isinf().all()
        else:
            d, _, _ = case.reference(*kind)
            assert (found.divergence.detach() - d).abs().max() <= max(1e-3 * d.max(), 4e-6)
            assert gradients[0].isfinite().all()


@special
@by_kind
@pytest.mark.parametrize("mask", [-1e4, -6e4])
def test_a_mask_that_is_finite(mask, kind, dtype, family):
    """In one model alone: as a logit, or beyond what 16 bits say of a ratio as -inf; the JSD is right with either."""
    case = Case(N, 16, 40, dtype, bias=True)
    biases = [case.student.bias.clone() for _ in range(2)]
    biases[0][5], biases[1][5] = -3.0, mask
    for infinite, (ours, theirs) in (("reverse_kl", biases), ("forward_kl", biases[::-1])):
        case.student, case.teacher = (case.student.frame(case.student.weight, bias) for bias in (ours, theirs))
        if kind[0] == infinite and mask < -2e4 and dtype != torch.float32:
            found, _ = case.package(*kind, trained=False)
            assert found.divergence[case.mask].isinf().all()
            plain = linear_divergence(
                case.hidden, case.student, case.teacher_hidden, case.teacher, kind=kind[0], backend="triton"
            )
            assert plain.isinf().all()  # also where nothing is stored
        elif kind[0] != infinite:
            found, _ = case.package(*kind, trained=False)
            d, *_ = case.reference(*kind)
            assert ((found.divergence.detach() - d)[case.mask].abs() <= (2e-3 * d[case.mask]).clamp(min=4e-6)).all()


@special
@by_kind
def test_a_model_that_forbids_every_word(kind, dtype, family):
    """It has no probabilities: NaN, as in PyTorch, and not a divergence from the uniform distribution."""
    case = Case(8, 16, 40, dtype, bias=True)
    case.mask[:] = True
    biases = [case.student.bias, torch.full_like(case.student.bias, -math.inf)]
    for ours, theirs in (biases, biases[::-1]):
        case.student, case.teacher = (case.student.frame(case.student.weight, bias) for bias in (ours, theirs))
        for targets in (False, True):
            found, gradients = case.package(*kind, trained=False, targets=targets)
            assert found.divergence.isnan().all() and gradients[0][case.incoming != 0].isnan().all()


@special
@by_kind
def test_masked_rows_are_never_read(kind, dtype, family):
    case = Case(N, 40, 300, dtype)
    clean, gradients = case.package(*kind)
    case.hidden[~case.mask] = case.teacher_hidden[~case.mask] = math.nan
    dirty, again = case.package(*kind)
    assert torch.equal(clean.divergence, dirty.divergence)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))  # and bit for bit


@special
@by_kind
def test_a_target_outside_the_vocabulary(kind, dtype, family):
    case = Case(N, 40, 300, dtype)
    clean, (gradient,) = case.package(*kind, trained=False)
    case.targets[0] = 300 if CUDA else 299  # values are checked where that does not make a GPU wait
    if not CUDA:
        return
    found, (other,) = case.package(*kind, trained=False)
    assert all(x[0].isnan() for x in found) and other[0].isnan().all()
    assert torch.equal(found.divergence[1:], clean.divergence[1:]) and torch.equal(other[1:], gradient[1:])


@by_kind
def test_log_p_beside_the_divergence(kind, dtype, family):
    """A loss of both, in one pass: weights of either, or of neither."""
    case = Case(N, 40, 300, dtype, softcap=4.0, bias=True)
    of_logp = torch.randn(N, device=DEVICE)
    of_logp[::2] = 0
    pair = Pair(case.hidden[None], case.student, case.teacher_hidden[None], case.teacher, 1.0, Divergence(*kind))
    out = DivergenceStatistics(torch.zeros(N, device=DEVICE), *torch.zeros(2, N, device=DEVICE))
    rows = Rows.build(case.mask, (case.incoming != 0) | (of_logp != 0))
    credit = PairCredit(case.incoming, of_logp)
    needs = Needs(True, True, True)
    finish = kernels.divergence_pass(pair, case.targets, rows, out, lambda *_: credit, needs, 1 << 30)
    found = finish(None)
    _, expected, _ = case.reference(*kind)
    leaves = [x.double().requires_grad_() for x in (case.hidden, case.student.weight, case.student.bias)]
    logp = case.logits(case.student, leaves)[1].log_softmax(-1).gather(1, case.targets[:, None]).squeeze(1)
    (logp * of_logp)[case.mask].sum().backward()
    assert (out.student_logp - logp)[case.mask].abs().max() <= 2e-4
    for name, a, e, leaf in zip(("hidden", "weight", "bias"), found, expected, leaves, strict=True):
        assert relative(a.view(e.shape), e + leaf.grad) <= GRADIENT_ERROR[dtype], name
