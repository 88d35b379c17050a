"""Hidden states instead of logits: reading a causal language model just below its LM head."""

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import trl.trainer.utils
from torch import Tensor


def hand_out_hidden_states(model: Any) -> None:
    """Let a causal language model's ``model(..., read_hidden=f)`` return ``f(hidden, weight, bias)``, not logits.

    hidden is (B, L, D) after the last norm; weight (V, D) and bias (V,) or None are the head's. f runs inside the
    model's forward, so DDP, FSDP and DeepSpeed see an ordinary pass through their wrapper: the weights are there,
    gradients are reduced, and mixed precision casts only what f returns.

    A deep copy of the model reads and computes with its own weights, and TRL's fused head, whose copies compute with
    the original's, is taken off. A pickled model comes back as it was without either.
    """
    _take_off_fused_head(model)
    below = model.__dict__.pop("forward", None)  # Accelerate's hooks or autocast, Liger's forward, the user's
    code = getattr(getattr(below, "__func__", None), "__code__", None)
    if code is _reading_forward(model.__class__, "").__code__:  # an earlier trainer's
        model.forward = below
        return
    # An earlier trainer's forward may lie further below; it looks up a place of its own.
    place = f"_forward_below_{sum(name.startswith('_forward_below_') for name in vars(model))}"
    setattr(model, place, below)
    # A method and no closure over the model: deepcopy binds it to the copy.
    model.forward = types.MethodType(_reading_forward(model.__class__, place), model)


@functools.cache
def _reading_forward(kind: Any, place: str) -> Callable[..., Any]:
    def forward(self, *args, read_hidden: Callable[[Tensor, Tensor, Tensor | None], Any] | None = None, **kwargs):
        if read_hidden is None:
            below = getattr(self, place) or types.MethodType(type(self).forward, self)
            return below(*args, **kwargs)
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        head = self.get_output_embeddings()
        with _gathered(head.weight, head.bias) as (weight, bias):
            return read_hidden(hidden, weight, bias)

    # generate() validates its arguments against the signature. Not functools.wraps: Accelerate unwraps what has a
    # __wrapped__, and would take this off with its own wrappers.
    vars(forward)["__signature__"] = inspect.signature(kind.forward)
    return forward


def _take_off_fused_head(model: Any) -> None:
    """Give the model the forward back that it had before TRL's ``add_fused_lm_head``, which nothing here calls."""
    while (function := getattr(model.__dict__.get("forward"), "__func__", None)) is not None and (
        function.__globals__ is vars(trl.trainer.utils)
    ):
        original = inspect.getclosurevars(function).nonlocals["original_forward"]
        del model.forward
        # In a copy of a model that had the fused head, the original is still the other model's.
        owner = original.args[0] if isinstance(original, functools.partial) else getattr(original, "__self__", None)
        if owner not in (None, model):
            original = copy.deepcopy(original, {id(owner): model})
        if original != model.forward:
            model.forward = original


@contextmanager
def _gathered(weight: Any, bias: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The head's parameters, whole where FSDP2 or ZeRO-3 has sharded them."""
    if hasattr(weight, "full_tensor"):
        yield weight.full_tensor(), None if bias is None else bias.full_tensor()
    elif hasattr(weight, "ds_status"):
        with trl.trainer.utils.maybe_gather_lm_head_ctx(weight, bias):
            yield weight, bias
    else:
        yield weight, bias
