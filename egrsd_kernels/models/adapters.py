"""A PEFT model without its adapters.

PEFT's ``disable_adapter`` writes a report on every module before and after, and turns ``requires_grad`` of all adapters
off and on again: some 100 ms for 28 layers. What LoRA's layers ask in their forward is a flag of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .places import every_module

FLAGS = {"_disable_adapters", "_adapters_disabled"}  # of a layer, and of PEFT's model


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """While this is entered, a PEFT model computes as its base model; afterwards it is as it was, flags included.

    What requires a gradient does so all the while. Of adapters that are no LoRA this is PEFT's own ``disable_adapter``.
    """
    if not _by_flags(model):
        with _by_peft(model):
            yield
        return
    modules = [*every_module(model)]
    of_class = {kind: {name for name in FLAGS if hasattr(kind, name)} for kind in set(map(type, modules))}
    before = [
        (module, name, getattr(module, name))
        for module in modules
        for name in of_class[type(module)] | (vars(module).keys() & FLAGS)
    ]
    try:
        for module, name, _ in before:
            setattr(module, name, True)
        yield
    finally:
        for module, name, flag in before:
            setattr(module, name, flag)


def _by_flags(model: Any) -> bool:
    """Whether all that takes part in its forward is a LoRA, or weights saved beside it."""
    kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in model.peft_config.values()}
    return kinds == {"LORA"}


@contextmanager
def _by_peft(model: Any) -> Iterator[None]:
    flags = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        # On leaving, PEFT turns requires_grad on for whatever is active, frozen or not.
        for name, parameter in model.named_parameters():
            entered, flag = flags[name]
            for tensor in (entered, parameter):  # FSDP2 exchanges them in between
                tensor.requires_grad_(flag)
