"""Entropies beside log p: values, and gradients under any two incoming ones, against autograd through full logits."""

from __future__ import annotations

import math

import pytest
import torch

from egrsd_kernels import linear_logp, token_statistics
from egrsd_kernels.backends import triton as triton_backend
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
    bounds = {k: bounds[k] + 2 * unit * v.abs() + (2.0**-24 if unit > 2.0**-30 else 0) for k, v in gradients.items()}
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
