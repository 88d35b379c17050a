"""Which tests `make test` runs, and which it leaves to `make test-all`: those marked slow, by hand or here."""

from __future__ import annotations

import pytest

COLLECTED = pytest.StashKey[dict[str, bool]]()  # in the session's config: is a test, by its id, slow?


def mark_slow_cases(items: list[pytest.Item]) -> None:
    """Of a heavy test the first case is quick (with each dtype and family, where it has them), and all others slow."""
    seen = set()
    for item in items:
        if item.get_closest_marker("heavy"):
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            test = item.nodeid.split("[")[0]
            case = {(test, name, parameters.get(name)) for name in ("dtype", "family")}
            if case <= seen:
                item.add_marker("slow")
            seen |= case


def slow_ones(items: list[pytest.Item]) -> dict[str, bool]:
    return {item.nodeid: item.get_closest_marker("slow") is not None for item in items}
