"""How a model's own layers attend over a pack.

Models of transformers ask one registry for their masks, and say by a function of positions what each kind of layer may
see: all before it, a window, a chunk. While a pack is in progress the registry's makers get that function at the
positions of the tree, together with the tree's own condition. So a window counts positions, not packed tokens, and no
model or kind of layer has to be known here.

``ROADS`` says by which way each attention implementation gets there, in any dtype: a dense mask, or flex_attention's
blocks. ``FAST`` has what comes before it on a GPU in 16 bits; another way is a context manager and its entry.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from egrsd_kernels.models import ModelError

from . import varlen
from .tree import Pack
from .varlen import moved, serve, table, window_of

BLOCK = 128  # tokens of flex_attention's blocks


Maker = Callable[..., Any]  # of the registry: a mask, from what is asked for by name


class _Current(threading.local):
    """The pack of the forward that this thread is in, and what makes its masks."""

    pack: Pack | None = None
    make: Callable[[Pack, Maker, dict[str, Any]], Any]


_current = _Current()
_lock = threading.Lock()
_makers: dict[str, Maker] = {}  # the registry's own, while any thread is in a pack
_threads = 0


@contextmanager
def _making(pack: Pack, make: Callable[[Pack, Maker, dict[str, Any]], Any]) -> Iterator[None]:
    """In this thread, while this is entered, masks that models of transformers make are those of ``make``."""
    global _threads
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as registry

    with _lock:
        if not _threads:
            for name in (name for name in {*ROADS, *FAST} if name in registry):
                _makers[name] = registry[name]
                registry[name] = functools.partial(_mask, _makers[name])
        _threads += 1
    before = _current.pack, getattr(_current, "make", make)
    _current.pack, _current.make = pack, make
    try:
        yield
    finally:
        _current.pack, _current.make = before
        with _lock:
            _threads -= 1
            if not _threads:
                for name, maker in _makers.items():
                    del registry[name]
                    if registry.get(name) is not maker:  # an entry that somebody had put over the library's
                        registry[name] = maker
                _makers.clear()


def by_mask(pack: Pack) -> AbstractContextManager[None]:
    """In this thread, while this is entered, masks that models of transformers make are the pack's."""
    return _making(pack, _dense)


def by_blocks(pack: Pack) -> AbstractContextManager[None]:
    """The same for flex_attention: 128 by 128 tokens of which none, some or all are seen."""
    return _making(pack, _blocks)


def by_small_blocks(pack: Pack) -> AbstractContextManager[None]:
    """What :func:`by_blocks` lets be seen, of blocks of 16 tokens, as the mask of an implementation that takes one."""
    return _making(pack, _blocks_as_mask)


def by_segments(pack: Pack, size: int | None = None) -> AbstractContextManager[None]:
    """The same for torch's own FlashAttention, over the keys and values of each segment's path.

    size: for layers that run compiled the number of tokens, and for CUDA graphs what the pack is padded to; else None.
    """
    serve(FAST)
    return _making(pack, functools.partial(_table, size))


@contextmanager
def beside() -> Iterator[None]:
    """A forward in here is none of the pack's, though this thread is in the pack's forward."""
    before, _current.pack = _current.pack, None
    try:
        yield
    finally:
        _current.pack = before


def _mask(maker: Maker, /, **asked: Any) -> Any:
    """The mask of this thread's pack, or in another thread what is asked for."""
    pack = _current.pack
    return maker(**asked) if pack is None else _current.make(pack, maker, asked)


def _dense(pack: Pack, maker: Maker, asked: dict[str, Any]) -> Any:
    """What ``maker`` makes of the tree's condition and the layers' own."""
    _check_keys(asked, len(pack))
    # The mask of ones that stands for no padding says nothing here; a mask that is left out would be causal.
    return maker(
        **{**asked, "mask_function": _sees(pack, asked), "attention_mask": None, "allow_is_causal_skip": False}
    )


def _blocks(pack: Pack, _: Maker, asked: dict[str, Any], block: int = BLOCK) -> Any:
    """flex_attention's mask; its kernels ask ``sees_in_tree`` within blocks of which not all is seen."""
    from torch.nn.attention.flex_attention import BlockMask

    _check_keys(asked, len(pack))
    sees, device = asked["mask_function"], _device(asked)
    positions, ends = moved(pack.position_ids, device), moved(pack.ends, device)

    def sees_in_tree(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_tree: Tensor = (key <= query) & (query < ends[key]) & sees(batch, head, positions[query], positions[key])
        return in_tree

    lengths = (len(pack), len(pack))
    return BlockMask.from_kv_blocks(
        *_seen_blocks(ends, block), BLOCK_SIZE=block, mask_mod=sees_in_tree, seq_lengths=lengths
    )


def _blocks_as_mask(pack: Pack, maker: Maker, asked: dict[str, Any]) -> Any:
    size = 16
    blocks = _blocks(pack, maker, asked, size)
    some = blocks.to_dense()[0, 0].bool()

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen: Tensor = some[query // size, key // size] & blocks.mask_mod(batch, head, query, key)
        return seen

    return maker(**{**asked, "mask_function": sees, "attention_mask": None, "allow_is_causal_skip": False})


def _seen_blocks(ends: Tensor, size: int = BLOCK) -> tuple[Tensor, Tensor]:
    """(1, 1, B) int32, how many blocks of keys each block of queries sees something of, and (1, 1, B, B), which.

    Some query of a block sees a key: the key stands no later than the last of them and ends behind the first. What the
    layers' own condition takes away besides is left to it.
    """
    count = -(-len(ends) // size)
    last = functional.pad(ends, (0, count * size - len(ends))).view(count, size).amax(1)
    block = torch.arange(count, device=ends.device)
    some = (block <= block[:, None]) & (last > block[:, None] * size)
    some |= block == block[:, None]
    order = some.int().argsort(dim=1, descending=True, stable=True)
    return some.sum(1)[None, None].int(), order[None, None].int()


def _table(size: int | None, pack: Pack, _: Maker, asked: dict[str, Any]) -> Any:
    tokens, device = size or len(pack), _device(asked)
    _check_keys(asked, tokens)
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else asked["dtype"]
    if dtype not in varlen.DTYPES:
        raise ModelError(f"its layers compute in {dtype}, where attention by segments was proved in 16 bits")
    window = window_of(asked["mask_function"], max(map(len, pack.places)))
    return table(pack, window, device, dtype, size is not None)


def _device(asked: dict[str, Any]) -> torch.device:
    """Where the mask is wanted; transformers 4 says it by the queries' positions."""
    return torch.device(asked["device"] if "device" in asked else asked["cache_position"].device)


def _check_keys(asked: dict[str, Any], tokens: int) -> None:
    if asked["kv_length"] != tokens:
        raise ModelError(f"its layers attend to {asked['kv_length']} keys where the pack has {tokens} tokens")


def _sees(pack: Pack, asked: dict[str, Any]) -> Callable[..., Tensor]:
    """Which packed token sees which: the tree's condition, and the layers' own at the positions of the tree."""
    sees: Callable[..., Tensor] = asked["mask_function"]
    held: dict[Any, tuple[Tensor, Tensor]] = {}

    def sees_in_tree(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if query.device not in held:
            held[query.device] = moved(pack.position_ids, query.device), moved(pack.ends, query.device)
        positions, ends = held[query.device]
        return (key <= query) & (query < ends[key]) & sees(batch, head, positions[query], positions[key])

    return sees_in_tree


Road = Callable[[Pack], AbstractContextManager[None]]
ROADS: Mapping[str, Road] = MappingProxyType({"eager": by_mask, "sdpa": by_mask, "flex_attention": by_blocks})
FAST: Mapping[str, Callable[[Pack, int | None], AbstractContextManager[None]]] = MappingProxyType(
    {"sdpa": by_segments, "flash_attention_2": by_segments, "flash_attention_3": by_segments}
)


def implementation_of(model: Any) -> str:
    """The name of a transformers model's attention implementation."""
    return str(getattr(model.config.get_text_config(), "_attn_implementation", None))


def road_of(implementation: str) -> Road:
    """The way of an attention implementation that serves any dtype; a ModelError for one that has none."""
    if implementation not in ROADS:
        names = ", ".join({**ROADS, **FAST})
        raise ModelError(f"attn_implementation: packing expects one of {names}, got {implementation!r}")
    return ROADS[implementation]
