"""The alignment of the teacher's positions with the student's (arXiv 2605.13255).

Student and teacher read the same response y behind different prompts: the student behind x, the teacher behind x and a
reference solution s*. Token y_t is predicted by the hidden state one position *before* it, and that position differs
between the two:

    student   x  x  x  y0 y1 y2 .          response_positions -> 2 3 4
    teacher   x  x  x  s* s* s* s* q  y0 y1 y2   response_positions -> 7 8 9

:func:`align_responses` builds both padded batches and these positions; :func:`response_hidden` gathers the two hidden
states of each response token into (B, T, D) tensors whose entries [b, t] belong to the same token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from egrsd_kernels import checks
from egrsd_kernels.checks import expect


@dataclass(frozen=True)
class AlignedBatch:
    """One batch of responses, ready for both models; T is the longest response.

    ``student`` and ``teacher`` are keyword arguments for a model: input_ids, attention_mask and position_ids, (B, L_S)
    and (B, L_T). Everything else is (B, T): ``target_ids`` (−100 at padding), ``mask`` (bool) and the positions whose
    hidden states predict the targets.
    """

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    student_positions: Tensor
    teacher_positions: Tensor
    target_ids: Tensor
    mask: Tensor

    def to(self, device: torch.device | str) -> "AlignedBatch":
        """The same batch on ``device``."""
        moved: dict[str, Any] = {
            name: {key: tensor.to(device) for key, tensor in value.items()}
            if isinstance(value, dict)
            else value.to(device)
            for name, value in vars(self).items()
        }
        return replace(self, **moved)


def align_responses(
    student_prompts: Sequence[Sequence[int]],
    teacher_prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_token_id: int,
    padding_side: Literal["left", "right"] = "right",
) -> AlignedBatch:
    """Append each response to its student's and its teacher's prompt, pad both, and say where each token is predicted.

    Args:
        student_prompts: token ids of x, one non-empty sequence a rollout.
        teacher_prompts: token ids of x and s*, e.g. of :func:`egrsd_kernels.rl.teacher_messages`.
        responses: token ids of y. An empty response gives a row without a valid token.
        pad_token_id: what fills the rest; attention never sees it. An integer of at least 0.
        padding_side: the same for both models. It does not change which token a position belongs to.

    Sequences are lists or tuples of integers of at least 0, or 1-d integer arrays or tensors.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it expects.
    """
    given = {"student_prompts": student_prompts, "teacher_prompts": teacher_prompts}
    prompts = {name: checks.token_ids(name, value) for name, value in given.items()}
    responses = checks.token_ids("responses", responses)
    counts = *map(len, prompts.values()), len(responses)
    if len(set(counts)) > 1:
        raise ValueError(
            "expected as many student_prompts as teacher_prompts and responses, "
            f"got {counts[0]}, {counts[1]} and {counts[2]}"
        )
    if not responses:
        raise ValueError("responses: expected at least one")
    for name, rows in prompts.items():
        if not all(rows):
            raise ValueError(f"{name}: expected no empty prompt: its last token predicts the first response token")

    student, teacher = (
        _padded(
            [prompt + response for prompt, response in zip(rows, responses, strict=True)], pad_token_id, padding_side
        )
        for rows in prompts.values()
    )
    lengths = torch.tensor([len(response) for response in responses])
    targets = _pad(responses, -100, "right")
    return AlignedBatch(
        student=student,
        teacher=teacher,
        student_positions=response_positions(student["attention_mask"], lengths),
        teacher_positions=response_positions(teacher["attention_mask"], lengths),
        target_ids=targets,
        mask=torch.arange(targets.shape[1]) < lengths[:, None],
    )


def pad_inputs(
    sequences: Sequence[Sequence[int]], pad_token_id: int, padding_side: Literal["left", "right"] = "right"
) -> dict[str, Tensor]:
    """input_ids, attention_mask and position_ids, (B, L) int64 each; positions count from a row's first real token.

    Arguments as in :func:`align_responses`; at least one sequence.
    """
    sequences = checks.token_ids("sequences", sequences)
    if not sequences:
        raise ValueError("sequences: expected at least one")
    return _padded(sequences, pad_token_id, padding_side)


def _padded(sequences: list[list[int]], pad_token_id: int, padding_side: str) -> dict[str, Tensor]:
    """:func:`pad_inputs` of checked sequences."""
    pad_token_id = checks.integer("pad_token_id", pad_token_id, low=0)
    known = isinstance(padding_side, str) and padding_side in ("left", "right")
    expect(known, "padding_side", padding_side, "'left' or 'right'")
    attention_mask = _pad([[1] * len(sequence) for sequence in sequences], 0, padding_side)
    return {
        "input_ids": _pad(sequences, pad_token_id, padding_side),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
    }


def response_positions(attention_mask: Tensor, response_lengths: Tensor, width: int | None = None) -> Tensor:
    """Where the hidden state that predicts each response token stands.

    A row's response is its last ``response_lengths[b]`` attended tokens, and a token is predicted at the attended
    position before it. Only the order of attended positions counts, so padding may stand left, right, on both sides, or
    between prompt and response.

    Args:
        attention_mask: (B, L), bool, or 0/1 in an integer or floating-point dtype, of prompt and response together.
        response_lengths: (B,), of any integer dtype: tokens in each response, from 0 on and fewer than the row's
            attended tokens.
        width: T, an integer of at least 0. Default: the longest response; on a GPU the host waits for that number, and
            where PyTorch traces it cannot be had, so pass it where it is known.

    Returns:
        (B, T) int64. Entries past a row's response are in range but mean nothing.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it expects. Values of both tensors are checked
            where :func:`egrsd_kernels.fused_egrsd_loss` checks values.
    """
    attended = checks.mask_of("attention_mask", attention_mask)
    expect(attended.ndim == 2 and attended.shape[1] > 0, "attention_mask", attention_mask, "shape (B, L), L > 0")
    checks.tensor("response_lengths", response_lengths, shape=attended.shape[:1])
    integers = response_lengths.dtype in checks.INTEGERS
    expect(integers, "response_lengths", response_lengths, "an integer tensor", TypeError)
    lengths = response_lengths.to(device=attended.device, dtype=torch.int64)
    if checks.values_checked(attended):
        tokens = attended.sum(1)
        if not ((lengths >= 0) & (lengths < tokens)).all():
            raise ValueError(
                "response_lengths: expected at least 0 and fewer tokens than each row attends to (a prompt of at least "
                f"one), got {lengths.tolist()} of {tokens.tolist()}"
            )
    if width is None:
        expect(lengths.numel() > 0, "attention_mask", attention_mask, "shape (B, L) with B > 0, or a width")
        width = int(lengths.max())
    width = checks.integer("width", width, low=0)
    # A stable sort moves the attended positions to the front of each row and keeps their order.
    positions = (~attended).long().argsort(dim=1, stable=True)
    first = attended.sum(1) - lengths - 1
    rank = first[:, None] + torch.arange(width, device=attended.device)
    return positions.gather(1, rank.clamp(max=attended.shape[1] - 1))


def response_hidden(hidden: Tensor, positions: Tensor) -> Tensor:
    """The hidden states (B, T, D) at ``positions`` (B, T) of ``hidden`` (B, L, D); differentiable in ``hidden``.

    Args:
        hidden: bfloat16, float16, float32 or float64.
        positions: of :func:`response_positions`, any integer dtype, in [0, L).

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it expects. Positions are checked where
            :func:`egrsd_kernels.fused_egrsd_loss` checks values.
    """
    checks.tensor("hidden", hidden)
    expect(hidden.dtype in checks.FLOATS, "hidden", hidden, checks.FLOAT_TENSOR, TypeError)
    checks.tensor("positions", positions, like=hidden)
    expect(positions.dtype in checks.INTEGERS, "positions", positions, "an integer tensor", TypeError)
    if hidden.ndim != 3 or positions.ndim != 2 or hidden.shape[0] != positions.shape[0]:
        raise ValueError(
            "expected hidden (B, L, D) and positions (B, T) of the same B, "
            f"got {tuple(hidden.shape)} and {tuple(positions.shape)}"
        )
    positions, length = positions.long(), hidden.shape[1]
    if checks.values_checked(positions):
        outside = (positions < 0) | (positions >= length)
        checks.refuse("positions", positions, positions, outside, f"positions in [0, {length})")
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def _pad(rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
    width = max(len(row) for row in rows)
    padded = torch.full((len(rows), width), value, dtype=torch.int64)
    for out, row in zip(padded, rows, strict=True):
        start = width - len(row) if side == "left" else 0
        out[start : start + len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return padded
