"""Package against reference: both results, and how near is near enough.

How near is near enough. The reference runs in float64 on the same rounded operands, so what is left is the arithmetic
of the package: float32 (float64 for float64 operands), unit roundoff u = 2^-24. The bounds follow the data:

- A logit is a sum of D products. Its rounding errors add up to at most D·u·Σ|h||w| (Higham, 2002, section 3.1), and
  with signs at random they stay under 4·√D·u·Σ|h||w| (Higham and Mary, 2019, λ = 4), which the Cauchy-Schwarz
  inequality bounds by 4·√D·u·‖h‖‖w‖. Changing its unit (log2 e, temperature, exp2, log2) costs a few u of the logit,
  so 8·u·‖h‖‖w‖ more; TF32 split in three costs no more than that. Together: Δz.
- log p = z_y − logsumexp(z) moves by at most 2·Δz, and the sum over the vocabulary by a relative 32·u.
- H moves by Σ p |log p + H| Δz ≤ 2·H·2·Δz, by Δz itself where logsumexp is subtracted first, and by 32·u·(1 + log V).
- Everything later is clip, min, product and quotient: each bound is carried through by its derivative.

For ordinary logits a promise of the package caps this: |Δ log p| ≤ 2e-4 nat. Gradients are compared as a whole, by the
relative error in the Frobenius norm, against the promise alone: 3e-3 in bfloat16, 1e-3 in float16, 1e-5 in float32, and
1e-12 in float64. One rounding to bfloat16 is off by 1.7e-3 on average (2^-8 at most). The kernels make two for a hidden
gradient, of the stored exponentials and of the result, and three for the head's: 2.4e-3 and 2.9e-3. Over hundreds of
tokens that is what comes out, to 3 %; over ten tokens a few entries decide, and a simulation of those roundings in
float64 reaches 4.3e-3. So a small problem is allowed 5e-3 there, and where ``linear_logp`` rounds the gradient of log
p before it is scaled. Where every token has p_y near 1, the reference's difference 1 - p_y has float64's error of a 1.
At extreme logits (±1e4) no float32 logit is better than Δz, so a row's gradient may be off by 2·Δz more there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from egrsd_kernels import TokenStats, fused_egrsd_loss
from reference import egrsd_loss
from tests.support.devices import Combo

LEARNED = ("student_hidden", "student_weight", "student_bias")
GRADIENT_TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-12}
OURS = ("chunk_bytes", "grad_mode", "sparse_tol")  # what the package takes and the reference does not know
FEW_TOKENS = 256  # below, the kernels' roundings to bfloat16 do not average out
LOGP_TOLERANCE = 2e-4  # nat: what the package promises for ordinary logits


@dataclass
class Result:
    """On the CPU. gradients: of LEARNED, as far as the case has them."""

    loss: torch.Tensor
    stats: TokenStats
    gradients: dict[str, torch.Tensor]


def loss_scale(case: dict, combo: Combo) -> float:
    """What a GradScaler is for: float16 cannot hold gradients of a mean over tokens."""
    return float(case["target_ids"].numel() or 1) if combo.dtype == torch.float16 else 1.0


def package_result(case: dict, combo: Combo, factor: float = 1.0, **more) -> Result:
    """``fused_egrsd_loss`` and its gradients when the incoming one is ``factor``."""
    leaves = {k: case[k].detach().clone().requires_grad_() for k in LEARNED if case.get(k) is not None}
    loss, stats = fused_egrsd_loss(**{**case, **leaves, **more}, backend=combo.backend, return_stats=True)
    loss.backward(torch.full_like(loss, factor))
    gradients = {k: x.grad.cpu() for k, x in leaves.items()}
    return Result(loss.detach().cpu(), TokenStats(*(x.cpu() for x in stats)), gradients)


def reference_result(case: dict, factor: float = 1.0) -> Result:
    """The reference in float64 on the CPU, on the case's operands as they are."""
    case = {k: x.detach().cpu() if isinstance(x, torch.Tensor) else x for k, x in case.items() if k not in OURS}
    leaves = {k: case[k].double().requires_grad_() for k in LEARNED if case.get(k) is not None}
    loss, stats = egrsd_loss(**{**case, **leaves}, return_stats=True, dtype=torch.float64)
    if loss.requires_grad:
        (loss * factor).backward()
    gradients = {k: torch.zeros_like(x) if x.grad is None else x.grad for k, x in leaves.items()}
    return Result(loss.detach(), stats, gradients)


# ------------------------------------------------------------------------------------------------ how near


def logit_error(combo: Combo, hidden, weight, bias=None, softcap=None, temperature=1.0) -> torch.Tensor:
    """Δz (...) in float64 on the CPU: how far the logits of each row may be off. See the top of this file."""
    hidden, weight = hidden.detach().cpu().double(), weight.detach().cpu().double()
    size = hidden.norm(dim=-1) * weight.norm(dim=-1).max()
    if bias is not None:
        finite = bias.detach().cpu().double()
        size = size + finite[finite.isfinite()].abs().max()
    if softcap is not None:
        size = size + (4 * size).clamp(max=softcap)  # tanh is off by u where it is large, and by less below 1/4
    return combo.unit_roundoff * (4 * math.sqrt(hidden.shape[-1]) + 8) * size / temperature


def gradient_tolerance(combo: Combo, tokens: int = 0, rounded_again: bool = False) -> float:
    """Relative, in the Frobenius norm. See the top of this file."""
    several = combo.backend == "triton" or rounded_again
    few = several and combo.dtype == torch.bfloat16 and tokens < FEW_TOKENS
    return 5e-3 if few else GRADIENT_TOLERANCE[combo.dtype]


def logp_error(combo: Combo, dz: torch.Tensor, ordinary: bool = True) -> torch.Tensor:
    bound = 2 * dz + 32 * combo.unit_roundoff
    return bound.clamp(max=LOGP_TOLERANCE) if ordinary else bound


def entropy_error(combo: Combo, dz: torch.Tensor, entropy: torch.Tensor, vocabulary: int) -> torch.Tensor:
    return (1 + 4 * entropy) * dz + 32 * combo.unit_roundoff * (1 + math.log(vocabulary))


def assert_within(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: torch.Tensor | float) -> None:
    """|got − want| ≤ tolerance everywhere; what is not finite has to be the same."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    same = (got == want) | (got.isnan() & want.isnan())
    excess = torch.where(same, 0.0, (got - want).abs() - torch.as_tensor(tolerance, dtype=torch.float64))
    wrong = ~(excess <= 0)
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        allowed = torch.as_tensor(tolerance, dtype=torch.float64).expand(want.shape)[at]
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} differ; at {at} got {got[at]}, want {want[at]}, "
            f"off by {(got - want)[at]:.2e}, allowed {allowed:.2e}"
        )


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖ over the entries where both are finite; the others have to be the same."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape
    finite = got.isfinite() & want.isfinite()
    assert ((got == want) | (got.isnan() & want.isnan()) | finite).all(), "not finite at different places"
    error, size = (got - want)[finite].norm(), want[finite].norm()
    return 0.0 if error == 0 else (error / size).item()


def assert_gradient(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    error = relative_error(got, want)
    assert error <= tolerance, f"gradient of {name}: relative error {error:.2e}, allowed {tolerance:.2e}"


def assert_result(
    case: dict, combo: Combo, got: Result, want: Result, *, ordinary: bool = True, factor: float = 1.0
) -> None:
    """Loss, every field of the statistics, and every gradient, which was multiplied by ``factor``."""
    u = combo.unit_roundoff
    shared = case.get("teacher_weight") is None
    weight_t = case["student_weight"] if shared else case["teacher_weight"]
    bias_t = case.get("teacher_bias")
    if shared and bias_t is None:
        bias_t = case.get("student_bias")
    transform = {k: case[k] for k in ("softcap", "temperature") if case.get(k) is not None}
    valid = case["target_ids"].cpu() != -100
    if case.get("mask") is not None:
        valid = valid & (case["mask"].cpu() != 0)
    tokens = int(valid.sum())

    for name, value in got.stats._asdict().items():
        assert value.dtype == combo.compute_dtype and not value.requires_grad, name
        assert value.shape == case["target_ids"].shape, name
        assert (value[~valid] == 0).all(), f"{name} is not 0 at masked positions"
    assert got.loss.ndim == 0 and got.loss.dtype == combo.compute_dtype

    def of_valid(x: torch.Tensor) -> torch.Tensor:  # masked positions may hold anything, NaN included
        return torch.where(valid, x, 0.0)

    def peak(x: torch.Tensor) -> torch.Tensor:
        return x.nan_to_num(0, 0, 0).max() if x.numel() else torch.zeros(())

    s = want.stats
    h_student = torch.where(valid[..., None], case["student_hidden"].cpu().double(), 0.0)
    dz_s = logit_error(combo, h_student, case["student_weight"], case.get("student_bias"), **transform)
    d_logp_s = of_valid(logp_error(combo, dz_s, ordinary))
    if case.get("teacher_hidden") is not None:
        h_teacher = torch.where(valid[..., None], case["teacher_hidden"].cpu().double(), 0.0)
        dz_t = logit_error(combo, h_teacher, weight_t, bias_t, **transform)
        d_logp_t = of_valid(logp_error(combo, dz_t, ordinary))
        d_entropy = of_valid(entropy_error(combo, dz_t, s.teacher_entropy, weight_t.shape[0]))
    else:
        d_logp_t, d_entropy = (u * of_valid(x.abs()) for x in (s.teacher_logp, s.teacher_entropy))

    # From here on by the derivative of each formula; ·4u for its own roundings.
    scale = case.get("entropy_scale", "batch_max")
    if isinstance(scale, str):
        source = s.teacher_entropy if scale == "batch_max" else s.lookahead_entropy
        scale = source.max() if source.numel() else 0.0
    scale = max(float(scale), case.get("min_entropy_scale", 1.0))
    normalised = s.lookahead_entropy / scale
    # A minimum is off by at most as much as what it is taken of: λ^-j H_j, where λ^-j is itself off by 16 u. A soft
    # minimum and a quantile weigh the H_j by what adds up to 1. A quantile's rank, at most reach, is off by 2 u of it,
    # and between two ranks lies at most the largest entropy.
    reach = min(case.get("lookahead", 0), case["target_ids"].shape[-1])
    discount = case.get("lookahead_decay", 1.0) ** -reach
    d_lookahead = discount * peak(d_entropy)
    if case.get("lookahead_filter", "minimum") != "minimum":
        d_lookahead = d_lookahead + 16 * u * peak(s.lookahead_entropy) + 2 * u * reach * peak(s.teacher_entropy)
    d_gate = d_lookahead / scale * (1 + normalised) + 4 * u * normalised
    d_gate = case.get("gamma", 0.3) * d_gate + 4 * u
    eps = case.get("clip_eps", 0.2)
    d_magnitude = ((1 + eps) * (d_logp_s + d_logp_t)).clamp(max=2 * eps) + 4 * u
    a = case["advantages"].cpu().double()
    if a.shape != valid.shape:
        if valid.ndim == 2:
            a = a[:, None].expand(valid.shape)
        else:
            bounds = case.get("cu_seqlens")
            lengths = torch.tensor([valid.numel()]) if bounds is None else bounds.cpu().long().diff()
            a = a.repeat_interleave(lengths)
    d_credit = a.abs() * (d_magnitude * s.gate + s.magnitude * d_gate + 4 * u)
    bounds = d_logp_s, d_logp_t, d_entropy, d_lookahead, d_magnitude, d_gate, d_credit
    for name, bound in zip(s._fields, bounds, strict=True):
        assert_within(name, getattr(got.stats, name), getattr(s, name), bound)

    divisor = float(case["normalizer"]) if case.get("normalizer") is not None else max(tokens, 1)
    terms = (s.token_advantage * s.student_logp).nan_to_num(0, 0, 0).abs().sum()
    d_loss = (s.token_advantage.abs() * d_logp_s + s.student_logp.abs() * d_credit).nan_to_num(0, 0, 0).sum()
    assert_within("loss", got.loss, want.loss, (d_loss + u * (math.sqrt(tokens) + 8) * terms) / divisor)

    silent = ~valid | (a == 0)
    # 1 - p_y cancels where p_y is near 1, in float64 in the reference; the kernels add up what is not p_y.
    cancelling = 2.0**-53
    credit = torch.where(silent, 0.0, s.token_advantage).nan_to_num(0, 0, 0)
    left = (credit * torch.expm1(s.student_logp).nan_to_num(0, 0, 0)).norm()
    tolerance = gradient_tolerance(combo, tokens) + 8 * cancelling * float(credit.norm() / left.clamp(min=1e-300))
    if not ordinary:
        relative = (d_credit / s.token_advantage.abs()).nan_to_num(0, 0, 0)
        tolerance += float(peak(2 * dz_s + relative))
    # What sparse gradients leave out, as a share of Σ |c| ‖p − e_y‖₁: a hidden gradient is off by at most max ‖W_v‖
    # times that, the head's by max ‖h‖ times it, and the bias' by once.
    left_out = float(got.stats.gradient_error_bound.double().sum())
    assert left_out <= (case.get("sparse_tol", 2.0**-10) if case.get("grad_mode", "exact") != "exact" else 0)
    mass = -2 * (credit.abs() * torch.expm1(s.student_logp).nan_to_num(0, 0, 0)).sum() * factor / divisor
    mass = float(mass) / case.get("temperature", 1.0)
    sizes = {
        "student_hidden": case["student_weight"].double().norm(dim=-1).max().item(),
        "student_weight": peak(h_student.norm(dim=-1)).item(),
        "student_bias": 1.0,
    }
    for name, gradient in got.gradients.items():
        assert gradient.dtype == case[name].dtype, name
        more = left_out * mass * sizes[name] / want.gradients[name].norm().item() if left_out else 0.0
        assert_gradient(name, gradient, want.gradients[name], tolerance + more)
    assert (got.gradients["student_hidden"][silent] == 0).all(), "a token without advantage or mask has a gradient"


def check_parity(case: dict, combo: Combo, *, ordinary: bool = True) -> tuple[Result, Result]:
    """Package against reference; both come back, for what else there is to say about them.

    float16 gradients of a mean over many tokens fall below its smallest normal number, 6e-5. A loss scaler multiplies
    the loss for that reason, and so does this.
    """
    factor = loss_scale(case, combo)
    got, want = package_result(case, combo, factor), reference_result(case, factor)
    assert_result(case, combo, got, want, ordinary=ordinary, factor=factor)
    return got, want
