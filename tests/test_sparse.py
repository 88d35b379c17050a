"""Sparse gradients: the certified bound on adversarial logits, what overflows, and what is given up.

With the identity as head, hidden states are the logits and the hidden gradient is dL/dlogits: every entry that was left
out shows. As in test_kernels.py fresh buffers are NaN, so that reading what no kernel wrote shows too.
"""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch

from egrsd_kernels import fused_egrsd_loss, linear_logp
from egrsd_kernels.backends import Needs, Sparse, VocabularyStatistics
from egrsd_kernels.backends import triton as triton_backend
from egrsd_kernels.backends.triton import sparse as sparse_gradients
from egrsd_kernels.backends.triton.common import device_limits
from egrsd_kernels.backends.triton.sparse import SparsePlan, certify
from egrsd_kernels.backends.triton.sparse.planes import DROPPED, WEIGHT
from egrsd_kernels.backends.triton.sparse.select import select_kernel
from egrsd_kernels.head import Head
from egrsd_kernels.rows import Rows
from tests.support import tolerances
from tests.support.cases import Draw, draw_head, draw_hidden, draw_targets, make_case
from tests.support.devices import Combo
from tests.support.tolerances import package_result

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
COMBO = Combo("triton", DEVICE.type, torch.float32)
SIZE = {torch.float32: 200, torch.float16: 800, torch.bfloat16: 800}  # vocabulary: a few tiles
UNIT = {torch.float32: 2.0**-20, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
N = 24

pytestmark = pytest.mark.cuda if CUDA else pytest.mark.heavy


@pytest.fixture(autouse=True)
def poisoned_buffers():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    return request.param


def plan_of(monkeypatch, **changes) -> None:
    """Every sparse pass with chunks of one row tile, entries that are sorted every two chunks, and these limits."""
    room = {"listed": 256, "reserve": 128, "partial_tiles": 2 * device_limits(DEVICE)[0]}
    plan = SparsePlan(**{"rows": 128, "entries": 512} | room | changes)
    monkeypatch.setattr(sparse_gradients, "sparse_plan", lambda *_: plan)


class Result:
    """Of one student pass on logits (n, V), that is with the identity as head; float64 and on the CPU."""

    def __init__(self, z, y, g, tolerance, dtype=torch.float32, softcap=None, temperature=1.0, exact=False):
        z, y, self.g = z.to(DEVICE, dtype), y.to(DEVICE), g.to(DEVICE)
        n, size = z.shape
        weight, bias = torch.eye(size, dtype=dtype, device=DEVICE), torch.zeros(size, dtype=dtype, device=DEVICE)
        head = Head(weight, bias, softcap=softcap)
        rows = Rows.build(torch.ones(n, dtype=torch.bool, device=DEVICE), self.g != 0)
        self.sparse = Sparse.of(tolerance, y)
        self.logp = torch.zeros(n, device=DEVICE)
        finish = triton_backend.student_pass(
            head, temperature, z[None], y, rows, VocabularyStatistics(self.logp), lambda *_: self.g,
            Needs(True, True, True), 1 << 30, None if exact else self.sparse,
        )  # fmt: skip
        self.gradients = finish(None)
        self.dz, self.dw, self.db = (x.cpu().double() for x in self.gradients)
        self.dz = self.dz[0]
        self.temperature = temperature
        self.h = z.cpu().double()
        self.dropped, self.mass = self.sparse.dropped.cpu().double(), self.sparse.mass.cpu().double()
        self.dense = self.sparse.dense.cpu() > 0

        product = self.h.clone().requires_grad_()
        logits = product * 1 if softcap is None else softcap * torch.tanh(product / softcap)
        self.log_p = (logits / temperature).log_softmax(-1).detach()
        # Without cancellation: 1 - p_y is the sum of all p but the target's.
        at = y.cpu().clamp(max=size - 1)[:, None]
        dz = -self.log_p.exp().scatter(1, at, 0)
        dz.scatter_(1, at, -dz.sum(1, keepdim=True))
        damping = 1.0 if softcap is None else 1 - torch.tanh(self.h / softcap) ** 2
        self.true_mass = (dz * damping).abs().sum(1)
        self.tight = softcap is None  # whether that is known, and not only a lower bound
        logits.backward(dz * self.g.cpu().double()[:, None] / temperature)
        self.want = product.grad
        self.weight = self.g.cpu().double().abs()

    def check(self, tolerance: float, dtype=torch.float32) -> None:
        spent, allowed = self.weight * self.dropped, self.weight * self.true_mass
        assert spent.sum() <= tolerance * allowed.sum()
        bound = self.sparse.error_bound(self.g).cpu().double()
        assert bound.isfinite().all() and (bound >= 0).all() and bound.sum() <= tolerance
        # Each row is off by what it says that it dropped, and by rounding; where that is nothing, by rounding alone.
        off = (self.dz - self.want).abs().sum(1)
        tiny = torch.finfo(dtype).smallest_normal * self.dz.shape[1]  # where the gradient's dtype underflows
        # A probability is as good as its logit; tensor cores truncate where an FMA rounds.
        logits = (32 if CUDA else 8) * 2.0**-24 * self.h.abs().amax(1) / self.temperature
        rounding = (2 * UNIT[dtype] + logits) * allowed + self.weight * 2.0**-120 * self.dz.shape[1] + tiny
        assert (off <= (spent + rounding) / self.temperature).all()
        assert not self.dropped[self.dense].any()
        # p_y near 1 costs no accuracy.
        sparse = ~self.dense & (self.weight > 0)
        error = self.mass - self.true_mass
        allowed = max(UNIT[dtype], 1e-4) * self.true_mass + 2.0**-120
        assert (error <= allowed)[sparse].all() and (not self.tight or (error >= -allowed)[sparse].all())
        # The head's gradients are made of the same entries. They are off by roundings: of dz; of the target's E, which
        # a dense row's factor takes from the others; of what comes out; and of the weighed hidden states.
        size = self.dz.abs().t() @ self.h.abs()
        assert ((self.dw - self.dz.t() @ self.h).abs() <= 4 * UNIT[dtype] * size + tiny * self.h.abs().max()).all()
        assert ((self.db - self.dz.sum(0)).abs() <= 3 * UNIT[dtype] * self.dz.abs().sum(0) + tiny).all()


def logits_of(name: str, size: int):
    """(z, y, g): N rows of logits, targets and dL/dlogp."""
    draw = Draw(7)
    z, y, g = draw.normal(N, size), draw.integers(size, N), draw.normal(N)
    g[::7] = 0
    rows = torch.arange(N)
    if name in ("peaked", "huge and tiny g", "huge g", "denormal g"):
        z += torch.nn.functional.one_hot(draw.integers(size, N), size) * 18 * draw.uniform(N, 1)
        y = torch.where(draw.uniform(N) < 0.8, z.argmax(1), y)
    if name == "huge and tiny g":
        g *= 10.0 ** (60 * draw.uniform(N) - 30)
    elif name == "huge g":
        g *= 1e37
    elif name == "denormal g":
        g *= 1e-40
    elif name == "flat":
        z *= 0.01
    elif name == "equal logits":
        z[...] = 3.0
    elif name == "one-hot":  # 1 - p_y is 0 in float32 for some rows, and tiny for others
        z[...] = 0
        z[rows, y] = 12.0 * (1 + rows % 10)
    elif name == "the largest g is one-hot":
        z[...] = 0
        z[rows, y] = torch.where(rows == 1, 400.0, 5.0)
        g = torch.where(rows == 1, 1e30, 1e-10)
    elif name == "unlikely targets":
        z[rows, (y + 1) % size] = 30.0
        z[rows, y] = -40.0 * (1 + rows % 3)
    elif name == "halves":  # every probability a power of two: equal weighed masses, on a threshold
        z = -math.log(2) * torch.arange(size).remainder(40).float().expand(N, size)
        g = torch.ones(N)
    elif name == "two kinds":  # decided rows that may lose all but the target, beside undecided ones
        z[::2] *= 0.1
        z[1::2, 5] += 16
        y[1::2] = 5
    return z, y, g


NAMES = [
    "peaked", "flat", "equal logits", "one-hot", "unlikely targets", "halves", "two kinds", "huge g", "denormal g",
    "huge and tiny g", "the largest g is one-hot",
]  # fmt: skip


@pytest.mark.parametrize("tolerance", [2.0**-10, 0.05], ids=["2^-10", "0.05"])
@pytest.mark.parametrize("name", NAMES)
def test_bound(name, tolerance, monkeypatch):
    plan_of(monkeypatch, entries=24)
    Result(*logits_of(name, SIZE[torch.float32]), tolerance).check(tolerance)


@pytest.mark.parametrize("name", ["peaked", "two kinds"])
@pytest.mark.parametrize("transform", [{}, {"softcap": 9.0, "temperature": 0.7}], ids=["plain", "softcap-temperature"])
def test_bound_in_every_dtype(name, transform, dtype, monkeypatch):
    plan_of(monkeypatch, entries=24)
    result = Result(*logits_of(name, SIZE[dtype]), 0.01, dtype, **transform)
    result.check(0.01, dtype)
    assert 0 < result.dense.sum() < N and result.dropped.any(), "the case shows nothing"


@pytest.mark.parametrize("cap, top", [(20, 200), (30, 90), (30, 120), (50, 200)])
def test_saturated_logits_count_as_far_as_they_have_a_gradient(cap, top, monkeypatch):
    """Under a softcap a token may be undecided and have no gradient: what it drops is held against what it has."""
    plan_of(monkeypatch)
    draw = Draw(7)
    z = 8 * draw.normal(N, SIZE[torch.float32])
    y = draw.integers(z.shape[1], N)
    z[torch.arange(N), y] = top * (0.75 + 0.25 * draw.uniform(N))
    z[torch.arange(0, N, 2), (y[::2] + 1) % z.shape[1]] = float(top)
    result = Result(z, y, draw.normal(N), 2.0**-10, softcap=float(cap))
    result.check(2.0**-10)
    off, whole = (result.dz - result.want).abs().sum(), result.want.abs().sum()
    assert off <= (2.0**-10 + 64 * 2.0**-24 * top) * whole


@pytest.mark.parametrize("transform", [{}, {"softcap": 60.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("height", [0.8, 1.2])
@pytest.mark.parametrize("tolerance", [2.0**-10, 0.0], ids=["sparse", "exact"])
def test_rows_whose_target_is_all_but_certain(tolerance, height, transform, monkeypatch):
    """1 - p_y is 1e-6 to 1e-9 there: as a difference it would be rounding, a thousand times what may be left out."""
    plan_of(monkeypatch)
    draw, n, size = Draw(3), 64, 64
    weight, y = draw.normal(200, size), draw.integers(200, n)
    hidden = 0.5 * draw.normal(n, size) + height * weight[y]
    weight, y, hidden = weight.to(DEVICE), y.to(DEVICE), hidden.to(DEVICE)
    ones = torch.ones(n, device=DEVICE)
    rows, sparse = Rows.build(ones > 0, ones > 0), Sparse.of(tolerance, y) if tolerance else None
    head = Head(weight, softcap=transform.get("softcap"))
    _, (d_hidden, *_) = student_pass(head, 1.0, hidden, y, ones, rows, sparse)
    product = hidden.double() @ weight.double().T
    cap = transform.get("softcap")
    x = -(product if cap is None else cap * torch.tanh(product / cap)).softmax(-1)
    at = y[:, None]
    x.scatter_(1, at, 0)
    mass = -2 * x.sum(1)
    x.scatter_(1, at, -x.sum(1, keepdim=True))
    if cap is not None:
        x *= 1 - torch.tanh(product / cap) ** 2
    off = (d_hidden[0].double() - x @ weight.double()).norm(dim=1) / weight.double().norm(dim=1).max()
    assert mass.median() < 1e-5 and (not tolerance or sparse.dense.sum() < n), "the case shows nothing"
    rounding = 64 * 2.0**-24 * product.abs().max()  # of a probability, by that of its logit
    assert off.sum() <= (tolerance + rounding) * mass.sum()


@pytest.mark.parametrize("tolerance, second, others", [(2.0**-10, -15.89, -27.734), (0.5, -24, -27.714)])
def test_what_float16_cannot_hold(tolerance, second, others, monkeypatch):
    """Entries just above and below a step of float16's smallest numbers, where they add up to all that matters."""
    plan_of(monkeypatch, entries=1024)
    z = torch.full((1, 256), float(others))
    z[0, :2] = torch.tensor([0.0, second])
    z = z.half().float()
    result = Result(z, torch.zeros(1, dtype=torch.long), torch.full((1,), 2.0**24), tolerance, torch.float16)
    result.check(tolerance, torch.float16)
    off = (result.dz - result.want).abs().sum()
    allowed = tolerance * result.weight * result.true_mass
    assert off <= 1.01 * allowed + UNIT[torch.float16] * (result.weight * result.true_mass)


@pytest.mark.parametrize("room", [64, 1024])
def test_entries_are_found_and_listed_in_order(room, dtype):
    """Those above a row's limit in its kept tiles, unless there are more than there is room for; without tiles none."""
    n, rows, cols, tiles, unseen = 6, 8, 64, 75, 2.0**-25
    draw = Draw(5)
    kept = draw.uniform(n, tiles) < torch.tensor([1, 0.9, 0.5, 0.1, 0.04, 0])[:, None]
    e = (3 * draw.normal(n, tiles * cols)).exp().clamp(max=6e4)
    e[0, ::3] = 64.0  # at the limit: not above
    e = e.to(dtype)
    tile_of = torch.full((rows, tiles), 1 << 30, dtype=torch.int32)
    floats, ints = torch.full((8, rows), math.nan), torch.full((6, rows), -1, dtype=torch.int32)
    total, limit = draw.normal(n).exp(), 64 * (draw.uniform(n) + 0.5)
    total[0], limit[0], budget = 1.0, 64.0, torch.tensor([math.nan, 2.0**-10])
    weight = budget[1] * total / (limit * room / 4)
    limit = budget[1] * (total / weight) * (4 / room)
    floats[[0, 1, 2, 4, 6], :n] = torch.stack([total, total, total, weight, limit])
    floats[4, n:] = 0
    ints[0, :n], ints[3, :n] = torch.arange(n), kept.sum(1)
    for r in range(n):
        tile_of[r, : ints[3, r]] = kept[r].nonzero()[:, 0]
    entry_of, value_of = torch.full((rows, room), -1, dtype=torch.int32), torch.full((rows, room), math.nan)
    tensors = [x.to(DEVICE) for x in (e, tile_of, floats, ints, budget, entry_of, value_of)]
    select_kernel[(rows,)](*tensors, rows, tiles, unseen, COLS=cols, AT_ONCE=16, CAPACITY=room)
    _, _, floats, ints, _, entry_of, value_of = (x.cpu() for x in tensors)
    inside = kept.repeat_interleave(cols, 1)
    all_above = inside & (e.float() > limit[:, None])
    for r in range(n):
        assert ints[4, r] == (all_above[r].sum() >= room)
        if ints[4, r]:
            continue
        last = ints[2, r] - 1
        found = entry_of[r, :last].long()
        assert torch.equal(found, all_above[r].nonzero()[:, 0]) and entry_of[r, last] == r
        assert torch.equal(value_of[r, :last], -e[r, found].float() * (1 / total[r])) and value_of[r, last] == total[r]
        others = inside[r].index_fill(0, found, False)
        small = torch.where(others, e[r].double(), 0).sum() + unseen * inside[r].sum() + limit[r]
        assert floats[6, r].item() == pytest.approx((small / total[r]).item(), rel=1e-5)
    assert (entry_of[n:] == -1).all() and (ints[4, :n] > 0).any() == (room == 64)
    assert all_above[0].sum() > 200 and 0 < ints[3, 4] < 8 and ints[2, 5] == 1, "the case shows nothing"


@pytest.mark.parametrize("over", [False, True])
def test_list_exactly_full(over, monkeypatch):
    """As many entries as there is room for, or one more: only then the row is dense."""
    plan_of(monkeypatch, entries=9)
    z = torch.full((N, SIZE[torch.float32]), -30.0)
    z[:, [*range(8), 100]] = 0.0  # the target, and 8 others in two tiles
    z[1::2, 150] = 0.0 if over else -30.0
    result = Result(z, torch.full((N,), 3), torch.ones(N), 2.0**-10)
    result.check(2.0**-10)
    assert torch.equal(result.dense, (torch.arange(N) % 2 == 1) & over)
    assert ((result.dz != 0).sum(1)[~result.dense] == 9).all()


def test_nothing_is_dropped_beyond_the_tolerance_of_rows_alone(monkeypatch):
    """What one row spends, others have to save: a single row keeps within its own mass."""
    plan_of(monkeypatch)
    z, y, _ = logits_of("peaked", SIZE[torch.float32])
    for row in range(2):
        result = Result(z[row : row + 1], y[row : row + 1], torch.ones(1), 0.05)
        result.check(0.05)


def test_a_failed_check_makes_the_chunk_exact(monkeypatch):
    """Whatever the thresholds are worth: here each row drops half of all that rows may, and then it is put right."""
    chosen = sparse_gradients.list_entries

    def beyond(seen, floats, ints, budget, *others):
        chosen(seen, floats, ints, budget, *others)
        weight, dropped = floats[WEIGHT.value], floats[DROPPED.value]
        dropped.copy_(torch.where(weight > 0, 0.5 * budget[0] / weight, 0))

    plan_of(monkeypatch)
    monkeypatch.setattr(sparse_gradients, "list_entries", beyond)
    monkeypatch.setattr(certify, "ROW_SHARE", 2.0**20)
    z, y, g = logits_of("peaked", SIZE[torch.float32])
    result = Result(z, y, g, 2.0**-10)
    result.check(2.0**-10)
    assert not result.dropped.any() and torch.equal(result.dense, g != 0)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_rows_without_a_finite_gradient_are_left_to_the_exact_kernels(softcap, monkeypatch):
    plan_of(monkeypatch)
    z, y, g = logits_of("peaked", SIZE[torch.float32])
    z[1, 5], y[2], g[3], g[4] = math.nan, SIZE[torch.float32] + 7, math.inf, math.nan
    got, want = (Result(z, y, g, 0.01, softcap=softcap, exact=exact) for exact in (False, True))
    odd = [1, 2, 3, 4]
    assert got.dense[odd].all() and torch.equal(got.logp.isnan(), want.logp.isnan())
    assert torch.equal(got.dz[odd].nan_to_num(0, 1, -1), want.dz[odd].nan_to_num(0, 1, -1))
    others = torch.ones(N, dtype=torch.bool)
    others[odd] = False
    assert got.dz[others].isfinite().all() and got.dropped[others].any()


def random_problem(dtype, n, size, vocabulary, *, transform, seed=0):
    """(head, hidden, targets, dL/dlogp, rows): language-model-like, a fifth masked, a third without gradient."""
    draw = Draw(seed)
    weight = draw_head(draw, vocabulary, size)
    hidden = draw_hidden(draw, "peaked", weight, n)
    targets, g, valid = draw_targets(draw, hidden, weight), draw.normal(n), draw.uniform(n) < 0.8
    g[::3] = 0
    transform = dict(transform)
    bias = draw.normal(vocabulary) if transform.pop("bias", False) else None
    if bias is not None:
        bias[7::5] = -math.inf
        targets = torch.where((targets >= 7) & (targets % 5 == 2), 0, targets)
    weight, hidden = (x.to(DEVICE, dtype) for x in (weight, hidden))
    head = Head(weight, None if bias is None else bias.to(DEVICE, dtype), softcap=transform.get("softcap"))
    targets, g, valid = (x.to(DEVICE) for x in (targets, g, valid))
    problem = head, transform.get("temperature", 1.0), hidden, targets, g, Rows.build(valid, g != 0)
    return *problem, valid


def student_pass(head, temperature, hidden, targets, g, rows, sparse, chunk_bytes=1 << 30):
    logp = torch.zeros(len(targets), device=DEVICE)
    needs = Needs(True, True, head.bias is not None)
    finish = triton_backend.student_pass(
        head, temperature, hidden[None], targets, rows, VocabularyStatistics(logp), lambda *_: g, needs, chunk_bytes,
        sparse,
    )  # fmt: skip
    return logp, finish(None)


@pytest.mark.parametrize(
    "family, transform",
    [("tma", {}), ("pointer", {"bias": True, "softcap": 14.0, "temperature": 0.7}), ("tma", {"bias": True})],
    ids=str,
)
def test_against_exact_gradients(transform, family, dtype, monkeypatch):
    """Several chunks, masked rows of NaN, a head of another size: gradients within the bound, log p as ever."""
    monkeypatch.setenv("EGRSD_KERNELS_TMA", "1" if family == "tma" else "0")
    tolerance = 0.02
    plan_of(monkeypatch, entries=32)
    head, temperature, hidden, targets, g, rows, valid = random_problem(dtype, 140, 40, 500, transform=transform)
    hidden[~valid], targets[~valid] = math.nan, 10**9
    sparse = Sparse.of(tolerance, targets)
    logp, got = student_pass(head, temperature, hidden, targets, g, rows, sparse)
    exact_logp, want = student_pass(head, temperature, hidden, targets, g, rows, None)
    assert (logp - exact_logp).abs().nan_to_num(0).max() <= 1e-4 and not logp[~valid].any()
    c = g.double().abs() * valid
    assert 0 < sparse.dense.sum() < c.count_nonzero() and sparse.dropped.any(), "the case shows nothing"
    # Where the row was not dense, its mass is ||p - e_y||_1; under a softcap it may be less.
    seen = (c > 0) & (sparse.dense == 0)
    mass = -2 * torch.expm1(exact_logp.double())
    error, allowed = sparse.mass - mass, max(1e-3, UNIT[dtype]) * mass + 1e-5
    assert (error <= allowed)[seen].all() and ("softcap" in transform or (error >= -allowed)[seen].all())
    assert (c * sparse.dropped).sum() <= tolerance * (c * mass).sum()
    assert sparse.error_bound(g).double().sum() <= tolerance
    # ||ΔdL/dz||_1 <= |c| dropped for each row; what the products make of it.
    spent = c * sparse.dropped / temperature
    lengths = hidden.double().nan_to_num(0).norm(dim=1)
    bounds = [spent * head.weight.double().norm(dim=1).max(), (spent * lengths).sum(), spent.sum()]
    unit = 4 * UNIT[dtype]
    off = (got[0] - want[0])[0].double().norm(dim=1)
    assert (off <= bounds[0] + unit * want[0][0].double().norm(dim=1) + unit * c).all()
    for a, b, bound in zip(got[1:], want[1:], bounds[1:], strict=True):
        assert a is b is None or (a - b).double().norm() <= bound + unit * b.double().norm()
    if not transform:
        again = Sparse.of(tolerance, targets)
        again_logp, others = student_pass(head, temperature, hidden, targets, g, rows, again)
        assert torch.equal(again_logp, logp) and torch.equal(again.dropped, sparse.dropped)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(others, got, strict=True))


@pytest.mark.parametrize("reserve", [128, 256])
@pytest.mark.parametrize("dense", ["none", "some", "all"])
def test_dense_rows_of_several_chunks_gather_in_the_reserve(dense, reserve, monkeypatch):
    """They are made when there is no more room for a chunk's, and after the last chunk."""
    plan_of(monkeypatch, entries=16, reserve=reserve)
    head, temperature, hidden, targets, g, rows, _ = random_problem(torch.float32, 500, 16, 200, transform={})
    g.sign_()
    scale = {"none": 40.0, "some": 0.1, "all": 0.01}[dense]
    hidden[::2] *= scale
    hidden[1::2] *= 40.0 if dense == "some" else scale
    sparse = Sparse.of(2.0**-10, targets)
    logp, got = student_pass(head, temperature, hidden, targets, g, rows, sparse)
    exact_logp, want = student_pass(head, temperature, hidden, targets, g, rows, None)
    found, active = (sparse.dense > 0).sum(), rows.counts[1]
    assert active > 2 * 128 and {"none": found == 0, "some": 128 < found < active, "all": found == active}[dense]
    assert (logp - exact_logp).abs().max() <= 1e-4
    spent = (g.abs() * sparse.dropped).sum()
    for a, b, other in zip(got[:2], want[:2], (head.weight, hidden), strict=True):
        assert (a - b).norm() <= 1.01 * spent * other.norm(dim=1).max() + 1e-5 * b.norm()
    if dense == "all":
        assert not sparse.dropped.any()


def test_what_waits_for_the_factor_holds_no_exponentials(monkeypatch):
    """After the forward pass the head's gradient is a float32 sum and lists of entries that are still to be added."""
    made = []

    class Watched(triton_backend.SparseGradients):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(weakref.ref(self.stored_pass))

    monkeypatch.setattr(triton_backend, "SparseGradients", Watched)
    plan_of(monkeypatch, entries=16)
    head, temperature, hidden, targets, g, rows, _ = random_problem(
        torch.float32, 60, 16, 200, transform={"bias": True}
    )
    out = VocabularyStatistics(torch.zeros(len(targets), device=DEVICE))
    arguments = head, temperature, hidden[None], targets, rows, out, lambda *_: g
    finish = triton_backend.student_pass(*arguments, Needs(True, True, True), 1 << 30, Sparse.of(0.02, targets))
    gc.collect()
    assert [watched() for watched in made] == [None]
    _, want = student_pass(head, temperature, hidden, targets, g, rows, Sparse.of(0.02, targets))
    for a, b in zip(finish(torch.full((), 0.5, device=DEVICE)), want, strict=True):
        assert torch.equal(a, b / 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flat", "peaked"])
def test_loss_over_many_chunks(kind, monkeypatch):
    """Statistics, made twice for dense tokens, as in exact mode; a share of the bound for each of the others."""
    plan_of(monkeypatch, entries=24)
    case = make_case(COMBO, lengths=(70, 70, 70), vocabulary=200, kind=kind, mask="holes", per_token=True, lookahead=2)
    case["advantages"] = case["advantages"].sign()
    exact, sparse = (package_result(case, COMBO, grad_mode=mode, sparse_tol=0.03) for mode in ("exact", "sparse"))
    bound = sparse.stats.gradient_error_bound
    assert (bound.sum() > 0) == (kind == "peaked") and bound.double().sum() <= 0.03
    for name, x in exact.stats._asdict().items():
        if name != "gradient_error_bound":
            assert (getattr(sparse.stats, name) - x).abs().max() <= 1e-5, name
    assert (sparse.loss - exact.loss).abs() <= 1e-5 * exact.loss.abs()
    assert not bound[~case["mask"].cpu()].any() and not bound[case["advantages"].cpu() == 0].any()


@pytest.mark.parametrize("incoming", ["ones", "few", "zeros", "huge"])
def test_logp_holds_the_bound_for_any_incoming_gradient(incoming, monkeypatch):
    """The forward pass of a frozen head cannot know what is asked for: tokens that dropped too much are made again."""
    plan_of(monkeypatch)
    z, y, _ = logits_of("two kinds", SIZE[torch.float32])
    weight, hidden = torch.eye(z.shape[1], device=DEVICE), z.clone().to(DEVICE).requires_grad_()
    tolerance = 0.2
    logp = linear_logp(hidden, weight, y.to(DEVICE), backend="triton", grad_mode="sparse", sparse_tol=tolerance)
    # The decided tokens, every second one, lose nearly all: nothing, where all tokens count alike.
    c = {
        "ones": torch.ones(N), "few": (torch.arange(N) % 2).float(), "zeros": torch.zeros(N),
        "huge": 1e38 * (torch.arange(N) % 2),
    }[incoming]  # fmt: skip
    logp.backward(c.to(DEVICE))
    e = torch.nn.functional.one_hot(y, z.shape[1])
    want = e - z.double().softmax(1)
    off = c.double() * ((hidden.grad.cpu().double() / c.double()[:, None]).nan_to_num(0) - want).abs().sum(1)
    mass = c.double() * want.abs().sum(1)
    assert off.sum() <= tolerance * mass.sum()
    if incoming == "ones":
        assert off[1::2].sum() > 0.4 * mass[1::2].sum()
    elif incoming == "zeros":
        assert not hidden.grad.any()


def test_automatic_mode_is_exact_and_said_to_go():
    case = make_case(COMBO, vocabulary=200, kind="peaked", per_token=True)
    with pytest.warns(FutureWarning, match="grad_mode") as said:
        assert not package_result(case, COMBO, grad_mode="auto", sparse_tol=0.03).stats.gradient_error_bound.any()
    assert {warning.filename for warning in said if warning.category is FutureWarning} == {tolerances.__file__}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"grad_mode": "dense"}, "grad_mode: expected"),
        ({"sparse_tol": 0}, "sparse_tol: expected"),
        ({"sparse_tol": 1.5}, "sparse_tol: expected"),
        ({"sparse_tol": math.nan}, "sparse_tol: expected"),
    ],
)
def test_bad_arguments_are_named(options, message):
    case = make_case(COMBO, lengths=(2,))
    with pytest.raises(ValueError, match=message):
        fused_egrsd_loss(**case, **options)
    with pytest.raises(ValueError, match=message):
        linear_logp(case["student_hidden"], case["student_weight"], case["target_ids"], **options)


def test_pytorch_is_exact_in_every_mode():
    case = make_case(COMBO)
    torch_backend = COMBO._replace(backend="torch")
    exact, *others = (package_result(case, torch_backend, grad_mode=mode) for mode in ("exact", "sparse"))
    for other in others:
        assert not other.stats.gradient_error_bound.any()
        assert torch.equal(other.gradients["student_hidden"], exact.gradients["student_hidden"])
