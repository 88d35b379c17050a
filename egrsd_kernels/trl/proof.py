"""The proof that the trainer's loss reads what the model makes of its logits: that of ``egrsd_kernels.models``."""

from typing import Any

from accelerate.utils import is_peft_model
from torch import Tensor, nn

from egrsd_kernels.models import ModelError
from egrsd_kernels.models.proof import Found, our_logits, prove


def prove_head(model: Any) -> float | None:
    """The model's softcap, None where it has none, once its logits are shown to be h·Wᵀ + b, softcapped.

    Args:
        model: a causal language model whose forward hands out hidden states, with or without PEFT adapters. Weights,
            modes and random states are afterwards what they were.

    Raises:
        ModelError: in one line, with the difference in nats or with what follows the head and is not supported.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    name = type(base).__name__
    head = base.get_output_embeddings()
    if getattr(type(head), "forward", None) is not nn.Linear.forward:  # which FSDP2's own class still has
        raise ModelError(
            f"model: expected a plain nn.Linear as LM head, got {type(head).__name__}: leave the head out of "
            "modules_to_save, target_modules and quantisation"
        )

    def more(input_ids: Tensor) -> dict[str, Tensor]:
        """What the trainer passes beside the tokens of an unpadded row."""
        mask = input_ids.new_ones(input_ids.shape)
        return {"attention_mask": mask, "position_ids": mask.cumsum(1) - 1}

    def ours(found: Found, arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """From the hidden states that the trainer reads, which are the backbone's."""
        return model(**arguments, read_hidden=lambda h, weight, bias: our_logits(0.0, h, found.frame(weight, bias)))

    found = prove(model, ours, more)
    if found.factor != 1:
        raise ModelError(
            f"model: {name}: it multiplies its logits by {found.factor:.6g} behind the head, which is not supported"
        )
    return found.softcap
