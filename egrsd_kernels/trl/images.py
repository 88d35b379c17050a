"""The images of a teacher's prompts: the student's, in front of other words."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import pad

from .context import Reader, images_of

# What TRL's batches hold of images for the model, and which tokens are theirs.
MODEL_IMAGES = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes",
                "image_position_ids")  # fmt: skip
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


def check_prompt(
    name: str, reader: Reader, prompt: Any, conversation: Any, ids: Sequence[int], completion: int
) -> None:
    """A ValueError where a row's ``conversation`` has other images than its ``prompt``, or no room in the window.

    ids: the conversation's tokens, those of images among them; completion: the tokens behind them.
    """
    expected, found = images_of(prompt), images_of(conversation)
    if len(expected) != len(found) or any(a is not b for a, b in zip(expected, found, strict=True)):
        raise ValueError(
            f"{name}: {reader.teacher}: expected the {len(expected)} images of the prompt in their order, "
            f"got {len(found)}, or others"
        )
    window = reader.window if reader.teacher_window is None else reader.teacher_window
    room = (window or math.inf) - completion
    if len(ids) > room:
        raise ValueError(
            f"{name}: the teacher's prompt has {len(ids)} tokens with its images, and the window has room for "
            f"{room} before the completion; shorten it, or take smaller images"
        )


def token_types(
    prompts: Sequence[Sequence[int]],
    types: Any,
    completion_ids: Tensor,
    kinds: Mapping[int | None, int] | None,
    multiple: int | None,
) -> Tensor:
    """(B, L) of prompts, padded on the left, and completions, as TRL makes them: which tokens images stand for.

    Args:
        types: the processor's, of the prompts.
        kinds: where completions have images, too, the types by token id; TRL then tells all tokens by them.
        multiple: of which the prompts' length is one.
    """
    completion = torch.zeros_like(completion_ids, device="cpu")
    if kinds is not None:
        types = [[kinds.get(token, 0) for token in ids] for ids in prompts]
        completion = torch.tensor([[kinds.get(token, 0) for token in ids] for ids in completion_ids.tolist()])
    rows = [torch.as_tensor(row) for row in types]
    prompt = pad(rows, padding_value=0, padding_side="left", pad_to_multiple_of=multiple)
    return torch.cat([prompt, completion], dim=1)
