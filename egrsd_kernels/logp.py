"""``linear_logp``: differentiable log p of the targets without full logits, for any policy-gradient loss."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import checks
from .backends import (
    DEFAULT_CHUNK_BYTES,
    DEFAULT_SPARSE_TOL,
    EXTRAS,
    Backend,
    EntropyGradient,
    Kept,
    Needs,
    Sparse,
    VocabularyStatistics,
    choose,
    exceeding,
    no_extras,
    power_of_two,
)
from .eager import eager
from .head import Head, compute_dtype, widened


class _Options(NamedTuple):
    temperature: float
    backend: Backend
    chunk_bytes: int
    keep_bytes: int
    needs: Needs
    sparse_tol: float | None
    entropy: bool  # whether it is returned
    entropy_grad: bool
    lazy: bool  # whether the entropy has a gradient that costs the forward pass nothing
    extras: tuple[str, ...]

    @property
    def ahead(self) -> bool:
        """Whether d log p / d hidden is all that will be needed, which needs no incoming gradient to be made."""
        return self.needs.hidden and not self.needs.head and not self.entropy_grad


class _LinearLogp(torch.autograd.Function):
    """A frozen head needs d log p / d hidden alone, which the forward pass makes while the exponentials are there.

    The head's gradient needs dL/dlogp before its product, and the entropy's needs dL/dentropy: there the exponentials
    are kept for the backward pass, or made again, chunk by chunk. A lazy gradient of the entropy finds what log p alone
    takes, and has all of it made again.

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
        columns: Tensor | None,
        frame: Callable[..., Head],
        target_ids: Tensor,
        valid: Tensor,
        options: _Options,
    ) -> tuple[Tensor | None, ...]:
        ctx.frame, ctx.options, ctx.kept = frame, options, None
        ctx.set_materialize_grads(False)
        backend, needs, sparse_tol = options.backend, options.needs, options.sparse_tol
        operands = hidden, weight, bias, columns, target_ids
        head, rows = frame(widened(weight, columns), bias), options.backend.build_rows(valid, valid)
        logp, entropy, logsumexp = (torch.zeros_like(valid, dtype=compute_dtype(hidden.dtype)) for _ in range(3))
        out = VocabularyStatistics(logp, entropy, logsumexp, **no_extras(logp, options.extras))
        if options.ahead:  # entropies only where they are returned
            out = out._replace(entropy=entropy if options.entropy else None, logsumexp=None)
        problem = head, options.temperature, hidden, target_ids, rows, out
        if options.ahead:
            ones = torch.ones_like(logp)
            sparse = None if sparse_tol is None else Sparse.of(sparse_tol / 2, target_ids)
            finish = backend.student_pass(*problem, lambda *_: ones, needs, options.chunk_bytes, sparse)
            more = (valid,) if sparse is None else (sparse.dropped, sparse.mass)
            again = (*operands, *more) if options.lazy or sparse is not None else ()
            ctx.save_for_backward(finish(None).hidden, *again)
        else:
            if any(needs) and sparse_tol is None:
                room = options.keep_bytes, options.chunk_bytes
                ctx.kept = backend.keep(*problem, needs, options.entropy_grad, *room)
            else:
                backend.statistics(*problem, options.chunk_bytes)
            # Of entropies without a gradient nothing is needed again; others may be changed in place.
            known = (entropy.clone(), logsumexp) if options.entropy_grad or options.lazy else (None, None)
            ctx.save_for_backward(*operands, valid, *known)
        returned = out._replace(entropy=entropy if options.entropy else None, logsumexp=None)
        constant = returned[2 if options.entropy_grad or options.lazy else 1 :]
        ctx.mark_non_differentiable(*(x for x in constant if x is not None))
        return tuple(returned)

    @staticmethod
    def backward(ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        checks.refuse_second_derivative("linear_logp")
        if d_logp is None and d_entropy is None:
            return (None,) * 8
        options: _Options = ctx.options
        sparse_tol = options.sparse_tol
        given = d_logp if d_logp is not None else d_entropy
        assert given is not None
        d_logp = torch.zeros_like(given) if d_logp is None else d_logp.contiguous()

        if options.ahead:
            direction, *again = ctx.saved_tensors
            if d_entropy is not None:
                *operands, valid = again
                return *_unannounced(ctx, operands, valid, d_logp, d_entropy.contiguous()), *(None,) * 4
            factor = d_logp.reshape(*direction.shape[:-1], 1)
            d_hidden = torch.mul(direction, factor, out=torch.empty_like(direction))
            # Chosen, not multiplied: the direction of a target outside the vocabulary is NaN.
            d_hidden.masked_fill_(factor == 0, 0)
            if sparse_tol is not None:
                *operands, dropped, mass = again
                beyond = exceeding(dropped, mass, d_logp, sparse_tol)
                exact = _gradients(ctx, operands, beyond, d_logp)[0]
                assert exact is not None  # since needs.hidden
                d_hidden = d_hidden.masked_fill_(beyond.view(factor.shape), 0).add_(exact)
            return d_hidden, *(None,) * 7
        *operands, valid, entropy, logsumexp = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # it is used up: a second backward pass makes the exponentials again
        needed, of_entropy = d_logp != 0, None
        if d_entropy is None and kept is not None and options.entropy_grad:  # it has kept logits
            d_entropy = torch.zeros_like(d_logp)
        if d_entropy is not None:
            kept = kept if options.entropy_grad else None  # a lazy one finds exponentials that it cannot use
            of_entropy = EntropyGradient(d_entropy.contiguous(), entropy, logsumexp)
            needed = needed | (d_entropy != 0)
        sparse = None if sparse_tol is None else Sparse.of(sparse_tol, operands[-1])
        return *_gradients(ctx, operands, valid & needed, d_logp, of_entropy, sparse, kept), *(None,) * 4


def _unannounced(
    ctx: Any, operands: Sequence[Any], valid: Tensor, d_logp: Tensor, d_entropy: Tensor
) -> tuple[Tensor | None, ...]:
    """Of (hidden, weight, bias, columns), by the passes that are made where the entropy's gradient is known of."""
    options: _Options = ctx.options
    hidden, weight, bias, columns, target_ids = operands
    needed = valid & ((d_logp != 0) | (d_entropy != 0))
    logp, entropy, logsumexp = (torch.zeros_like(d_logp) for _ in range(3))
    head, rows = ctx.frame(widened(weight, columns), bias), options.backend.build_rows(needed, needed)
    kept = options.backend.keep(
        head, options.temperature, hidden, target_ids, rows, VocabularyStatistics(logp, entropy, logsumexp),
        options.needs, True, options.keep_bytes, options.chunk_bytes,
    )  # fmt: skip
    return _gradients(ctx, operands, needed, d_logp, EntropyGradient(d_entropy, entropy, logsumexp), kept=kept)


def _gradients(
    ctx: Any, operands: Sequence[Any], needed: Tensor, d_logp: Tensor, of_entropy: EntropyGradient | None = None,
    sparse: Sparse | None = None, kept: Kept | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Of (hidden, weight, bias, columns), from the rows ``needed``, with what was ``kept`` of them."""
    options: _Options = ctx.options
    hidden, weight, bias, columns, target_ids = operands
    head, power = ctx.frame(widened(weight, columns), bias), None
    if hidden.dtype == torch.float16 and d_logp.numel():
        # The head's product has dL/dlogp times hidden as an operand: a loss scale would leave float16's range.
        largest = d_logp.abs().nan_to_num(0, 0, 0).amax()
        if of_entropy is not None:
            largest = largest.maximum(of_entropy.gradient.abs().nan_to_num(0, 0, 0).amax())
        power = power_of_two(largest)
        d_logp = d_logp / power
        if of_entropy is not None:
            of_entropy = of_entropy._replace(gradient=of_entropy.gradient / power)
    if kept is not None:
        finish = kept(head, hidden, d_logp, of_entropy, needed, options.chunk_bytes)
    else:
        again = options.backend.build_rows(needed, needed), VocabularyStatistics(torch.zeros_like(d_logp))
        finish = options.backend.student_pass(
            head, options.temperature, hidden, target_ids, *again, lambda *_: d_logp, options.needs,
            options.chunk_bytes, sparse, of_entropy,
        )  # fmt: skip
    return finish(power).of_operands(options.needs, columns)


@overload
def linear_logp(
    hidden: Tensor, weight: Tensor | Head, target_ids: Tensor, *, bias: Tensor | None = ..., mask: Tensor | None = ...,
    temperature: float = ..., softcap: float | None = ...,
    return_entropy: Literal[False] = ..., entropy_grad: Literal[False] = ..., extras: tuple[()] = ...,
    backend: Literal["auto", "triton", "torch"] = ..., grad_mode: Literal["exact", "sparse"] = ...,
    sparse_tol: float = ..., chunk_bytes: int = ..., keep_bytes: int = ...,
) -> Tensor: ...  # fmt: skip
@overload
def linear_logp(
    hidden: Tensor, weight: Tensor | Head, target_ids: Tensor, *, bias: Tensor | None = ..., mask: Tensor | None = ...,
    temperature: float = ..., softcap: float | None = ...,
    return_entropy: Literal[True], entropy_grad: bool | Literal["lazy"] = ..., extras: tuple[()] = ...,
    backend: Literal["auto", "triton", "torch"] = ..., grad_mode: Literal["exact", "sparse"] = ...,
    sparse_tol: float = ..., chunk_bytes: int = ..., keep_bytes: int = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def linear_logp(
    hidden: Tensor, weight: Tensor | Head, target_ids: Tensor, *, bias: Tensor | None = ..., mask: Tensor | None = ...,
    temperature: float = ..., softcap: float | None = ...,
    return_entropy: bool = ..., entropy_grad: bool | Literal["lazy"] = ..., extras: Collection[str] = ...,
    backend: Literal["auto", "triton", "torch"] = ..., grad_mode: Literal["exact", "sparse"] = ...,
    sparse_tol: float = ..., chunk_bytes: int = ..., keep_bytes: int = ...,
) -> Tensor | tuple[Tensor, Tensor] | VocabularyStatistics: ...  # fmt: skip
@eager
def linear_logp(
    hidden: Tensor,
    weight: Tensor | Head,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    entropy_grad: bool | Literal["lazy"] = False,
    extras: Collection[str] = (),
    backend: Literal["auto", "triton", "torch"] = "auto",
    grad_mode: Literal["exact", "sparse"] = "exact",
    sparse_tol: float = DEFAULT_SPARSE_TOL,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    keep_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Tensor | tuple[Tensor, Tensor] | VocabularyStatistics:
    """log p(y) = z_y - logsumexp(z), in nats, differentiable in hidden, weight and bias; and the entropy beside it.

    z = softcap · tanh((h Wᵀ + b) / softcap) / temperature, and H = -Σ_v p_v log p_v over the full vocabulary.

    Where the head is frozen (nothing of it requires grad) and the entropy has no gradient, the forward pass makes
    d log p / d hidden, and the backward pass scales it: nothing logits-sized is kept between the two. Otherwise the
    gradient is made in the backward pass, of exponentials that were kept as far as they fit into keep_bytes. Others are
    made again, chunk by chunk; rows whose incoming gradients are 0 cost nothing then.

    Args:
        hidden: (B, T, D) or (N, D); bfloat16, float16, float32, or float64 (torch backend). weight: (V, D), the dtype
            of hidden, or a :class:`egrsd_kernels.Head`, whose bias and softcap then take the place of bias and softcap.
            bias: (V,), any of those dtypes. All dense (not sparse, nested or quantised) and not on meta.
        target_ids: (B, T) or (N,), of any integer dtype, in [0, V); -100 masks a position. mask: the same shape, bool,
            or 0/1 in an integer or one of those dtypes.
        temperature, softcap, backend, chunk_bytes: as in :func:`egrsd_kernels.fused_egrsd_loss`.
        return_entropy: True to return the entropies, too, which costs next to nothing.
        entropy_grad: True for entropies that are differentiable, dH/dz = -p (log p + H); with return_entropy only.
            "lazy" for those of which a gradient may or may not be asked: the forward pass is that of False, and the
            backward pass makes the exponentials again if it is. A frozen head then keeps hidden for it.
        extras: names of more to be made by the same pass, without gradient: "is_top1", "mean_logits",
            "log_sum_sq_probs", as :class:`egrsd_kernels.VocabularyStatistics` has them.
        grad_mode, sparse_tol: as there. The bound holds for any incoming gradient; with a frozen head a sparse forward
            pass keeps hidden and weight for the backward pass, which makes the tokens again that it would not hold for.
            With entropy_grad gradients are exact.
        keep_bytes: the most that is kept between forward and backward: the exponentials of as many rows as fit, V · 2
            bytes each in 16 bits, and a trained head's hidden states beside them; on the torch backend log p in the
            compute dtype, and as much again under a softcap. The others' are made again in the backward pass, which
            takes one more product of hidden states and head, as are all of a second backward pass. 0: nothing. This is
            of each call, and saved-tensor hooks do not see it: pass 0 under checkpointing.

    Returns:
        float32 (float64 for float64 input), shaped like target_ids, 0 where masked; with return_entropy,
        (logp, entropy). With extras VocabularyStatistics: logp, entropy where return_entropy asks for it, and these.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it expects. Values of target_ids and mask are
            checked where :func:`egrsd_kernels.fused_egrsd_loss` checks values.
    """
    given = hidden, weight, target_ids, bias, mask, temperature, softcap
    hidden, head, temperature, flat_targets, valid = checks.operands(*given)
    chunk_bytes = checks.integer("chunk_bytes", chunk_bytes, low=1)
    keep_bytes = checks.integer("keep_bytes", keep_bytes, low=0)
    checks.flag("return_entropy", return_entropy)
    lazy = entropy_grad == "lazy"
    checks.expect(lazy or isinstance(entropy_grad, bool), "entropy_grad", entropy_grad, 'True, False or "lazy"')
    if entropy_grad:
        checks.expect(return_entropy, "entropy_grad", entropy_grad, "False, since return_entropy is False")
    names = checks.names("extras", extras, EXTRAS)
    ops = choose(backend, hidden)
    sparse_tolerance = checks.sparse_tolerance(grad_mode, sparse_tol)
    if entropy_grad:
        expected = f'"exact", since entropy_grad is {checks.describe(entropy_grad)}'
        checks.expect(sparse_tolerance is None, "grad_mode", grad_mode, expected)
    states, columns = head.join(checks.batched(hidden), valid)
    needs = Needs.of(states, head.weight, head.bias, columns)
    options = _Options(
        temperature, ops, chunk_bytes, keep_bytes, needs, sparse_tolerance, return_entropy, entropy_grad is True, lazy,
        names,
    )  # fmt: skip
    with torch.cuda.device_of(hidden):
        outputs: tuple[Any, ...] = _LinearLogp.apply(  # type: ignore[no-untyped-call]
            states, head.weight, head.bias, columns, head.frame, flat_targets, valid, options
        )
    found = VocabularyStatistics(*outputs).view(target_ids.shape)
    if names:
        return found
    return found.logp if found.entropy is None else (found.logp, found.entropy)
