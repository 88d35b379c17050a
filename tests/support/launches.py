"""What Triton is asked to launch in the interpreter, and what it would compile for that on a GPU."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class TensorWork(TorchDispatchMode):
    """Names of PyTorch's own operators that a GPU would launch something for: neither views nor empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and func.namespace == "aten" and not name.startswith(("empty", "new_empty", "detach")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Launch(NamedTuple):
    """A kernel's name; and what it is compiled for: a kernel is compiled again for each other ``variant``."""

    kernel: str
    variant: tuple[Any, ...]


def _special(value: Any) -> Any:
    """What Triton tells apart of an argument: a size, whether it is 1, whether it or a pointer is divisible by 16."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return value.bit_length() > 31, value == 1 or value % 16 == 0, value == 1
    return _type(value)


def _type(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, int) and not isinstance(value, bool):
        return value.bit_length() > 31
    if hasattr(value, "block_shape"):  # a descriptor: its shape is no part of what is compiled
        return value.base.dtype, tuple(value.block_shape)
    return type(value)


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """All launches while it is entered, which are noted and not run: nothing the host does may hang on results."""
    from triton.runtime.interpreter import InterpretedFunction

    found: list[Launch] = []
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        parameters = inspect.signature(self.fn).parameters
        given = dict(zip(parameters, args, strict=False)) | kwargs
        general = self.kwargs.get("do_not_specialize") or ()
        variant = tuple(
            value
            if "constexpr" in str(parameters[name].annotation)
            else (_type if name in general else _special)(value)
            for name, value in given.items()
            if name in parameters
        )
        found.append(Launch(self.fn.__name__, variant))

    InterpretedFunction.run = noted
    try:
        yield found
    finally:
        InterpretedFunction.run = run
