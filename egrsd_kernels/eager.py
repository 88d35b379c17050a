"""Functions that ``torch.compile`` does not look into: a graph break, after which they run as they stand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
# Made where something is compiled: the decorator imports the compiler, which takes a second.
_disabled = functools.cache(torch.compiler.disable)


def eager(function: F) -> F:
    """``torch.compiler.disable`` that costs nothing where nothing is compiled, and keeps the function's type."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        run = _disabled(function) if torch.compiler.is_compiling() else function
        return run(*args, **kwargs)

    return call  # type: ignore[return-value]
