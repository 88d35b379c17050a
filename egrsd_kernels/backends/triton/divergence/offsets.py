"""What the exponentials of student and teacher are relative to, before anything is known of a row.

The student's offset is the target's logit: Σ 2^(z - z_y) is 1/p_y, which a sampled token keeps small. Without targets
it is the mean logit plus log2 V, which no logsumexp is below. The teacher's is the student's less the difference of
the two mean logits, so that r' has its mean over the vocabulary at 0: float16 rounds relative to |r'|, and a target
whose two probabilities lie far apart would push all the other ratios away from 0.

The mean logit is h W̄ + b̄ of a sample of the vocabulary, exact but for a softcap. It need not be exact: any offsets give
the same result, but for the rounding of r'; and rows whose rounding would show are done again with exact ones.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from egrsd_kernels.head import Head

from ..common import block_of, logits_of
from ..gather import Chunk

SAMPLE = 8192  # entries of the vocabulary, which put the mean's error at a hundredth of the spread


class MeanRow:
    """W̄ (D,) and b̄ (1,) of a head, float32: the means over SAMPLE entries of the vocabulary, evenly spaced."""

    def __init__(self, head: Head):
        step = max(1, head.weight.shape[0] // SAMPLE)
        self.weight = head.weight[::step].mean(0, dtype=torch.float32)
        self.bias = None
        if head.bias is not None:
            bias = head.bias[::step].float()
            finite = bias.isfinite()  # a word forbidden by -inf has no part in the mean
            self.bias = (torch.where(finite, bias, 0).sum() / finite.sum().clamp(min=1)).view(1)


@triton.jit
def mean_logit(hidden, slot, mean, bias, softcap, scale, D, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """The logit of a row (D,) of the chunk by the mean row, in units of ln 2."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        h = tl.load(hidden + slot.to(tl.int64) * D + d, mask=d < D, other=0.0)
        total += h.to(tl.float32) * tl.load(mean + d, mask=d < D, other=0.0)
    product = tl.sum(total, 0)
    if bias is not None:
        product += tl.load(bias)
    z, _ = logits_of(product, softcap, scale, SOFTCAP)
    return z


@triton.jit
def offset_kernel(
    student, teacher, student_mean, teacher_mean, student_bias, teacher_bias, student_offset, teacher_offset,
    row_counts, D, TEACHER_D, student_cap, student_scale, teacher_cap, teacher_scale, log_vocabulary,
    TARGETS: tl.constexpr, STUDENT_CAP: tl.constexpr, TEACHER_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both offsets (n_slots,) float32 of a row. TARGETS: the student's is there already. Grid: (n_slots,).

    student: (n_slots, D), teacher: (n_slots, TEACHER_D), means: of these sizes, float32, biases: (1,) or None.
    """
    slot = tl.program_id(0)
    if slot < tl.load(row_counts):
        s = mean_logit(student, slot, student_mean, student_bias, student_cap, student_scale, D, STUDENT_CAP, BLOCK)
        t = mean_logit(
            teacher, slot, teacher_mean, teacher_bias, teacher_cap, teacher_scale, TEACHER_D, TEACHER_CAP, BLOCK
        )
        if TARGETS:
            offset = tl.load(student_offset + slot)
        else:
            offset = s + log_vocabulary
            tl.store(student_offset + slot, offset)
        # The same bits as the student's where both models are the same.
        tl.store(teacher_offset + slot, offset - (s - t))


def make_offsets(student: Chunk, teacher: Chunk, means: tuple[MeanRow, MeanRow], targets: bool) -> None:
    """Of the rows of two gathered chunks; targets: whether they have any."""
    offset_kernel[(student.rows,)](
        student.hidden, teacher.hidden, means[0].weight, means[1].weight, means[0].bias, means[1].bias,
        student.offset, teacher.offset, student.row_counts, student.D, teacher.D,
        student.softcap or 0.0, student.logit_scale, teacher.softcap or 0.0, teacher.logit_scale,
        math.log2(student.V), TARGETS=targets, STUDENT_CAP=student.softcap is not None,
        TEACHER_CAP=teacher.softcap is not None, BLOCK=block_of(max(student.D, teacher.D), 1024),
        num_warps=4, enable_fp_fusion=False,  # equal models have equal means
    )  # fmt: skip
