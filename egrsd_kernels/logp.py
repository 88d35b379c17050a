"""``linear_logp``: differentiable log p of the targets without full logits, for any policy-gradient loss."""

from __future__ import annotations

from typing import Literal

import torch

from . import inputs
from .problem import DEFAULT_CHUNK_BYTES, Head, Rows, compute_dtype


class _LinearLogp(torch.autograd.Function):
    """A frozen head needs d log p / d hidden alone, which the forward pass makes while the exponentials are there.

    The head's gradient needs dL/dlogp before its product, so there the exponentials are made again, chunk by chunk.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, softcap, temperature, target_ids, valid, backend, chunk_bytes, needs):
        ctx.arguments = softcap, temperature, backend, chunk_bytes, needs
        problem = Head(weight, bias, softcap, temperature), hidden, target_ids, Rows.build(valid, valid)
        if needs == (True, False, False):
            logp, ones = (new(valid, dtype=compute_dtype(hidden.dtype)) for new in (torch.zeros_like, torch.ones_like))
            direction, *_ = backend.student_pass(*problem, logp, lambda *_: ones, needs, chunk_bytes)(None)
            ctx.save_for_backward(direction)
            return logp
        ctx.save_for_backward(hidden, weight, bias, target_ids, valid)
        return backend.statistics(*problem, chunk_bytes)[0]

    @staticmethod
    def backward(ctx, d_logp):
        inputs.refuse_second_derivative("linear_logp")
        softcap, temperature, backend, chunk_bytes, needs = ctx.arguments
        if needs == (True, False, False):
            (direction,) = ctx.saved_tensors
            d_logp = d_logp.reshape(*direction.shape[:-1], 1)
            d_hidden = torch.mul(direction, d_logp, out=torch.empty_like(direction))
            # Chosen, not multiplied: the direction of a target outside the vocabulary is NaN.
            return d_hidden.masked_fill_(d_logp == 0, 0), *(None,) * 9
        hidden, weight, bias, target_ids, valid = ctx.saved_tensors
        d_logp = d_logp.contiguous()
        needed = valid & (d_logp != 0)
        rows = Rows.build(needed, needed)
        head = Head(weight, bias, softcap, temperature)
        finish = backend.student_pass(
            head, hidden, target_ids, rows, torch.zeros_like(d_logp), lambda *_: d_logp, needs, chunk_bytes
        )
        return *finish(None), *(None,) * 7


@torch.compiler.disable
def linear_logp(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: Literal["auto", "triton", "torch"] = "auto",
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> torch.Tensor:
    """log p(y) = z_y - logsumexp(z), in nats, differentiable in hidden, weight and bias.

    z = softcap · tanh((h Wᵀ + b) / softcap) / temperature. Nothing logits-sized is kept between forward and backward.
    With a frozen head (neither weight nor bias requires grad) the forward pass makes d log p / d hidden, and the
    backward pass scales it. With a trained one the backward pass makes the exponentials again, chunk by chunk; rows
    whose incoming gradient is 0 cost nothing there.

    Args:
        hidden: (B, T, D) or (N, D). weight: (V, D), the dtype of hidden. bias: (V,).
        target_ids: (B, T) or (N,) integers; -100 masks a position. mask: the same shape, bool or 0/1.
        temperature, softcap, backend, chunk_bytes: as in :func:`egrsd_kernels.fused_egrsd_loss`.

    Returns:
        float32 (float64 for float64 input), shaped like target_ids, 0 where masked.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it expects.
    """
    inputs.hidden_states("hidden", hidden)
    hidden, weight = inputs.autocast(hidden, weight)
    head = inputs.head("", "hidden", hidden, weight, bias, softcap, temperature)
    flat_targets, valid = inputs.targets(target_ids, hidden, weight.shape[0], mask)
    chunk_bytes = inputs.integer("chunk_bytes", chunk_bytes, low=1)
    ops = inputs.backend(backend, hidden)
    hidden = inputs.batched(hidden)
    needs = inputs.needs_grad(hidden, head.weight, head.bias)
    with torch.cuda.device_of(hidden):
        logp = _LinearLogp.apply(
            hidden, head.weight, head.bias, head.softcap, head.temperature, flat_targets, valid, ops, chunk_bytes, needs
        )
    return logp.view(target_ids.shape)
