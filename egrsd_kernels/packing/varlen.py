"""Attention over a pack by segments: each attends to the gathered keys and values of its path from the root.

That is variable-length attention of as many sequences as there are segments, each with fewer queries than keys and the
two aligned at their ends: torch's own FlashAttention, which :func:`torch.nn.attention.varlen.varlen_attn` calls as
well. No mask is made, and a window is an argument.

It is one operator for the compiler, forward and backward. How many keys and segments there are stands in tensors, so
that what is compiled or recorded for N tokens serves every tree of N tokens or less. Rows beyond it are 0.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from egrsd_kernels.models import ModelError
from egrsd_kernels.operators import LIBRARY

from .segments import Copies, copies_of, segment_sum
from .tree import Pack

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256  # of FlashAttention
# Times as many tokens in a pack as in one with a graph, which takes as much of a token in layers that are computed
# again: 36 layers' inputs and one layer's activations and gradients, for one layer's activations.
WITHOUT_GRAPH = 4


class Unserved(ModelError):
    """What a layer asks for and this way of attention does not have; another may."""


class Table(NamedTuple):
    """What a layer gets in a mask's place.

    entries: int32 (C,), cu_queries, cu_keys, keys (G,) and their copies, one after another, on the layers' device.
    sizes: int64 (6,) on the CPU: the tokens, keys and segments of the tree, its longest segment and path, and how many
    positions a token sees, itself included; 0 for all. dtype: of the queries, keys and values. fixed: whether the
    layers are to run compiled.
    """

    entries: Tensor
    sizes: Tensor
    dtype: torch.dtype
    fixed: bool


# A pack's, by device: each kind of layer and each pass over a pack has the same.
_entries: weakref.WeakKeyDictionary[Pack, dict[torch.device, Tensor]] = weakref.WeakKeyDictionary()


def table(pack: Pack, window: int, device: torch.device, dtype: torch.dtype, fixed: bool) -> Table:
    """The table of a pack, for layers that see ``window`` positions, or 0 for all."""
    paths, held = pack.paths, _entries.setdefault(pack, {})
    if device not in held:
        parts = [paths.cu_queries, paths.cu_keys, paths.keys, *copies_of(paths.keys, len(pack))]
        with torch.inference_mode(False):  # it is kept, and a later pass may have gradients
            held[device] = moved(torch.cat([part.int() for part in parts]), device)
    sizes = [len(pack), len(paths.keys), len(pack.segments), paths.longest_segment, paths.longest_path, window]
    return Table(held[device], torch.tensor(sizes), dtype, fixed)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, and not waited for."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# --------------------------------------------------------------------------------------------------------- the operator

# Where the compiler cuts CUDA graphs: how many keys and segments there are is a pack's own.
CUT = tuple(tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None)
LIBRARY.define(
    "tree_attention(Tensor query, Tensor key, Tensor value, Tensor entries, Tensor sizes, float scale) "
    "-> (Tensor, Tensor)",
    tags=CUT,
)
LIBRARY.define(
    "tree_attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
    "Tensor entries, Tensor sizes, float scale) -> (Tensor, Tensor, Tensor)",
    tags=CUT,
)


class _Tree(NamedTuple):
    tokens: int
    keys: Tensor
    copies: Copies
    boundaries: tuple[Tensor, Tensor, int, int]
    causal: bool
    window: dict[str, int]


def _tree(entries: Tensor, sizes: Tensor) -> _Tree:
    tokens, count, segments, longest, path, window = sizes.tolist()
    lengths = [segments + 1, segments + 1, count, count, tokens + 1]
    cu_queries, cu_keys, keys, order, starts = entries[: sum(lengths)].split(lengths)
    return _Tree(
        tokens,
        keys,
        Copies(order, starts),
        (cu_queries, cu_keys, longest, path),
        not window,
        {"window_size_left": window - 1, "window_size_right": 0},
    )


def _forward(
    query: Tensor, key: Tensor, value: Tensor, entries: Tensor, sizes: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    tree = _tree(entries, sizes)
    out, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        _rows(query, tree.tokens),
        key.index_select(0, tree.keys),
        value.index_select(0, tree.keys),
        *tree.boundaries,
        0.0,
        tree.causal,
        False,
        scale=scale,
        **tree.window,
    )
    return _grown(out, query), functional.pad(logsumexp, (0, len(query) - tree.tokens))


def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    entries: Tensor,
    sizes: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tree = _tree(entries, sizes)
    to_query, to_keys, to_values = torch.ops.aten._flash_attention_backward(
        _rows(gradient, tree.tokens),
        _rows(query, tree.tokens),
        key.index_select(0, tree.keys),
        value.index_select(0, tree.keys),
        _rows(out, tree.tokens),
        logsumexp[:, : tree.tokens].contiguous(),
        *tree.boundaries,
        0.0,
        tree.causal,
        torch.zeros(2, dtype=torch.uint64, device=query.device),  # of dropout, which there is none of
        torch.empty(0, device=query.device),
        scale=scale,
        **tree.window,
    )
    return (
        _grown(to_query, query),
        segment_sum(to_keys, tree.copies, len(key)),
        segment_sum(to_values, tree.copies, len(value)),
    )


def _rows(tensor: Tensor, count: int) -> Tensor:
    return tensor[:count].contiguous()


def _grown(tensor: Tensor, like: Tensor) -> Tensor:
    """As many rows as ``like``, contiguous."""
    if len(tensor) == len(like):
        return tensor.contiguous()
    out = tensor.new_zeros(like.shape)
    out[: len(tensor)] = tensor
    return out


def _contiguous_like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


def _fake_forward(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _contiguous_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


def _fake_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _contiguous_like(query), _contiguous_like(key), _contiguous_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, entries, sizes, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output, entries, sizes)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    operator = torch.ops.egrsd_kernels.tree_attention_backward
    return *operator(gradient, *ctx.saved_tensors, ctx.scale), None, None, None


LIBRARY.impl("tree_attention", _forward, "CUDA")
LIBRARY.impl("tree_attention_backward", _backward, "CUDA")
torch.library.register_fake("egrsd_kernels::tree_attention", _fake_forward, lib=LIBRARY)
torch.library.register_fake("egrsd_kernels::tree_attention_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("egrsd_kernels::tree_attention", _differentiate, setup_context=_keep, lib=LIBRARY)


# ----------------------------------------------------------------------------------------------------------- the layers


def attend(own: Callable[..., Any], module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None,
           *more: Any, **options: Any) -> Any:  # fmt: skip
    """In the place of ``own``, transformers' attention function: (1, H, N, D) to (1, N, H, D), by a table if one is
    given as the mask."""
    if not isinstance(attention_mask, Table):
        return own(module, query, key, value, attention_mask, *more, **options)
    mask = attention_mask
    scaling = options.get("scaling")
    if dropout := options.get("dropout", 0.0):
        raise ModelError(f"attention dropout {dropout:g}: packing expects 0 in training")
    for name in ("position_bias", "s_aux", "softcap"):
        if options.get(name) is not None:
            raise Unserved(f"{name}: attention by segments has none")
    width = query.shape[-1]
    if key.shape[-1] != width or value.shape[-1] != width or width > LARGEST_HEAD or width % 8:
        raise Unserved(f"heads of {width}, {key.shape[-1]} and {value.shape[-1]}: attention by segments expects "
                       f"one multiple of 8 up to {LARGEST_HEAD}")  # fmt: skip
    query, key, value = (one[0].transpose(0, 1).to(mask.dtype) for one in (query, key, value))
    scale = width**-0.5 if scaling is None else scaling
    out, _ = torch.ops.egrsd_kernels.tree_attention(query, key, value, mask.entries, mask.sizes, scale)
    return out[None], None


def serve(names: Iterable[str]) -> None:
    """From now on transformers' attention functions of these names take tables, in backward passes too.

    Layers that are computed again for their gradients ask the registry when no pack is in progress, so the entries
    stay; what comes with any other mask goes through them as before.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry

    for name in names:
        own = registry[name]
        if not (isinstance(own, functools.partial) and own.func is attend):
            registry.register(name, functools.partial(attend, own))


# By a layer's function and the positions: of layers without a window it is the same one in every forward.
_windows: weakref.WeakKeyDictionary[Callable[..., Tensor], dict[int, int]] = weakref.WeakKeyDictionary()


def window_of(sees: Callable[..., Tensor], positions: int) -> int:
    """How many positions a token sees, itself the last, by a layer's own function; 0 for all of ``positions``.

    Unserved where it is another set than that: chunks, or tokens that follow.
    """
    held = _windows.setdefault(sees, {})
    if positions not in held:
        held[positions] = _window_of(sees, positions)
    return held[positions]


def _window_of(sees: Callable[..., Tensor], positions: int) -> int:
    keys, last, none = torch.arange(positions), torch.tensor(positions - 1), torch.tensor(0)
    seen = sees(none, none, last, keys)
    width = int(seen.sum()) if seen.shape == keys.shape else 0
    edges = [edge + step for edge in (0, width, 2 * width, positions) for step in range(-2, 3)]
    queries = torch.tensor(sorted({*edges, *range(0, positions, max(1, positions // 61))} & {*range(positions)}))[
        :, None
    ]
    expected = (keys <= queries) & (keys > queries - width)
    if not sees(none, none, queries, keys).expand(expected.shape).equal(expected):
        raise Unserved("its layers see no window: attention by segments expects one")
    return 0 if width == positions else width
