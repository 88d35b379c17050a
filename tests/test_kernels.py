"""The Triton kernels one by one: both families (TMA and pointer), odd shapes, poisoned buffers.

On a machine without a GPU they run in Triton's interpreter, in float32 and float16 (its bfloat16 products are wrong).
``torch.use_deterministic_algorithms`` fills every fresh buffer with NaN, so that reading what no kernel wrote shows.
"""

from __future__ import annotations

import math

import pytest
import torch

from egrsd_kernels.backends import triton as triton_backend
from egrsd_kernels.backends.triton import gradient, tuning
from egrsd_kernels.credit import Lookahead
from egrsd_kernels.head import Head
from egrsd_kernels.rows import Rows
from tests.support.kernel_case import CHUNK_BYTES, CUDA, DEVICE, DTYPES, GRADIENT_ERROR, UNIT, Case, relative

pytestmark = pytest.mark.cuda if CUDA else pytest.mark.heavy


@pytest.fixture(autouse=True)
def poisoned_buffers():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["tma", "pointer"])
def family(request, monkeypatch):
    monkeypatch.setenv("EGRSD_KERNELS_TMA", "1" if request.param == "tma" else "0")
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    return request.param


SHAPES = [(140, 40, 300), (1, 16, 1), (3, 17, 33), (261, 72, 515)]  # the first ones here are `make test`'s
if CUDA:
    SHAPES += [(1000, 1000, 5003), (300, 5120, 2049), (2049, 256, 32_003)]
TRANSFORMS = [{"bias": True, "softcap": 4.0, "temperature": 0.7, "logit_scale": 1.6}, {}]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["bias-scale-softcap-temperature", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(shape, transform, dtype, family):
    case = Case(*shape, dtype, **transform)
    expected = case.reference()
    actual = case.statistics()
    for name, a, e in zip(("logp", "entropy", "logsumexp"), actual, expected, strict=False):
        assert (a - e)[case.valid].abs().max() <= case.tolerance, name
        assert (a[~case.valid] == 0).all(), name


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["bias-scale-softcap-temperature", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_student_pass(shape, transform, dtype, family):
    case = Case(*shape, dtype, **transform)
    if shape[0] == 1:  # its only row must take part
        case.gradient[0], case.valid[0] = 1, True
        case.rows = Rows.build(case.valid, case.gradient != 0)
    expected, *_, expected_gradients = case.reference()
    logp, gradients = case.student_pass(chunk_bytes=1)  # one row tile a chunk: several chunks, and accumulation
    assert (logp - expected)[case.valid].abs().max() <= case.tolerance
    assert (logp[~case.valid] == 0).all()
    for name, a, e, bound in zip(
        ("hidden", "weight", "bias"), gradients, expected_gradients, case.bounds, strict=False
    ):
        assert ((a - e).abs() <= bound).all(), name
        if shape[0] > 100:
            assert relative(a, e) <= GRADIENT_ERROR[dtype], name
    untouched = ~case.valid | (case.gradient == 0)
    assert (gradients[0][0][untouched] == 0).all()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["bias-scale-softcap-temperature", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_chunk(shape, transform, dtype, family):
    """All rows in one chunk: the head's product waits for the factor, and is rounded once."""
    case = Case(*shape, dtype, **transform)
    *_, expected_gradients = case.reference()
    factor = torch.tensor(-0.37, device=DEVICE)
    _, gradients = case.student_pass(factor=factor)
    for name, a, e, bound in zip(
        ("hidden", "weight", "bias"), gradients, expected_gradients, case.bounds, strict=False
    ):
        assert a.dtype == dtype
        # The hidden gradient is rounded before the factor, and after it.
        again = UNIT[dtype] * e.abs() if name == "hidden" else 0
        assert ((a / factor.double() - e).abs() <= bound + again + 1e-7).all(), name


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["bias-scale-softcap-temperature", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slices_of_the_vocabulary(shape, transform, dtype, family):
    """Without gradients of the head, one vocabulary tile at a time; and never the whole vocabulary by default."""
    case = Case(*shape, dtype, **transform)
    expected, *_, expected_gradients = case.reference()
    for chunk_bytes in (1, CHUNK_BYTES):
        logp, (hidden, *_) = case.student_pass(needs=(True, False, False), chunk_bytes=chunk_bytes)
        assert ((logp - expected)[case.valid].abs() <= case.tolerance).all()
        assert ((hidden - expected_gradients[0]).abs() <= case.bounds[0]).all()
        if shape[0] > 100:
            assert relative(hidden, expected_gradients[0]) <= GRADIENT_ERROR[dtype]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_unlikely_targets_are_done_again(trained, dtype, family):
    """1/p_y beyond float32's range: e^(z - z_y) overflows, and the chunk falls back on the exact logsumexp."""
    case = Case(200, 32, 400, dtype, bias=True)
    case.head.bias[7] = 300.0
    case.targets[::2] = 7  # half the rows have p_y = 1, half p_y < 1e-100
    expected, *_, expected_gradients = case.reference()
    assert expected.min() < -250
    logp, gradients = case.student_pass(needs=(True, trained, trained), chunk_bytes=CHUNK_BYTES if trained else 1)
    assert (logp - expected)[case.valid].abs().max() <= case.tolerance + 300 * 2.0**-22
    for a, e in zip(gradients, expected_gradients, strict=True):
        assert a is None or relative(a, e) <= GRADIENT_ERROR[dtype]


def test_logits_of_minus_infinity(dtype, family):
    """Words forbidden through a bias of -inf, whole tiles of them, and one of them a target."""
    case = Case(150, 32, 700, dtype, bias=True)
    case.head.bias[100:600] = -math.inf
    case.targets = torch.where((case.targets >= 100) & (case.targets < 600), 5, case.targets)
    expected, expected_entropy, *_, expected_gradients = case.reference()
    logp, entropy, _ = case.statistics()
    assert (entropy - expected_entropy)[case.valid].abs().max() <= case.tolerance
    assert (logp - expected)[case.valid].abs().max() <= case.tolerance
    student_logp, gradients = case.student_pass()
    assert (student_logp - expected)[case.valid].abs().max() <= case.tolerance
    for a, e in zip(gradients, expected_gradients, strict=True):
        assert relative(a, e.nan_to_num()) <= GRADIENT_ERROR[dtype]
    first = int(case.valid.nonzero()[0])
    case.targets[first] = 300
    logp, *_ = case.statistics()
    assert logp[first] == -math.inf
    student_logp, gradients = case.student_pass()
    assert student_logp[first] == -math.inf
    assert all(g.isfinite().all() for g in gradients)


def test_masked_rows_are_never_read(dtype, family):
    case = Case(200, 40, 300, dtype)
    clean_logp, clean = case.student_pass(chunk_bytes=1)
    case.hidden[0][~case.valid] = math.nan
    case.targets[~case.valid] = 10**9
    logp, gradients = case.student_pass(chunk_bytes=1)
    assert torch.equal(logp, clean_logp)
    assert torch.equal(gradients[0], clean[0]) and torch.equal(gradients[1], clean[1])


def test_target_outside_the_vocabulary_is_nan(dtype, family):
    case = Case(60, 40, 300, dtype)
    valid = case.valid.nonzero().squeeze(1)
    for row, target in ((valid[0], -1), (valid[1], 300), (valid[2], 2**40)):
        case.targets[row] = target
    logp, entropy, _ = case.statistics()
    student_logp, (hidden, *_) = case.student_pass(needs=(True, False, False))
    for values in (logp, student_logp):
        assert values[valid[:3]].isnan().all() and values[valid[3:]].isfinite().all()
    assert entropy.isfinite().all()
    assert hidden[0][valid[3:]].isfinite().all()


@pytest.mark.parametrize("programs", [1, 3, 37])
def test_result_does_not_hang_on_the_number_of_programs(programs, family, monkeypatch):
    """Few programs: several tiles each. Many: the sum over the vocabulary is split."""
    monkeypatch.setattr(tuning, "device_limits", lambda device: (programs, 0))
    case = Case(200, 72, 515, torch.float32)
    *_, expected = case.reference()
    _, gradients = case.student_pass()
    for a, e in zip(gradients[:2], expected, strict=True):
        assert relative(a, e) <= GRADIENT_ERROR[torch.float32]


@pytest.mark.slow
def test_same_bits_every_time(dtype, family):
    case = Case(261, 72, 515, dtype, bias=True)
    first_logp, first = case.student_pass(chunk_bytes=1)
    for _ in range(3 if CUDA else 1):
        logp, gradients = case.student_pass(chunk_bytes=1)
        assert torch.equal(logp, first_logp)
        assert all(torch.equal(a, b) for a, b in zip(gradients, first, strict=True))


def test_any_layout(dtype, family):
    """Hidden states cut out of a longer batch, and a head stored transposed or with unaligned rows."""
    case = Case(120, 40, 300, dtype)
    case.reference()
    clean_logp, clean = case.student_pass()
    wide = torch.full((1, 240, 41), math.nan, dtype=dtype, device=DEVICE)[:, ::2, 1:]
    wide.copy_(case.hidden)
    case.hidden = wide
    for weight in (case.head.weight.t().contiguous().t(), torch.empty(300, 41, dtype=dtype, device=DEVICE)[:, 1:]):
        weight.copy_(case.head.weight)
        other = Head(weight)
        case.head, original = other, case.head
        logp, gradients = case.student_pass()
        case.head = original
        assert (logp - clean_logp).abs().max() <= case.tolerance
        assert gradients[0].is_contiguous() and gradients[1].is_contiguous()
        for a, b in zip(gradients[:2], clean, strict=False):
            assert relative(a, b.double()) <= GRADIENT_ERROR[dtype]


@pytest.mark.parametrize("lookahead", [3, 0, 1, 8, 1000])
def test_lookahead_entropy(lookahead):
    g = torch.Generator().manual_seed(lookahead)
    lengths = [1, 0, 7, 300, 1, 55]
    n = sum(lengths)
    entropy = torch.rand(n, generator=g)
    valid = torch.rand(n, generator=g) < 0.7
    ends = torch.cat([torch.full((length,), sum(lengths[: i + 1]) - 1) for i, length in enumerate(lengths)])
    expected = torch.zeros(n)
    for t in range(n):
        window = [entropy[j] for j in range(t, min(t + lookahead, int(ends[t])) + 1) if valid[j]]
        expected[t] = min(window) if valid[t] else 0
    arguments = entropy.to(DEVICE), valid.to(DEVICE), ends.to(torch.int32).to(DEVICE), Lookahead(lookahead)
    assert torch.equal(triton_backend.lookahead_entropy(*arguments).cpu(), expected)


def test_lookahead_keeps_nan():
    entropy = torch.tensor([1.0, math.nan, 2.0, 3.0], device=DEVICE)
    ends = torch.full((4,), 3, dtype=torch.int32, device=DEVICE)
    out = triton_backend.lookahead_entropy(entropy, torch.ones(4, dtype=torch.bool, device=DEVICE), ends, Lookahead(1))
    assert out.isnan().tolist() == [True, True, False, False]


def test_multiply_rounds_once():
    x = torch.randn(2500, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    factor = torch.tensor(1 / 3, device=DEVICE)
    expected = (x.float() * factor).half()
    assert torch.equal(gradient.multiply(x, factor, torch.empty_like(x)), expected)
    assert torch.equal(gradient.multiply(x, factor, x), expected)
