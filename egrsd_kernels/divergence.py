"""``linear_divergence``: full-vocabulary divergences of student and teacher without full logits, differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import checks
from .backends import (
    DEFAULT_CHUNK_BYTES,
    Divergence,
    DivergenceBackend,
    DivergenceStatistics,
    KeptDivergence,
    Kind,
    Needs,
    Pair,
    PairCredit,
    choose_divergence,
    power_of_two,
)
from .eager import eager
from .head import Head, compute_dtype, widened
from .rows import Rows


class _Options(NamedTuple):
    student: Callable[..., Head]  # makes the head of its (weight, bias)
    teacher: Callable[..., Head]
    temperature: float
    divergence: Divergence
    backend: DivergenceBackend
    chunk_bytes: int
    keep_bytes: int
    needs: Needs
    stats: bool  # whether more than the divergence is returned

    @property
    def ahead(self) -> bool:
        """Whether dD / d hidden is all that will be needed, which needs no incoming gradient to be made."""
        return self.needs.hidden and not self.needs.head

    def pair(self, operands: Sequence[Any]) -> Pair:
        hidden, weight, bias, columns, teacher_hidden, teacher_weight, teacher_bias = operands
        student, teacher = self.student(widened(weight, columns), bias), self.teacher(teacher_weight, teacher_bias)
        return Pair(hidden, student, teacher_hidden, teacher, self.temperature, self.divergence)


def _share(divergence: Tensor) -> Tensor:
    """Powers of two (N,) that bring directions to the size of the head's rows, for float16 to hold them.

    Σ |dD/dz| is about √D: the more alike two distributions are, the smaller is the direction, which float16 would round
    to its smallest numbers.
    """
    size = divergence.sqrt().clamp(2.0**-14, 1.0)
    return 1 / power_of_two(torch.where(size.isnan(), 1, size))


class _LinearDivergence(torch.autograd.Function):
    """A frozen head needs dD / d hidden alone, which the forward pass makes; the backward pass scales it.

    The head's gradient needs dL/dD before its product: there dD/dz is kept for the backward pass, or made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        columns: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        target_ids: Tensor | None,
        valid: Tensor,
        options: _Options,
    ) -> tuple[Tensor | None, ...]:
        ctx.options, ctx.kept = options, None
        ctx.set_materialize_grads(False)
        backend, needs = options.backend, options.needs
        operands = hidden, weight, bias, columns, teacher_hidden, teacher_weight, teacher_bias
        dtype = compute_dtype(hidden.dtype)
        zeros = [torch.zeros_like(valid, dtype=dtype) for _ in range(5 if options.stats else 1)]
        out = DivergenceStatistics(*zeros)
        if target_ids is None:
            out = out._replace(student_logp=None, teacher_logp=None)
        problem = options.pair(operands), target_ids, Rows.build(valid, valid), out
        if options.ahead:
            share = torch.ones_like(out.divergence)
            half = hidden.dtype == torch.float16

            def credit(first_row: int, n_rows: int) -> PairCredit:
                return PairCredit(share.copy_(_share(out.divergence)) if half else share)

            direction = backend.divergence_pass(*problem, credit, needs, options.chunk_bytes)(None).hidden
            ctx.save_for_backward(direction, share if half else None)
        elif any(needs):
            ctx.kept = backend.keep_divergence(*problem, needs, options.keep_bytes, options.chunk_bytes)
            ctx.save_for_backward(*operands, target_ids, valid)
        else:
            backend.divergence_pass(*problem, _no_credit, needs, options.chunk_bytes)
        ctx.mark_non_differentiable(*(x for x in out[1:] if x is not None))
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        checks.refuse_second_derivative("linear_divergence")
        if gradient is None:
            return (None,) * 10
        options: _Options = ctx.options
        if options.ahead:
            direction, share = ctx.saved_tensors
            factor = gradient if share is None else gradient / share
            factor = factor.reshape(*direction.shape[:-1], 1)
            d_hidden = torch.mul(direction, factor, out=torch.empty_like(direction))
            # Chosen, not multiplied: the direction of an infinite divergence is not finite.
            return d_hidden.masked_fill_(factor == 0, 0), *(None,) * 9
        *operands, target_ids, valid = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # it is used up: a second backward pass makes all of it again
        return *_gradients(options, operands, target_ids, valid, gradient.contiguous(), kept), *(None,) * 6


def _no_credit(first_row: int, n_rows: int) -> PairCredit:
    raise AssertionError("a pass without gradients asks for no credit")


def _gradients(
    options: _Options,
    operands: Sequence[Any],
    target_ids: Tensor | None,
    valid: Tensor,
    gradient: Tensor,
    kept: KeptDivergence | None,
) -> tuple[Tensor | None, ...]:
    """Of (hidden, weight, bias, columns)."""
    hidden, columns, power = operands[0], operands[3], None
    needed = valid & (gradient != 0)
    if hidden.dtype == torch.float16 and gradient.numel():
        # The head's product has dL/dD times hidden as an operand: a loss scale would leave float16's range.
        power = power_of_two(gradient.abs().nan_to_num(0, 0, 0).amax())
        gradient = gradient / power
    pair = options.pair(operands)
    if kept is not None:
        finish = kept(pair, gradient, needed, options.chunk_bytes)
    else:
        again = Rows.build(needed, needed), DivergenceStatistics(torch.zeros_like(gradient))
        credit = PairCredit(gradient)
        finish = options.backend.divergence_pass(
            pair, target_ids, *again, lambda *_: credit, options.needs, options.chunk_bytes
        )
    return finish(power).of_operands(options.needs, columns)


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
@eager
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
        backend, chunk_bytes: as in :func:`egrsd_kernels.fused_egrsd_loss`.
        keep_bytes: the most that is kept between forward and backward where the head is trained: the gradients of the
            logits of as many rows as fit, V · 2 bytes each in 16 bits; on the torch backend in the compute dtype.
            0: nothing. Of each call, and saved-tensor hooks do not see it: pass 0 under
            checkpointing.

    Returns:
        float32 (float64 for a float64 student), shaped like hidden states without D, 0 where masked: at least 0, and
        exactly 0, gradient included, for operands equal bit for bit. With return_stats, DivergenceStatistics.
        Where p_S > 0 = p_T (a logit of -inf), KL(p_S ‖ p_T) is inf and has no finite gradient; the same vice versa.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it expects. Values of target_ids and mask are
            checked where :func:`egrsd_kernels.fused_egrsd_loss` checks values; unchecked, a target outside the
            vocabulary makes all that is said of its token NaN.
        RuntimeError: in the backward pass under create_graph=True; there is no second derivative.
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
    with torch.cuda.device_of(student_hidden):
        states, columns = student.join(checks.batched(student_hidden), valid)
        with torch.no_grad():
            teacher_states, teacher = teacher.detach().joined(checks.batched(teacher_hidden.detach()), valid)
        pair = Pair(states, student, teacher_states, teacher, temperature, which)
        ops = choose_divergence(backend, pair)
        needs = Needs.of(states, student.weight, student.bias, columns)
        frames = student.frame, teacher.frame
        options = _Options(*frames, temperature, which, ops, chunk_bytes, keep_bytes, needs, return_stats)
        outputs: tuple[Any, ...] = _LinearDivergence.apply(  # type: ignore[no-untyped-call]
            states, student.weight, student.bias, columns, teacher_states, teacher.weight, teacher.bias, flat_targets,
            valid, options,
        )  # fmt: skip
    found = DivergenceStatistics(*outputs).view(leading)
    return found if return_stats else found.divergence
