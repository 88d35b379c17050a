"""Who is trained, and by whom: settled on a few tokens, whatever the architecture and the adapters."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from egrsd_kernels.models import ModelError
from egrsd_kernels.models.proof import evaluating

from .teacher import refuse_trained_teacher

PADDING, TOKENS = 16, 4
# A model that ignores its padding reads a row with and without it alike: the difference is below that of one rounding
# of its embeddings, and mostly 0 in 16 bits. A model that reads its padding is off by tenths.
ROUNDINGS, NEGLIGIBLE = 3, 1e-3


def check_trained(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """A ModelError where no weight of the model would be trained."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if not trained:
        adapters = is_peft_model(model)
        remedy = (
            "PeftModel.from_pretrained needs is_trainable=True" if adapters else "unfreeze it, or pass a peft_config"
        )
        raise ModelError(f"model: expected trainable weights, got none; {remedy}")
    if optimizer is not None:
        held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        if held.isdisjoint(map(id, trained)):
            raise ModelError(
                "optimizers: expected an optimizer of the model's trainable weights, got one with none of them"
            )


def weights_at_hand(model: nn.Module, device: torch.device) -> bool:
    """Whether an unsharded model can be read before training begins: it is not still to be moved to ``device``."""
    return all(weight.device.type == device.type for weight in model.parameters())


@dataclass(frozen=True)
class Roles:
    """Student and teacher, and how a step reads them.

    ``model``: the student. ``embeddings``: of a model, its input embeddings. ``as_teacher``: while what it returns is
    entered, the model that it gives is the teacher. ``read``: a model's hidden states and its head's tensors, for
    prompt_ids, prompt_mask, completion_ids and completion_mask. ``vocabulary``: every id below it is a token's.
    """

    model: nn.Module
    embeddings: Callable[[nn.Module], nn.Module]
    as_teacher: Callable[[], AbstractContextManager[nn.Module]]
    read: Callable[..., tuple[Tensor, ...]]
    vocabulary: int
    pad_token_id: int
    device: torch.device

    def check_student(self) -> None:
        """A ModelError where no trained weight takes part in what the model computes."""
        with evaluating(self.model):
            if not self._used(self._trained()):
                raise ModelError(
                    "model: expected trainable weights that its forward uses, got none; "
                    "its adapters are disabled, merged, or others than the active one"
                )

    def check_adapters_off(self) -> None:
        """A ValueError where the teacher, the model without its adapters, depends on what is trained."""
        trained = self._trained()
        with self.as_teacher():
            refuse_trained_teacher(self._used(trained))

    def check_padding(self, name: str, reading: Callable[[], AbstractContextManager[nn.Module]]) -> None:
        """A ModelError where the model of ``reading`` reads a padded row differently from the same row alone."""

        def distance(a: Tensor, b: Tensor) -> float:
            return ((a - b).norm(dim=-1) / b.norm(dim=-1)).max().item()

        with reading() as model, torch.no_grad():
            alone, padded = self._hidden(model), self._hidden(model, PADDING)
            # How far roundings carry in this model: the same row with its embeddings rounded once more.
            hook = self.embeddings(model).register_forward_hook(_round_again)
            try:
                rounded = self._hidden(model)
            finally:
                hook.remove()
        off = distance(padded, alone)
        if not off <= max(NEGLIGIBLE, ROUNDINGS * distance(rounded, alone)):
            raise ModelError(
                f"{name}: reads a padded row differently from the same row alone (hidden states off by {off:.1%}); "
                "generate for one prompt at a time: per_device_train_batch_size * steps_per_generation and "
                "per_device_eval_batch_size must divide num_generations, without pad_to_multiple_of"
            )

    def _trained(self) -> dict[str, Tensor]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def _used(self, trained: dict[str, Tensor]) -> list[str]:
        """The names of those weights that a reading of a few tokens depends on."""
        for weight in trained.values():
            weight.requires_grad_(True)  # disable_adapter() has just turned it off
        with torch.enable_grad():
            leaves = {id(leaf) for leaf in _leaves(self.read(self.model, *self._row()))}
        return [name for name, weight in trained.items() if id(weight) in leaves]

    def _hidden(self, model: nn.Module, padding: int = 0) -> Tensor:
        return self.read(model, *self._row(padding))[0][0].float()

    def _row(self, padding: int = 0) -> list[Tensor]:
        """What ``read`` takes of a row of a few tokens; with padding, of a longer one below it too."""
        length = padding + 1 + TOKENS
        ids = (torch.arange(length, device=self.device) * 31 % self.vocabulary).flip(0).expand(2, -1).clone()
        mask = torch.ones_like(ids)
        ids[0, :padding], mask[0, :padding] = self.pad_token_id, 0
        rows = slice(2 if padding else 1)
        cuts = slice(padding + 1), slice(padding + 1, None)
        return [part[rows, cut] for cut in cuts for part in (ids, mask)]


def _leaves(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors whose gradients a backward pass would make, without the pass and its memory."""
    tensors = [output for output in outputs if output.requires_grad]
    yield from (tensor for tensor in tensors if tensor.is_leaf)
    nodes, seen = [tensor.grad_fn for tensor in tensors], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                yield node.variable
            nodes += [before for before, _ in node.next_functions]


def _round_again(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    kind = output.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else output.dtype
    sign = 1 - 2 * (torch.arange(output.shape[-1], device=output.device) % 2)
    return output * (1 + sign * torch.finfo(dtype).eps).to(output.dtype)
