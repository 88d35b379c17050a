"""What a pass over the vocabulary says of a token beside log p and entropy, on every backend, against float64."""

from __future__ import annotations

import math

import pytest
import torch

import reference
from egrsd_kernels import Head, VocabularyStatistics, linear_logp, token_statistics
from egrsd_kernels.backends import EXTRAS, Needs, no_extras, no_statistics
from egrsd_kernels.backends import torch as torch_backend
from egrsd_kernels.backends import triton as triton_backend
from egrsd_kernels.backends.triton import plan
from egrsd_kernels.rows import Rows
from tests.support.devices import Combo, all_combos, cuda_combos, few_combos, sparse_combos
from tests.support.tolerances import assert_within, logit_error
from tests.test_statistics import make_operands

# Every path that statistics are made on: which operands have a gradient, and how it is made.
PATHS = {
    "frozen": (("hidden",), {}),
    "frozen-slices": (("hidden",), {"chunk_bytes": 1}),
    "kept": (("hidden", "weight", "bias"), {}),
    "partly-kept": (("hidden", "weight", "bias"), {"keep_bytes": 1 << 17, "chunk_bytes": 1}),
    "made-again": (("hidden", "weight"), {"keep_bytes": 0}),
    "kept-logits": (("hidden", "weight"), {"return_entropy": True, "entropy_grad": True}),
    "frozen-sparse": (("hidden",), {"grad_mode": "sparse"}),
    "sparse": (("hidden", "weight"), {"grad_mode": "sparse"}),
    "no-gradient": ((), {"return_entropy": True}),
}
paths = pytest.mark.parametrize("path", PATHS)


@pytest.fixture(params=["tma", "pointer"])
def family(request, monkeypatch):
    monkeypatch.setenv("EGRSD_KERNELS_TMA", "1" if request.param == "tma" else "0")


def by_path(combo: Combo, path: str, operands: dict, targets: torch.Tensor, extras=EXTRAS, **options):
    """What ``linear_logp`` returns."""
    learned, more = PATHS[path]
    leaves = {k: x.detach().clone().requires_grad_(k in learned) for k, x in operands.items()}
    return linear_logp(**leaves, target_ids=targets, extras=extras, backend=combo.backend, **more, **options), leaves


def check(combo: Combo, got: VocabularyStatistics, operands: dict, targets: torch.Tensor, **options) -> None:
    """The extras of valid tokens against float64. Without rounding in the logits, is_top1 is the argmax's first.

    mean_logits errs as a logit does, and by its sum's rounding; log Σ p² by 2 (q - p)·Δz with two distributions p and
    q, so by 4 Δz at most, and by the rounding of two sums and their logarithms. With rounding, whether a token is the
    top one is known where it is ahead, or behind, by more than twice a logit's error.
    """
    valid = targets.cpu() != -100
    exact = {k: x.detach().cpu().double() for k, x in operands.items()}
    z, y = reference.logits(**exact, **options)[valid], targets.cpu()[valid]
    dz, unit = logit_error(combo, **operands, **options)[valid], combo.unit_roundoff
    for name, x in zip(EXTRAS, got[3:], strict=True):
        assert x.shape == targets.shape and x.device.type == combo.device and not x.requires_grad
        assert x.dtype == (torch.bool if name == "is_top1" else combo.compute_dtype)
        assert (x.cpu()[~valid] == 0).all()
    is_top1, mean_logits, log_sum_sq_probs = (x.cpu()[valid] for x in got[3:])
    sizes = z.abs().nan_to_num(0, 0, 0).mean(-1)
    assert_within("mean_logits", mean_logits, reference.mean_logits(z), dz + 32 * unit * sizes)
    assert_within("log_sum_sq_probs", log_sum_sq_probs, reference.log_sum_sq_probs(z), 4 * dz + 64 * unit)
    others = z.scatter(-1, y[..., None], -math.inf).amax(-1)
    own = z.gather(-1, y[..., None])[..., 0]
    known = (own - others).abs() > 2 * dz
    assert known.float().mean() >= 0.9 or z.shape[-1] == 1
    assert torch.equal(is_top1[known], reference.is_top1(z, y)[known])


def drawn(combo: Combo, vocabulary: int, *shape: int, size: float = 1.0, width: int = 16):
    """Operands of small integers, whose logits are exact in any order of sums, and often tie. Targets are the first
    maximum, or any, or mostly random."""
    random = torch.Generator().manual_seed(vocabulary)
    hidden, weight = (
        torch.randint(-1, 2, s, generator=random).double() for s in ((*shape, width), (vocabulary, width))
    )
    z = hidden @ weight.T
    scores = torch.rand(z.shape, generator=random)
    targets = torch.where(scores[..., 0] < 0.3, z.argmax(-1), (scores + 2 * (z == z.amax(-1, keepdim=True))).argmax(-1))
    targets = torch.where(scores[..., 0] > 0.8, torch.randint(vocabulary, shape, generator=random), targets)
    operands = {"hidden": hidden, "weight": size * weight}
    return {k: x.to(combo.dtype).to(combo.device) for k, x in operands.items()}, targets.to(combo.device)


def is_first_maximum(operands: dict, targets: torch.Tensor) -> torch.Tensor:
    z = operands["hidden"].cpu().double() @ operands["weight"].cpu().double().T
    return reference.is_top1(z, targets.cpu())


@all_combos
@pytest.mark.parametrize(
    "size, options",
    [
        ({"width": 40, "vocabulary": 70, "bias": True}, {"softcap": 8.0, "temperature": 1.5}),
        ({"width": 17, "vocabulary": 515}, {"temperature": 0.7}),
        ({"vocabulary": 1, "bias": True}, {}),
        ({"kind": "extreme", "bias": True}, {}),
    ],
    ids=str,
)
def test_statistics(combo, size, options):
    operands, targets = make_operands(combo, 3, 5, **size)
    targets[1, 2] = -100
    got = token_statistics(**operands, target_ids=targets, backend=combo.backend, extras=EXTRAS, **options)
    check(combo, got, operands, targets, **options)
    plain = token_statistics(**operands, target_ids=targets, backend=combo.backend, **options)
    assert len(plain) == 3 and all(torch.equal(x, y) for x, y in zip(plain, got, strict=False))


@few_combos
@paths
def test_every_path(combo, path):
    """And log p, entropies and gradients are what they are without extras, bit for bit."""
    operands, targets = make_operands(combo, 2, 5, vocabulary=257, bias=True)
    targets[1, 2] = -100
    options = {"softcap": 8.0, "temperature": 0.8}
    got, leaves = by_path(combo, path, operands, targets, **options)
    check(combo, got, operands, targets, **options)
    plain, others = by_path(combo, path, operands, targets, extras=(), **options)
    plain = plain if isinstance(plain, tuple) else (plain,)
    assert all(torch.equal(x, y) for x, y in zip(plain, got, strict=False))
    assert got.logsumexp is None and (got.entropy is None) == (len(plain) == 1)
    learned = PATHS[path][0]
    assert got.logp.requires_grad == bool(learned)
    for logp, made in ((got.logp, leaves), (plain[0], others)) if learned else ():
        (logp * torch.linspace(-1, 1, 5, device=combo.device)).sum().backward()
        assert made["hidden"].grad.abs().sum() > 0
    assert all(torch.equal(leaves[name].grad, others[name].grad) for name in learned)


@sparse_combos
@pytest.mark.slow
@pytest.mark.parametrize("path", ["frozen", "partly-kept", "frozen-sparse", "no-gradient"])
def test_many_chunks(combo, path, monkeypatch):
    monkeypatch.setattr(plan, "MOST_ROWS", plan.ROW_TILE)
    monkeypatch.setattr(triton_backend, "STATISTICS_ROWS", plan.ROW_TILE)
    operands, targets = make_operands(combo, 2, 70, vocabulary=130, bias=True)
    check(combo, by_path(combo, path, operands, targets)[0], operands, targets)


@all_combos
@pytest.mark.parametrize("vocabulary, size", [(700, 1.0), (130, 12.0), (1, 1.0)])
def test_of_equal_logits_the_first_wins(combo, vocabulary, size):
    """Ties within a tile and across tiles, and logits up to some ±200."""
    operands, targets = drawn(combo, vocabulary, 60, size=size)
    got = token_statistics(**operands, target_ids=targets, backend=combo.backend, extras=["is_top1"])
    want = is_first_maximum(operands, targets)
    assert torch.equal(got.is_top1.cpu(), want)
    assert got.mean_logits is None and got.log_sum_sq_probs is None
    for path in ("frozen", "kept-logits"):
        assert torch.equal(by_path(combo, path, operands, targets)[0].is_top1.cpu(), want)
    assert 0 < want.sum() < len(want) or vocabulary == 1


@sparse_combos
@pytest.mark.parametrize("path", ["frozen", "kept-logits", "no-gradient"])
def test_kernels_without_tma(combo, path, monkeypatch):
    monkeypatch.setenv("EGRSD_KERNELS_TMA", "0")
    operands, targets = make_operands(combo, 3, 5, vocabulary=257, bias=True)
    check(combo, by_path(combo, path, operands, targets)[0], operands, targets)
    operands, targets = drawn(combo, 700, 60)
    assert torch.equal(by_path(combo, path, operands, targets)[0].is_top1.cpu(), is_first_maximum(operands, targets))


@few_combos
@paths
def test_unlikely_targets_are_done_again(combo, path):
    """1/p_y beyond float32's range, for half of the tokens."""
    operands, targets = make_operands(combo, 1, 60, vocabulary=400, bias=True)
    operands["bias"][7] = 300.0
    targets[:, ::2] = 7
    got, _ = by_path(combo, path, operands, targets)
    assert got.logp.min() < -250
    check(combo, got, operands, targets)


@few_combos
@pytest.mark.parametrize("path", ["frozen", "kept-logits", "no-gradient"])
def test_minus_infinity_through_the_bias(combo, path):
    """Whole tiles of it, and one of them a target; the mean is -inf, too."""
    operands, targets = make_operands(combo, 3, 5, vocabulary=700, bias=True)
    operands["bias"][100:600] = -math.inf
    targets[(targets >= 100) & (targets < 600)] = 3
    targets[1, 2] = 300
    got, _ = by_path(combo, path, operands, targets)
    assert (got.mean_logits == -math.inf).all() and not got.is_top1[1, 2] and got.logp[1, 2] == -math.inf
    check(combo, got, operands, targets)


@few_combos
def test_a_low_rank_part_of_the_head(combo):
    operands, targets = make_operands(combo, 3, 5, vocabulary=257)
    random = torch.Generator().manual_seed(0)
    low_rank = [0.3 * torch.randn(*s, generator=random).to(combo.dtype).to(combo.device) for s in ((8, 16), (257, 8))]
    head = Head(operands["weight"], softcap=20.0, low_rank=(*low_rank, 0.5))
    options = {"backend": combo.backend, "extras": EXTRAS}
    found = token_statistics(operands["hidden"], head, targets, **options)
    trained = linear_logp(operands["hidden"].requires_grad_(), head, targets, **options)
    columns = torch.nn.functional.linear(operands["hidden"], 0.5 * low_rank[0])
    joined = {
        "hidden": torch.cat([operands["hidden"], columns], -1),
        "weight": torch.cat([operands["weight"], low_rank[1]], 1),
    }
    for got in (found, trained):
        check(combo, got, joined, targets, softcap=20.0)


@few_combos
def test_each_alone(combo):
    """What is not asked for is not made, and changes nothing else."""
    operands, targets = make_operands(combo, 3, 5, vocabulary=257)
    every = by_path(combo, "frozen", operands, targets)[0]
    for name in EXTRAS:
        got = by_path(combo, "frozen", operands, targets, extras={name})[0]
        assert torch.equal(getattr(got, name), getattr(every, name))
        assert [x for x in EXTRAS if getattr(got, x) is not None] == [name]


@few_combos
@pytest.mark.parametrize("student", [False, True])
def test_target_outside_the_vocabulary(combo, student):
    """Not the top one, whatever the others are; log p is a NaN."""
    operands, targets = drawn(combo, 300, 40)
    want = is_first_maximum(operands, targets)
    targets[0], targets[1], targets[2] = -1, 300, 2**40
    want[:3] = False
    ops = torch_backend if combo.backend == "torch" else triton_backend
    valid = torch.ones_like(targets, dtype=torch.bool)
    hidden, rows = operands["hidden"][None], Rows.build(valid, valid)
    logp, *others = no_statistics(len(targets), hidden)
    out = VocabularyStatistics(logp, *others, **no_extras(logp, EXTRAS))
    problem = Head(operands["weight"]), 1.0, hidden, targets, rows
    if student:
        needs = Needs(True, False, False)
        ops.student_pass(*problem, out._replace(logsumexp=None), lambda *_: torch.ones_like(logp), needs, 1 << 30)
    else:
        ops.statistics(*problem, out, 1 << 30)
    assert logp[:3].isnan().all() and logp[3:].isfinite().all()
    assert torch.equal(out.is_top1.cpu(), want)
    assert out.mean_logits.isfinite().all() and out.log_sum_sq_probs[3:].isfinite().all()


@few_combos
def test_nan_is_never_the_top(combo):
    """A row whose log p is a NaN has no most likely token."""
    operands, targets = drawn(combo, 40, 6)
    operands["hidden"][2, 3] = math.nan
    for found in (
        token_statistics(**operands, target_ids=targets, backend=combo.backend, extras=EXTRAS),
        by_path(combo, "frozen", operands, targets)[0],
    ):
        assert found.logp[2].isnan() and not found.is_top1[2]


@few_combos
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_token(combo, shape):
    operands, targets = make_operands(combo, *shape)
    for path in ("frozen", "kept", "no-gradient"):
        assert all(x.shape == shape for x in by_path(combo, path, operands, targets)[0][3:])


def test_as_trl_means_them():
    """Its own kernels' torch twin, on logits that tie."""
    chunked = pytest.importorskip("trl.kernels.chunked_logprob", reason="needs TRL")
    operands, targets = drawn(Combo("torch", "cpu", torch.float32), 700, 60)
    options = {"temperature": 0.7, "softcap": 30.0}
    got = token_statistics(**operands, target_ids=targets, extras=EXTRAS, **options)
    logp, entropy, log_sum_sq_probs, mean_logits, is_top1 = chunked.ChunkedLogProbFunction.apply(
        operands["hidden"], operands["weight"], None, targets, 0.7, 256, 30.0
    )
    assert torch.equal(got.is_top1, is_top1) and is_top1.any()
    for x, y in zip(got, (logp, entropy, None, None, mean_logits, log_sum_sq_probs), strict=True):
        if y is not None:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", [token_statistics, linear_logp])
@pytest.mark.parametrize(
    "extras, error, words",
    [
        (("is_top1", "top5"), ValueError, "extras: expected names out of {}, got ['top5']"),
        ("is_top1", TypeError, "extras: expected a collection of names out of {}, got 'is_top1'"),
        (True, TypeError, "extras: expected a collection of names out of {}, got True"),
    ],
)
def test_refused(call, extras, error, words):
    with pytest.raises(error) as found:
        call(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long), extras=extras)
    assert str(found.value) == words.format("is_top1, mean_logits, log_sum_sq_probs")


@pytest.mark.cuda
@cuda_combos
@pytest.mark.parametrize("size", [{"width": 1024, "vocabulary": 8209}, {"width": 333, "vocabulary": 5003}], ids=str)
def test_parity_at_size(combo, size, family):
    operands, targets = make_operands(combo, 3, 500, bias=True, **size)
    targets[1, 2] = -100
    for path in ("no-gradient", "frozen", "kept", "kept-logits", "frozen-sparse"):
        check(combo, by_path(combo, path, operands, targets, softcap=20.0)[0], operands, targets, softcap=20.0)


@pytest.mark.cuda
@cuda_combos
@pytest.mark.parametrize("vocabulary, size", [(32_003, 12.0), (8209, 1.0)])
def test_ties_at_size(combo, vocabulary, size, family):
    operands, targets = drawn(combo, vocabulary, 1000, size=size, width=64)
    want = is_first_maximum(operands, targets)
    for path in ("no-gradient", "frozen", "kept-logits", "frozen-sparse"):
        assert torch.equal(by_path(combo, path, operands, targets)[0].is_top1.cpu(), want)
