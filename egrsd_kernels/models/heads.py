"""The public functions that read a model at its head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from egrsd_kernels.head import Head

from .proof import found_in
from .reading import run

Result = TypeVar("Result")


def with_head(model: nn.Module, function: Callable[[Tensor, Head], Result], /, **inputs: Any) -> tuple[Result, Any]:
    """Run the model's own forward, and ``function(hidden, head)`` where it would make logits.

    What the model does before its head (a transform, image tokens, scales) and beside it (a router's loss) is its own.
    The first call for a model proves its head as :func:`head_of` does, and the finding is kept with the model.

    Args:
        model: as :func:`head_of` takes it, in the mode and the grad mode that it has.
        function: of hidden (B, L, D), as the head would read them, and a :class:`Head` whose weights are whole here and
            only here: gathered where FSDP2 or DeepSpeed has sharded them. It returns a tensor, or tensors in tuples,
            lists and dicts. Rows that it does not ask for, by an index, cost nothing.
        inputs: the model's. ``logits_to_keep`` restricts the rows where the model knows it. ``use_cache`` is False
            unless it is given; ``labels`` would need logits, and are refused.

    Returns:
        (result, output): the function's result, with gradients that go the way of the model's own, and the model's
            output, ``aux_loss`` for example, without its logits.

    Raises:
        ModelError: as :func:`head_of`; and where the head's weights are no whole matrix in the model's forward, in one
            line.
        ValueError: for labels.
    """
    if inputs.get("labels") is not None:
        raise ValueError("labels: expected none, a loss of the model's own would need logits")
    found = found_in(model)
    return run(model, found.path, found.frame, function, inputs)


def read_hidden(model: nn.Module, /, **inputs: Any) -> Tensor:
    """The hidden states (B, L, D) that the model's head would read: :func:`with_head` with nothing done there.

    What is computed from them, and from :func:`head_of`'s weights, is outside of the model's forward. DDP, FSDP2 and
    DeepSpeed train a head right only by :func:`with_head`.
    """
    hidden, _ = with_head(model, lambda hidden, head: hidden, **inputs)
    return hidden
