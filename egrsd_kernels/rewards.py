"""The verifiable reward, shaped by length (arXiv 2605.13255)."""

import torch
from torch import Tensor


def length_shaped_reward(correct: Tensor, lengths: Tensor, max_length: int, beta: float = 0.5) -> Tensor:
    """r = 1[correct] · (1 + β_L (1 − |y| / L_max)): a correct answer earns more the shorter it is.

    A wrong answer earns 0, and so does one that no verifier could judge: pass False for it. Every reward therefore lies
    in {0} ∪ [1, 1 + β_L].

    Args:
        correct: (B,) bool, or 0/1.
        lengths: (B,) response lengths |y| in tokens.
        max_length: L_max, the completion cap in tokens.
        beta: β_L, the largest bonus. 0 gives the bare 0/1 reward.

    Returns:
        (B,) float32 on the device of ``correct``.
    """
    for name, tensor in (("correct", correct), ("lengths", lengths)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if correct.shape != lengths.shape:
        raise ValueError(f"lengths: expected the shape of correct, {tuple(correct.shape)}, got {tuple(lengths.shape)}")
    if max_length <= 0:
        raise ValueError(f"max_length: expected a positive number of tokens, got {max_length}")
    if beta < 0:
        raise ValueError(f"beta: expected at least 0, got {beta}")
    # On a GPU these two checks would make the host wait, so they look at CPU tensors only.
    if correct.device.type == "cpu" and not ((correct == 0) | (correct == 1)).all():
        raise ValueError("correct: expected bool or 0/1 values (False for an answer that cannot be verified)")
    if lengths.device.type == "cpu" and not ((lengths >= 0) & (lengths <= max_length)).all():
        raise ValueError(f"lengths: expected values in [0, max_length = {max_length}], got {lengths.tolist()}")

    used = lengths.to(device=correct.device, dtype=torch.float32) / max_length
    return correct.float() * (1 + beta * (1 - used))
