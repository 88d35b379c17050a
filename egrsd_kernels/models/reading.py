"""A model's own forward, in which something else than logits is computed where its head would make them.

The head's ``forward`` is replaced on the instance, for the calling thread and one call. What surrounds it stays: the
hooks of FSDP2, DeepSpeed and Accelerate on the head gather its weights, move its input, and release the weights again.

    hidden ── head's hooks ── function(hidden, head) ── _Carry ── column ── the model's own end ── wrappers ── output
                                                          └────────────── result ─────────────────────────── _Tie

Wrappers look at tensors of the output: DDP searches their graph for parameters that were not used, and FSDP2 and
DeepSpeed wait for their gradients before they gather weights for the backward pass. Hence the head returns one column
of zeros in the place of V logits, which hangs on the result (``_Carry``) and leaves as the output's logits; and the
result that the caller gets hangs on what has left (``_Tie``). Gradients of zeros pass along the column, and by the time
they reach the head every hook has fired.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from egrsd_kernels.eager import eager
from egrsd_kernels.head import Head

from .errors import ModelError
from .places import check_whole, head_at, language_model, module_at

Result = TypeVar("Result")
PLAIN = (type(None), bool, int, float, str)  # what a result may hold beside tensors


class InForward(nn.Module):
    """A model whose forward is in progress, with its hooks: a call runs ``forward``, what it would do by itself."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any]):
        super().__init__()
        self.module, self.own_forward = model, forward  # language_model() finds a wrapper's model as its module

    def forward(self, **inputs: Any) -> Any:
        return self.own_forward(**inputs)


def run(
    model: nn.Module,
    path: str,
    frame: Callable[..., Head],
    function: Callable[[Tensor, Head], Any],
    inputs: Mapping[str, Any],
) -> tuple[Any, Any]:
    """(function(hidden, head), the model's output without logits) of ``model(**inputs)``, for the head at ``path``."""
    base = language_model(model)
    name, module = type(base).__name__, module_at(base, path)
    results: list[tuple[list[Any], Any, list[int], list[Tensor]]] = []

    def read(hidden: Tensor, *more: Any, **options: Any) -> Tensor:
        if more or options:
            raise ModelError(f"model: {name}: its head takes more than hidden states, which is not supported")
        if results:
            raise ModelError(f"model: {name}: its forward calls its head more than once, which is not supported")
        try:
            head = head_at(module, frame)
            check_whole(head)
        except ModelError as refusal:
            raise ModelError(f"model: {name}: {refusal}") from None
        hidden = hidden.to(head.weight.device)  # a LoRA's layer has no hook of its own that would
        leaves, structure = _pytree.tree_flatten(function(hidden, head))
        odd = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, *PLAIN))]
        if odd:  # its tensors would not leave as part of the output
            raise TypeError(f"function: expected tensors in tuples, lists and dicts, got {odd[0]}")
        grad = torch.is_grad_enabled()  # without it, parameters still require theirs
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad and grad]
        column = hidden.new_zeros(*hidden.shape[:-1], 1)
        column, *carried = _Carry.apply(column, *(leaves[i] for i in where)) if where else (column,)  # type: ignore[no-untyped-call]
        results.append((leaves, structure, where, carried))
        return column

    with redirected(module, read):
        output = model(**_without_cache(base, inputs))
    if not results:
        raise ModelError(f"model: {name}: its forward did not call its head")
    leaves, structure, where, carried = results[0]
    if where:
        left = logits_of(output)
        if not left.requires_grad:
            raise ModelError(
                f"model: {name}: its output does not depend on its head, so its wrappers would not train it"
            )
        tied = _Tie.apply(left, *carried)  # type: ignore[no-untyped-call]
        for i, tensor in zip(where, tied, strict=True):
            leaves[i] = tensor
    return _pytree.tree_unflatten(leaves, structure), _without_logits(output)


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: of a ModelOutput, the first of a tuple, or the output itself."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif isinstance(output, tuple) and not hasattr(output, "logits"):
        output = output[0] if output else None
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    if not isinstance(output, Tensor):
        raise ModelError("expected a model whose output has logits")
    return output


def _without_logits(output: Any) -> Any:
    """The output, where nobody will take the column for logits."""
    if isinstance(output, Tensor):
        return None
    if isinstance(output, Mapping):
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})
    if hasattr(output, "_replace"):
        return output._replace(logits=None)
    if isinstance(output, tuple):
        return (None, *output[1:])
    output = copy.copy(output)
    output.logits = None
    return output


def _without_cache(base: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A cache of keys and values is of no use here, and transformers' models make one unless they are told."""
    takes, any_name = _names_of(type(base).forward)
    passed_on = hasattr(base, "base_model_prefix") and any_name
    return {"use_cache": False, **inputs} if "use_cache" in takes or passed_on else dict(inputs)


@functools.cache  # to read one takes a millisecond
def _names_of(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """The names of a function's parameters, and whether it takes others."""
    parameters = inspect.signature(forward).parameters
    return frozenset(parameters), any(one.kind is one.VAR_KEYWORD for one in parameters.values())


# ------------------------------------------------------------------------------------------------------------ forward


class _Readers(threading.local):
    """What takes a module's place, in this thread."""

    def __init__(self) -> None:
        self.of: dict[nn.Module, Callable[..., Tensor]] = {}


_readers = _Readers()
_users: Counter[nn.Module] = Counter()  # how many threads have a module redirected
_lock = threading.Lock()


@contextmanager
def redirected(module: nn.Module, read: Callable[..., Tensor]) -> Iterator[None]:
    """In this thread, while this is entered, a call of the module is its hooks around ``read``."""
    # Accelerate's hooks are a forward on the instance, above the one that it keeps.
    place = "_old_forward" if "_hf_hook" in vars(module) else "forward"
    with _lock:
        if not _users[module]:
            below = vars(module).get(place)
            # A method of a function that is always the same: torch.compile's guards know it again, a deep copy has it
            # bound to the copy, and a pickle finds the class's forward by its name.
            ours = MethodType(forward, module) if below is None else functools.partial(forward_over, module, below)
            vars(module)[place] = ours
        _users[module] += 1
    before = _readers.of.get(module)
    _readers.of[module] = read
    try:
        yield
    finally:
        if before is None:
            del _readers.of[module]
        else:
            _readers.of[module] = before
        with _lock:
            _users[module] -= 1
            if not _users[module]:
                del _users[module]
                ours = vars(module).pop(place)
                if isinstance(ours, functools.partial):
                    vars(module)[place] = ours.args[1]


@eager
def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return (_readers.of.get(self) or MethodType(type(self).forward, self))(*args, **kwargs)


@eager
def forward_over(module: nn.Module, below: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (_readers.of.get(module) or below)(*args, **kwargs)


# -------------------------------------------------------------------------------------------------------------- graph


class _Carry(torch.autograd.Function):
    """(column, *tensors), as they are: what hangs on the column hangs on the tensors, and has to come back first."""

    @staticmethod
    def forward(ctx: Any, column: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return (column.clone(), *(tensor.detach() for tensor in tensors))

    @staticmethod
    def backward(ctx: Any, _: Tensor | None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *gradients)


class _Tie(torch.autograd.Function):
    """tensors, as they are; the column that left the wrappers gets a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.left = left.shape, left.dtype, left.device
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        shape, dtype, device = ctx.left
        return (torch.zeros(shape, dtype=dtype, device=device), *gradients)
