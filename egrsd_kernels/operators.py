"""How functions become operators: for ``torch.compile``, FakeTensorMode and ``torch.func`` each is one step.

An operator knows tensors, numbers and names. It has no derivative of its own: the autograd functions around them do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

import torch

NAMESPACE = "egrsd_kernels"
# Of every operator, those of packing among them.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
# What a field of a tuple of options is in a schema.
_TYPES: dict[Any, str] = {
    bool: "bool", int: "SymInt", float: "float", str: "str", tuple[str, ...]: "str[]",
    int | None: "SymInt?", float | None: "float?", str | None: "str?",
}  # fmt: skip
Options = TypeVar("Options", bound=tuple[Any, ...])
Forward = TypeVar("Forward", bound=Callable[..., Any])


def signed(forward: Forward) -> Forward:
    """An autograd function's forward, with a signature at hand: ``apply`` asks for it with each call."""
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward


def operator(schema: str, like: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as ``torch.ops.egrsd_kernels.NAME``, and gives that operator.

    schema: "NAME(arguments) -> results". It changes none of its arguments, and its results share no memory with them
    or with each other. like: empty results for the same arguments, whose tensors may be without values.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Without gradients also where it is called by itself, as an exported program does.
        LIBRARY.impl(name, torch.no_grad()(function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", like, lib=LIBRARY)
        made: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
        return made

    return register


def parameters(kind: type[tuple[Any, ...]], prefix: str = "") -> str:
    """The part of a schema that a NamedTuple of numbers, names and other such tuples is, field by field."""
    made = []
    for name, hint in get_type_hints(kind).items():
        if hasattr(hint, "_fields"):
            made.append(parameters(hint, f"{prefix}{name}_"))
        else:
            made.append(f"{_TYPES[str if get_origin(hint) is Literal else hint]} {prefix}{name}")
    return ", ".join(made)


def flat(options: tuple[Any, ...]) -> list[Any]:
    """Such a tuple as arguments of an operator."""
    made: list[Any] = []
    for field in options:
        # A tuple first: a number that is traced may be asked for no attribute.
        made += flat(field) if isinstance(field, tuple) and hasattr(field, "_fields") else [field]
    return made


def unflat(kind: type[Options], values: Iterable[Any]) -> Options:
    """The inverse of :func:`flat`."""
    values, fields = iter(values), []
    for hint in get_type_hints(kind).values():
        if hasattr(hint, "_fields"):
            fields.append(unflat(hint, values))
        else:
            value = next(values)
            fields.append(tuple(value) if isinstance(value, list) else value)
    return kind(*fields)
