"""How functions become operators: for ``torch.compile``, FakeTensorMode and ``torch.func`` each is one step.

An operator knows tensors, numbers and names. It has no derivative of its own: the autograd functions around them do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "egrsd_kernels"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(schema: str, like: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as ``torch.ops.egrsd_kernels.NAME``, and gives that operator.

    schema: "NAME(arguments) -> results". It changes none of its arguments, and its results share no memory with them
    or with each other. like: empty results for the same arguments, whose tensors may be without values.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", like, lib=_library)
        made: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
        return made

    return register
