"""The public functions under ``torch.compile``: a graph break, after which they run as they stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def eager(function: F) -> F:
    """``torch.compiler.disable``, which has no types and would take the function's away."""
    disabled: F = torch.compiler.disable(function)
    return disabled
