"""Decoder layers that run compiled over packs, one by one, and as they are over anything else.

A layer gets its pack's table in a mask's place, in its forward and when it is computed again for its gradients, so the
table says which of the two runs. Generation through the same layers compiles nothing.

Gradient checkpointing of transformers is compiled as well: what is computed again is part of the backward's graph, with
nothing in it that no gradient needs (a layer's last product, for one), and no tensor passes through checkpoint's hooks.

Each kind of graph is compiled once, for packs of any number of tokens.

With CUDA_GRAPHS what stands before and after a layer's attention is launched as one CUDA graph each, by PyTorch's CUDA
graph trees: they copy what is new of a pack into a graph's own buffers, look whether weights are still where they were,
and run a layer as compiled at its first pack of a size. Attention, whose sizes are a pack's own, is launched between.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from egrsd_kernels.models import ModelError
from egrsd_kernels.models.places import every_module

from .varlen import CUT, Table

CUDA_GRAPHS = "cudagraphs"
OPTIONS: dict[str, Any] = {"triton.cudagraphs": True, "graph_partition": True}  # of the compiler
SMALLEST = 1024  # tokens
# Graphs of one layer's class: with gradients and without, adapters on and off, as CUDA graphs or not, two kinds of
# layers, and as many for what a first pack's sizes happen to equal. What needs more would be compiled without an end.
GRAPHS = 2 * 2 * 2 * 2 * 4
# Of torch._dynamo: layers that are computed again may set attributes.
HANDED_ON = "skip_fwd_side_effects_in_bwd_under_checkpoint"
# Of torch._functorch, in newer PyTorch.
AT_ONCE = "force_non_lazy_backward_lowering"


class NotCompiled(ModelError):
    """Decoder layers that cannot run compiled; as they are, they can."""


def padded_size(tokens: int) -> int:
    """The number of tokens that a pack is padded to for CUDA graphs: 8, 9, ..., 15 times a power of two.

    At least 1,024. At most a ninth is padding; a budget of such a size loses least.
    """
    if tokens <= SMALLEST:
        return SMALLEST
    step = 1 << ((tokens - 1).bit_length() - 4)
    return -(-tokens // step) * step


_layers: weakref.WeakKeyDictionary[nn.Module, list[nn.Module]] = weakref.WeakKeyDictionary()


@contextmanager
def compiled_layers(base: Any, replayed: bool = False) -> Iterator[None]:
    """Make a model's decoder layers run compiled where a pack's table asks for it, from now on.

    A backward pass has the graphs of its forward; layers that it computes again may be compiled then.

    replayed: as CUDA graphs, in forwards while this is entered and in their backward passes. Then one forward follows
    another only when its backward pass has run: what a graph has kept lies where the next puts its own.
    """
    if any("forward" in vars(layer) for layer in _decoder_layers(base)):
        raise NotCompiled(
            f"compile_layers: {type(base).__name__}: expected layers with their class's forward, got one of their own, "
            "as accelerate's hooks of a device_map put it there"
        )
    for layer in _decoder_layers(base):
        own: Any = type(layer)
        if not hasattr(own, "_runs_compiled"):
            layer.__class__ = _compiled(own)
    if replayed:
        _begin(base)
    before, _run.replayed = _run.replayed, replayed
    try:
        with _many_graphs():  # once for all layers: it takes some 30 µs
            yield
    finally:
        _run.replayed = before


_owned = WeakTensorKeyDictionary()  # trained weights whose gradients are copied out of a graph's buffers


def _begin(base: Any) -> None:
    """The graphs' buffers are free for another pack; a ModelError where a graph would be another function."""
    for weight in check_cudagraphs(base, is_dropping if torch.is_grad_enabled() else None):
        if weight not in _owned:
            _owned[weight] = weight.register_hook(_own)
    torch.compiler.cudagraph_mark_step_begin()


def check_cudagraphs(base: Any, drops: Callable[[Any], bool] | None, sharded: bool = False) -> list[Tensor]:
    """A ModelError where a CUDA graph of a decoder layer would be another function than the layer.

    Args:
        drops: whether a module draws numbers; None: there are no gradients.
        sharded: whether weights are going to be spread over processes.

    Returns:
        The layers' weights that train.
    """
    refused = f"compile_layers: {type(base).__name__}: CUDA graphs expect"
    if not CUT:
        raise ModelError(f"{refused} operators that the compiler cuts a graph at, got torch {torch.__version__}")
    trained: list[Tensor] = []
    if drops is None:
        return trained
    for module in itertools.chain.from_iterable(map(every_module, _decoder_layers(base))):
        if drops(module):
            raise ModelError(f"{refused} layers without dropout, got {module.p:g}")
        for weight in module._parameters.values():
            if weight is None:
                continue
            if sharded or _is_spread(weight):
                raise ModelError(f"{refused} whole weights that stay where they are, got sharded ones")
            if weight.requires_grad:
                trained.append(weight)
    return trained


def has_spread_layers(base: Any) -> bool:
    """Whether the decoder layers' weights are spread over processes, by FSDP2 or DeepSpeed."""
    return any(map(_is_spread, _decoder_layers(base)[0].parameters()))


def _is_spread(weight: Tensor) -> bool:
    return hasattr(weight, "device_mesh") or hasattr(weight, "ds_id")


def may_drop(module: nn.Module) -> bool:
    """Whether it is a dropout that draws in training."""
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def is_dropping(module: nn.Module) -> bool:
    return may_drop(module) and module.training


def _own(gradient: Tensor) -> Tensor:
    """Accumulated gradients outlive the graph that made them, whose buffers the next pack writes to."""
    return gradient.clone()


@contextmanager
def _many_graphs() -> Iterator[None]:
    # A layer's own floats, its scale and epsilon, are no sizes: as symbols they make the compiler begin again.
    settings: dict[str, Any] = {
        "recompile_limit": GRAPHS,
        "accumulated_recompile_limit": 4 * GRAPHS,
        "specialize_float": True,
    }
    # Fused adapters hand one another what they have made, and nothing of it is left when a layer ends.
    if hasattr(torch._dynamo.config, HANDED_ON):  # not in older PyTorch
        settings[HANDED_ON] = True
    # A backward graph of any size that does not compile is an error of the forward, where it is caught.
    at_once: dict[str, Any] = {AT_ONCE: True} if hasattr(functorch, AT_ONCE) else {}
    with torch._dynamo.config.patch(settings), functorch.patch(at_once):
        yield


def _decoder_layers(base: Any) -> list[nn.Module]:
    if base in _layers:  # to look through all modules takes as long as a layer does
        return _layers[base]
    count = base.config.get_text_config().num_hidden_layers
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    for part in (decoder, base):  # a tower of images may have as many layers
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                _layers[base] = [*module]
                return _layers[base]
    raise NotCompiled(f"compile_layers: {type(base).__name__}: expected a list of {count} decoder layers")


def _bare(own: type[nn.Module]) -> nn.Module:
    return own.__new__(own)


class _Run(threading.local):
    """How this thread runs layers: again for their gradients, within their own graphs; and as CUDA graphs."""

    again = False
    replayed = False


_run = _Run()
CHECKPOINTING = "_gradient_checkpointing_func"  # of a layer: what transformers calls it through


def _checkpointing_of(layer: nn.Module) -> Callable[..., Any]:
    """What transformers has put there; of a layer over a pack, its own graph in its place."""
    if CHECKPOINTING not in vars(layer):
        raise AttributeError(CHECKPOINTING)
    return functools.partial(_within_its_graph, vars(layer)[CHECKPOINTING])


def _set_checkpointing(layer: nn.Module, function: Callable[..., Any]) -> None:
    vars(layer)[CHECKPOINTING] = function


def _within_its_graph(outside: Any, call: Any, *args: Any) -> Any:
    """``outside(call, *args)``, or where that is torch's checkpoint of all of a layer over a pack, the layer alone."""
    if (
        getattr(outside, "func", None) is not checkpoint
        or "context_fn" in outside.keywords  # which keeps some of it
        or not _for_a_pack(args, getattr(call, "keywords", {}))
    ):
        return outside(call, *args)
    before, _run.again = _run.again, True
    try:
        return call(*args)
    finally:
        _run.again = before


def _for_a_pack(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(one, Table) and one.fixed for one in itertools.chain(args, kwargs.values()))


@functools.cache
def _compiled(own: Any) -> type[nn.Module]:
    """A class with the same name and forward; copies and pickles of it are of the class below."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    forward: Callable[..., Any] = own.forward

    def computed_again(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, self, *args, use_reentrant=False, **kwargs)

    runs = {
        (again, replayed): torch.compile(
            computed_again if again else forward,
            fullgraph=True,
            dynamic=True,
            options=OPTIONS if replayed else None,
        )
        for again, replayed in itertools.product((False, True), repeat=2)
    }

    def choose(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _for_a_pack(args, kwargs):
            return forward(self, *args, **kwargs)
        try:
            # A layer that is computed again in a backward pass may be compiled there, outside of compiled_layers.
            with nullcontext() if torch._dynamo.config.recompile_limit >= GRAPHS else _many_graphs():
                return runs[_run.again, _run.replayed](self, *args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as failure:
            cause = getattr(failure, "inner_exception", None) or failure.__cause__ or failure  # of a backend; another's
            first = str(cause).strip().partition("\n")[0]
            raise NotCompiled(f"compile_layers: {own.__name__}: {type(failure).__name__}: {first}") from failure

    def as_own(self: nn.Module, _: Any) -> Any:
        return _bare, (own,), self.__getstate__()

    body = {
        "forward": functools.wraps(forward)(choose),
        CHECKPOINTING: property(_checkpointing_of, _set_checkpointing),
        "__reduce_ex__": as_own,
        "_runs_compiled": True,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
    }
    subclass = type(own.__name__, (own,), body)
    return subclass
