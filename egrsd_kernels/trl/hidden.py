"""Hidden states instead of logits: reading a causal language model just below its LM head."""

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def hand_out_hidden_states(model: nn.Module) -> None:
    """Let ``model(..., read_hidden=f)`` return ``f(hidden, weight, bias)`` instead of making logits.

    hidden is (B, L, D) after the last norm; weight (V, D) and bias (V,) or None are the head's. f runs inside the
    model's forward, so DDP, FSDP and DeepSpeed see an ordinary pass through their wrapper: the weights are there,
    gradients are reduced, and mixed precision casts only what f returns.
    """
    original = model.forward

    def forward(self, *args, read_hidden: Callable[[Tensor, Tensor, Tensor | None], Any] | None = None, **kwargs):
        if read_hidden is None:
            return original(*args, **kwargs)
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        head = self.get_output_embeddings()
        with _gathered(head.weight, head.bias) as (weight, bias):
            return read_hidden(hidden, weight, bias)

    # generate() validates its arguments against the signature. Not functools.wraps: Accelerate unwraps what has a
    # __wrapped__, and would take this off with its own wrappers.
    forward.__signature__ = inspect.signature(type(model).forward)
    model.forward = types.MethodType(forward, model)


@contextmanager
def _gathered(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The head's parameters, whole where FSDP2 or ZeRO-3 has sharded them."""
    if hasattr(weight, "full_tensor"):
        yield weight.full_tensor(), None if bias is None else bias.full_tensor()
    elif hasattr(weight, "ds_status"):
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        with maybe_gather_lm_head_ctx(weight, bias):
            yield weight, bias
    else:
        yield weight, bias
