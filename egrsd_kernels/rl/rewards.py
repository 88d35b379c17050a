"""The verifiable reward, shaped by length (arXiv 2605.13255)."""

import torch
from torch import Tensor

from egrsd_kernels import checks
from egrsd_kernels.checks import expect, number


def length_shaped_reward(correct: Tensor, lengths: Tensor, max_length: float, beta: float = 0.5) -> Tensor:
    """r = 1[correct] · (1 + β_L (1 − |y| / L_max)): a correct answer earns more the shorter it is.

    A wrong answer earns 0, and so does one that no verifier could judge: pass False for it. Every reward therefore lies
    in {0} ∪ [1, 1 + β_L].

    Args:
        correct: (B,) bool, or 0/1 in an integer dtype, bfloat16, float16, float32 or float64.
        lengths: (B,) response lengths |y| in tokens, from 0 to max_length; any of those dtypes, bool apart, any device.
        max_length: L_max, the completion cap in tokens. A number above 0.
        beta: β_L, the largest bonus. 0 gives the bare 0/1 reward. A number of at least 0.

    Returns:
        (B,) float32 on the device of ``correct``.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it expects. Values of correct and lengths are
            checked where :func:`egrsd_kernels.fused_egrsd_loss` checks values.
    """
    right = checks.mask_of("correct", correct, why=" (0 for an answer that cannot be verified)")
    checks.tensor("lengths", lengths, shape=correct.shape)
    expect(lengths.dtype in (*checks.INTEGERS, *checks.FLOATS), "lengths", lengths, "a tensor of lengths", TypeError)
    max_length = number("max_length", max_length, low=0, strict=True)
    beta = number("beta", beta, low=0)
    if checks.values_checked(lengths):
        outside = ~((lengths >= 0) & (lengths <= max_length))  # NaN too
        checks.refuse("lengths", lengths, lengths, outside, f"values in [0, max_length = {max_length:g}]")

    used = lengths.to(device=correct.device, dtype=torch.float32) / max_length
    return right.float() * (1 + beta * (1 - used))
