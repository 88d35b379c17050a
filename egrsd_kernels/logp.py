"""``linear_logp``: differentiable log p of the targets without full logits, for any policy-gradient loss."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import checks
from .backends import (
    DEFAULT_CHUNK_BYTES,
    DEFAULT_SPARSE_TOL,
    Backend,
    Gradients,
    Needs,
    Sparse,
    choose,
    exceeding,
    power_of_two,
)
from .eager import eager
from .head import Head, compute_dtype
from .rows import Rows


class _Options(NamedTuple):
    temperature: float
    backend: Backend
    chunk_bytes: int
    needs: Needs
    sparse_tol: float | None


class _LinearLogp(torch.autograd.Function):
    """A frozen head needs d log p / d hidden alone, which the forward pass makes while the exponentials are there.

    The head's gradient needs dL/dlogp before its product, so there the exponentials are made again, chunk by chunk.

    A sparse direction is made before anyone knows dL/dlogp = c, so with every c = 1, within half of the tolerance. What
    that says of other c is known once they are there. Σ |c| dropped <= sparse_tol Σ |c| mass mostly holds, unless |c|
    goes up with what was dropped. Else all tokens that drop more than sparse_tol of their own mass are made again,
    exactly, and then it holds token by token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        target_ids: Tensor,
        valid: Tensor,
        options: _Options,
    ) -> Tensor:
        ctx.frame, ctx.options = head.frame, options
        temperature, backend, chunk_bytes, needs, sparse_tol = options
        problem = head, temperature, hidden, target_ids, Rows.build(valid, valid)
        if needs.hidden and not needs.head:
            logp, ones = (new(valid, dtype=compute_dtype(hidden.dtype)) for new in (torch.zeros_like, torch.ones_like))
            sparse = None if sparse_tol is None else Sparse.of(sparse_tol / 2, target_ids)
            finish = backend.student_pass(*problem, logp, lambda *_: ones, needs, chunk_bytes, sparse)
            again = () if sparse is None else (hidden, weight, bias, target_ids, sparse.dropped, sparse.mass)
            ctx.save_for_backward(finish(None).hidden, *again)
            return logp
        ctx.save_for_backward(hidden, weight, bias, target_ids, valid)
        return backend.statistics(*problem, chunk_bytes)[0]

    @staticmethod
    def backward(ctx: Any, d_logp: Tensor) -> tuple[Tensor | None, ...]:
        checks.refuse_second_derivative("linear_logp")
        options: _Options = ctx.options
        temperature, backend, chunk_bytes, needs, sparse_tol = options
        d_logp = d_logp.contiguous()

        def gradients(
            hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, needed: Tensor,
            sparse: Sparse | None,
        ) -> Gradients:  # fmt: skip
            problem = ctx.frame(weight, bias), temperature, hidden, target_ids, Rows.build(needed, needed)
            logp, gradient, power = torch.zeros_like(d_logp), d_logp, None
            if hidden.dtype == torch.float16 and d_logp.numel():
                # The head's product has dL/dlogp times hidden as an operand: a loss scale would leave float16's range.
                power = power_of_two(d_logp.abs().nan_to_num(0, 0, 0).amax())
                gradient = d_logp / power
            return backend.student_pass(*problem, logp, lambda *_: gradient, needs, chunk_bytes, sparse)(power)

        if needs.hidden and not needs.head:
            direction, *again = ctx.saved_tensors
            factor = d_logp.reshape(*direction.shape[:-1], 1)
            d_hidden = torch.mul(direction, factor, out=torch.empty_like(direction))
            # Chosen, not multiplied: the direction of a target outside the vocabulary is NaN.
            d_hidden.masked_fill_(factor == 0, 0)
            if sparse_tol is not None:
                hidden, weight, bias, target_ids, dropped, mass = again
                beyond = exceeding(dropped, mass, d_logp, sparse_tol)
                exact = gradients(hidden, weight, bias, target_ids, beyond, None).hidden
                assert exact is not None  # since needs.hidden
                d_hidden = d_hidden.masked_fill_(beyond.view(factor.shape), 0).add_(exact)
            return d_hidden, *(None,) * 6
        hidden, weight, bias, target_ids, valid = ctx.saved_tensors
        sparse = None if sparse_tol is None else Sparse.of(sparse_tol, target_ids)
        return *gradients(hidden, weight, bias, target_ids, valid & (d_logp != 0), sparse), *(None,) * 4


@eager
def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: Literal["auto", "triton", "torch"] = "auto",
    grad_mode: Literal["exact", "sparse"] = "exact",
    sparse_tol: float = DEFAULT_SPARSE_TOL,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Tensor:
    """log p(y) = z_y - logsumexp(z), in nats, differentiable in hidden, weight and bias.

    z = softcap · tanh((h Wᵀ + b) / softcap) / temperature. Nothing logits-sized is kept between forward and backward.
    With a frozen head (neither weight nor bias requires grad) the forward pass makes d log p / d hidden, and the
    backward pass scales it. With a trained one the backward pass makes the exponentials again, chunk by chunk; rows
    whose incoming gradient is 0 cost nothing there.

    Args:
        hidden: (B, T, D) or (N, D); bfloat16, float16, float32, or float64 (torch backend). weight: (V, D), the dtype
            of hidden. bias: (V,), any of those dtypes. All dense (not sparse, nested or quantised) and not on meta.
        target_ids: (B, T) or (N,), of any integer dtype, in [0, V); -100 masks a position. mask: the same shape, bool,
            or 0/1 in an integer or one of those dtypes.
        temperature, softcap, backend, chunk_bytes: as in :func:`egrsd_kernels.fused_egrsd_loss`.
        grad_mode, sparse_tol: as there. The bound holds for any incoming gradient; with a frozen head a sparse forward
            pass keeps hidden and weight for the backward pass, which makes the tokens again that it would not hold for.

    Returns:
        float32 (float64 for float64 input), shaped like target_ids, 0 where masked.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it expects. Values of target_ids and mask are
            checked where :func:`egrsd_kernels.fused_egrsd_loss` checks values.
    """
    operands = hidden, weight, target_ids, bias, mask, temperature, softcap
    hidden, head, temperature, flat_targets, valid = checks.operands(*operands)
    chunk_bytes = checks.integer("chunk_bytes", chunk_bytes, low=1)
    ops = choose(backend, hidden)
    sparse_tolerance = checks.sparse_tolerance(grad_mode, sparse_tol)
    hidden = checks.batched(hidden)
    needs = Needs.of(hidden, head.weight, head.bias)
    options = _Options(temperature, ops, chunk_bytes, needs, sparse_tolerance)
    with torch.cuda.device_of(hidden):
        logp: Tensor = _LinearLogp.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, head, flat_targets, valid, options
        )
    return logp.view(target_ids.shape)
