"""The divergence of TRL's ``DistillationTrainer``, and the student's entropy, by our own pass.

The trainer calls ``ChunkedDivergenceFunction.apply`` by a name of a module of TRL's, with hidden states and heads of
both models; :func:`fused_divergence` makes what :func:`.fusing.fuse_heads` puts under that name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from egrsd_kernels import DivergenceStatistics, Head, linear_divergence
from egrsd_kernels.backends import Divergence, Kind, Pair, choose_divergence, torch_divergence

KINDS: dict[float, Kind] = {0.0: "forward_kl", 1.0: "reverse_kl"}  # by TRL's beta; between them it is the JSD's


def fused_divergence(trls: type) -> type:
    """A class whose ``apply`` is that of ``trls``, TRL's ``ChunkedDivergenceFunction``, by :func:`linear_divergence`.

    Arguments and result are TRL's: hidden states (N, D), weights (V, D), biases (V,) or None, of student and teacher;
    beta, 0 for KL(p_T ‖ p_S), 1 for KL(p_S ‖ p_T), and the JSD between; the temperature, and the heads' scales and
    caps. Returns (divergence, the student's entropy), (N,) float32, nats; the second has no gradient. Under ZeRO-3,
    whose heads TRL gathers in its own passes, of float64 on a GPU, which plain PyTorch would make, and for arguments
    that only a later TRL has, it is TRL's.
    """

    class FusedDivergence(trls):
        @staticmethod
        def apply(
            student_hidden: Tensor,
            student_weight: Tensor,
            student_bias: Tensor | None,
            teacher_hidden: Tensor,
            teacher_weight: Tensor,
            teacher_bias: Tensor | None,
            beta: float,
            temperature: float = 1.0,
            student_logit_scale: float = 1.0,
            student_final_logit_softcapping: float | None = None,
            teacher_logit_scale: float = 1.0,
            teacher_final_logit_softcapping: float | None = None,
            *later: Any,
        ) -> tuple[Tensor, Tensor]:
            def by_trl() -> tuple[Tensor, Tensor]:
                return trls.apply(  # type: ignore[attr-defined]
                    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, beta,
                    temperature, student_logit_scale, student_final_logit_softcapping, teacher_logit_scale,
                    teacher_final_logit_softcapping, *later,
                )  # fmt: skip

            if later or is_deepspeed_zero3_enabled():
                return by_trl()
            # As TRL does, a head of another dtype is read in that of its hidden states.
            student = Head(
                student_weight.to(student_hidden.dtype), student_bias, student_logit_scale,
                student_final_logit_softcapping,
            )  # fmt: skip
            teacher = Head(
                teacher_weight.to(teacher_hidden.dtype), teacher_bias, teacher_logit_scale,
                teacher_final_logit_softcapping,
            )  # fmt: skip
            operands = student_hidden, student, teacher_hidden, teacher
            kind = KINDS.get(beta, "jsd")
            divergence = Divergence(kind, beta if kind == "jsd" else 0.5)
            if lacks_kernels(Pair(*operands, temperature, divergence)):
                return by_trl()
            found = linear_divergence(
                *operands, kind=kind, beta=divergence.beta, temperature=temperature, return_stats=True
            )
            assert isinstance(found, DivergenceStatistics) and found.student_entropy is not None
            return found.divergence, found.student_entropy

    return FusedDivergence


def lacks_kernels(pair: Pair) -> bool:
    """Whether the pair is on a GPU, and plain PyTorch would make its divergence there: slower than TRL's kernels."""
    return pair.student_hidden.is_cuda and choose_divergence("auto", pair) is torch_divergence
