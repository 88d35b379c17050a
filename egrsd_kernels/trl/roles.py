"""Who is trained, and by whom: settled on a few tokens, whatever the architecture and the adapters."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from .proof import ModelError, evaluating
from .teacher import AdaptersOff, refuse_trained_teacher

if TYPE_CHECKING:
    from .trainer import EGRSDTrainer

PADDING, TOKENS = 16, 4
# Readings of one row differ by a few roundings. What reads its padding is off by tenths.
ROUNDINGS, NEGLIGIBLE = 4, 1e-3


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


def weights_at_hand(trainer: "EGRSDTrainer") -> bool:
    """Whether the model can be read before training begins: neither sharded nor still to be moved to its device."""
    kind = trainer.accelerator.device.type
    return not trainer._sharded and all(weight.device.type == kind for weight in trainer.model.parameters())


def check_roles(trainer: "EGRSDTrainer") -> None:
    """A ModelError where the student trains nothing, or the teacher depends on what is trained or on padding."""
    if not trainer._sharded:  # a forward with gradients and no backward would disturb FSDP
        _check_weights(trainer)
    if _may_pad(trainer):
        _check_padding(trainer)


def _check_weights(trainer: "EGRSDTrainer") -> None:
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    with evaluating(trainer.model):
        if not _used(trainer, trained):
            raise ModelError(
                "model: expected trainable weights that its forward uses, got none; "
                "its adapters are disabled, merged, or others than the active one"
            )
    if isinstance(trainer.teacher, AdaptersOff):
        with trainer._as_teacher():
            refuse_trained_teacher(_used(trainer, trained))


def _used(trainer: "EGRSDTrainer", trained: dict[str, Tensor]) -> list[str]:
    """The names of those weights that a reading of a few tokens depends on."""
    for weight in trained.values():
        weight.requires_grad_(True)  # disable_adapter() has just turned it off
    with torch.enable_grad():
        leaves = {id(leaf) for leaf in _leaves(_read(trainer, *_row(trainer)))}
    return [name for name, weight in trained.items() if id(weight) in leaves]


def _leaves(outputs: Iterable[Tensor | None]) -> Iterator[Tensor]:
    """The tensors whose gradients a backward pass would make, without the pass and its memory."""
    outputs = [output for output in outputs if output is not None and output.requires_grad]
    yield from (output for output in outputs if output.is_leaf)
    nodes, seen = [output.grad_fn for output in outputs], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                yield node.variable
            nodes += [before for before, _ in node.next_functions]


def _may_pad(trainer: "EGRSDTrainer") -> bool:
    """Whether a process ever generates for prompts of different lengths at once."""
    args = trainer.args
    sizes = args.per_device_train_batch_size * args.steps_per_generation, args.per_device_eval_batch_size
    several = [n % size for n, size in zip((trainer.num_generations, trainer.num_generations_eval), sizes, strict=True)]
    return any(several) or trainer.pad_to_multiple_of is not None


def _check_padding(trainer: "EGRSDTrainer") -> None:
    def distance(a: Tensor, b: Tensor) -> float:
        return ((a - b).norm(dim=-1) / b.norm(dim=-1)).max().item()

    with trainer._as_teacher(), torch.no_grad():
        alone = _hidden(trainer, *_row(trainer))
        padded = _hidden(trainer, *_row(trainer, PADDING))
        # How far roundings carry in this model: the same row with its embeddings rounded once more.
        model = trainer.accelerator.unwrap_model(trainer.model)
        hook = model.get_input_embeddings().register_forward_hook(_round_again)
        try:
            rounded = _hidden(trainer, *_row(trainer))
        finally:
            hook.remove()
    off = distance(padded, alone)
    if not off <= max(NEGLIGIBLE, ROUNDINGS * distance(rounded, alone)):
        raise ModelError(
            f"model: reads a padded row differently from the same row alone (hidden states off by {off:.1%}); generate "
            "for one prompt at a time: per_device_train_batch_size * steps_per_generation and "
            "per_device_eval_batch_size must divide num_generations, without pad_to_multiple_of"
        )


def _round_again(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    kind = output.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else output.dtype
    sign = 1 - 2 * (torch.arange(output.shape[-1], device=output.device) % 2)
    return output * (1 + sign * torch.finfo(dtype).eps).to(output.dtype)


def _row(trainer: "EGRSDTrainer", padding: int = 0) -> list[Tensor]:
    """What ``_read`` takes of a row of a few tokens; with padding, of a longer one below it too."""
    device, length = trainer.accelerator.device, padding + 1 + TOKENS
    vocabulary = min(trainer._vocab_size, len(trainer.processing_class))
    ids = (torch.arange(length, device=device) * 31 % vocabulary).flip(0).expand(2, -1).clone()
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = trainer._pad_token_id, 0
    rows = slice(2 if padding else 1)
    return [
        part for cut in (slice(padding + 1), slice(padding + 1, None)) for part in (ids[rows, cut], mask[rows, cut])
    ]


def _read(trainer: "EGRSDTrainer", *row: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return trainer._read(trainer.model, *row, lambda *read: read)


def _hidden(trainer: "EGRSDTrainer", *row: Tensor) -> Tensor:
    return _read(trainer, *row)[0][0].float()
