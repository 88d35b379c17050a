"""One function in another's place, in all modules, and back again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
_replaced: dict[Callable[..., Any], Callable[..., Any]] = {}  # by what is in its place


def put_in_place(now: Function, replacement_of: Callable[[Function], Function]) -> AbstractContextManager[Any]:
    """``replacement_of(now)`` under every name that ``now`` has in a loaded module, and so in those loaded later.

    A function that is a replacement itself stays. Returns a context whose end undoes what this call has done.
    """
    undo = ExitStack()
    if not is_replacement(now):
        new = replacement_of(now)
        _replaced[new] = now
        _replace(now, new)
        undo.callback(put_back, new)
    return undo


def put_back(now: Callable[..., Any]) -> None:
    """What ``now`` has replaced; another function stays."""
    if is_replacement(now):
        _replace(now, _replaced.pop(now))


def is_replacement(function: Callable[..., Any]) -> bool:
    return function in _replaced


def _replace(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        for name in [name for name, value in list(names.items()) if value is old]:
            names[name] = new
