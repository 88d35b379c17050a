"""``fused_egrsd_loss``: the EGRSD and CL-EGRSD loss without full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import checks
from .backends import (
    DEFAULT_CHUNK_BYTES,
    DEFAULT_SPARSE_TOL,
    Divergence,
    DivergenceStatistics,
    Finish,
    Gradients,
    Kind,
    Needs,
    Pair,
    PairCredit,
    Sparse,
    VocabularyStatistics,
    choose,
    choose_divergence,
    known,
    no_statistics,
)
from .checks import expect, number
from .credit import ENTROPY_SCALES, CreditOptions, EntropyScale, Filter, Lookahead, TokenStats, batch_max
from .head import Head, compute_dtype, widened
from .once import once
from .operators import flat, operator, parameters, signed, unflat
from .rows import Rows, Sequences


class _Options(NamedTuple):
    """The numbers and names of a call."""

    logit_scale: float
    softcap: float | None
    teacher_logit_scale: float
    teacher_softcap: float | None
    temperature: float
    backend: str
    chunk_bytes: int
    credit: CreditOptions
    min_entropy_scale: float
    sparse_tol: float | None  # None: exact gradients
    kind: str | None  # None: no divergence
    beta: float
    top_k: int | None
    divergence_weight: float
    policy_weight: float

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        return Head(weight, bias, self.logit_scale, self.softcap)

    def teacher(self, weight: Tensor, bias: Tensor | None) -> Head:
        return Head(weight, bias, self.teacher_logit_scale, self.teacher_softcap)


class _Given(NamedTuple):
    """What the student's pass works on beside its hidden states and head: (N,) in the callers' order, or 0-d."""

    target_ids: Tensor
    order: Tensor  # with counts, a :class:`Rows`
    counts: Tensor
    advantages: Tensor
    teacher_logp: Tensor
    teacher_entropy: Tensor
    lookahead_entropy: Tensor
    peak: Tensor  # 0-d, nats: what entropies are divided by, if it is not too small
    normalizer: Tensor | None  # 0-d
    teacher_hidden: Tensor | None  # (B, T, D), and its head: with a divergence only
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None


# ------------------------------------------------------------------------------ what is known before the student reads


def _evidence(
    student_hidden: Tensor, target_ids: Tensor, valid: Tensor, advantages: Tensor, boundaries: Tensor | None,
    teacher_hidden: Tensor | None, teacher_weight: Tensor | None, teacher_bias: Tensor | None, logp: Tensor | None,
    entropy: Tensor | None, *, length: int, lookahead: Lookahead, options: _Options,
) -> list[Tensor]:  # fmt: skip
    """[order, counts, advantages, lookahead entropy], and the teacher's logp and entropy where they are not given."""
    n, dtype, hidden = len(target_ids), compute_dtype(student_hidden.dtype), student_hidden
    backend = choose(options.backend, *(x for x in (hidden, teacher_hidden) if x is not None))
    with torch.cuda.device_of(hidden):
        flat, last = backend.by_token(advantages, n, Sequences(length, boundaries), dtype)
        rows = backend.build_rows(valid, flat if options.kind is None else valid)
        made = []
        if logp is None or entropy is None:
            assert teacher_hidden is not None and teacher_weight is not None
            found = no_statistics(n, teacher_hidden)
            head, out = options.teacher(teacher_weight, teacher_bias), VocabularyStatistics(*found)
            backend.statistics(head, options.temperature, teacher_hidden, target_ids, rows, out, options.chunk_bytes)
            made = [x.to(dtype) for x in found[:2]]
            entropy = made[1]
        return [*rows, flat, backend.lookahead_entropy(entropy, valid, last, lookahead), *made]


def _evidence_like(student_hidden: Tensor, target_ids: Tensor, *given: Any) -> list[Tensor]:
    n, dtype, new = target_ids.shape[0], compute_dtype(student_hidden.dtype), student_hidden.new_empty
    numbers = 4 if given[6] is None or given[7] is None else 2
    return [new(n, dtype=torch.int32), new(2, dtype=torch.int32), *(new(n, dtype=dtype) for _ in range(numbers))]


@operator(
    "egrsd_evidence(Tensor student_hidden, Tensor target_ids, Tensor valid, Tensor advantages, Tensor? boundaries, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? logp, Tensor? entropy, "
    f"SymInt length, {parameters(Lookahead, 'lookahead_')}, {parameters(_Options)}) -> Tensor[]",
    _evidence_like,
)
def _evidence_operator(*given: Any) -> list[Tensor]:
    tensors, (length, *numbers) = given[:10], given[10:]
    fields = len(Lookahead._fields)
    window, options = unflat(Lookahead, numbers[:fields]), unflat(_Options, numbers[fields:])
    made = _evidence(*tensors, length=length, lookahead=window, options=options)
    # Two of no_statistics share memory.
    return [*made[:4], *(x.clone() for x in made[4:])]


# --------------------------------------------------------------------------------------------------- the student's pass


def _student(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, given: _Given, options: _Options, needs: Needs
) -> tuple[Tensor, Tensor, Finish | None, Tensor | None]:
    """(loss; planes (8, N): the numbers of TokenStats that are made here, and two of its own; what finishes the
    gradients; the power of two that they lack, 0-d, for float16)."""
    o, rows = options, Rows(given.order, given.counts)
    backend = choose(o.backend, hidden)
    scales = backend.scales(given.peak, o.min_entropy_scale, rows, given.normalizer, hidden.dtype == torch.float16)
    planes = torch.zeros(8, len(given.target_ids), dtype=given.advantages.dtype, device=hidden.device)
    logp, magnitude, gate, token_advantage, bound, divergence, terms, gradient = planes.unbind()
    known = given.teacher_logp, given.teacher_entropy, given.lookahead_entropy
    stats = TokenStats(logp, *known, magnitude, gate, token_advantage, bound, divergence)
    share = scales.share if o.policy_weight == 1 else o.policy_weight * scales.share

    def credit(first_row: int, n_rows: int) -> Tensor:
        settings = given.advantages, scales.entropy, share, o.credit
        backend.token_credit(rows, first_row, n_rows, *settings, stats, terms, gradient)
        return gradient

    head, finish = o.head(weight, bias), None
    problem = head, o.temperature, hidden, given.target_ids, rows, VocabularyStatistics(logp)
    if o.kind is not None:
        assert given.teacher_hidden is not None and given.teacher_weight is not None
        of_gate, teacher = -o.divergence_weight * scales.share, o.teacher(given.teacher_weight, given.teacher_bias)

        def both(first_row: int, n_rows: int) -> PairCredit:
            of_logp = credit(first_row, n_rows)
            return PairCredit(gate * of_gate, of_logp)

        pair = Pair(
            hidden, head, given.teacher_hidden, teacher, o.temperature, Divergence._make((o.kind, o.beta, o.top_k))
        )  # fmt: skip
        out, passes = DivergenceStatistics(divergence, logp), choose_divergence(o.backend, pair)
        finish = passes.divergence_pass(pair, given.target_ids, rows, out, both, needs, o.chunk_bytes)
        if not any(needs):
            credit(0, logp.numel())
        # Where a weight is 0, a log p or divergence that is infinite costs nothing. But NaN must be seen: a target
        # outside the vocabulary makes the divergence NaN, too.
        policy = o.policy_weight * terms if o.policy_weight else 0
        silent = (gate == 0) & ~divergence.isnan()
        terms = policy + torch.where(silent, 0, o.divergence_weight * gate * divergence)
    elif any(needs):
        sparse = None if o.sparse_tol is None else Sparse.of(o.sparse_tol, given.target_ids)
        finish = backend.student_pass(*problem, credit, needs, o.chunk_bytes, sparse)
        if sparse is not None:
            bound.copy_(sparse.error_bound(token_advantage))
    else:
        backend.statistics(*problem, o.chunk_bytes)
        credit(0, logp.numel())
    return terms.sum() / scales.normalizer, planes, finish, scales.power


def _whole(finish: Finish | None, power: Tensor | None) -> Callable[[Tensor], Gradients] | None:
    """What makes the gradients of a given dL/dloss, the power of two included."""
    if finish is None or power is None:
        return finish
    return lambda d_loss: finish(d_loss / power)


def _student_like(hidden: Tensor, weight: Tensor, bias: Tensor | None, *given: Any) -> list[Tensor]:
    advantages, needs = given[3], unflat(Needs, given[-len(Needs._fields) :])
    made = [advantages.new_empty(()), advantages.new_empty(8, advantages.shape[0])]
    made += [hidden.new_empty(hidden.shape)] if needs.hidden else []
    made += [weight.new_empty(weight.shape[0], weight.shape[1] - needs.first_column)] if needs.weight else []
    made += [bias.new_empty(bias.shape)] if needs.bias and bias is not None else []
    return made + ([advantages.new_empty(())] if hidden.dtype == torch.float16 else [])


@operator(
    "egrsd_student(Tensor hidden, Tensor weight, Tensor? bias, Tensor target_ids, Tensor order, Tensor counts, "
    "Tensor advantages, Tensor teacher_logp, Tensor teacher_entropy, Tensor lookahead_entropy, Tensor peak, "
    "Tensor? normalizer, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    f"{parameters(_Options)}, {parameters(Needs, 'needs_')}) -> Tensor[]",
    _student_like,
)
def _student_operator(hidden: Tensor, weight: Tensor, bias: Tensor | None, *given: Any) -> list[Tensor]:
    """[loss, planes, the gradients that are needed, the power that they lack, for float16]."""
    tensors, numbers = len(_Given._fields), -len(Needs._fields)
    options, needs = unflat(_Options, given[tensors:numbers]), unflat(Needs, given[numbers:])
    with torch.cuda.device_of(hidden):
        loss, planes, finish, power = _student(hidden, weight, bias, _Given(*given[:tensors]), options, needs)
        gradients = [] if finish is None else [x for x in finish(None) if x is not None]
        return [loss, planes, *gradients, *([] if power is None else [power.clone()])]


@operator(
    "scale(Tensor[] gradients, Tensor factor) -> Tensor[]",
    lambda gradients, factor: [torch.empty_like(x) for x in gradients],
)
def _scale_operator(gradients: list[Tensor], factor: Tensor) -> list[Tensor]:
    """Each times a factor (0-d) of more precision, rounded once."""
    return [torch.mul(x, factor.view(1), out=torch.empty_like(x)) for x in gradients]


class _FusedLoss(torch.autograd.Function):
    """The loss with its gradients made in the forward pass, while each chunk's exponentials are there.

    What finishes them is no tensor. Who traces has them finished at once, and scaled by the backward pass.

    anchor: who traces gets nothing, with the graph of the hidden states, which finished gradients do not hold on to.
    Without it a derivative of the gradient would be 0 in silence.
    """

    @staticmethod
    @signed
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor | None, options: _Options, needs: Needs,
        traced: bool, anchor: Tensor | None, *given: Tensor | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        whole = widened(weight, columns)
        if traced:
            return tuple(_student_operator(hidden, whole, bias, *given, *flat(options), *flat(needs)))
        with torch.cuda.device_of(hidden):
            loss, planes, finish, power = _student(hidden, whole, bias, _Given._make(given), options, needs)
        return loss, planes, _whole(finish, power)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        hidden, weight, bias, columns, ctx.options, ctx.needs, ctx.traced, anchor, *given = inputs
        ctx.finish = None
        if ctx.traced:
            constant = output[1:]
            ctx.save_for_backward(anchor, columns, *output[2:])
        else:
            constant, ctx.finish = output[1:2], output[2]
            ctx.save_for_backward(hidden, weight, bias, columns, *given)
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        arguments = 8 + len(_Given._fields)
        if d_loss is None:
            return (None,) * arguments
        finish, ctx.finish = ctx.finish, None
        how = _FusedLoss._scaled if ctx.traced else _FusedLoss._finished
        more = (ctx.needs,) if ctx.traced else (ctx.needs, ctx.options, finish)
        gradients = once("fused_egrsd_loss", how, ctx.saved_tensors, d_loss, *more)
        return *gradients, *(None,) * (arguments - 4)

    @staticmethod
    def _scaled(saved: tuple[Any, ...], d_loss: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
        """Of (hidden, weight, bias, columns), from those that the forward pass has finished."""
        _, columns, *made = saved
        if len(made) > sum(needs[:3]):
            d_loss = d_loss / made.pop()
        scaled = iter(_scale_operator(made, d_loss))
        gradients = Gradients(*(next(scaled) if needed else None for needed in needs[:3]))
        return gradients.of_operands(needs, columns)

    @staticmethod
    def _finished(
        saved: tuple[Any, ...],
        d_loss: Tensor,
        needs: Needs,
        options: _Options,
        finish: Callable[[Tensor], Gradients] | None,
    ) -> tuple[Tensor | None, ...]:
        """The same, by what finishes them."""
        hidden, weight, bias, columns, *given = saved
        if finish is None:
            # A second backward: the first one scaled its gradients in place and gave them away. They are made again.
            made = _student(hidden, widened(weight, columns), bias, _Given._make(given), options, needs)
            finish = _whole(*made[2:])
            assert finish is not None  # since there are needs
        return finish(d_loss).of_operands(needs, columns)


def _teacher(
    teacher_hidden: Tensor, teacher_weight: object, teacher_bias: object, student_hidden: Tensor, student: Head,
    described: bool,
) -> tuple[Tensor, Head]:  # fmt: skip
    """The teacher's hidden states and head: its own, or the student's. described: that one was given as a Head."""
    leading = tuple(student_hidden.shape[:-1])
    same = tuple(teacher_hidden.shape[:-1]) == leading
    expect(same, "teacher_hidden", teacher_hidden, f"shape {(*leading, 'D')}, like student_hidden")
    if teacher_weight is None:
        weight, why = student.weight, "of the student's head, since teacher_weight is not given"
        own = student.low_rank is None
        expect(own, "teacher_weight", None, "the teacher's own Head, since the student's has a low-rank part")
        (teacher_hidden,) = checks.autocast(teacher_hidden)
        fits = teacher_hidden.shape[-1] == weight.shape[1]
        expect(fits, "teacher_hidden", teacher_hidden, f"the hidden size {weight.shape[1]} {why}")
        fits = teacher_hidden.dtype == weight.dtype
        expect(fits, "teacher_hidden", teacher_hidden, f"the dtype {weight.dtype} {why}", TypeError)
        if teacher_bias is None:
            return teacher_hidden, student.detach()
        why = "None, since student_weight is a Head, which has its own"
        expect(not described, "teacher_bias", teacher_bias, why)
        softcap = student.softcap
    else:
        same = isinstance(teacher_weight, Head) == described
        expect(same, "teacher_weight", teacher_weight, f"a {'Head' if described else 'tensor'}, as student_weight is")
        teacher_hidden, weight = checks.autocast(teacher_hidden, teacher_weight)
        softcap = None if described else student.softcap
    head = checks.head("teacher_", "teacher_hidden", teacher_hidden, weight, teacher_bias, softcap)
    rows = student.weight.shape[0]
    expect(head.weight.shape[0] == rows, "teacher_weight", head.weight, f"the student's vocabulary, {rows} rows")
    return teacher_hidden, head.detach()


def fused_egrsd_loss(
    student_hidden: Tensor,
    student_weight: Tensor | Head,
    teacher_hidden: Tensor | None,
    target_ids: Tensor,
    advantages: Tensor,
    *,
    teacher_weight: Tensor | Head | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    teacher_logp: Tensor | None = None,
    teacher_entropy: Tensor | None = None,
    gamma: float = 0.3,
    gate_floor: float = 0.1,
    lookahead: int = 0,
    lookahead_filter: Filter = "minimum",
    lookahead_decay: float = 1.0,
    lookahead_temperature: float = 0.0,
    lookahead_quantile: float = 0.0,
    clip_eps: float = 0.2,
    entropy_scale: EntropyScale | float | Tensor = "batch_max",
    min_entropy_scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    normalizer: float | Tensor | None = None,
    data_group: torch.distributed.ProcessGroup | None = None,
    divergence: Kind | None = None,
    divergence_weight: float = 1.0,
    divergence_beta: float = 0.5,
    divergence_top_k: int | None = None,
    policy_weight: float = 1.0,
    backend: Literal["auto", "triton", "torch"] = "auto",
    grad_mode: Literal["exact", "sparse"] = "exact",
    sparse_tol: float = DEFAULT_SPARSE_TOL,
    return_stats: bool = False,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Tensor | tuple[Tensor, TokenStats]:
    """The EGRSD loss, or CL-EGRSD's with ``lookahead`` > 0 (arXiv 2605.13255), without full logits.

    L = -(1/Σm) Σ_t m_t Â_t log p_S(y_t), where Â = A · w · ω is a constant (no gradient):

    - magnitude w = clip(exp(sign(A) · δ), 1 - clip_eps, 1 + clip_eps), δ = log p_T(y) - log p_S(y);
    - gate ω = clip(1 - gamma · Ĥ, gate_floor, 1), Ĥ = H^CL / max(scale, min_entropy_scale) (Eq. 8);
    - H^CL_t = the minimum of the teacher's entropy H over valid j in [t, min(t + lookahead, end of the sequence)], or
      what another lookahead_filter makes of the H_j there, at most H_t.

    gamma = 0 is RLSD's loss; gamma = 0 with clip_eps = 0 is REINFORCE with the given advantages.

    With a divergence L = (1/Σm) Σ_t m_t (-policy_weight · Â_t log p_S(y_t) + divergence_weight · ω_t D_t), where D_t is
    what :func:`egrsd_kernels.linear_divergence` makes of the two distributions at t, and the gate ω is a constant. D is
    taken at the given tokens: what it would cost that the student samples others is not in the gradient.

    Args:
        student_hidden: (B, T, D), or packed (N, D); bfloat16, float16, float32, or float64 (torch backend). Like every
            tensor here dense (not sparse, nested, quantised or complex), and on a device that holds values (not meta).
        student_weight: (V, D), the student's LM head, in the dtype of student_hidden; or a :class:`egrsd_kernels.Head`,
            whose bias and softcap take the place of student_bias and softcap. Beside a low-rank part the call holds a
            copy of the head, V · (D + r) numbers of its dtype; the gradient of W is made only if W requires it.
        teacher_hidden: like student_hidden, never differentiated; its D and dtype may differ when teacher_weight is
            given. None when teacher_logp and teacher_entropy are given.
        target_ids: (B, T) or (N,), of any integer dtype: the token that each position predicts, in [0, V). -100 masks
            a position.
        advantages: (B,) one a sequence or (B, T) one a token; packed (S,) or (N,); finite, of any of those dtypes.
            Packed sequences as many as tokens (S = N, some of them empty) make the shape ambiguous: refused where
            values can be seen; elsewhere one a token wins. Leave empty sequences out of cu_seqlens.
        teacher_weight, teacher_bias: the teacher's head. Without teacher_weight the teacher shares the student's head,
            its bias included unless teacher_bias is given. Neither without teacher_hidden. A Head where student_weight
            is one, and needed where that has a low-rank part.
        student_bias: (V,). Biases may be of any of those dtypes.
        mask: (B, T) or (N,), bool, or 0/1 in an integer or one of those dtypes. Masked positions are never read and
            cost nothing.
        cu_seqlens: (S + 1,) int32 or int64 boundaries of packed sequences; without it, packed input is one sequence.
        teacher_logp, teacher_entropy: (B, T) or (N,), nats, any of those dtypes: teacher statistics computed earlier,
            in the place of teacher_hidden; with a divergence beside it, where they spare the teacher's own pass. log p
            is at most 0 and may be -inf; entropies are finite and at least 0; both but for rounding.
        gamma, gate_floor, lookahead, clip_eps: γ, the gate's floor, W and ε above. Numbers; γ is at least 0, the floor
            and ε in [0, 1], W an integer of at least 0.
        lookahead_filter: how the window is filtered, each at most H_t: "minimum"; "discounted", min_j λ^-(j - t) · H_j,
            with which a later token counts the less the further it is; "softmin", -τ log mean_j exp(-H_j / τ); or
            "quantile", the q-quantile of the H_j, linear between two of them.
        lookahead_decay, lookahead_temperature, lookahead_quantile: λ in (0, 1], τ in [0, 10^6] nats, q in [0, 1]; each
            for its own filter, and the minimum by default.
        entropy_scale: what H^CL is divided by, in nats: "batch_max", the maximum of the valid tokens' raw H (Eq. 8);
            "batch_max_lookahead", the maximum of H^CL (Algorithm 1's order); or a number or 0-d tensor, of an integer
            or one of those dtypes, on any device: positive, and finite in the loss's dtype.
        min_entropy_scale: lower bound of that scale, nats, above 0.
        temperature, softcap: z = softcap · tanh((h Wᵀ + b) / softcap) / temperature, for student and teacher; numbers
            above 0. softcap=None: no tanh.
        normalizer: instead of Σm, the number of valid tokens: a number or 0-d tensor, as entropy_scale.
        data_group: the torch.distributed group over which the minibatch is spread; the batch maximum is the group's.
        divergence: "reverse_kl", "forward_kl" or "jsd"; it needs teacher_hidden and exact gradients. None: none.
            divergence_beta, divergence_top_k: its beta and top_k, as in :func:`egrsd_kernels.linear_divergence`.
        divergence_weight, policy_weight: numbers above 0, and at least 0, that weigh the two terms. Without a
            divergence both are 1. With policy_weight = 0 the advantages are of no account but for TokenStats.
        backend: "triton", "torch" (plain PyTorch), or "auto": Triton on a GPU where it runs, else PyTorch, which
            also makes the student's pass with a divergence_top_k.
        grad_mode: "exact"; or, experimental, "sparse", which leaves out vocabulary entries that carry little of the
            gradient. What that changes in dL/d(h Wᵀ) is certified to be at most sparse_tol of its L1 norm, on any
            input; tokens whose gradient is not sparse are made exactly. It pays on large models that are mostly sure of
            their next token. The PyTorch backend's gradients are always exact.
        sparse_tol: that tolerance, Σ_t |c_t| dropped_t <= sparse_tol · Σ_t |c_t| ‖p_t - e_y‖₁ with c_t = dL/dlog p_t
            and dropped_t the probability mass left out (both times tanh's derivative, under a softcap); a token's share
            of it is TokenStats.gradient_error_bound. A number in (0, 1].
        return_stats: True to return also the per-token :class:`TokenStats`.
        chunk_bytes: the most working memory of the student's pass: exponentials of a chunk of tokens and what goes with
            them; an integer above 0. (The smallest chunk takes some 35 MiB; the teacher's pass takes 60 MiB at D = 4096
            and V = 152k.)
            With a frozen head the Triton backend holds at most 350 MiB for exact gradients, since more would buy no
            speed; for sparse ones it takes all, half of it for tokens that wait to be made exactly. With a trained
            head, chunks add up in a float32 gradient of the head, 4·V·D bytes more. Where all tokens fit into one chunk
            there is none; that chunk may take what this spares beside a 16-bit head, 2·V·D bytes, and is held until
            the backward pass. Sparse gradients of a trained head always add up in float32; beside a 16-bit head they
            take the 2·V·D bytes that its gradient is given at the end.

    Returns:
        The loss, 0-d float32 (float64 for float64 input), differentiable in student_hidden, student_weight and
        student_bias; with return_stats, (loss, TokenStats). No valid token: loss 0 and zero gradients.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it expects. What can only be seen in the values
            (targets outside the vocabulary, advantages that are not finite, teacher statistics that no distribution
            has, boundaries that do not ascend, infinite scales, advantages of ambiguous shape) is checked on CPU
            tensors, and on a GPU when EGRSD_KERNELS_CHECK=1; never under torch.compile, FakeTensorMode or torch.func.
            Unchecked, such a target makes its log p and the loss NaN.
    """
    checks.hidden_states("student_hidden", student_hidden)
    if teacher_hidden is not None:
        checks.hidden_states("teacher_hidden", teacher_hidden, like=student_hidden)
    if data_group is not None:
        is_group = torch.distributed.is_available() and isinstance(data_group, torch.distributed.ProcessGroup)
        expect(is_group, "data_group", data_group, "a torch.distributed.ProcessGroup or None", TypeError)
    checks.flag("return_stats", return_stats)
    student_hidden, given_head = checks.autocast(student_hidden, student_weight)
    student = checks.head("student_", "student_hidden", student_hidden, given_head, student_bias, softcap)
    temperature = number("temperature", temperature, low=0, strict=True)
    flat_targets, valid = checks.targets(target_ids, student_hidden, student.weight.shape[0], mask)
    dtype, sequences = compute_dtype(student_hidden.dtype), checks.sequences(cu_seqlens, student_hidden)
    advantages = checks.token_advantages(advantages, student_hidden, valid, sequences)
    if isinstance(entropy_scale, str):
        expected = '"batch_max", "batch_max_lookahead" or nats'
        expect(entropy_scale in ENTROPY_SCALES, "entropy_scale", entropy_scale, expected)
    else:
        entropy_scale = checks.scalar("entropy_scale", entropy_scale, valid, dtype)
    credit = CreditOptions(
        gamma=number("gamma", gamma, low=0),
        gate_floor=number("gate_floor", gate_floor, low=0, high=1),
        clip_eps=number("clip_eps", clip_eps, low=0, high=1),
    )
    window = Lookahead.checked(lookahead, lookahead_filter, lookahead_decay, lookahead_temperature, lookahead_quantile)
    min_entropy_scale = number("min_entropy_scale", min_entropy_scale, low=0, strict=True)
    chunk_bytes = checks.integer("chunk_bytes", chunk_bytes, low=1)
    sparse_tolerance = checks.sparse_tolerance(grad_mode, sparse_tol)
    weights = divergence_weight, policy_weight
    which = Divergence.of_loss(divergence, *weights, divergence_beta, divergence_top_k, student.weight.shape[0])
    if which is not None:
        expect(teacher_hidden is not None, "teacher_hidden", None, "a tensor, since there is a divergence")
        expect(sparse_tolerance is None, "grad_mode", grad_mode, '"exact", since there is a divergence')
    hidden, columns = student.join(checks.batched(student_hidden), valid)

    traced = checks.traced(hidden)
    known(backend)
    if not traced:
        choose(backend, *(x for x in (student_hidden, teacher_hidden) if x is not None))

    with torch.no_grad():
        given = {"teacher_logp": teacher_logp, "teacher_entropy": teacher_entropy}
        one = teacher_logp if teacher_logp is not None else teacher_entropy
        states = teacher = logp = entropy = None
        if teacher_hidden is None:
            for name, unused in (("teacher_weight", teacher_weight), ("teacher_bias", teacher_bias)):
                expect(unused is None, name, unused, "None, since teacher_hidden is None")
        else:
            expected = "None beside teacher_hidden, since there is no divergence"
            expect(one is None or which is not None, "teacher_logp, teacher_entropy", one, expected)
            described = isinstance(student_weight, Head)
            read = _teacher(teacher_hidden, teacher_weight, teacher_bias, student_hidden, student, described)
            states, teacher = read[1].joined(checks.batched(read[0].detach()), valid)
        if teacher_hidden is None or one is not None:
            why = "teacher_hidden is None" if teacher_hidden is None else "the other statistic is given"
            logp, entropy = (
                checks.teacher_statistic(name, x, target_ids, valid, why).to(dtype) for name, x in given.items()
            )
        head = student if teacher is None else teacher
        of_teacher = (None, None, None) if teacher is None else (states, teacher.weight, teacher.bias)
        kind, beta, top_k = which or (None, 0.5, None)
        options = _Options(
            student.logit_scale, student.softcap, head.logit_scale, head.softcap, temperature, backend, chunk_bytes,
            credit, min_entropy_scale, sparse_tolerance, kind, beta, top_k, float(divergence_weight),
            float(policy_weight),
        )  # fmt: skip
        tensors = flat_targets, valid, advantages, sequences.boundaries, *of_teacher, logp, entropy
        if traced:
            evidence = _evidence_operator(hidden, *tensors, sequences.length, *window, *flat(options))
        else:
            evidence = _evidence(hidden, *tensors, length=sequences.length, lookahead=window, options=options)
        order, counts, flat_advantages, lookahead_entropy, *made = evidence
        if made:
            logp, entropy = made
        assert logp is not None and entropy is not None
        if isinstance(entropy_scale, str):
            entropy_scale = batch_max(entropy if entropy_scale == "batch_max" else lookahead_entropy, data_group)
        if normalizer is not None:
            normalizer = checks.scalar("normalizer", normalizer, valid, dtype)

    minibatch = _Given(
        flat_targets, order, counts, flat_advantages, logp, entropy, lookahead_entropy, entropy_scale, normalizer,
        *(of_teacher if which is not None else (None, None, None)),
    )  # fmt: skip
    needs = Needs.of(hidden, student.weight, student.bias, columns)
    anchor = hidden[:0].clone() if traced else None
    outputs: tuple[Tensor, ...] = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, student.weight, student.bias, columns, options, needs, traced, anchor, *minibatch
    )
    loss, planes = outputs[:2]
    if not return_stats:
        return loss
    student_logp, *others = planes.unbind()[: len(TokenStats._fields) - 3]
    stats = student_logp, logp, entropy, lookahead_entropy, *others
    return loss, TokenStats(*(x.view(target_ids.shape) for x in stats))
