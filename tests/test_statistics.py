"""``token_statistics`` against float64: log p, entropy and logsumexp, on every backend."""

from __future__ import annotations

import math

import pytest
import torch

from egrsd_kernels import token_statistics
from egrsd_kernels.backends import triton as triton_backend
from reference import entropy, log_prob, logits
from tests.support.cases import Draw, draw_head, draw_hidden, draw_targets
from tests.support.devices import Combo, all_combos, cuda_combos, few_combos
from tests.support.tolerances import assert_within, entropy_error, logit_error, logp_error


def make_operands(
    combo: Combo, *shape: int, width: int = 16, vocabulary: int = 61, kind: str = "peaked", bias: bool = False
):
    draw = Draw(len(shape))
    weight = draw_head(draw, vocabulary, width)
    hidden = draw_hidden(draw, kind, weight, *shape)
    targets = draw_targets(draw, hidden, weight)
    operands = {"hidden": hidden, "weight": weight} | ({"bias": draw.normal(vocabulary)} if bias else {})
    return {k: x.to(combo.dtype).to(combo.device) for k, x in operands.items()}, targets.to(combo.device)


def check(combo: Combo, operands: dict, targets: torch.Tensor, ordinary: bool = True, **options):
    """The three figures of every token; the exact ones come back."""
    got = token_statistics(**operands, target_ids=targets, backend=combo.backend, **options)
    for name in ("chunk_bytes", "mask"):
        options.pop(name, None)
    exact = {k: x.detach().cpu().double() for k, x in operands.items()}
    z = logits(**exact, **options)
    want = log_prob(z, targets.cpu()), entropy(z), torch.logsumexp(z, -1)
    dz = logit_error(combo, **operands, **options)
    bounds = (
        logp_error(combo, dz, ordinary),
        entropy_error(combo, dz, want[1], z.shape[-1]),
        logp_error(combo, dz, ordinary),
    )
    for name, x, y, bound in zip(got._fields, got, want, bounds, strict=True):
        assert x.dtype == combo.compute_dtype and x.shape == targets.shape and x.device.type == combo.device
        assert not x.requires_grad
        assert_within(name, x, y, bound)
    return want


@all_combos
@pytest.mark.parametrize(
    "size, options",
    [
        ({"width": 40, "vocabulary": 70, "bias": True}, {"softcap": 8.0, "temperature": 1.5}),
        ({}, {}),
        ({"width": 17, "vocabulary": 257}, {"temperature": 0.7}),
        ({"width": 40, "vocabulary": 1003, "bias": True}, {"softcap": 5.0}),
        ({"width": 1, "vocabulary": 2}, {}),
        ({"vocabulary": 1, "bias": True}, {}),
        ({"kind": "flat", "vocabulary": 200}, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(3, 5), (7,)], ids=["padded", "packed"])
def test_parity(combo, size, options, shape):
    check(combo, *make_operands(combo, *shape, **size), **options)


@all_combos
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"temperature": 0.5}], ids=str)
def test_extreme_logits(combo, options):
    check(combo, *make_operands(combo, 3, 5, kind="extreme", bias=True), ordinary=False, **options)


@all_combos
def test_known_distributions(combo):
    """All logits equal: log V. One far above the rest: 0. Two equal ones far above: log 2."""
    hidden = torch.eye(3, dtype=combo.dtype, device=combo.device)
    weight = torch.zeros(100, 3, dtype=combo.dtype, device=combo.device)
    weight[17, 1], weight[17, 2], weight[99, 2] = 2000, 2000, 2000
    targets = torch.tensor([0, 17, 99], device=combo.device)
    out = token_statistics(hidden, weight, targets, backend=combo.backend)
    exact = {
        "logp": [-math.log(100), 0, -math.log(2)],
        "entropy": [math.log(100), 0, math.log(2)],
        "logsumexp": [math.log(100), 2000, 2000 + math.log(2)],
    }
    for name, values in exact.items():
        # A last bit of 2000, and so of its logsumexp, is 1.2e-4 in float32.
        tolerance = torch.tensor([2e-6, 2e-6, 1.3e-4] if name == "entropy" else [2e-6, 3e-4, 3e-4])
        assert_within(name, getattr(out, name), torch.tensor(values), tolerance)


@all_combos
def test_minus_infinity_through_the_bias(combo):
    operands, targets = make_operands(combo, 3, 5, vocabulary=150, bias=True)
    operands["bias"][::3] = -math.inf
    targets[1, 2] = 3
    logp, h, _ = check(combo, operands, targets)
    assert logp[1, 2] == -math.inf and h.isfinite().all()
    # All entries but one impossible: nothing is left to decide.
    operands["bias"][:] = -math.inf
    operands["bias"][4] = 0.5
    targets[:] = 4
    check(combo, operands, targets)


def same(combo, got, want) -> bool:
    """Bit for bit from the kernels. A BLAS chooses its loops by number of rows, strides and threads."""
    if combo.backend == "triton":
        return all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    slack = 64 * combo.unit_roundoff
    return all(torch.allclose(x, y, rtol=slack, atol=slack) for x, y in zip(got, want, strict=True))


@all_combos
def test_masked_positions_are_zero_and_never_looked_at(combo):
    operands, targets = make_operands(combo, 4, 6, bias=True)
    mask = torch.rand(4, 6, device=combo.device, generator=torch.Generator(combo.device).manual_seed(1)) < 0.6
    mask[2] = False
    plain = token_statistics(**operands, target_ids=targets, backend=combo.backend)
    operands["hidden"][~mask] = math.nan
    targets[~mask] = -7
    for value in (mask, mask.long()):
        masked = token_statistics(**operands, target_ids=targets, mask=value, backend=combo.backend)
        assert all((x[~mask] == 0).all() for x in masked)
        assert same(combo, (x[mask] for x in masked), (x[mask] for x in plain))
    targets[~mask] = -100
    ignored = token_statistics(**operands, target_ids=targets, backend=combo.backend)
    assert all((x[~mask] == 0).all() for x in ignored)
    assert same(combo, (x[mask] for x in ignored), (x[mask] for x in plain))


@all_combos
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_no_token(combo, shape):
    operands, targets = make_operands(combo, *shape)
    assert all(x.shape == shape for x in token_statistics(**operands, target_ids=targets, backend=combo.backend))


@all_combos
def test_many_chunks(combo, monkeypatch):
    monkeypatch.setattr(triton_backend, "STATISTICS_ROWS", triton_backend.ROW_TILE)
    shape = (2, 70) if combo.backend == "triton" else (2, 9)
    check(combo, *make_operands(combo, *shape, vocabulary=37, bias=True), chunk_bytes=1)


@few_combos
def test_no_gradient_even_where_one_is_asked_for(combo):
    operands, targets = make_operands(combo, 2, 3)
    for x in operands.values():
        x.requires_grad_()
    assert not any(x.requires_grad for x in token_statistics(**operands, target_ids=targets, backend=combo.backend))


@few_combos
def test_bit_for_bit_the_same(combo):
    operands, targets = make_operands(combo, *((3, 5) if combo.device == "cpu" else (2, 3000)), vocabulary=257)
    first = token_statistics(**operands, target_ids=targets, backend=combo.backend)
    for _ in range(1 if combo.interpreted else 4):
        again = token_statistics(**operands, target_ids=targets, backend=combo.backend)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@few_combos
def test_any_strides(combo):
    """Slices, transposes and expanded rows are read where they lie."""
    operands, targets = make_operands(combo, 3, 5)
    hidden, weight = operands.values()
    options = {"backend": combo.backend}
    want = token_statistics(hidden[:, :-1].contiguous(), weight, targets[:, 1:].contiguous(), **options)
    columns = weight.T.contiguous().T
    assert not columns.is_contiguous()
    apart = torch.stack([hidden, hidden], -1)[..., 0]
    assert apart.stride(-1) == 2
    for h, w in ((hidden, weight), (hidden, columns), (apart, weight)):
        got = token_statistics(h[:, :-1], w, targets[:, 1:], **options)
        assert same(combo, got, want)
    repeated = token_statistics(hidden[:1, :1].expand(2, 3, -1), weight, targets[:1, :1].expand(2, 3), **options)
    once = token_statistics(hidden, weight, targets, **options)
    assert same(combo, repeated, (x[:1, :1].expand(2, 3) for x in once))


@pytest.mark.cuda
@cuda_combos
@pytest.mark.parametrize(
    "shape, size",
    [
        ((3, 500), {"width": 1024, "vocabulary": 8209, "bias": True}),
        ((5001,), {"width": 72, "vocabulary": 1003}),
        ((200,), {"width": 5120, "vocabulary": 4099}),
        ((64,), {"width": 256, "vocabulary": 151936, "kind": "flat"}),
    ],
    ids=str,
)
def test_parity_at_size(combo, shape, size):
    check(combo, *make_operands(combo, *shape, **size))
