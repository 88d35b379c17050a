"""``linear_logp``: differentiable log p of the targets without full logits, for any policy-gradient loss."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import checks
from .backends import (
    DEFAULT_CHUNK_BYTES,
    DEFAULT_SPARSE_TOL,
    EXTRAS,
    EntropyGradient,
    Gradients,
    Kept,
    Needs,
    Sparse,
    VocabularyStatistics,
    choose,
    exceeding,
    known,
    power_of_two,
    scale_rows,
)
from .head import Head, compute_dtype, widened
from .once import once
from .operators import flat, operator, parameters, signed, unflat


class _Options(NamedTuple):
    """What goes with the tensors of a call."""

    logit_scale: float
    softcap: float | None
    temperature: float
    backend: str
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

    @property
    def names(self) -> tuple[str, ...]:
        """Fields of VocabularyStatistics that are returned."""
        return ("logp", "entropy", *self.extras) if self.entropy else ("logp", *self.extras)

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        return Head(weight, bias, self.logit_scale, self.softcap)


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, valid: Tensor, options: _Options,
    keeps: bool = False,
) -> tuple[list[Tensor], list[Tensor], Kept | None]:  # fmt: skip
    """(what is returned, what the backward pass takes of this one, what it has kept: with ``keeps`` only).

    Taken are, where the gradient is made here, d log p / d hidden, and with a tolerance what it dropped and its mass;
    else entropy and logsumexp, where the entropy may have a gradient.
    """
    backend, o, n = choose(options.backend, hidden), options, len(target_ids)
    every = {"logp", "entropy", "logsumexp", *o.extras}
    names = set(o.names) if o.ahead else every
    with torch.cuda.device_of(hidden):
        head, rows = o.head(weight, bias), backend.build_rows(valid, valid)
        out = VocabularyStatistics.of(names, VocabularyStatistics.empty(names, n, hidden, hidden.new_zeros))
        problem, kept = (head, o.temperature, hidden, target_ids, rows, out), None
        state: list[Tensor] = []
        if o.ahead:
            ones = torch.ones_like(out.logp)
            sparse = None if o.sparse_tol is None else Sparse.of(o.sparse_tol / 2, target_ids)
            finish = backend.student_pass(*problem, lambda *_: ones, o.needs, o.chunk_bytes, sparse)
            direction = finish(None).hidden
            assert direction is not None
            state = [direction] if sparse is None else [direction, sparse.dropped.clone(), sparse.mass.clone()]
        else:
            if keeps:
                kept = backend.keep(*problem, o.needs, o.entropy_grad, o.keep_bytes, o.chunk_bytes)
            else:
                backend.statistics(*problem, o.chunk_bytes)
            if o.entropy_grad or o.lazy:
                assert out.entropy is not None and out.logsumexp is not None
                state = [out.entropy.clone(), out.logsumexp]  # the one that is returned may be changed in place
    return [x for name in out._fields if name in o.names and (x := getattr(out, name)) is not None], state, kept


def _forward_like(hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, *given: Any) -> list[Tensor]:
    o, n = unflat(_Options, given[1:]), target_ids.shape[0]
    found = VocabularyStatistics.empty(o.names, n, hidden, hidden.new_empty)
    if o.ahead:
        sparse = [] if o.sparse_tol is None else [hidden.new_empty(n, dtype=torch.float32) for _ in range(2)]
        return [*found, hidden.new_empty(hidden.shape), *sparse]
    known = 2 if o.entropy_grad or o.lazy else 0
    return found + [hidden.new_empty(n, dtype=compute_dtype(hidden.dtype)) for _ in range(known)]


_OPERANDS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target_ids, Tensor valid"


@operator(f"linear_logp({_OPERANDS}, {parameters(_Options)}) -> Tensor[]", _forward_like)
def _forward_operator(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, valid: Tensor, *options: Any
) -> list[Tensor]:  # fmt: skip
    """hidden: (B, T, D); target_ids, valid: (N,). What is returned, and after it what the backward pass takes."""
    found, state, _ = _forward(hidden, weight, bias, target_ids, valid, unflat(_Options, options))
    return found + state


def _backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, valid: Tensor, state: Sequence[Tensor],
    d_logp: Tensor | None, d_entropy: Tensor | None, options: _Options, kept: Kept | None = None,
) -> Gradients:  # fmt: skip
    """What :func:`_forward` does not make ahead. One of d_logp and d_entropy (N,) may be None, for 0."""
    given = d_logp if d_logp is not None else d_entropy
    assert given is not None
    d_logp = torch.zeros_like(given) if d_logp is None else d_logp.contiguous()
    if options.ahead:
        if d_entropy is not None:
            return _unannounced(hidden, weight, bias, target_ids, valid, d_logp, d_entropy.contiguous(), options)
        d_hidden = scale_rows(state[0], d_logp)
        if options.sparse_tol is not None:
            beyond = exceeding(state[1], state[2], d_logp, options.sparse_tol)
            exact = _gradients(hidden, weight, bias, target_ids, beyond, d_logp, options).hidden
            assert exact is not None  # since needs.hidden
            d_hidden.masked_fill_(beyond.view(*hidden.shape[:-1], 1), 0).add_(exact)
        return Gradients(d_hidden, None, None)
    needed, of_entropy = d_logp != 0, None
    if d_entropy is None and kept is not None and options.entropy_grad:  # it has kept logits
        d_entropy = torch.zeros_like(d_logp)
    if d_entropy is not None:
        kept = kept if options.entropy_grad else None  # a lazy one finds exponentials that it cannot use
        of_entropy = EntropyGradient(d_entropy.contiguous(), *state)
        needed = needed | (d_entropy != 0)
    sparse = None if options.sparse_tol is None else Sparse.of(options.sparse_tol, target_ids)
    return _gradients(
        hidden, weight, bias, target_ids, valid & needed, d_logp, options, of_entropy, sparse, kept
    )  # fmt: skip


def _backward_like(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, valid: Tensor, state: list[Tensor],
    d_logp: Tensor | None, d_entropy: Tensor | None, *options: Any,
) -> list[Tensor]:  # fmt: skip
    needs = unflat(_Options, options).needs
    made = [hidden.new_empty(hidden.shape)] if needs.hidden else []
    made += [weight.new_empty(weight.shape[0], weight.shape[1] - needs.first_column)] if needs.weight else []
    return made + ([bias.new_empty(bias.shape)] if needs.bias and bias is not None else [])


@operator(
    f"linear_logp_backward({_OPERANDS}, Tensor[] state, Tensor? d_logp, Tensor? d_entropy, {parameters(_Options)}) "
    "-> Tensor[]",
    _backward_like,
)
def _backward_operator(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, valid: Tensor, state: list[Tensor],
    d_logp: Tensor | None, d_entropy: Tensor | None, *options: Any,
) -> list[Tensor]:  # fmt: skip
    """state: what :func:`_forward_operator` left for it. The needed gradients come, in the order of the operands."""
    given = hidden, weight, bias, target_ids, valid, state, d_logp, d_entropy
    with torch.cuda.device_of(hidden):
        return [x for x in _backward(*given, unflat(_Options, options)) if x is not None]


@operator("scale_rows(Tensor direction, Tensor factor) -> Tensor", lambda direction, _: torch.empty_like(direction))
def _scale_operator(direction: Tensor, factor: Tensor) -> Tensor:
    return scale_rows(direction, factor)


class _LinearLogp(torch.autograd.Function):
    """A frozen head needs d log p / d hidden alone, which the forward pass makes while the exponentials are there.

    The head's gradient needs dL/dlogp before its product, and the entropy's needs dL/dentropy: there the exponentials
    are kept for the backward pass, or made again, chunk by chunk. A lazy gradient of the entropy finds what log p alone
    takes, and has all of it made again.

    A sparse direction is made before anyone knows dL/dlogp = c, so with every c = 1, within half of the tolerance. What
    that says of other c is known once they are there. Σ |c| dropped <= sparse_tol Σ |c| mass mostly holds, unless |c|
    goes up with what was dropped. Else all tokens that drop more than sparse_tol of their own mass are made again,
    exactly, and then it holds token by token.

    What is kept is no tensor: ``keeps`` says whether there is something, which nobody who traces may ask for.

    anchor: beside a direction nothing, with the graph of the hidden states, which the direction does not hold on to.
    Without it a derivative of the gradient would be 0 in silence.
    """

    @staticmethod
    @signed
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor | None, target_ids: Tensor, valid: Tensor,
        options: _Options, keeps: bool, anchor: Tensor | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        operands = hidden, widened(weight, columns), bias, target_ids, valid
        if keeps:
            found, state, kept = _forward(*operands, options, keeps=True)
            return *found, *state, kept
        return tuple(_forward_operator(*operands, *flat(options)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        hidden, weight, bias, columns, target_ids, valid, options, keeps, anchor = inputs
        ctx.options, ctx.kept = options, None
        if keeps:
            output, ctx.kept = output[:-1], output[-1]
        state = output[len(options.names) :]
        # An exact gradient that is made ahead needs nothing else, unless a lazy one is asked for after all.
        alone = options.ahead and len(state) == 1 and not options.lazy
        operands = (None,) * 6 if alone else (hidden, weight, bias, columns, target_ids, valid)
        ctx.save_for_backward(anchor, *operands, *state)
        constant = output[2 if options.entropy_grad or options.lazy else 1 :]
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_logp: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        options: _Options = ctx.options
        d_entropy = others[0] if options.entropy_grad or options.lazy else None
        if d_logp is None and d_entropy is None:
            return (None,) * 9
        kept, ctx.kept = ctx.kept, None  # it is used up: a second backward pass makes the exponentials again
        gradients = once("linear_logp", _LinearLogp._gradients, ctx.saved_tensors, d_logp, d_entropy, options, kept)
        return *gradients, *(None,) * 5

    @staticmethod
    def _gradients(
        saved: tuple[Any, ...], d_logp: Tensor | None, d_entropy: Tensor | None, options: _Options, kept: Kept | None
    ) -> tuple[Tensor | None, ...]:
        """Of (hidden, weight, bias, columns)."""
        _, hidden, weight, bias, columns, target_ids, valid, *state = saved
        if hidden is None:
            return _scale_operator(state[0], d_logp), None, None, None
        given = hidden, widened(weight, columns), bias, target_ids, valid, state, d_logp, d_entropy
        if kept is not None:
            made = _backward(*given, options, kept)
        else:
            found = iter(_backward_operator(*given, *flat(options)))
            made = Gradients(*(next(found) if needed else None for needed in options.needs[:3]))
        return made.of_operands(options.needs, columns)


def _unannounced(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, valid: Tensor, d_logp: Tensor,
    d_entropy: Tensor, options: _Options,
) -> Gradients:  # fmt: skip
    """By the passes that are made where the entropy's gradient is known of."""
    backend, needed = choose(options.backend, hidden), valid & ((d_logp != 0) | (d_entropy != 0))
    logp, entropy, logsumexp = (torch.zeros_like(d_logp) for _ in range(3))
    problem = options.head(weight, bias), options.temperature, hidden, target_ids, backend.build_rows(needed, needed)
    kept = backend.keep(
        *problem, VocabularyStatistics(logp, entropy, logsumexp), options.needs, True, options.keep_bytes,
        options.chunk_bytes,
    )  # fmt: skip
    of_entropy = EntropyGradient(d_entropy, entropy, logsumexp)
    return _gradients(hidden, weight, bias, target_ids, needed, d_logp, options, of_entropy, kept=kept)


def _gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, needed: Tensor, d_logp: Tensor,
    options: _Options, of_entropy: EntropyGradient | None = None, sparse: Sparse | None = None,
    kept: Kept | None = None,
) -> Gradients:  # fmt: skip
    """From the rows ``needed``, with what was ``kept`` of them."""
    backend, head, power = choose(options.backend, hidden), options.head(weight, bias), None
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
        again = backend.build_rows(needed, needed), VocabularyStatistics(torch.zeros_like(d_logp))
        finish = backend.student_pass(
            head, options.temperature, hidden, target_ids, *again, lambda *_: d_logp, options.needs,
            options.chunk_bytes, sparse, of_entropy,
        )  # fmt: skip
    return finish(power)


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
    sparse_tolerance = checks.sparse_tolerance(grad_mode, sparse_tol)
    if entropy_grad:
        expected = f'"exact", since entropy_grad is {checks.describe(entropy_grad)}'
        checks.expect(sparse_tolerance is None, "grad_mode", grad_mode, expected)
    states, columns = head.join(checks.batched(hidden), valid)
    needs = Needs.of(states, head.weight, head.bias, columns)
    options = _Options(
        head.logit_scale, head.softcap, temperature, known(backend), chunk_bytes, keep_bytes, needs, sparse_tolerance,
        return_entropy, entropy_grad is True, lazy, names,
    )  # fmt: skip
    keeps = any(needs) and not options.ahead and sparse_tolerance is None and not checks.traced(states)
    anchor = states[:0].clone() if options.ahead else None
    outputs: tuple[Any, ...] = _LinearLogp.apply(  # type: ignore[no-untyped-call]
        states, head.weight, head.bias, columns, flat_targets, valid, options, keeps, anchor
    )
    found = VocabularyStatistics.of(options.names, outputs[: len(options.names)]).view(target_ids.shape)
    if names:
        return found
    return found.logp if found.entropy is None else (found.logp, found.entropy)
