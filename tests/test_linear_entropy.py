"""Entropies beside log p: values, and gradients under any two incoming ones, against autograd through full logits."""

from __future__ import annotations

import math

import pytest
import torch

from egrsd_kernels import linear_logp, token_statistics
from egrsd_kernels.backends import power_of_two
from egrsd_kernels.backends import torch as torch_backend
from egrsd_kernels.backends import triton as triton_backend
from egrsd_kernels.backends.triton import plan
from reference import entropy, log_prob, logits
from tests.support.devices import Combo, all_combos, cuda_combos, few_combos, sparse_combos
from tests.support.tolerances import assert_within, entropy_error, logit_error, logp_error
from tests.test_linear_logp import make_operands

# The largest relative error of a rounding to the dtype, and of a logit kept in the 16 bits of float16.
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
KEPT = 2.0**-11
WAYS = [(True, 1 << 30), (False, 1 << 30), (True, 0), (False, 0)]
ways = pytest.mark.parametrize("frozen, keep_bytes", WAYS, ids=["frozen-kept", "trained-kept", "frozen", "trained"])


def incoming_of(combo: Combo, shape, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """dL/dlogp and dL/dentropy; a quarter of each is 0, and some of both."""
    g = torch.Generator().manual_seed(seed)
    both = torch.randn(2, *shape, generator=g)
    both[torch.rand(2, *shape, generator=g) < 0.25] = 0
    return tuple(both.to(combo.compute_dtype).to(combo.device))


def package(combo: Combo, operands: dict, targets, incoming, frozen: bool, **options):
    leaves = {k: x.detach().clone().requires_grad_(k == "hidden" or not frozen) for k, x in operands.items()}
    options = {"return_entropy": True, "entropy_grad": True, "backend": combo.backend, **options}
    logp, h = linear_logp(**leaves, target_ids=targets, **options)
    torch.autograd.backward([logp, h], list(incoming))
    return logp.detach().cpu(), h.detach().cpu(), {k: x.grad.cpu() for k, x in leaves.items() if x.requires_grad}


def exact(combo: Combo, operands: dict, targets, incoming, kept: bool, mask=None, softcap=None, temperature=1.0):
    """(log p, entropies, gradients, bounds of what these may be off) in float64.

    An entry of dL/dz is p (g + h (log p + H)), but for the target. What is rounded: p by a logit's error, log p and H
    by theirs, the entry once, and kept logits x = z - z_y by KEPT |x|, which moves p and log p. The target's entry is
    the sum of the others. Under a softcap, 1 - t^2 of a kept logit is off by 2 t times what t is. A product then adds
    up in float32. A head's has scaled hidden states, and a factor that undoes the rounding of the target's entry.
    """
    leaves = {k: x.detach().cpu().double().requires_grad_() for k, x in operands.items()}
    targets, (g, h) = targets.cpu(), (x.cpu().double() for x in incoming)
    valid = targets != -100
    if mask is not None:
        valid &= mask.cpu() != 0
    rows = leaves["hidden"][valid]
    z = logits(rows, leaves["weight"], leaves.get("bias"), softcap, temperature)
    logp, H = log_prob(z, targets[valid]), entropy(z)
    (logp * g[valid] + H * h[valid]).sum().backward()

    transform = {"softcap": softcap, "temperature": temperature}
    dz = logit_error(combo, rows, leaves["weight"], leaves.get("bias"), **transform)[:, None]
    g, h, y = g[valid][:, None], h[valid][:, None], targets[valid][:, None]
    z = z.detach()
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    log_p = log_p.clamp(min=-1e4)
    slope = (g + h * (log_p + H.detach()[:, None])).abs()
    of_statistics = logp_error(combo, dz, False) + entropy_error(combo, dz, H.detach()[:, None], z.shape[1])
    smooth = p * (2 * dz * slope + h.abs() * of_statistics)
    unit, damping = UNIT[combo.dtype], 1.0
    error = smooth + unit * p * slope
    x = (z - z.gather(1, y)).clamp(min=-1e4).abs()
    off = KEPT * x if kept and combo.backend == "triton" and combo.dtype.itemsize == 2 else 0 * x
    error += p * off * (slope + h.abs())
    if softcap is not None:
        t = (z * temperature / softcap).abs()
        damping = 1 - t * t
        error = damping * error + p * slope * 2 * t * ((off + dz) * temperature / softcap + 4 * combo.unit_roundoff)
    own = unit * (p * slope).sum(1, keepdim=True) + smooth.sum(1, keepdim=True)
    error.scatter_(1, y, own)
    error = error / temperature
    size = p * slope * damping / temperature
    size.scatter_(1, y, size.sum(1, keepdim=True))
    error += 32 * combo.unit_roundoff * size
    w, s = leaves["weight"].detach().abs(), rows.detach().abs()
    bounds = {"hidden": torch.zeros_like(leaves["hidden"]), "weight": (error + 2 * unit * size).t() @ s}
    bounds["hidden"][valid] = error @ w
    bounds["bias"] = (error + 2 * unit * size).sum(0)
    gradients = {k: x.grad for k, x in leaves.items()}
    least = 2.0**-24 if unit > 2.0**-30 else 0.0
    if combo.dtype == torch.float16:  # which holds a gradient over the power of two in the largest incoming one
        least += 2.0**-25 * power_of_two(torch.stack([x.abs().max() for x in (g, h)]).max()).item()
    bounds = {k: bounds[k] + 2 * unit * v.abs() + least for k, v in gradients.items()}
    spread = [torch.zeros(targets.shape, dtype=torch.float64).masked_scatter(valid, x.detach()) for x in (logp, H)]
    widths = [torch.zeros(targets.shape, dtype=torch.float64).masked_scatter(valid, e[:, 0]) for e in (
        logp_error(combo, dz, False), entropy_error(combo, dz, H.detach()[:, None], z.shape[1])
    )]  # fmt: skip
    return *spread, gradients, widths, bounds


def check(combo: Combo, operands: dict, targets, incoming, frozen: bool, **options) -> None:
    logp, h, gradients = package(combo, operands, targets, incoming, frozen, **options)
    kept = options.pop("keep_bytes", 1) > 0
    options.pop("chunk_bytes", None)
    want_logp, want_h, expected, widths, bounds = exact(combo, operands, targets, incoming, kept, **options)
    assert logp.dtype == h.dtype == combo.compute_dtype and logp.shape == h.shape == targets.shape
    assert_within("logp", logp, want_logp, widths[0])
    assert_within("entropy", h, want_h, widths[1])
    assert gradients.keys() == ({"hidden"} if frozen else operands.keys())
    for name, gradient in gradients.items():
        assert gradient.dtype == operands[name].dtype
        assert_within(f"gradient of {name}", gradient, expected[name].nan_to_num(0), bounds[name])
    silent = ((incoming[0] == 0) & (incoming[1] == 0)).cpu()
    assert not gradients["hidden"][silent].any()


@all_combos
@ways
@pytest.mark.parametrize(
    "shape, size, options",
    [
        ((7,), {"width": 40, "vocabulary": 130, "bias": True}, {"softcap": 5.0, "temperature": 0.8}),
        ((3, 5), {"width": 17, "vocabulary": 257}, {"temperature": 0.7}),
        ((1, 1), {"kind": "flat", "vocabulary": 200}, {}),
        ((5,), {"width": 2, "vocabulary": 3}, {}),
    ],
    ids=str,
)
def test_parity(combo, frozen, keep_bytes, shape, size, options):
    operands, targets, _ = make_operands(combo, *shape, **size)
    check(combo, operands, targets, incoming_of(combo, shape), frozen, keep_bytes=keep_bytes, **options)


@pytest.fixture(params=[False, True], ids=["", "unasked"])
def counts_unasked(request, monkeypatch):
    """PyTorch's backend asks a CPU how many rows count. A GPU would have to be waited for: it takes all of them."""
    if request.param:
        monkeypatch.setattr(torch_backend, "count", lambda rows, which: rows.order.numel())


@all_combos
@ways
def test_masks_and_many_chunks(combo, frozen, keep_bytes, monkeypatch, counts_unasked):
    monkeypatch.setattr(triton_backend, "STATISTICS_ROWS", triton_backend.ROW_TILE)
    monkeypatch.setattr(plan, "MOST_ROWS", triton_backend.ROW_TILE)
    shape = (2, 70) if combo.backend == "triton" else (2, 9)
    operands, targets, _ = make_operands(combo, *shape, vocabulary=37, bias=True)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(combo.device) < 0.8
    targets[0, 1:4] = -100
    operands["hidden"][~mask] = math.nan
    options = {"chunk_bytes": 1, "keep_bytes": keep_bytes, "mask": mask}
    logp, h, gradients = package(combo, operands, targets, incoming_of(combo, shape), frozen, **options)
    left_out = ~mask.cpu() | (targets == -100).cpu()
    assert not any(x[left_out].any() for x in (logp, h, gradients["hidden"]))
    operands["hidden"][~mask] = 0
    check(combo, operands, targets, incoming_of(combo, shape), frozen, **options)


@all_combos
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("options", [{}, {"softcap": 8.0}], ids=str)
def test_some_rows_are_kept_and_others_made_again(combo, frozen, options, monkeypatch, counts_unasked):
    """Two tiles of rows are kept, each a chunk of its own, and the third is made again."""
    monkeypatch.setattr(plan, "MOST_ROWS", triton_backend.ROW_TILE)
    plan.chunk_plan.cache_clear()
    if combo.backend == "triton":
        shape, columns = (2, 170), (256 if combo.dtype.itemsize == 2 else 128) + 16
        keep_bytes = 256 * (columns * combo.dtype.itemsize + 64)
    else:
        shape, keep_bytes = (2, 9), 7 * 70 * combo.compute_dtype.itemsize * (2 if options else 1)
    operands, targets, _ = make_operands(combo, *shape, vocabulary=70, bias=True)
    targets[0, ::5] = -100
    check(combo, operands, targets, incoming_of(combo, shape), frozen, keep_bytes=keep_bytes, chunk_bytes=1, **options)


@all_combos
@ways
@pytest.mark.parametrize("options", [{"softcap": 30.0}, {}], ids=str)
def test_extreme_logits(combo, frozen, keep_bytes, options):
    operands, targets, _ = make_operands(combo, 3, 5, kind="extreme", bias=True)
    check(combo, operands, targets, incoming_of(combo, (3, 5)), frozen, keep_bytes=keep_bytes, **options)


@all_combos
@ways
def test_minus_infinity_through_the_bias(combo, frozen, keep_bytes):
    operands, targets, _ = make_operands(combo, 3, 5, vocabulary=150, bias=True)
    operands["bias"][::3] = -math.inf
    targets[targets % 3 == 0] += 1
    check(combo, operands, targets, incoming_of(combo, (3, 5)), frozen, keep_bytes=keep_bytes)


@few_combos
@ways
def test_unlikely_targets(combo, frozen, keep_bytes):
    """1/p_y beyond float32's range: relative to the target's logit nothing could be stored."""
    operands, targets, _ = make_operands(combo, 3, 5, vocabulary=150, bias=True)
    operands["bias"][7] = 300.0
    targets[0] = 7
    check(combo, operands, targets, incoming_of(combo, (3, 5)), frozen, keep_bytes=keep_bytes)


@all_combos
@ways
def test_rows_that_are_all_but_decided(combo, frozen, keep_bytes):
    """An entropy's gradient is tiny where p_y is near 1, and is as accurate as elsewhere."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.eye(40) + 0.01 * torch.randn(40, 40, generator=generator)
    targets = torch.arange(20)
    hidden = torch.randn(20, 40, generator=generator)
    hidden[torch.arange(20), targets] += torch.linspace(9, 14, 20)
    operands = {k: x.to(combo.dtype).to(combo.device) for k, x in {"hidden": hidden, "weight": weight}.items()}
    incoming = torch.zeros(20), torch.linspace(-1, 1, 20)
    incoming = [x.to(combo.compute_dtype).to(combo.device) for x in incoming]
    targets = targets.to(combo.device)
    *_, got = package(combo, operands, targets, incoming, frozen, keep_bytes=keep_bytes)
    *_, want, _, _ = exact(combo, operands, targets, incoming, bool(keep_bytes))
    error = (got["hidden"].double() - want["hidden"]).norm(dim=1) / want["hidden"].norm(dim=1)
    size = want["hidden"].norm(dim=1)
    assert size.max() < 0.2, "the case shows nothing"
    # A logit of 14 is off by 14 u or so, and p_v with it; to 16 bits it is kept as well as its exponential would be.
    # The reference takes log p + H as a difference.
    cancelling = 64 * 2.0**-53 / size
    assert (error <= 3 * UNIT[combo.dtype] + 2**10 * combo.unit_roundoff + cancelling).all()


@all_combos
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
@ways
def test_no_token(combo, frozen, keep_bytes, shape):
    operands, targets, _ = make_operands(combo, *shape, bias=True)
    logp, h, gradients = package(combo, operands, targets, incoming_of(combo, shape), frozen, keep_bytes=keep_bytes)
    assert logp.shape == h.shape == shape
    assert gradients["hidden"].shape == (*shape, 16) and not any(x.any() for x in gradients.values())


@few_combos
@ways
@pytest.mark.parametrize("which", [0, 1], ids=["logp alone", "entropy alone"])
def test_a_loss_of_one_of_the_two(combo, frozen, keep_bytes, which):
    operands, targets, _ = make_operands(combo, 3, 5, bias=True)
    incoming = list(incoming_of(combo, (3, 5)))
    incoming[1 - which].zero_()
    leaves = {k: x.clone().requires_grad_(k == "hidden" or not frozen) for k, x in operands.items()}
    options = {"return_entropy": True, "entropy_grad": True, "keep_bytes": keep_bytes, "backend": combo.backend}
    linear_logp(**leaves, target_ids=targets, **options)[which].backward(incoming[which])
    *_, want, _, bounds = exact(combo, operands, targets, incoming, bool(keep_bytes))
    for name, x in leaves.items():
        if x.requires_grad:
            assert_within(name, x.grad, want[name], bounds[name])


@few_combos
@ways
def test_backward_twice(combo, frozen, keep_bytes):
    """What was kept is used up: the second time all is made again."""
    operands, targets, _ = make_operands(combo, 3, 5, bias=True)
    leaves = {k: x.clone().requires_grad_(k == "hidden" or not frozen) for k, x in operands.items()}
    options = {"return_entropy": True, "entropy_grad": True, "keep_bytes": keep_bytes, "backend": combo.backend}
    outputs = linear_logp(**leaves, target_ids=targets, **options)
    incoming = incoming_of(combo, (3, 5))
    learned = [x for x in leaves.values() if x.requires_grad]
    first, second = (torch.autograd.grad(outputs, learned, incoming, retain_graph=True) for _ in range(2))
    *_, want, _, bounds = exact(combo, operands, targets, incoming, bool(keep_bytes))
    for name, one, other in zip(want, first, second, strict=False):
        assert_within(name, one, want[name], bounds[name])
        assert_within(name, other, want[name], bounds[name])


@few_combos
@ways
def test_a_row_without_gradient_may_hold_anything(combo, frozen, keep_bytes):
    """Its log p is NaN; where the loss leaves it out, so does the gradient."""
    for entropy_grad in (False, True):
        operands, targets, _ = make_operands(combo, 2, 3)
        operands["hidden"][0, 1] = math.nan
        leaves = {k: x.requires_grad_(k == "hidden" or not frozen) for k, x in operands.items()}
        options = {"return_entropy": True, "entropy_grad": entropy_grad, "keep_bytes": keep_bytes}
        logp, h = linear_logp(**leaves, target_ids=targets, backend=combo.backend, **options)
        assert logp[0, 1].isnan() and logp.isnan().sum() == 1
        both = logp + h if entropy_grad else logp
        both[torch.tensor([[True, False, True], [True, True, True]], device=combo.device)].sum().backward()
        assert all(x.grad.isfinite().all() and x.grad.any() for x in leaves.values() if x.requires_grad)


@pytest.mark.heavy
@few_combos
@ways
def test_a_lazy_gradient(combo, frozen, keep_bytes):
    """Unasked, log p has the gradient that it has beside constant entropies, bit for bit; asked, both are right."""
    operands, targets, _ = make_operands(combo, 3, 5, width=17, vocabulary=70, bias=True)
    targets[0, 1:3] = -100
    operands["hidden"][0, 2] = math.nan
    transform = {"softcap": 5.0, "temperature": 0.8}
    options = {"return_entropy": True, "keep_bytes": keep_bytes, "backend": combo.backend, **transform}
    incoming = incoming_of(combo, (3, 5))
    alone = []
    for lazy in ("lazy", False):
        leaves = {k: x.detach().clone().requires_grad_(k == "hidden" or not frozen) for k, x in operands.items()}
        learned = [x for x in leaves.values() if x.requires_grad]
        outputs = linear_logp(**leaves, target_ids=targets, entropy_grad=lazy, **options)
        grads = torch.autograd.grad(outputs[0], learned, incoming[0], retain_graph=True)
        alone.append([x.detach() for x in (*outputs, *grads)])
        if lazy:
            outputs[1].detach().zero_()  # nothing is read of what the caller has
            both = [torch.autograd.grad(outputs, learned, incoming, retain_graph=True) for _ in range(2)]
            h = torch.autograd.grad(outputs[1], learned, incoming[1])
    assert all(torch.equal(x, y) for x, y in zip(*(a[:1] + a[2:] for a in alone), strict=True))
    operands["hidden"][0, 2] = 0
    nothing = torch.zeros_like(incoming[0])
    for found, pair in ((both[0], incoming), (both[1], incoming), (h, (nothing, incoming[1]))):
        *_, want, _, bounds = exact(combo, operands, targets, pair, bool(keep_bytes), **transform)
        for name, gradient in zip([k for k, x in leaves.items() if k == "hidden" or not frozen], found, strict=True):
            assert_within(name, gradient, want[name].nan_to_num(0), bounds[name])


@all_combos
def test_a_loss_scale(combo):
    operands, targets, _ = make_operands(combo, 3, 5, bias=True)
    incoming = [2.0**14 * x for x in incoming_of(combo, (3, 5))]
    for frozen, keep_bytes in WAYS:
        *_, got = package(combo, operands, targets, incoming, frozen, keep_bytes=keep_bytes)
        *_, want, _, bounds = exact(combo, operands, targets, incoming, bool(keep_bytes))
        for name, gradient in got.items():
            held = want[name].abs() < torch.finfo(combo.dtype).max
            assert_within(name, gradient[held], want[name][held], bounds[name][held])


@all_combos
@pytest.mark.parametrize("frozen, keep_bytes", [(True, 0), (False, 1 << 30), (False, 0)], ids=str)
def test_entropies_without_gradient(combo, frozen, keep_bytes):
    """As token_statistics has them; log p and its gradient are what they are without, bit for bit."""
    operands, targets, incoming = make_operands(combo, 3, 5, width=17, vocabulary=257, bias=True)
    options = {"softcap": 8.0, "backend": combo.backend}
    results = []
    for return_entropy in (False, True):
        leaves = {k: x.detach().clone().requires_grad_(k == "hidden" or not frozen) for k, x in operands.items()}
        more = {"return_entropy": return_entropy, "keep_bytes": keep_bytes}
        out = linear_logp(**leaves, target_ids=targets, **options, **more)
        logp, *h = out if return_entropy else (out,)
        logp.backward(incoming)
        results.append([logp.detach(), *(x.grad for x in leaves.values() if x.requires_grad)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert not h[0].requires_grad and h[0].shape == targets.shape
    found = token_statistics(**operands, target_ids=targets, **options).entropy
    dz = logit_error(combo, **operands, softcap=8.0)
    assert_within("entropy", h[0], found, 2 * entropy_error(combo, dz, found.cpu().double(), 257))


@sparse_combos
def test_entropies_beside_sparse_gradients(combo):
    operands, targets, incoming = make_operands(combo, 3, 5, width=17, vocabulary=257)
    options = {"target_ids": targets, "backend": combo.backend}
    found = token_statistics(**operands, **options).entropy
    for frozen in (True, False):
        leaves = {k: x.detach().clone().requires_grad_(k == "hidden" or not frozen) for k, x in operands.items()}
        logp, h = linear_logp(**leaves, **options, return_entropy=True, grad_mode="sparse")
        logp.backward(incoming)
        dz = logit_error(combo, **operands)
        assert_within("entropy", h, found, 2 * entropy_error(combo, dz, found.cpu().double(), 257))


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 1.4, "chunk_bytes": 1}], ids=str)
def test_gradcheck(options, keep_bytes):
    combo = Combo("torch", "cpu", torch.float64)
    operands, targets, _ = make_operands(combo, 2, 3, width=3, vocabulary=7, bias=True)
    targets[0, 1] = -100
    options = {"return_entropy": True, "entropy_grad": True, "keep_bytes": keep_bytes, **options}

    def both(hidden, weight, bias):
        return linear_logp(hidden, weight, targets, bias=bias, backend="torch", **options)

    assert torch.autograd.gradcheck(both, [x.requires_grad_() for x in operands.values()])


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_keeping_takes(monkeypatch, softcap):
    """Log p of valid rows on a CPU, as many as fit into keep_bytes; logits of the others are made twice."""
    made = []
    make = torch_backend.logits
    monkeypatch.setattr(torch_backend, "logits", lambda *args: made.append(len(args[2])) or make(*args))
    operands, targets, incoming = make_operands(Combo("torch", "cpu", torch.float32), 4, 50, vocabulary=1000)
    targets[0] = -100
    kept = 150 * 1000 * 4 * (1 if softcap is None else 2)
    for keep_bytes in (kept, kept * 60 // 150 + 5, 0):
        leaves = {k: x.requires_grad_() for k, x in operands.items()}
        linear_logp(**leaves, target_ids=targets, softcap=softcap, keep_bytes=keep_bytes).backward(incoming)
    learned = ((incoming != 0) & (targets != -100))[targets != -100]
    assert made == [150, 60, 90, int(learned[60:].sum()), 150, int(learned.sum())]


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"entropy_grad": True}, ValueError, "entropy_grad: expected False, since return_entropy is False, got True"),
        ({"entropy_grad": 1}, ValueError, 'entropy_grad: expected True, False or "lazy", got 1'),
        ({"return_entropy": 1}, TypeError, "return_entropy: expected True or False, got 1"),
        (
            {"return_entropy": True, "entropy_grad": True, "grad_mode": "sparse"},
            ValueError,
            "grad_mode: expected \"exact\", since entropy_grad is True, got 'sparse'",
        ),
        ({"keep_bytes": -1}, ValueError, "keep_bytes: expected at least 0, got -1"),
    ],
)
def test_refused(options, error, words):
    with pytest.raises(error) as found:
        linear_logp(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long), **options)
    assert str(found.value) == words


@few_combos
@ways
def test_results_may_be_changed_in_place(combo, frozen, keep_bytes):
    operands, targets, _ = make_operands(combo, 2, 3)
    incoming = incoming_of(combo, (2, 3))
    *_, want = package(combo, operands, targets, incoming, frozen, keep_bytes=keep_bytes)
    leaves = {k: x.clone().requires_grad_(k == "hidden" or not frozen) for k, x in operands.items()}
    options = {"return_entropy": True, "entropy_grad": True, "keep_bytes": keep_bytes, "backend": combo.backend}
    logp, h = linear_logp(**leaves, target_ids=targets, **options)
    torch.autograd.backward([logp.add_(1), h.add_(1)], list(incoming))
    assert all(torch.equal(leaves[k].grad.cpu(), x) for k, x in want.items())


@pytest.mark.cuda
@cuda_combos
@ways
@pytest.mark.parametrize("size", [{"width": 1024, "vocabulary": 8209}, {"width": 333, "vocabulary": 5003}], ids=str)
def test_parity_at_size(combo, frozen, keep_bytes, size):
    operands, targets, _ = make_operands(combo, 3, 500, bias=True, **size)
    options = {"chunk_bytes": 1 << 22, "softcap": 20.0}
    check(combo, operands, targets, incoming_of(combo, (3, 500)), frozen, keep_bytes=keep_bytes, **options)
