"""How a model's own layers attend over a pack.

Models of transformers ask one registry for their masks, and say by a function of positions what each kind of layer may
see: all before it, a window, a chunk. While a pack is in progress the registry's makers get that function at the
positions of the tree, together with the tree's own condition. So a window counts positions, not packed tokens, and no
model or kind of layer has to be known here.

``ROADS`` says by which way each attention implementation gets there; another way is a context manager and its entry.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any

from torch import Tensor

from egrsd_kernels.models import ModelError

from .tree import Pack


class _Current(threading.local):
    """The pack of the forward that this thread is in."""

    pack: Pack | None = None


_current = _Current()
_lock = threading.Lock()
_makers: dict[str, Callable[..., Any]] = {}  # the registry's own, while any thread is in a pack
_threads = 0


@contextmanager
def by_mask(pack: Pack) -> Iterator[None]:
    """In this thread, while this is entered, masks that models of transformers make are the pack's."""
    global _threads
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as registry

    with _lock:
        if not _threads:
            for name in (name for name, road in ROADS.items() if road is by_mask and name in registry):
                _makers[name] = registry[name]
                registry[name] = functools.partial(_mask, _makers[name])
        _threads += 1
    before, _current.pack = _current.pack, pack
    try:
        yield
    finally:
        _current.pack = before
        with _lock:
            _threads -= 1
            if not _threads:
                for name, maker in _makers.items():
                    del registry[name]
                    if registry.get(name) is not maker:  # an entry that somebody had put over the library's
                        registry[name] = maker
                _makers.clear()


@contextmanager
def beside() -> Iterator[None]:
    """A forward in here is none of the pack's, though this thread is in the pack's forward."""
    before, _current.pack = _current.pack, None
    try:
        yield
    finally:
        _current.pack = before


def _mask(maker: Callable[..., Any], /, **asked: Any) -> Any:
    """What ``maker`` makes of the tree's condition and the layers' own, or in another thread of what is asked for."""
    pack = _current.pack
    if pack is None:
        return maker(**asked)
    if asked["kv_length"] != len(pack):
        raise ModelError(f"its layers attend to {asked['kv_length']} keys where the pack has {len(pack)} tokens")
    sees: Callable[..., Tensor] = asked["mask_function"]
    held: dict[Any, tuple[Tensor, Tensor]] = {}

    def sees_in_tree(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if query.device not in held:
            held[query.device] = pack.position_ids.to(query.device), pack.ends.to(query.device)
        positions, ends = held[query.device]
        return (key <= query) & (query < ends[key]) & sees(batch, head, positions[query], positions[key])

    # The mask of ones that stands for no padding says nothing here; a mask that is left out would be causal.
    return maker(**{**asked, "mask_function": sees_in_tree, "attention_mask": None, "allow_is_causal_skip": False})


Road = Callable[[Pack], AbstractContextManager[None]]
ROADS: Mapping[str, Road] = MappingProxyType({"eager": by_mask, "sdpa": by_mask})


def road_of(model: Any) -> Road:
    """The way of a transformers model's attention implementation; a ModelError for one that has none."""
    name = str(getattr(model.config.get_text_config(), "_attn_implementation", None))
    if name not in ROADS:
        raise ModelError(f"attn_implementation: packing expects one of {', '.join(ROADS)}, got {name!r}")
    return ROADS[name]
