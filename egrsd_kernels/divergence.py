"""``linear_divergence``: full-vocabulary divergences of student and teacher without full logits, differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import checks
from .backends import (
    DEFAULT_CHUNK_BYTES,
    Divergence,
    DivergenceStatistics,
    Gradients,
    KeptDivergence,
    Kind,
    Needs,
    Pair,
    PairCredit,
    choose,
    choose_divergence,
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
    teacher_logit_scale: float
    teacher_softcap: float | None
    temperature: float
    kind: Kind
    beta: float
    top_k: int | None
    backend: str
    chunk_bytes: int
    keep_bytes: int
    needs: Needs
    names: tuple[str, ...]  # fields of DivergenceStatistics that are returned

    @property
    def ahead(self) -> bool:
        """Whether dD / d hidden is all that will be needed, which needs no incoming gradient to be made."""
        return self.needs.hidden and not self.needs.head

    def pair(self, operands: _Operands) -> Pair:
        student = Head(operands.weight, operands.bias, self.logit_scale, self.softcap)
        teacher = Head(operands.teacher_weight, operands.teacher_bias, self.teacher_logit_scale, self.teacher_softcap)
        which = Divergence(self.kind, self.beta, self.top_k)
        return Pair(operands.hidden, student, operands.teacher_hidden, teacher, self.temperature, which)


class _Operands(NamedTuple):
    """Hidden states (B, T, D), heads, and (N,): the targets, if there are any, and which tokens are valid."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    target_ids: Tensor | None
    valid: Tensor


_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, "
    "Tensor? target_ids, Tensor valid"
)
_TENSORS = len(_Operands._fields)


def _share(divergence: Tensor) -> Tensor:
    """Powers of two (N,) that bring directions to the size of the head's rows, for float16 to hold them.

    Σ |dD/dz| is about √D: the more alike two distributions are, the smaller is the direction, which float16 would round
    to its smallest numbers.
    """
    size = divergence.sqrt().clamp(2.0**-14, 1.0)
    return 1 / power_of_two(torch.where(size.isnan(), 1, size))


def _forward(
    operands: _Operands, options: _Options, keeps: bool = False
) -> tuple[list[Tensor], list[Tensor], KeptDivergence | None]:
    """(what is returned, what the backward pass takes of this one, what it has kept: with ``keeps`` only).

    Taken are, where the gradient is made here, dD / d hidden, and beside float16 what each token's was multiplied by.
    """
    o, hidden, valid = options, operands.hidden, operands.valid
    dtype = compute_dtype(hidden.dtype)
    with torch.cuda.device_of(hidden):
        pair = o.pair(operands)
        passes, rows = choose_divergence(o.backend, pair), choose(o.backend, hidden).build_rows(valid, valid)
        out = DivergenceStatistics(**{name: torch.zeros_like(valid, dtype=dtype) for name in o.names})
        problem, kept = (pair, operands.target_ids, rows, out), None
        state: list[Tensor] = []
        if o.ahead:
            share, half = torch.ones_like(out.divergence), hidden.dtype == torch.float16

            def credit(first_row: int, n_rows: int) -> PairCredit:
                if half:  # of these rows alone: D of earlier ones may have been made again, their direction not
                    index = rows.order[first_row : first_row + n_rows].long()
                    share[index] = _share(out.divergence[index])
                return PairCredit(share)

            direction = passes.divergence_pass(*problem, credit, o.needs, o.chunk_bytes)(None).hidden
            assert direction is not None
            state = [direction, share] if half else [direction]
        elif keeps:
            kept = passes.keep_divergence(*problem, o.needs, o.keep_bytes, o.chunk_bytes)
        else:
            passes.divergence_pass(*problem, _no_credit, Needs(False, False, False), o.chunk_bytes)
    return [x for x in out if x is not None], state, kept


def _no_credit(first_row: int, n_rows: int) -> PairCredit:
    raise AssertionError("a pass without gradients asks for no credit")


def _forward_like(*given: Any) -> list[Tensor]:
    operands, options = _Operands(*given[:_TENSORS]), unflat(_Options, given[_TENSORS:])
    hidden, n = operands.hidden, operands.valid.shape[0]
    dtype = compute_dtype(hidden.dtype)
    numbers = len(options.names) + (options.ahead and hidden.dtype == torch.float16)
    found = [hidden.new_empty(n, dtype=dtype) for _ in range(numbers)]
    if options.ahead:
        found.insert(len(options.names), hidden.new_empty(hidden.shape))
    return found


@operator(f"linear_divergence({_SCHEMA}, {parameters(_Options)}) -> Tensor[]", _forward_like)
def _forward_operator(*given: Any) -> list[Tensor]:
    """What is returned, and after it what the backward pass takes."""
    found, state, _ = _forward(_Operands(*given[:_TENSORS]), unflat(_Options, given[_TENSORS:]))
    return found + state


def _backward(
    operands: _Operands, gradient: Tensor, options: _Options, kept: KeptDivergence | None = None
) -> Gradients:
    """Of a trained head's operands, given dL/dD (N,)."""
    hidden, power = operands.hidden, None
    gradient = gradient.contiguous()
    needed = operands.valid & (gradient != 0)
    if hidden.dtype == torch.float16 and gradient.numel():
        # The head's product has dL/dD times hidden as an operand: a loss scale would leave float16's range.
        power = power_of_two(gradient.abs().nan_to_num(0, 0, 0).amax())
        gradient = gradient / power
    pair = options.pair(operands)
    if kept is not None:
        return kept(pair, gradient, needed, options.chunk_bytes)(power)
    rows, credit = choose(options.backend, hidden).build_rows(needed, needed), PairCredit(gradient)
    finish = choose_divergence(options.backend, pair).divergence_pass(
        pair, operands.target_ids, rows, DivergenceStatistics(torch.zeros_like(gradient)), lambda *_: credit,
        options.needs, options.chunk_bytes,
    )  # fmt: skip
    return finish(power)


def _backward_like(*given: Any) -> list[Tensor]:
    operands, needs = _Operands(*given[:_TENSORS]), unflat(_Options, given[_TENSORS + 1 :]).needs
    hidden, weight, bias = operands[:3]
    made = [hidden.new_empty(hidden.shape)] if needs.hidden else []
    made += [weight.new_empty(weight.shape[0], weight.shape[1] - needs.first_column)] if needs.weight else []
    return made + ([bias.new_empty(bias.shape)] if needs.bias and bias is not None else [])


@operator(f"linear_divergence_backward({_SCHEMA}, Tensor gradient, {parameters(_Options)}) -> Tensor[]", _backward_like)
def _backward_operator(*given: Any) -> list[Tensor]:
    """gradient: dL/dD (N,). The needed gradients come, in the order of the operands."""
    operands, options = _Operands(*given[:_TENSORS]), unflat(_Options, given[_TENSORS + 1 :])
    with torch.cuda.device_of(operands.hidden):
        return [x for x in _backward(operands, given[_TENSORS], options) if x is not None]


@operator(
    "scale_directions(Tensor direction, Tensor? share, Tensor factor) -> Tensor",
    lambda direction, *_: torch.empty_like(direction),
)
def _scale_operator(direction: Tensor, share: Tensor | None, factor: Tensor) -> Tensor:
    """direction (B, T, D) times factor (N,) over share (N,), rounded once; 0 where the factor is."""
    return scale_rows(direction, factor if share is None else factor / share)


class _LinearDivergence(torch.autograd.Function):
    """A frozen head needs dD / d hidden alone, which the forward pass makes; the backward pass scales it.

    The head's gradient needs dL/dD before its product: there dD/dz is kept for the backward pass, or made again. What
    is kept is no tensor: ``keeps`` says whether there is something, which nobody who traces may ask for.

    anchor: nothing, with the graph of the hidden states, which a direction does not hold on to. Without it a derivative
    of the gradient would be 0 in silence.
    """

    @staticmethod
    @signed
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor | None, options: _Options, keeps: bool,
        anchor: Tensor, *others: Tensor | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        operands = _Operands._make((hidden, widened(weight, columns), bias, *others))
        if keeps:
            found, state, kept = _forward(operands, options, keeps=True)
            return *found, *state, kept
        return tuple(_forward_operator(*operands, *flat(options)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        hidden, weight, bias, columns, options, keeps, anchor, *others = inputs
        ctx.options, ctx.kept = options, None
        if keeps:
            output, ctx.kept = output[:-1], output[-1]
        if options.ahead:
            ctx.save_for_backward(anchor, *output[len(options.names) :])
        else:
            ctx.save_for_backward(hidden, weight, bias, columns, *others)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        arguments = 4 + _TENSORS
        if gradient is None:
            return (None,) * arguments
        kept, ctx.kept = ctx.kept, None  # it is used up: a second backward pass makes all of it again
        how = _LinearDivergence._gradients
        gradients = once("linear_divergence", how, ctx.saved_tensors, gradient, ctx.options, kept)
        return *gradients, *(None,) * (arguments - 4)

    @staticmethod
    def _gradients(
        saved: Sequence[Any], gradient: Tensor, options: _Options, kept: KeptDivergence | None
    ) -> tuple[Tensor | None, ...]:
        """Of (hidden, weight, bias, columns)."""
        if options.ahead:
            direction, share = (*saved[1:], None)[:2]
            return _scale_operator(direction, share, gradient), None, None, None
        hidden, weight, bias, columns, *others = saved
        operands = _Operands._make((hidden, widened(weight, columns), bias, *others))
        if kept is not None:
            made = _backward(operands, gradient, options, kept)
        else:
            found = iter(_backward_operator(*operands, gradient, *flat(options)))
            made = Gradients(*(next(found) if needed else None for needed in options.needs[:3]))
        return made.of_operands(options.needs, columns)


@overload
def linear_divergence(
    student_hidden: Tensor, student_head: Tensor | Head, teacher_hidden: Tensor, teacher_head: Tensor | Head, *,
    kind: Kind = ..., beta: float = ..., target_ids: Tensor | None = ..., temperature: float = ...,
    mask: Tensor | None = ..., top_k: int | None = ..., return_stats: Literal[False] = ...,
    backend: Literal["auto", "triton", "torch"] = ..., chunk_bytes: int = ..., keep_bytes: int = ...,
) -> Tensor: ...  # fmt: skip
@overload
def linear_divergence(
    student_hidden: Tensor, student_head: Tensor | Head, teacher_hidden: Tensor, teacher_head: Tensor | Head, *,
    kind: Kind = ..., beta: float = ..., target_ids: Tensor | None = ..., temperature: float = ...,
    mask: Tensor | None = ..., top_k: int | None = ..., return_stats: bool,
    backend: Literal["auto", "triton", "torch"] = ..., chunk_bytes: int = ..., keep_bytes: int = ...,
) -> Tensor | DivergenceStatistics: ...  # fmt: skip
def linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_head: Tensor | Head,
    *,
    kind: Kind = "reverse_kl",
    beta: float = 0.5,
    target_ids: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    top_k: int | None = None,
    return_stats: bool = False,
    backend: Literal["auto", "triton", "torch"] = "auto",
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    keep_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Tensor | DivergenceStatistics:
    """The divergence of p_S and p_T over the full vocabulary, a token, in nats, differentiable in the student.

    Both are softmax(z / temperature) of logits z that a :class:`egrsd_kernels.Head` makes of hidden states:

    - "reverse_kl": KL(p_S ‖ p_T) = Σ_v p_S ln(p_S / p_T);
    - "forward_kl": KL(p_T ‖ p_S) = Σ_v p_T ln(p_T / p_S);
    - "jsd": β KL(p_T ‖ m) + (1 - β) KL(p_S ‖ m), m = (1 - β) p_S + β p_T: at most ln 2, and always finite.

    Any weights of tokens come in through autograd. Where the student's head is frozen (nothing of it requires grad),
    the forward pass makes dD / d hidden, and the backward pass scales it: nothing logits-sized is kept between the two.
    Otherwise the gradient is made in the backward pass, of the logits' gradients that were kept as far as they fit into
    keep_bytes; others are made again, chunk by chunk. The teacher gets no gradient: its tensors count as detached.

    Args:
        student_hidden: (B, T, D) or (N, D); bfloat16, float16, float32, or float64 (torch backend).
        student_head: its weight (V, D), in the dtype of student_hidden, or a :class:`egrsd_kernels.Head`.
        teacher_hidden: (B, T, D') or (N, D'), any of those dtypes. teacher_head: like student_head, of the same
            vocabulary. All dense (not sparse, nested or quantised), on one device, and not on meta.
        kind: "reverse_kl", "forward_kl" or "jsd".
        beta: β above, the teacher's share of m, in (0, 1); of "jsd" only.
        target_ids: (B, T) or (N,), of any integer dtype, in [0, V): the token that each position predicts; -100 masks a
            position. The divergence does not depend on them. With return_stats, log p of them comes back; and kernels
            take the target's own logit as the offset of their exponentials, as for log p. Without targets that is the
            mean logit plus ln V, which the mean row of the head gives beforehand, and no logsumexp is below it.
        temperature: what logits are divided by last, for both; a number above 0. D is not multiplied by its square.
        mask: (B, T) or (N,), bool, or 0/1 in an integer or one of those dtypes. Masked positions are never read.
        top_k: of the partition of the vocabulary into the teacher's k likeliest entries and all others as one: still a
            divergence, at most that of the full vocabulary. An integer in [1, V]; on the torch backend only ("auto"
            takes that one). None: the full vocabulary.
        return_stats: True for :class:`egrsd_kernels.DivergenceStatistics`: log p of the targets and entropies beside
            the divergence, of both models, without gradient.
        backend, chunk_bytes: as in :func:`egrsd_kernels.fused_egrsd_loss`; "auto" is plain PyTorch with top_k, too.
        keep_bytes: the most that is kept between forward and backward where the head is trained: the gradients of the
            logits of as many rows as fit, V · 2 bytes each in 16 bits; on the torch backend in the compute dtype.
            0: nothing. Of each call, and saved-tensor hooks do not see it: pass 0 under
            checkpointing.

    Returns:
        float32 (float64 for a float64 student), shaped like hidden states without D, 0 where masked: at least 0, and
        exactly 0, gradient included, for operands equal bit for bit. With return_stats, DivergenceStatistics.
        For ordinary logits a token's is off by at most the larger of 1e-3 of it and 4e-6 nat, and the gradient of a row
        of hidden states beside 16-bit operands by 3e-3 of its norm in the root mean square: 8e-3 was seen, and 1.1e-2
        where the mean divergence is 2e-5 nat; in float16 by its smallest number, 6e-8, in each feature as well.
        Where p_S > 0 = p_T (a logit of -inf), KL(p_S ‖ p_T) is inf, and its gradient is NaN in that row of hidden
        states and all over a trained head. Where p_T > 0 = p_S, KL(p_T ‖ p_S) is inf, and its gradient p_S - p_T. Where
        dL/dD is 0, neither has one. By the kernels, beside 16-bit operands, a bias that puts a logit 20,800 nats below
        the other model's is -inf.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it expects. Values of target_ids and mask are
            checked where :func:`egrsd_kernels.fused_egrsd_loss` checks values; unchecked, a target outside the
            vocabulary makes all that is said of its token NaN.
        RuntimeError: where a gradient made under create_graph=True is differentiated; there is no second derivative.
    """
    checks.hidden_states("student_hidden", student_hidden)
    checks.hidden_states("teacher_hidden", teacher_hidden, like=student_hidden)
    leading = tuple(student_hidden.shape[:-1])
    same = tuple(teacher_hidden.shape[:-1]) == leading
    checks.expect(same, "teacher_hidden", teacher_hidden, f"shape {(*leading, 'D')}, like student_hidden")
    checks.flag("return_stats", return_stats)
    student_hidden, given = checks.autocast(student_hidden, student_head)
    student = checks.whole_head("student_head", "student_hidden", student_hidden, given)
    teacher_hidden, given = checks.autocast(teacher_hidden, teacher_head)
    teacher = checks.whole_head("teacher_head", "teacher_hidden", teacher_hidden, given)
    vocabulary = student.weight.shape[0]
    fits = teacher.weight.shape[0] == vocabulary
    checks.expect(fits, "teacher_head", teacher.weight, f"the student's vocabulary, {vocabulary} rows")
    which = Divergence.checked("", kind, beta, top_k, vocabulary)
    temperature = checks.number("temperature", temperature, low=0, strict=True)
    flat_targets, valid = checks.optional_targets(target_ids, student_hidden, vocabulary, mask)
    chunk_bytes = checks.integer("chunk_bytes", chunk_bytes, low=1)
    keep_bytes = checks.integer("keep_bytes", keep_bytes, low=0)
    names = ["divergence"]
    if return_stats:
        names += [] if flat_targets is None else ["student_logp", "teacher_logp"]
        names += ["student_entropy", "teacher_entropy"]
    states, columns = student.join(checks.batched(student_hidden), valid)
    with torch.no_grad():
        teacher_states, teacher = teacher.detach().joined(checks.batched(teacher_hidden.detach()), valid)
    choose_divergence(backend, Pair(states, student, teacher_states, teacher, temperature, which))  # or it is refused
    options = _Options(
        student.logit_scale, student.softcap, teacher.logit_scale, teacher.softcap, temperature, *which, backend,
        chunk_bytes, keep_bytes, Needs.of(states, student.weight, student.bias, columns), tuple(names),
    )  # fmt: skip
    keeps = any(options.needs) and not options.ahead and not checks.traced(states)
    outputs: tuple[Any, ...] = _LinearDivergence.apply(  # type: ignore[no-untyped-call]
        states, student.weight, student.bias, columns, options, keeps, states[:0].clone(), teacher_states,
        teacher.weight, teacher.bias, flat_targets, valid,
    )  # fmt: skip
    found = DivergenceStatistics(**dict(zip(names, outputs, strict=False))).view(leading)
    return found if return_stats else found.divergence
