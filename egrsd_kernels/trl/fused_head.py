"""What TRL's constructor does about a model's head, and how it is undone: here the head is read by ``with_head``."""

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trl.trainer.grpo_trainer
import trl.trainer.utils


@contextmanager
def adapters_on_head_allowed() -> Iterator[None]:
    """While this is entered, TRL's constructor takes adapters on the head. It refuses what its own loss cannot train.

    The check is an ``isinstance`` in the constructor's middle, of a class that nothing else there asks for:
    cast_lm_head_to_fp32 does, which EGRSDConfig refuses.
    """
    module = vars(trl.trainer.grpo_trainer)
    checked = module.get("BaseTunerLayer")  # without PEFT there is neither
    module["BaseTunerLayer"] = ()
    try:
        yield
    finally:
        if checked is None:
            del module["BaseTunerLayer"]
        else:
            module["BaseTunerLayer"] = checked


def take_off_fused_head(model: Any) -> None:
    """Give a model the forward back that it had before TRL's ``add_fused_lm_head``, which nothing here calls.

    With it a deep copy of the model would compute with the original's weights, and a pickle would not come back.
    """
    while (function := getattr(vars(model).get("forward"), "__func__", None)) is not None and (
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
