"""The public function that reads a model at its head, over a pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from egrsd_kernels.eager import eager
from egrsd_kernels.head import Head
from egrsd_kernels.models import ModelError, with_head
from egrsd_kernels.models.places import language_model
from egrsd_kernels.models.proof import found_in

from .attention import beside, road_of
from .proof import inputs_of, row_limit
from .tree import Pack

Result = TypeVar("Result")


@eager
def packed(
    model: nn.Module, pack: Pack, function: Callable[[Tensor, Head], Result], /, **inputs: Any
) -> tuple[Result, Any]:
    """Run the model's own forward over a pack, and ``function(hidden, head)`` for the targets that were asked for.

    log p of a row and its gradients are what they are for the row alone, unpadded: the first call for a model and an
    attention implementation proves it, on a small model of the same class, and the finding is kept with the model.
    Each pack is a forward of its own, so a loop over packs holds the graph of one:

    >>> for pack in pack_rows(rows, budget=8192, targets=completion_mask):
    ...     logp, _ = packed(model, pack, lambda hidden, head: linear_logp(hidden, head, pack.target_ids))
    ...     loss = -(advantages[pack.target_rows] * logp).sum() / completion_mask.sum()
    ...     loss.backward()

    Dropout draws once for a prefix, and not once for each row.

    Args:
        model: a causal language model of transformers, as :func:`with_head` takes it, whose attention is ``"eager"`` or
            ``"sdpa"``.
        pack: of :func:`pack_rows`, on any device.
        function: of hidden (M, D), the state that predicts each of the pack's M targets, in their order, and a
            :class:`Head`; as :func:`with_head` takes it.
        inputs: the model's further ones, none of which may have an entry for each token.

    Returns:
        (result, output): as :func:`with_head` returns them.

    Raises:
        ModelError: as :func:`with_head`; and in one line, with the difference in nats, where a row in a pack is not
            what it is alone, or where a row is longer than the model's rope lets rows be that stand together.
    """
    base: Any = language_model(model)
    limit, longest = row_limit(model), max(map(len, pack.places))
    if longest > limit and len(pack.rows) > 1:
        raise ModelError(
            f"model: {type(base).__name__}: rows up to {limit:.0f} tokens can be packed, where its rope does not yet "
            f"depend on the longest, got one of {longest}"
        )

    def at_targets(hidden: Tensor, head: Head) -> Result:
        rows = hidden[0].index_select(0, pack.hidden_index.to(hidden.device))
        with beside():
            return function(rows, head)

    found_in(model)  # with its own forwards, before the pack's
    with road_of(base)(pack):
        return with_head(model, at_targets, **inputs_of(pack, base.device), **inputs)
