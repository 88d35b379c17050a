"""PEFT's LoRA layers by as few products and passes as there are: :func:`fuse_adapters`.

A plain layer is y = x Wᵀ + bias + s (x Aᵀ) Bᵀ. PEFT makes the two terms apart: casts of x, A and B, a scaled copy, a
sum. Here the second term is added where the first product has been stored, and so is its gradient:

    forward    u = x Aᵀ,  y = x Wᵀ + bias,  y += s u Bᵀ
    backward   t = s dy B,  dx = dy W,  dx += t A,  dA = tᵀ x,  dB = s dyᵀ u

Layers of one module that read one tensor (q, k, v; gate, up) are one step: their A are stacked, so u, t A and dA are
one product for all of them, and no two gradients of x have to be added.

A and B are cast to autocast's dtype at each use, all of a step in one launch. A copy that is kept until the weights
change would have to know of each change: optimizers that write by pointer or through ``.data`` (bitsandbytes,
DeepSpeed) leave no trace of it in a tensor's version.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .models import ModelError
from .models.places import every_module, language_model
from .models.proof import evaluating
from .once import once
from .operators import operator, signed

_PLACE = "_fused_adapter"  # on a layer that is fused: its _Place
_WHOLE = {Tensor, nn.Parameter}
_CAST = {torch.float32, torch.bfloat16, torch.float16}  # by autocast
_ROUNDINGS = 4  # of a value to its dtype, that two ways to the same sums may be apart


def fuse_adapters(model: nn.Module, /, **inputs: Any) -> AbstractContextManager[Any]:
    """From now on the plain LoRA layers of a PEFT model run as one step each, or with those that read the same tensor.

    >>> model = get_peft_model(model, LoraConfig(r=64, target_modules="all-linear"))
    >>> fuse_adapters(model)

    Worth it with ``compile_layers="cudagraphs"``, and where packs have more than about 10,000 tokens: in smaller ones
    without graphs a step waits for the host, which takes longer for these layers than for PEFT's.

    That holds in each forward, packed or not, and in compiled layers (with checkpointing of PyTorch 2.13 and later);
    weights, names and checkpoints stay as they are. Gradients differ from PEFT's by rounding only. They have no
    gradient of their own: ``create_graph=True`` raises, as do ``torch.func.vmap`` and forward-mode derivatives.

    A layer is plain as long as its class is PEFT's ``lora.Linear`` over ``nn.Linear`` with frozen weights, one adapter
    is active, without dropout in effect, DoRA or another variant, bias of its own or hooks on its parts, nothing is
    merged, and all of it is in one dtype or under autocast. With any other, and with adapters off, PEFT's own forward
    runs. That is looked at in each call. An adapter that becomes active later is PEFT's own. In compiled layers it is
    not seen that the model changes the tensor in place between its readers, where it did not do so in its first run.

    The model is run once, without gradients and in evaluation mode, to see which layers read the same tensor. Each
    active adapter's layer is compared then with PEFT's forward and its gradients, on random rows.

    Args:
        model: with PEFT's adapters, on its device.
        inputs: what the model is called with that one time; by default ``input_ids`` of three tokens.

    Returns:
        A context whose end gives PEFT's layers back, as in ``with fuse_adapters(model): ...``; to call it alone is
        enough.

    Raises:
        ModelError: in one line, where no layer is plain, or a layer of PEFT's gives other numbers.
    """
    from peft.tuners import lora

    base: Any = language_model(model)
    layers: dict[str, Any] = {name: one for name, one in base.named_modules() if type(one) is lora.Linear}
    with torch.inference_mode(False), torch.no_grad(), evaluating(base), _autocast(layers.values()):
        calls = _calls(base, layers, inputs)
        proved = {name: found for name, layer in layers.items() if (found := _proved(name, layer)) is not None}
    if not proved:
        before = sum(_PLACE in vars(module) for module in every_module(base))
        raise ModelError(
            f"model: {type(base).__name__}: fuse_adapters expects layers that are PEFT's lora.Linear over a frozen "
            "nn.Linear, unsharded, in one dtype or autocast's, with one active adapter that is on, not merged and no "
            f"variant of LoRA, without hooks on their parts, got none of {len(layers)}"
            + (f" ({before} more are fused already)" if before else "")
        )
    undo = ExitStack()
    undo.callback(_give_back, [layers[name] for name in proved])
    fused, slot = _fused(lora.Linear), _Slot()
    for names in _together(calls, proved):
        readers = _Readers([layers[name] for name in names], slot)
        for index, name in enumerate(names):
            setattr(layers[name], _PLACE, _Place(readers, index, proved[name]))
            layers[name].__class__ = fused
    return undo


def _give_back(layers: Iterable[Any]) -> None:
    for layer in layers:
        if _PLACE in vars(layer):
            delattr(layer, _PLACE)
            layer.__class__ = type(layer).__base__


# ----------------------------------------------------------------------------------------------------------- the layers


class _Operands(NamedTuple):
    """What a plain layer computes with now. dtype: of its products; name: of its adapter."""

    weight: Tensor  # (E, D)
    bias: Tensor | None  # (E,)
    a: Tensor  # (R, D)
    b: Tensor  # (E, R)
    scale: float
    dtype: torch.dtype
    name: str


def _operands(layer: Any, x: Tensor) -> _Operands | None:
    """Those of a layer over x (..., D); None where it is not plain, or its adapter is not the one that was proved."""
    if layer.disable_adapters or layer.merged:
        return None
    parts = layer._modules
    active = [name for name in layer.active_adapters if name in parts["lora_A"]._modules]
    if len(active) != 1:
        return None
    (name,) = active
    place: _Place | None = getattr(layer, _PLACE, None)
    if place is not None and place.name != name:
        return None
    base, dropout = parts["base_layer"], parts["lora_dropout"]._modules[name]
    down, up = parts["lora_A"]._modules[name], parts["lora_B"]._modules[name]
    if (
        name in getattr(layer, "lora_variant", ())  # of PEFT 0.17 and later
        or layer.use_dora.get(name)
        or not (_bare(base) and _bare(down) and _bare(up))
        or (type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or (dropout.training and dropout.p)))
    ):
        return None
    weight, bias, a, b = base.weight, base.bias, down.weight, up.weight
    if weight.requires_grad or down.bias is not None or up.bias is not None:
        return None
    if bias is not None and (bias.requires_grad or bias.dtype != weight.dtype):
        return None
    if (
        not {type(x), type(weight), type(a), type(b)} <= _WHOLE
        or len({x.device, weight.device, a.device, b.device}) > 1
    ):
        return None  # sharded, or on the way to another device
    dtype, dtypes = x.dtype, {x.dtype, weight.dtype, a.dtype, b.dtype}
    kind = x.device.type
    if _can_autocast(kind) and torch.is_autocast_enabled(kind):
        dtype, fit = torch.get_autocast_dtype(kind), dtypes <= _CAST
    else:
        fit = len(dtypes) == 1 and x.is_floating_point()
    return _Operands(weight, bias, a, b, float(layer.scaling[name]), dtype, name) if fit else None


@torch.compiler.assume_constant_result  # PyTorch 2.11 cannot trace the question
def _can_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def _bare(module: Any) -> bool:
    """Whether all that a call of the module does is nn.Linear's."""
    return type(module) is nn.Linear and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


class _Made(NamedTuple):
    """Outputs of layers that read x, by their numbers, and what they were made of."""

    readers: _Readers
    x: Tensor
    operands: list[_Operands]
    versions: list[list[int | None]]
    grad: bool
    outputs: dict[int, Tensor]

    def still(self, number: int, x: Tensor, operands: _Operands) -> bool:
        """Whether the output of a layer is what it would be if it were made now."""
        then = self.operands[number]
        return (
            self.x is x
            and self.grad == torch.is_grad_enabled()
            and all(one is other for one, other in zip(then[:4], operands[:4], strict=True))
            and then[4:] == operands[4:]
            and self.versions[number] == _versions(x, operands)
        )


def _version(one: Tensor | None) -> int | None:
    return None if one is None or one.is_inference() else one._version


def _versions(x: Tensor, operands: _Operands) -> list[int | None]:
    """How often each was changed in place; within graphs it cannot be asked for."""
    if torch.compiler.is_compiling():
        return []
    return [_version(one) for one in (x, *operands[:4])]


class _Slot:
    """Of a model: what was made last and is not yet taken. A forward that fails leaves no more than this behind."""

    def __init__(self) -> None:
        self.made: _Made | None = None


class _Readers:
    """Layers that read one tensor, in the order of their calls; the first call makes the outputs of all.

    From the first time on that another finds nothing it can take, each of them runs by itself.
    """

    def __init__(self, layers: Sequence[Any], slot: _Slot):
        self.layers, self.slot = layers, slot
        self.together = len(layers) > 1

    def taken(self, number: int, x: Tensor, operands: _Operands | None) -> Tensor | None:
        """The output of layer ``number``, whose own operands these are, where it is one of those made together."""
        if number == 0:
            self.slot.made = None
            return None if operands is None else self._first(x, operands)
        made, output = self.slot.made, None
        if made is None:  # called by itself
            return None
        if made.readers is self and operands is not None and made.still(number, x, operands):
            output = made.outputs.pop(number, None)
        if output is None:
            self.together = False
        if output is None or number == len(self.layers) - 1:
            self.slot.made = None
        return output

    def _first(self, x: Tensor, operands: _Operands) -> Tensor | None:
        together = [operands]
        for layer in self.layers[1:]:
            one = _operands(layer, x)
            if one is None or one.dtype != operands.dtype:
                return None
            together.append(one)
        outputs = dict(enumerate(_apply(x, together)))
        output = outputs.pop(0)
        versions = [_versions(x, one) for one in together]
        self.slot.made = _Made(self, x, together, versions, torch.is_grad_enabled(), outputs)
        return output


class _Place(NamedTuple):
    """Of a fused layer: which of the readers it is, and the adapter that was proved."""

    readers: _Readers
    number: int
    name: str


def _class(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


@functools.cache
def _fused(own: Any) -> Any:
    """A class with the same name; copies and pickles of its modules are of the class below, and are not fused."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        operands = None if args or kwargs else _operands(self, x)
        place: _Place = self._fused_adapter
        output = place.readers.taken(place.number, x, operands) if place.readers.together else None
        if output is not None:
            return output
        return own.forward(self, x, *args, **kwargs) if operands is None else _apply(x, [operands])[0]

    def as_own(self: Any, _: Any) -> Any:
        return _class, (own,), {name: value for name, value in vars(self).items() if name != _PLACE}

    body = {
        "forward": functools.wraps(own.forward)(forward),
        "__reduce_ex__": as_own,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
    }
    return type(own.__name__, (own,), body)


# --------------------------------------------------------------------------------------------------------- the products


def _apply(x: Tensor, operands: Sequence[_Operands]) -> list[Tensor]:
    """(..., E) for each, of x (..., D)."""
    dtype = operands[0].dtype
    # What is frozen is cast here, to be kept for the backward pass as autocast keeps it.
    weights = [one.weight.to(dtype) for one in operands]
    biases = [None if one.bias is None else one.bias.to(dtype) for one in operands]
    a, b, scales = ([one[place] for one in operands] for place in (2, 3, 4))
    run: Callable[..., tuple[Tensor, ...]] = _Adapted.apply if torch.is_grad_enabled() else _Adapted.forward
    *outputs, _ = run(x.to(dtype).reshape(-1, x.shape[-1]), scales, *weights, *biases, *a, *b)
    # Not within the function: autograd lets nobody change its views in place, as models may an output.
    return [one.view(*x.shape[:-1], one.shape[-1]) for one in outputs]


class _Adapted(torch.autograd.Function):
    """Layers that read x (N, D): y (N, E) for each, and u = x Aᵀ (N, ΣR)."""

    @staticmethod
    @signed
    def forward(x: Tensor, scales: Sequence[float], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        run: Callable[..., Any] = _forward_operator if torch.compiler.is_compiling() else _forward
        weights, biases, a, b = _quarters(tensors)
        stacked, factors = _cast(a, b, x.dtype)
        # By itself: a compiled layer that is computed again for its gradients may need no more than this of its last.
        u = x @ stacked.T
        return *run(x, u, weights, biases, factors, scales), u

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.scales, *tensors = inputs
        weights, _, a, b = _quarters(tensors)
        ctx.save_for_backward(x, output[-1], *weights, *a, *b)
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        count, needs = len(ctx.scales), ctx.needs_input_grad
        result: list[Tensor | None] = [None] * len(needs)
        # As with PEFT's, the adapter of an output that takes no part has no gradient.
        part = [number for number in range(count) if gradients[number] is not None]
        if not part:
            return tuple(result)
        x, u, *tensors = ctx.saved_tensors
        weights, a, b = (tensors[first : first + count] for first in range(0, 3 * count, count))
        of_each = (gradients, _parts(u, [len(one) for one in a]), weights, a, b, ctx.scales)
        given, us, *others = ([some[number] for number in part] for some in of_each)
        places = [[0], *([first + number for number in part] for first in (2 + 2 * count, 2 + 3 * count))]
        wanted = [any(needs[place] for place in some) for some in places]
        made = once("fuse_adapters", _gradients, given, x, us, *others, wanted)
        into = [place for some, one in zip(places, wanted, strict=True) if one for place in some]
        for place, one in zip(into, made, strict=True):
            result[place] = one
        return tuple(result)


def _quarters(tensors: Sequence[Any]) -> list[list[Any]]:
    count = len(tensors) // 4
    return [[*tensors[first : first + count]] for first in range(0, 4 * count, count)]


def _forward(
    x: Tensor,
    u: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    b: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    parts = _parts(u, [one.shape[1] for one in b])
    return [
        functional.linear(x, weight, bias).addmm_(part, factor.T, alpha=scale)
        for weight, bias, factor, part, scale in zip(weights, biases, b, parts, scales, strict=True)
    ]


def _backward(
    gradients: Sequence[Tensor],
    x: Tensor,
    u: Sequence[Tensor],
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """[dx], dA and dB, one for each layer; only those of the three that are wanted. u: (N, R) of each."""
    for_x, for_a, for_b = wanted
    stacked, b_now = _cast(a, b, x.dtype)
    ranks, made = [len(one) for one in a], []
    if for_x or for_a:
        t = x.new_empty(len(x), sum(ranks))
        for part, gradient, factor, scale in zip(_parts(t, ranks), gradients, b_now, scales, strict=True):
            part.addmm_(gradient, factor, beta=0, alpha=scale)
    if for_x:
        to_x = _product(t, stacked)
        for gradient, weight in zip(gradients, weights, strict=True):
            to_x.addmm_(gradient, weight)
        made.append(to_x)
    to_factors: list[Tensor] = []
    if for_a:
        to_factors += _product(t.T, x).split(ranks)
    if for_b:
        to_factors += [_product(one.T, part, scale) for one, part, scale in zip(gradients, u, scales, strict=True)]
    factors = [one for some, one_wanted in ((a, for_a), (b, for_b)) if one_wanted for one in some]
    if factors:
        gradients_of = [torch.empty_like(one) for one in factors]
        torch._foreach_copy_(gradients_of, to_factors)
        made += gradients_of
    return made


def _gradients(*arguments: Any) -> tuple[Tensor, ...]:
    run: Callable[..., Any] = _backward_operator if torch.compiler.is_compiling() else _backward
    return tuple(run(*arguments))


def _product(one: Tensor, other: Tensor, scale: float = 1.0) -> Tensor:
    """scale · one @ other in their dtype, whatever autocast may be on in a backward pass: it leaves addmm_ alone."""
    return one.new_empty(one.shape[0], other.shape[1]).addmm_(one, other, beta=0, alpha=scale)


def _parts(of_all: Tensor, ranks: list[int]) -> tuple[Tensor, ...]:
    """(N, R) for each layer, of (N, ΣR)."""
    parts: tuple[Tensor, ...] = of_all.split(ranks, dim=1)
    return parts


def _cast(a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Sequence[Tensor]]:
    """All A as one (ΣR, D), and each B (E, R), in dtype."""
    if all(one.dtype == dtype for one in (*a, *b)):
        return a[0] if len(a) == 1 else torch.cat([*a]), b
    run: Callable[..., Any] = _casts_operator if torch.compiler.is_compiling() else _casts
    stacked, *factors = run(a, b, dtype)
    return stacked, factors


def _casts(a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    stacked, *factors = made = _like_casts(a, b, dtype)
    torch._foreach_copy_([*stacked.split([len(one) for one in a]), *factors], [*a, *b])
    return made


def _like_casts(a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    stacked = a[0].new_empty(sum(len(one) for one in a), a[0].shape[1], dtype=dtype)
    return [stacked, *(torch.empty_like(one, dtype=dtype) for one in b)]


def _like_forward(
    x: Tensor,
    u: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    b: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    return [x.new_empty(len(x), len(one)) for one in weights]


def _like_backward(
    gradients: Sequence[Tensor],
    x: Tensor,
    u: Sequence[Tensor],
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    wanted: Sequence[bool],
) -> list[Tensor]:
    made = [x.new_empty(x.shape)] if wanted[0] else []
    made += [torch.empty_like(one) for one in a] if wanted[1] else []
    return made + ([torch.empty_like(one) for one in b] if wanted[2] else [])


_casts_operator = operator("lora_casts(Tensor[] a, Tensor[] b, ScalarType dtype) -> Tensor[]", _like_casts)(_casts)
_forward_operator = operator(
    "lora_forward(Tensor x, Tensor u, Tensor[] weights, Tensor?[] biases, Tensor[] b, float[] scales) -> Tensor[]",
    _like_forward,
)(_forward)
_backward_operator = operator(
    "lora_backward(Tensor[] gradients, Tensor x, Tensor[] u, Tensor[] weights, Tensor[] a, Tensor[] b, float[] scales, "
    "bool[] wanted) -> Tensor[]",
    _like_backward,
)(_backward)


# ---------------------------------------------------------------------------------------------- what is seen beforehand


def _autocast(layers: Iterable[Any]) -> AbstractContextManager[Any]:
    """As it is; on in a layer's dtype where its adapters are in another, which only autocast makes plain."""
    for layer in layers:
        weight = layer.base_layer.weight
        mixed = any(one.weight.dtype != weight.dtype for one in layer.lora_A.values())
        if mixed and weight.dtype in (torch.bfloat16, torch.float16):
            kind = weight.device.type
            return nullcontext() if torch.is_autocast_enabled(kind) else torch.autocast(kind, weight.dtype)
    return nullcontext()


def _calls(base: nn.Module, layers: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What each layer is called with in one forward: tensors with the number of their changes so far, and with more
    than a tensor None; by the layers' names, in the order of their first calls."""
    calls: dict[str, list[Any]] = {}

    def seen(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        calls.setdefault(name, []).append((args[0], _version(args[0])) if plain else None)

    if not inputs:
        device = next(base.parameters()).device
        inputs = {"input_ids": torch.arange(1, 4, device=device)[None]}
    with ExitStack() as hooks, torch.compiler.set_stance("force_eager"):
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(functools.partial(seen, name), with_kwargs=True)
            hooks.callback(hook.remove)
        base(**inputs)
    return calls


def _together(calls: Mapping[str, list[Any]], names: Iterable[str]) -> list[list[str]]:
    """The names of layers that read one tensor; a layer that was not called once is by itself.

    Only within a module: layers that are computed again for their gradients share nothing with others.
    """
    groups: dict[Any, list[str]] = {}
    for name in sorted(names, key=[*calls, *set(names) - calls.keys()].index):
        (call, *more) = calls.get(name, [None])
        key = name if call is None or more else (name.rpartition(".")[0], id(call[0]), call[1])
        groups.setdefault(key, []).append(name)
    return [*groups.values()]


def _proved(name: str, layer: Any) -> str | None:
    """The adapter of a plain layer, whose output and gradients are PEFT's; None of a layer that is not plain."""
    weight = layer.base_layer.weight
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, layer.in_features, generator=random, device="cpu").to(weight)
    operands = _operands(layer, x)
    if operands is None:
        return None
    gradient = torch.randn(4, layer.out_features, generator=random, device="cpu").to(x.device, operands.dtype)
    leaves = [x, *(one for one in (operands.a, operands.b) if one.requires_grad)]
    with torch.enable_grad():
        x.requires_grad_()
        theirs, ours = layer(x), _apply(x, [operands])[0]
        pairs = [
            (theirs, ours),
            *zip(*(torch.autograd.grad(one, leaves, gradient) for one in (theirs, ours)), strict=True),
        ]
    # A product with TF32 rounds a float32's operands to 10 bits.
    eps = 2**-10 if operands.dtype == torch.float32 and x.is_cuda else torch.finfo(operands.dtype).eps
    inner = max(*weight.shape) ** 0.5 * torch.finfo(torch.promote_types(operands.dtype, torch.float32)).eps
    for expected, found in pairs:
        off, size = (one.double().norm().item() for one in (found.double() - expected.double(), expected))
        if not off <= (_ROUNDINGS * eps + inner) * size or not math.isfinite(size):
            raise ModelError(
                f"model: {name}: expected y = x Wᵀ + {operands.scale:g} (x Aᵀ) Bᵀ of its LoRA {operands.name!r}, got a "
                f"layer that is off from it by {off / size if size else math.inf:.2g} of its size"
            )
    return operands.name
