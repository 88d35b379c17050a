"""From a batch of the trainer to :class:`egrsd_kernels.rollouts.Rollout`."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from egrsd_kernels import TokenStats
from egrsd_kernels.rollouts import Rollout


def rollout_file(output_dir: str, step: int) -> Path:
    """The file of an optimizer step's rollouts. It is written whole: a resumed run replaces those it repeats."""
    return Path(output_dir, "rollouts", f"rollouts-step{step:06d}.jsonl")


def rollouts_of(
    inputs: dict[str, Any],
    mask: Tensor,
    stats: TokenStats,
    step: int,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Rollout]:
    """One for each row of a micro-batch, titled where its response was cut off; mask and the stats are (B, T).

    They have the tokens of the mask: what tools and environments answered is left out.
    """
    stats = TokenStats(*(value.cpu() for value in stats))
    rollouts = []
    for row, own in enumerate(mask.bool().cpu()):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
        rollouts.append(
            Rollout.from_stats(
                TokenStats(*(value[row : row + 1, own] for value in stats)),
                0,
                prompt=tokenizer.decode(prompt),
                tokens=[tokenizer.decode([token]) for token in inputs["completion_ids"][row].cpu()[own].tolist()],
                reward=None if math.isnan(reward := inputs["reward"][row].item()) else reward,
                advantage=inputs["advantages"][row].item(),
                reference=inputs["reference"][row],
                title="truncated" if inputs["truncated"][row] else "",
                vocab_size=vocab_size,
                step=step,
            )
        )
    return rollouts
