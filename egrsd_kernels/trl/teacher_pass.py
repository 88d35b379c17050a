"""The teacher's reading of fresh rollouts: what it is told in each context, and log p and entropy of their tokens.

All functions are of an :class:`.trainer.EGRSDTrainer`.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .context import Reader, context_window
from .divergence import TeacherStates
from .evidence import learned
from .images import MODEL_IMAGES, TOKEN_TYPES, check_prompt, token_types
from .rewards import excerpt
from .teacher import pad_prompts


def readers_of(trainer: Any, own: str) -> dict[str, Reader]:
    """By context, what reads and checks a row; without a teacher, one under no name for the student's prompt.

    own: what to name in a refusal where the trainer words the teacher's prompt itself.
    """
    contexts = trainer._contexts
    words = {name: own if function == trainer.teacher_prompt else name for name, function in contexts.items()}
    colocated = trainer.use_vllm and trainer.vllm_mode == "colocate"
    return {
        name: Reader(
            trainer.processing_class,
            {"chat_template": trainer.chat_template, **trainer.chat_template_kwargs},
            contexts.get(name, lambda example: example["prompt"]),
            trainer.args.solution_column,
            context_window(trainer.model.config),
            trainer.max_completion_length,
            word,
            trainer.args.vllm_max_model_length if colocated else None,
            trainer._is_vlm,
            lambda example: _tools_of(trainer, example),
            trainer.environment_factories is not None,
            trainer._teacher_window,
        )
        for name, word in (words or {"": own}).items()
    }


def _tools_of(trainer: Any, example: Mapping[str, Any]) -> Sequence[Any] | None:
    """The tools that the row's prompt is rendered with."""
    if trainer.environment_factories is None:
        tools: Sequence[Any] | None = trainer.tools
        return tools
    name = example.get("environment") if trainer._multi_environment else None
    if name not in trainer._env_tools:
        known = ", ".join(map(str, trainer._env_tools))
        raise ValueError(f"environment: expected one of {known}, as environment_factory has them, got {name!r}")
    own: Sequence[Any] = trainer._env_tools[name]
    return own


def check_rendered(trainer: Any, prompts: Sequence[Any], prompt_ids: Sequence[Sequence[int]]) -> None:
    """A ValueError where rollout_func has other prompt ids than the chat template gives."""
    rendered = trainer._tokenize_prompts(copy.deepcopy(prompts))[0]
    for prompt, ids, expected in zip(prompts, prompt_ids, rendered, strict=True):
        if list(ids) != list(expected):
            raise ValueError(
                "rollout_func: expected prompt_ids as the chat template renders them, since the teacher's are "
                f"made from the same messages, got others for {excerpt(prompt)}"
            )


def read_rollouts(
    trainer: Any,
    readers: Mapping[str, Reader],
    names: Sequence[str],
    rows: Sequence[dict[str, Any]],
    output: dict[str, Any],
) -> None:
    """Put the teacher's statistics of a generation's rollouts into it, named after their context.

    CONTEXT_logp and CONTEXT_entropy, (B, T) each, nats; with a divergence CONTEXT_hidden (B, T, D), beside the head
    that reads them, the trainer's ``_teacher_head``.

    Args:
        readers: of :func:`readers_of`.
        names, rows: of the dataset, with the prompts that generation was given.
    """
    device = trainer.accelerator.device
    completion = output["completion_ids"], output["completion_mask"], learned(output)
    size = trainer._rows_at_a_time()  # of the student's mode: the teacher's is another
    for context in trainer._contexts:
        prompts, images = _prompts_of(trainer, readers[context], names, rows, output)
        padded = pad_prompts(prompts, trainer._pad_token_id, trainer.pad_to_multiple_of)
        if trainer.args.divergence is not None:
            trainer._teacher_states = TeacherStates(trainer.teacher, device)
        try:
            with trainer._as_teacher() as teacher:
                output[f"{context}_logp"], output[f"{context}_entropy"] = trainer._statistics(
                    teacher, *(x.to(device) for x in padded), *completion, size, **images
                )
            if trainer._teacher_states is not None:
                # The generation is one optimizer step's: the head is the same for all of its micro-batches.
                output[f"{context}_hidden"], trainer._teacher_head = trainer._teacher_states.take()
        finally:
            trainer._teacher_states = None


def _prompts_of(
    trainer: Any, reader: Reader, names: Sequence[str], rows: Sequence[dict[str, Any]], output: dict[str, Any]
) -> tuple[list[list[int]], dict[str, Tensor]]:
    """A context's prompts as token ids, and what TRL's pass over them takes of images: the student's, there."""
    conversations = reader.read(list(zip(names, rows, strict=True)))
    prompts, _, fields = trainer._tokenize_prompts(conversations)
    if not trainer._is_vlm:
        return prompts, {}
    for name, row, conversation, ids in zip(names, rows, conversations, prompts, strict=True):
        check_prompt(name, reader, row["prompt"], conversation, ids, output["completion_ids"].shape[1])
    images = {key: output[key] for key in (*MODEL_IMAGES, "num_images", "num_tiles") if key in output}
    kinds = None
    if trainer._tool_images:  # which TRL may have left out, and then all others with them
        shown = "pixel_values" in output
        kinds = {trainer._image_pad_token_id: 1, trainer._video_pad_token_id: 2} if shown else {}
    for key in TOKEN_TYPES:  # of the prompt's tokens, where images are; the student's are of its own
        if key in output:
            completion = output["completion_ids"]
            types = token_types(prompts, fields.get(key), completion, kinds, trainer.pad_to_multiple_of)
            images[key] = types.to(output[key])
    return prompts, images
