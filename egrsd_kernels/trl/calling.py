"""How the trainer calls a model, student and teacher alike, and the head that this very call is proved for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from egrsd_kernels.models import ModelError


def inputs_of(ids: Tensor, mask: Tensor, router_loss: bool, images: bool = False) -> dict[str, Any]:
    """What a model is called with for ids (B, L) under an attention mask (B, L).

    images: that it reads them, and knows itself where their tokens are.
    """
    inputs = {"input_ids": ids, "attention_mask": mask}
    if not images:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return inputs | ({"output_router_logits": True} if router_loss else {})


class Called(nn.Module):
    """``head_of(Called(model, router_loss))``: the model's head, proved with what the trainer calls the model with."""

    def __init__(self, model: nn.Module, router_loss: bool, images: bool = False):
        super().__init__()
        self.module = model  # below a module of this name head_of finds the model
        self.router_loss = router_loss
        self.images = images

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        inputs = inputs_of(input_ids, torch.ones_like(input_ids), self.router_loss, self.images)
        output = self.module(**inputs, **options)
        if self.router_loss and not isinstance(getattr(output, "aux_loss", None), Tensor):
            raise ModelError("it returns no load-balancing loss: set router_aux_loss_coef to 0 to train without one")
        return output


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """The model in training mode, where a head with dropout is refused; each module is in its own afterwards."""
    evaluating = [module for module in model.modules() if not module.training]
    for module in evaluating:
        module.training = True
    try:
        yield
    finally:
        for module in evaluating:
            module.training = False
