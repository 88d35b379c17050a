"""``fused_egrsd_loss``: the EGRSD and CL-EGRSD loss without full logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import checks
from .backends import (
    DEFAULT_CHUNK_BYTES,
    DEFAULT_SPARSE_TOL,
    Backend,
    Divergence,
    DivergenceBackend,
    DivergenceStatistics,
    Finish,
    Kind,
    Needs,
    Pair,
    PairCredit,
    Scales,
    Sparse,
    VocabularyStatistics,
    choose,
    choose_divergence,
    no_statistics,
)
from .checks import expect, number
from .credit import ENTROPY_SCALES, CreditOptions, EntropyScale, Filter, Lookahead, TokenStats, batch_max
from .eager import eager
from .head import Head, compute_dtype, widened
from .rows import Rows


@dataclass(frozen=True)
class _Term:
    """What λ ω D is made of beside the student: its passes, and the teacher's hidden states (B, T, D) and head."""

    backend: DivergenceBackend
    divergence: Divergence
    weight: float  # λ
    teacher_hidden: Tensor
    teacher: Head

    def pair(self, head: Head, hidden: Tensor, temperature: float) -> Pair:
        return Pair(hidden, head, self.teacher_hidden, self.teacher, temperature, self.divergence)


@dataclass(frozen=True)
class _Minibatch:
    """What the student's pass works on beside its hidden states and head: (N,) tensors in the callers' order."""

    backend: Backend
    target_ids: Tensor
    rows: Rows
    advantages: Tensor
    teacher_logp: Tensor
    teacher_entropy: Tensor
    lookahead_entropy: Tensor
    scales: Scales
    options: CreditOptions
    temperature: float
    chunk_bytes: int
    sparse_tol: float | None  # None: exact gradients
    policy_weight: float
    term: _Term | None  # None: no divergence

    def loss(self, head: Head, hidden: Tensor, needs: Needs) -> tuple[Tensor, TokenStats, Finish | None]:
        """(loss, stats, what finishes the gradients, which the power of two is left out of)."""
        n, dtype = self.advantages.numel(), self.advantages.dtype
        zeros = torch.zeros(8, n, dtype=dtype, device=hidden.device)
        logp, magnitude, gate, token_advantage, bound, divergence, terms, gradient = zeros.unbind()
        stats = TokenStats(
            logp, self.teacher_logp, self.teacher_entropy, self.lookahead_entropy, magnitude, gate, token_advantage,
            bound, divergence,
        )  # fmt: skip
        share = self.scales.share if self.policy_weight == 1 else self.policy_weight * self.scales.share

        def credit(first_row: int, n_rows: int) -> Tensor:
            self.backend.token_credit(
                self.rows, first_row, n_rows, self.advantages, self.scales.entropy, share, self.options, stats,
                terms, gradient,
            )  # fmt: skip
            return gradient

        problem = head, self.temperature, hidden, self.target_ids, self.rows, VocabularyStatistics(logp)
        finish = None
        if self.term is not None:
            term, of_gate = self.term, -self.term.weight * self.scales.share

            def both(first_row: int, n_rows: int) -> PairCredit:
                of_logp = credit(first_row, n_rows)
                return PairCredit(gate * of_gate, of_logp)

            pair, out = term.pair(head, hidden, self.temperature), DivergenceStatistics(divergence, logp)
            finish = term.backend.divergence_pass(pair, self.target_ids, self.rows, out, both, needs, self.chunk_bytes)
            if not any(needs):
                credit(0, logp.numel())
            # Where the gate is shut, an infinite divergence costs nothing.
            terms = self.policy_weight * terms + torch.where(gate == 0, 0, term.weight * gate * divergence)
        elif any(needs):
            sparse = None if self.sparse_tol is None else Sparse.of(self.sparse_tol, self.target_ids)
            finish = self.backend.student_pass(*problem, credit, needs, self.chunk_bytes, sparse)
            if sparse is not None:
                bound.copy_(sparse.error_bound(token_advantage))
        else:
            self.backend.statistics(*problem, self.chunk_bytes)
            credit(0, n)
        return terms.sum() / self.scales.normalizer, stats, finish


class _FusedLoss(torch.autograd.Function):
    """The loss with its gradients made in the forward pass, while each chunk's exponentials are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor | None,
        frame: Callable[..., Head], minibatch: _Minibatch, needs: Needs,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        loss, stats, ctx.finish = minibatch.loss(frame(widened(weight, columns), bias), hidden, needs)
        ctx.save_for_backward(hidden, weight, bias, columns)
        ctx.arguments = frame, minibatch, needs
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        checks.refuse_second_derivative("fused_egrsd_loss")
        if d_loss is None:
            return (None,) * 7
        frame, minibatch, needs = ctx.arguments
        hidden, weight, bias, columns = ctx.saved_tensors
        finish, ctx.finish = ctx.finish, None
        if finish is None:
            # A second backward: the first one scaled its gradients in place and gave them away. They are made again.
            finish = minibatch.loss(frame(widened(weight, columns), bias), hidden, needs)[2]
        power = minibatch.scales.power
        factor = d_loss if power is None else d_loss / power
        return *finish(factor).of_operands(needs, columns), *(None,) * 3


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


@eager
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
        backend: "triton", "torch" (plain PyTorch), or "auto": Triton on a GPU where it runs, else PyTorch.
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
    n, dtype = valid.numel(), compute_dtype(student_hidden.dtype)
    sequences = checks.sequences(cu_seqlens, student_hidden)
    advantages = checks.token_advantages(advantages, student_hidden, valid, sequences)
    if isinstance(entropy_scale, str):
        expected = '"batch_max", "batch_max_lookahead" or nats'
        expect(entropy_scale in ENTROPY_SCALES, "entropy_scale", entropy_scale, expected)
    else:
        entropy_scale = checks.scalar("entropy_scale", entropy_scale, valid, dtype)
    options = CreditOptions(
        gamma=number("gamma", gamma, low=0),
        gate_floor=number("gate_floor", gate_floor, low=0, high=1),
        clip_eps=number("clip_eps", clip_eps, low=0, high=1),
    )
    window = Lookahead.checked(lookahead, lookahead_filter, lookahead_decay, lookahead_temperature, lookahead_quantile)
    min_entropy_scale = number("min_entropy_scale", min_entropy_scale, low=0, strict=True)
    chunk_bytes = checks.integer("chunk_bytes", chunk_bytes, low=1)
    ops = choose(backend, *(x for x in (student_hidden, teacher_hidden) if x is not None))
    sparse_tolerance = checks.sparse_tolerance(grad_mode, sparse_tol)
    weights = divergence_weight, policy_weight
    which = Divergence.of_loss(divergence, *weights, divergence_beta, divergence_top_k, student.weight.shape[0])
    if which is not None:
        expect(teacher_hidden is not None, "teacher_hidden", None, "a tensor, since there is a divergence")
        expect(sparse_tolerance is None, "grad_mode", grad_mode, '"exact", since there is a divergence')
    hidden, columns = student.join(checks.batched(student_hidden), valid)

    with torch.cuda.device_of(student_hidden), torch.no_grad():
        flat_advantages, last = ops.by_token(advantages, n, sequences, dtype)
        rows = ops.build_rows(valid, valid if which is not None else flat_advantages)
        given = {"teacher_logp": teacher_logp, "teacher_entropy": teacher_entropy}
        one = teacher_logp if teacher_logp is not None else teacher_entropy
        term = None
        if teacher_hidden is None:
            for name, unused in (("teacher_weight", teacher_weight), ("teacher_bias", teacher_bias)):
                expect(unused is None, name, unused, "None, since teacher_hidden is None")
        else:
            expected = "None beside teacher_hidden, since there is no divergence"
            expect(one is None or which is not None, "teacher_logp, teacher_entropy", one, expected)
            described = isinstance(student_weight, Head)
            read = _teacher(teacher_hidden, teacher_weight, teacher_bias, student_hidden, student, described)
            states, teacher = read[1].joined(checks.batched(read[0].detach()), valid)
            if which is not None:
                pair = Pair(checks.batched(student_hidden), student, states, teacher, temperature, which)
                divergences = choose_divergence(backend, pair)
                term = _Term(divergences, which, float(divergence_weight), states, teacher)
        if teacher_hidden is None or one is not None:
            why = "teacher_hidden is None" if teacher_hidden is None else "the other statistic is given"
            logp, entropy = (checks.teacher_statistic(name, x, target_ids, valid, why) for name, x in given.items())
        else:
            logp, entropy, _ = found = no_statistics(n, states)
            out = VocabularyStatistics(*found)
            ops.statistics(teacher, temperature, states, flat_targets, rows, out, chunk_bytes)
        logp, entropy = logp.to(dtype), entropy.to(dtype)
        lookahead_entropy = ops.lookahead_entropy(entropy, valid, last, window)
        if isinstance(entropy_scale, str):
            entropy_scale = batch_max(entropy if entropy_scale == "batch_max" else lookahead_entropy, data_group)
        if normalizer is not None:
            normalizer = checks.scalar("normalizer", normalizer, valid, dtype)
        scales = ops.scales(entropy_scale, min_entropy_scale, rows, normalizer, hidden.dtype == torch.float16)
        minibatch = _Minibatch(
            ops, flat_targets, rows, flat_advantages, logp, entropy, lookahead_entropy, scales, options, temperature,
            chunk_bytes, sparse_tolerance, float(policy_weight), term,
        )  # fmt: skip

    with torch.cuda.device_of(student_hidden):
        needs = Needs.of(hidden, student.weight, student.bias, columns)
        outputs: tuple[Tensor, ...] = _FusedLoss.apply(  # type: ignore[no-untyped-call]
            hidden, student.weight, student.bias, columns, student.frame, minibatch, needs
        )
    loss, *stats = outputs
    if not return_stats:
        return loss
    return loss, TokenStats(*(x.view(target_ids.shape) for x in stats))
