"""``fused_egrsd_loss``: the EGRSD and CL-EGRSD loss without full logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Literal

import torch

from . import inputs
from .inputs import expect, number
from .problem import (
    DEFAULT_CHUNK_BYTES,
    DEFAULT_SPARSE_TOL,
    Head,
    Options,
    Rows,
    Sparse,
    TokenStats,
    compute_dtype,
    power_of_two,
)


@dataclass(frozen=True)
class _Credit:
    """What the student pass needs beside the student: (N,) tensors in the callers' order, and the method's options."""

    backend: ModuleType
    target_ids: torch.Tensor
    rows: Rows
    advantages: torch.Tensor
    teacher_logp: torch.Tensor
    teacher_entropy: torch.Tensor
    lookahead_entropy: torch.Tensor
    scale: torch.Tensor  # 0-d, nats: what entropies are divided by
    normalizer: torch.Tensor  # 0-d
    options: Options
    sparse_tol: float | None  # of sparse gradients; None for exact ones

    @cached_property
    def power(self) -> torch.Tensor:
        """The power of two in the normaliser (0-d).

        The forward pass leaves it out of the gradients: a token's hidden gradient is then of the head's own size, which
        float16 can hold, and to divide by it in the backward pass rounds nothing.
        """
        return power_of_two(self.normalizer)

    def student(self, head: Head, hidden: torch.Tensor, needs: tuple[bool, bool, bool]):
        """(loss, stats, what finishes the gradients of loss · :attr:`power` for hidden, weight and bias)."""
        logp, loss, magnitude, gate, token_advantage, bound = (torch.zeros_like(self.advantages) for _ in range(6))
        stats = TokenStats(
            logp, self.teacher_logp, self.teacher_entropy, self.lookahead_entropy, magnitude, gate, token_advantage,
            bound,
        )  # fmt: skip

        unit = -self.power / self.normalizer

        def credit(first_row: int, chunk: int) -> torch.Tensor:
            self.backend.token_credit(
                self.rows, first_row, chunk, self.advantages, self.teacher_logp, logp, self.lookahead_entropy,
                self.scale, self.options, stats, loss,
            )  # fmt: skip
            return token_advantage * unit

        arguments = head, hidden, self.target_ids, self.rows
        if any(needs):
            sparse = None if self.sparse_tol is None else Sparse.of(self.sparse_tol, self.target_ids)
            finish = self.backend.student_pass(*arguments, logp, credit, needs, self.options.chunk_bytes, sparse)
            if sparse is not None:
                bound.copy_(sparse.error_bound(token_advantage))
        else:
            logp.copy_(self.backend.statistics(*arguments, self.options.chunk_bytes)[0])
            credit(0, logp.numel())
            finish = None
        return loss.sum() / self.normalizer, stats, finish


class _FusedLoss(torch.autograd.Function):
    """The loss with its gradients made in the forward pass, while each chunk's exponentials are there."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, softcap, temperature, credit: _Credit, needs):
        loss, stats, ctx.finish = credit.student(Head(weight, bias, softcap, temperature), hidden, needs)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.arguments = softcap, temperature, credit, needs
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return loss, *stats

    @staticmethod
    def backward(ctx, d_loss, *_):
        inputs.refuse_second_derivative("fused_egrsd_loss")
        if d_loss is None:
            return (None,) * 7
        softcap, temperature, credit, needs = ctx.arguments
        hidden, weight, bias = ctx.saved_tensors
        finish, ctx.finish = ctx.finish, None
        if finish is None:
            # A second backward: the first one scaled its gradients in place and gave them away. They are made again.
            finish = credit.student(Head(weight, bias, softcap, temperature), hidden, needs)[2]
        return *finish(d_loss / credit.power), *(None,) * 4


def _entropy_scale(options: Options, entropy, lookahead_entropy, group) -> torch.Tensor:
    """The normaliser of Ĥ (0-d, nats): the batch maximum (Eq. 8) or the given scale, and at least min_entropy_scale."""
    scale = options.entropy_scale
    if isinstance(scale, str):
        # Masked tokens hold 0 and no entropy is below that, so they change no maximum.
        source = entropy if scale == "batch_max" else lookahead_entropy
        scale = source.max() if source.numel() else source.new_zeros(())
        if group is not None:
            torch.distributed.all_reduce(scale, op=torch.distributed.ReduceOp.MAX, group=group)
    return scale.clamp(min=options.min_entropy_scale)


def _options(
    gamma, gate_floor, lookahead, clip_eps, entropy_scale, min_entropy_scale, chunk_bytes, like, dtype
) -> Options:
    if isinstance(entropy_scale, str):
        expected = '"batch_max", "batch_max_lookahead" or nats'
        expect(entropy_scale in ("batch_max", "batch_max_lookahead"), "entropy_scale", entropy_scale, expected)
    else:
        entropy_scale = inputs.scalar("entropy_scale", entropy_scale, like, dtype)
    return Options(
        gamma=number("gamma", gamma, low=0),
        gate_floor=number("gate_floor", gate_floor, low=0, high=1),
        lookahead=inputs.integer("lookahead", lookahead, low=0),
        clip_eps=number("clip_eps", clip_eps, low=0, high=1),
        entropy_scale=entropy_scale,
        min_entropy_scale=number("min_entropy_scale", min_entropy_scale, low=0, strict=True),
        chunk_bytes=inputs.integer("chunk_bytes", chunk_bytes, low=1),
    )


def _teacher(teacher_hidden, teacher_weight, teacher_bias, student_hidden, student: Head) -> tuple[torch.Tensor, Head]:
    """The teacher's hidden states and head: its own, or the student's."""
    leading = tuple(student_hidden.shape[:-1])
    same = tuple(teacher_hidden.shape[:-1]) == leading
    expect(same, "teacher_hidden", teacher_hidden, f"shape {(*leading, 'D')}, like student_hidden")
    if teacher_weight is None:
        weight, why = student.weight, "of the student's head, since teacher_weight is not given"
        (teacher_hidden,) = inputs.autocast(teacher_hidden)
        fits = teacher_hidden.shape[-1] == weight.shape[1]
        expect(fits, "teacher_hidden", teacher_hidden, f"the hidden size {weight.shape[1]} {why}")
        fits = teacher_hidden.dtype == weight.dtype
        expect(fits, "teacher_hidden", teacher_hidden, f"the dtype {weight.dtype} {why}", TypeError)
        bias = student.bias if teacher_bias is None else teacher_bias
    else:
        teacher_hidden, weight = inputs.autocast(teacher_hidden, teacher_weight)
        bias = teacher_bias
    head = inputs.head("teacher_", "teacher_hidden", teacher_hidden, weight, bias, student.softcap, student.temperature)
    vocabulary = student.weight.shape[0]
    expect(weight.shape[0] == vocabulary, "teacher_weight", weight, f"the student's vocabulary, {vocabulary} rows")
    return teacher_hidden, head.detach()


@torch.compiler.disable
def fused_egrsd_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    target_ids: torch.Tensor,
    advantages: torch.Tensor,
    *,
    teacher_weight: torch.Tensor | None = None,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    teacher_logp: torch.Tensor | None = None,
    teacher_entropy: torch.Tensor | None = None,
    gamma: float = 0.3,
    gate_floor: float = 0.1,
    lookahead: int = 0,
    clip_eps: float = 0.2,
    entropy_scale: Literal["batch_max", "batch_max_lookahead"] | float | torch.Tensor = "batch_max",
    min_entropy_scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    normalizer: float | torch.Tensor | None = None,
    data_group: torch.distributed.ProcessGroup | None = None,
    backend: Literal["auto", "triton", "torch"] = "auto",
    grad_mode: Literal["exact", "sparse", "auto"] = "exact",
    sparse_tol: float = DEFAULT_SPARSE_TOL,
    return_stats: bool = False,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> torch.Tensor | tuple[torch.Tensor, TokenStats]:
    """The EGRSD loss, or CL-EGRSD's with ``lookahead`` > 0 (arXiv 2605.13255), without full logits.

    L = -(1/Σm) Σ_t m_t Â_t log p_S(y_t), where Â = A · w · ω is a constant (no gradient):

    - magnitude w = clip(exp(sign(A) · δ), 1 - clip_eps, 1 + clip_eps), δ = log p_T(y) - log p_S(y);
    - gate ω = clip(1 - gamma · Ĥ, gate_floor, 1), Ĥ = H^CL / max(scale, min_entropy_scale) (Eq. 8);
    - H^CL_t = the minimum of the teacher's entropy H over valid j in [t, min(t + lookahead, end of the sequence)].

    gamma = 0 is RLSD's loss; gamma = 0 with clip_eps = 0 is REINFORCE with the given advantages.

    Args:
        student_hidden: (B, T, D), or packed (N, D); bfloat16, float16, float32, or float64 (torch backend). Like every
            tensor here dense (not sparse, nested, quantised or complex), and on a device that holds values (not meta).
        student_weight: (V, D), the student's LM head, in the dtype of student_hidden.
        teacher_hidden: like student_hidden, never differentiated; its D and dtype may differ when teacher_weight is
            given. None when teacher_logp and teacher_entropy are given.
        target_ids: (B, T) or (N,), of any integer dtype: the token that each position predicts, in [0, V). -100 masks
            a position.
        advantages: (B,) one a sequence or (B, T) one a token; packed (S,) or (N,); finite, of any of those dtypes.
            Packed sequences as many as tokens (S = N, some of them empty) make the shape ambiguous: refused where
            values can be seen; elsewhere one a token wins. Leave empty sequences out of cu_seqlens.
        teacher_weight, teacher_bias: the teacher's head. Without teacher_weight the teacher shares the student's head,
            its bias included unless teacher_bias is given. Neither without teacher_hidden.
        student_bias: (V,). Biases may be of any of those dtypes.
        mask: (B, T) or (N,), bool, or 0/1 in an integer or one of those dtypes. Masked positions are never read and
            cost nothing.
        cu_seqlens: (S + 1,) int32 or int64 boundaries of packed sequences; without it, packed input is one sequence.
        teacher_logp, teacher_entropy: (B, T) or (N,), nats, any of those dtypes: teacher statistics computed earlier.
            log p is at most 0 and may be -inf; entropies are finite and at least 0; both but for rounding.
        gamma, gate_floor, lookahead, clip_eps: γ, the gate's floor, W and ε above. Numbers; γ is at least 0, the floor
            and ε in [0, 1], W an integer of at least 0.
        entropy_scale: what H^CL is divided by, in nats: "batch_max", the maximum of the valid tokens' raw H (Eq. 8);
            "batch_max_lookahead", the maximum of H^CL (Algorithm 1's order); or a number or 0-d tensor, of an integer
            or one of those dtypes, on any device: positive, and finite in the loss's dtype.
        min_entropy_scale: lower bound of that scale, nats, above 0.
        temperature, softcap: z = softcap · tanh((h Wᵀ + b) / softcap) / temperature, for student and teacher; numbers
            above 0. softcap=None: no tanh.
        normalizer: instead of Σm, the number of valid tokens: a number or 0-d tensor, as entropy_scale.
        data_group: the torch.distributed group over which the minibatch is spread; the batch maximum is the group's.
        backend: "triton", "torch" (plain PyTorch), or "auto": Triton on a GPU where it runs, else PyTorch.
        grad_mode: "exact"; "sparse", which leaves out vocabulary entries that carry little of the gradient: what that
            changes in dL/d(h Wᵀ) is certified to be at most sparse_tol of its L1 norm, on any input, and tokens whose
            gradient is not sparse are made exactly; or "auto", sparse as long as earlier calls found it to pay. The
            PyTorch backend's gradients are always exact.
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
    inputs.hidden_states("student_hidden", student_hidden)
    if teacher_hidden is not None:
        inputs.hidden_states("teacher_hidden", teacher_hidden, like=student_hidden)
    if data_group is not None:
        is_group = torch.distributed.is_available() and isinstance(data_group, torch.distributed.ProcessGroup)
        expect(is_group, "data_group", data_group, "a torch.distributed.ProcessGroup or None", TypeError)
    inputs.flag("return_stats", return_stats)
    student_hidden, student_weight = inputs.autocast(student_hidden, student_weight)
    student = inputs.head(
        "student_", "student_hidden", student_hidden, student_weight, student_bias, softcap, temperature
    )
    target_ids_flat, valid = inputs.targets(target_ids, student_hidden, student_weight.shape[0], mask)
    n, dtype = valid.numel(), compute_dtype(student_hidden.dtype)
    boundaries = inputs.boundaries(cu_seqlens, student_hidden)
    sequence = inputs.sequence_of(boundaries, n)
    flat_advantages = inputs.token_advantages(advantages, student_hidden, valid, sequence, boundaries.numel() - 1)
    flat_advantages = flat_advantages.to(dtype)
    options = _options(
        gamma, gate_floor, lookahead, clip_eps, entropy_scale, min_entropy_scale, chunk_bytes, valid, dtype
    )
    ops = inputs.backend(backend, *(x for x in (student_hidden, teacher_hidden) if x is not None))
    hidden = inputs.batched(student_hidden)
    needs = inputs.needs_grad(hidden, student.weight, student.bias)
    tolerance = ops.sparse_tolerance(*inputs.gradients(grad_mode, sparse_tol), student, needs)

    with torch.cuda.device_of(student_hidden), torch.no_grad():
        rows = Rows.build(valid, flat_advantages != 0)
        if teacher_hidden is None:
            for name, unused in (("teacher_weight", teacher_weight), ("teacher_bias", teacher_bias)):
                expect(unused is None, name, unused, "None, since teacher_hidden is None")
            given = {"teacher_logp": teacher_logp, "teacher_entropy": teacher_entropy}
            logp_t, entropy = (inputs.teacher_statistic(name, x, target_ids, valid) for name, x in given.items())
        else:
            unused = teacher_logp if teacher_logp is not None else teacher_entropy
            expect(unused is None, "teacher_logp, teacher_entropy", unused, "None beside teacher_hidden")
            teacher_hidden, teacher = _teacher(teacher_hidden, teacher_weight, teacher_bias, student_hidden, student)
            logp_t, entropy, _ = ops.statistics(
                teacher, inputs.batched(teacher_hidden), target_ids_flat, rows, chunk_bytes
            )
        logp_t, entropy = logp_t.to(dtype), entropy.to(dtype)
        end_of_sequence = (boundaries[1:] - 1)[sequence].clamp(max=n - 1).to(torch.int32)
        lookahead_entropy = ops.lookahead_entropy(entropy, valid, end_of_sequence, lookahead)
        scale = _entropy_scale(options, entropy, lookahead_entropy, data_group)
        tokens = rows.counts[0].to(dtype)
        divisor = tokens if normalizer is None else inputs.scalar("normalizer", normalizer, valid, dtype)
        divisor = torch.where(tokens == 0, 1, divisor)
        credit = _Credit(
            ops, target_ids_flat, rows, flat_advantages, logp_t, entropy, lookahead_entropy, scale, divisor, options,
            tolerance,
        )  # fmt: skip

    with torch.cuda.device_of(student_hidden):
        loss, *stats = _FusedLoss.apply(
            hidden, student.weight, student.bias, student.softcap, student.temperature, credit, needs
        )
    if not return_stats:
        return loss
    return loss, TokenStats(*(x.view(target_ids.shape) for x in stats))
