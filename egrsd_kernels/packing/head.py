"""The public functions that read a model at its head, over packs."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from egrsd_kernels.checks import expect
from egrsd_kernels.eager import eager
from egrsd_kernels.head import Head
from egrsd_kernels.models import ModelError, with_head
from egrsd_kernels.models.places import language_model
from egrsd_kernels.models.proof import found_in

from .attention import FAST, beside, implementation_of, road_of
from .layers import CUDA_GRAPHS, NotCompiled, compiled_layers, has_spread_layers, padded_size
from .proof import draws, fast_road, inputs_of, remembers, row_limit
from .segments import Copies, copies_of, take_rows
from .tree import Pack
from .varlen import moved

Result = TypeVar("Result")
CompileLayers: TypeAlias = bool | Literal["cudagraphs"] | None
_as_they_are: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # whose layers None has found not to compile
_indices: weakref.WeakKeyDictionary[Pack, dict[torch.device, tuple[Tensor, Copies]]] = weakref.WeakKeyDictionary()


def _targets(pack: Pack, device: torch.device) -> tuple[Tensor, Copies]:
    """The packed rows that predict a pack's targets, and where each of them stands among these."""
    held = _indices.setdefault(pack, {})
    if device not in held:
        copies = (moved(one, device) for one in copies_of(pack.hidden_index, len(pack)))
        held[device] = moved(pack.hidden_index, device), Copies(*copies)
    return held[device]


@eager
def packed(
    model: nn.Module,
    pack: Pack,
    function: Callable[[Tensor, Head], Result],
    /,
    *,
    compile_layers: CompileLayers = None,
    **inputs: Any,
) -> tuple[Result, Any]:
    """Run the model's own forward over a pack, and ``function(hidden, head)`` for the targets that were asked for.

    log p of a row and its gradients are what they are for the row alone, unpadded: the first call for a model, its PEFT
    adapters and an attention implementation proves it, on a small model of the same, and the finding is kept with it.
    Each pack is a forward of its own, so a loop over packs holds the graph of one:

    >>> for pack in pack_rows(rows, budget=8192, targets=completion_mask):
    ...     logp, _ = packed(model, pack, lambda hidden, head: linear_logp(hidden, head, pack.target_ids))
    ...     loss = -(advantages[pack.target_rows] * logp).sum() / completion_mask.sum()
    ...     loss.backward()

    Dropout draws once for a prefix, and not once for each row.

    Args:
        model: a causal language model of transformers, as :func:`with_head` takes it, whose attn_implementation is
            ``"sdpa"``, ``"eager"``, ``"flex_attention"``, or one of flash-attn's on a GPU. On a GPU and in 16 bits,
            ``"sdpa"`` and flash-attn's attend by segments (torch's own FlashAttention); else packs have a dense mask,
            or with ``"flex_attention"`` a mask of blocks, which long packs with softcaps or sinks want.
        pack: of :func:`pack_rows`, on any device.
        compile_layers: whether the decoder layers run compiled, one by one, in this forward and its backward pass and
            in no other; they are compiled once, for packs of any number of tokens. None, the default: where the model
            attends by segments and its layers are whole and compile; where they do not compile, a warning says why,
            once. ``"cudagraphs"``: launched as CUDA graphs as well, each for one of a few sizes that packs are padded
            to (:func:`padded_size`), where each forward's backward pass runs before the next.
        function: of hidden (M, D), the state that predicts each of the pack's M targets, in their order, and a
            :class:`Head`; as :func:`with_head` takes it.
        inputs: the model's further ones, none of which may have an entry for each token.

    Returns:
        (result, output): as :func:`with_head` returns them.

    Raises:
        ModelError: as :func:`with_head`; and in one line, with the difference in nats, where a row in a pack is not
            what it is alone, or where a row is longer than the model's rope lets rows be that stand together.
    """
    base: Any = language_model(model)
    limit, longest = row_limit(model), max(map(len, pack.places))
    if longest > limit and remembers(model):
        raise ModelError(
            f"model: {type(base).__name__}: rows up to {limit:.0f} tokens can be packed, where its dynamic rope "
            f"forgets the longest row before, got one of {longest}"
        )
    if longest > limit and len(pack.rows) > 1:
        raise ModelError(
            f"model: {type(base).__name__}: rows up to {limit:.0f} tokens can be packed, where its rope does not yet "
            f"depend on the longest, got one of {longest}"
        )

    found_in(model)  # with its own forwards, before the pack's
    fast = fast_road(model)
    if check_compile_layers(compile_layers) and fast is None:
        raise ModelError(
            f"compile_layers: {type(base).__name__}: expected a model on a GPU, in 16 bits, with attn_implementation "
            f"{' or '.join(FAST)}, got {base.dtype} on {base.device.type} with {implementation_of(base)}"
        )

    def at_targets(hidden: Tensor, head: Head) -> Result:
        with beside():
            return function(take_rows(hidden[0], *_targets(pack, hidden.device)), head)

    def run(compiles: bool) -> tuple[Result, Any]:
        replayed = compile_layers == CUDA_GRAPHS
        if replayed and torch.is_grad_enabled() and base.training and draws(model):
            raise ModelError(f"compile_layers: {type(base).__name__}: CUDA graphs expect layers without dropout")
        tokens = padded_size(len(pack)) if replayed else len(pack)
        size = tokens if compiles else None
        with (
            compiled_layers(base, replayed) if compiles else nullcontext(),
            road_of(implementation_of(base))(pack) if fast is None else fast(pack, size),
        ):
            return with_head(model, at_targets, **inputs_of(pack, base.device, size), **inputs)

    if compile_layers is not None or fast is None or base in _as_they_are:
        return run(bool(compile_layers))
    try:
        return run(not has_spread_layers(base))
    except NotCompiled as failure:  # in a layer, so the function has not run
        warnings.warn(f"{type(base).__name__}: layers run as they are, not compiled: {failure}", stacklevel=3)
        _as_they_are.add(base)
        return run(False)


def check_compile_layers(value: Any) -> CompileLayers:
    """``value``, which is one of :data:`CompileLayers`; a ValueError otherwise."""
    allowed = value is None or isinstance(value, bool) or value == CUDA_GRAPHS
    expect(allowed, "compile_layers", value, f"True, False, None or {CUDA_GRAPHS!r}")
    found: CompileLayers = value
    return found


@eager
def read_packs(
    model: nn.Module,
    packs: Sequence[Pack],
    function: Callable[[Tensor, Head, Tensor], Result],
    /,
    *,
    compile_layers: CompileLayers = None,
    **inputs: Any,
) -> Result:
    """What ``function(hidden, head, target_ids)`` makes of all M targets of these packs, row by row.

    >>> with torch.no_grad():
    ...     old_logp = read_packs(model, packs, linear_logp)  # (M,)

    The order is the same however the rows were packed: ``result[pack.target_numbers]`` are a pack's. With gradients it
    holds the graphs of all packs; :func:`packed`, one after another, those of one.

    Args:
        model, compile_layers, inputs: as :func:`packed` takes them.
        packs: all of one :func:`pack_rows` or :func:`pack_responses`.
        function: of a pack's hidden (M', D), a :class:`Head` and the targets' ids (M',), all on one device; one tensor
            (M', ...), or a tuple of such, or of None: :func:`egrsd_kernels.token_statistics` and
            :func:`egrsd_kernels.linear_logp` do.

    Returns:
        The same with (M, ...).

    Raises:
        ModelError: as :func:`packed`. ValueError: where packs are missing or given twice, or the function returns
            something else.
    """
    if not packs:
        raise ValueError("packs: expected all of one call of pack_rows, got none")
    numbers, targets = torch.cat([pack.target_numbers.cpu() for pack in packs]), packs[0].targets
    order = numbers.argsort()
    if not numbers[order].equal(torch.arange(targets)):
        raise ValueError(
            f"packs: expected all of one call of pack_rows, each once, got {len(packs)} with {len(numbers)} targets "
            f"where the call has {targets}"
        )

    if compile_layers == CUDA_GRAPHS and len(packs) > 1 and torch.is_grad_enabled():
        raise ValueError("compile_layers: 'cudagraphs' expects each pack's backward pass before the next: use packed()")

    def at_targets(pack: Pack) -> Callable[[Tensor, Head], Result]:
        return lambda hidden, head: function(hidden, head, moved(pack.target_ids, hidden.device))

    found = [packed(model, pack, at_targets(pack), compile_layers=compile_layers, **inputs)[0] for pack in packs]
    joined: Result = _in_order(found, packs, order)
    return joined


def _in_order(found: Sequence[Any], packs: Sequence[Pack], order: Tensor) -> Any:
    """The results of all packs as one, by the order of their targets."""
    first = found[0]
    if isinstance(first, tuple):
        joined = [_in_order(parts, packs, order) for parts in zip(*found, strict=True)]
        return first._make(joined) if hasattr(first, "_make") else tuple(joined)
    if first is None:
        return None
    for one, pack in zip(found, packs, strict=True):
        count = len(pack.target_ids)
        if not isinstance(one, Tensor) or one.shape[:1] != (count,):
            got = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
            raise ValueError(f"function: expected an entry for each of a pack's {count} targets, got {got}")
    return torch.cat([*found])[moved(order, first.device)]
