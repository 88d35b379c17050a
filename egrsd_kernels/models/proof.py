"""What a model does with its head's logits, read off the model itself, and the proof that we compute the same.

A model may transform hidden states before its head, and scale, cap, mask or cut what the head returns. No list of names
can know that of the next model, so the model is asked, with 16 tokens and three forwards:

1. The model's own logits, and which module makes them.
2. The head returns a ladder of chosen numbers, from tiny to huge of both signs. What the forward makes of them shows
   the factor and the softcap behind the head. The last token differs from that of the other forwards: what enters the
   head before it may not depend on it.
3. Our logits, from the hidden states that a loss will read.

Rounding the model's logits z once to their dtype (unit roundoff u) moves log p_v = z_v − logsumexp z by at most
u (|z_v| + Σ_j p_j |z_j|). A model makes up to five such roundings: of the product, of the factor's, and of a softcap's
quotient, tanh and product. Float32 sums of D products in another order differ by 4 √D 2^-24 ‖h‖‖W_v‖ at most (Higham
and Mary, 2019). A LoRA's h Aᵀ, product and sum are rounded, too, whatever is left of them in z.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from egrsd_kernels import checks
from egrsd_kernels.eager import eager
from egrsd_kernels.head import Head, compute_dtype

from .errors import ModelError
from .places import every_module, head_at, kind_of, language_model, module_at, place_of, size_of, tensors_of, unwrapped
from .reading import InForward, logits_of, redirected, run

TOKENS = 16
ROUNDINGS = 5
CAUSAL_ROUNDINGS = 64
VOCABULARY_BLOCK = 8192  # entries of the head that are held in float32 at once
_KEPT = "_proved_heads"
_lock = threading.RLock()  # a proof puts the model into another mode


class Behind(NamedTuple):
    """softcap · tanh(factor · z / softcap), or factor · z where softcap is None."""

    factor: float
    softcap: float | None


class Found(NamedTuple):
    """Where a model's head is, and what comes behind it."""

    path: str
    factor: float
    softcap: float | None

    @property
    def frame(self) -> Callable[..., Head]:
        return functools.partial(Head, logit_scale=self.factor, softcap=self.softcap)


@eager
def head_of(model: nn.Module) -> Head:
    """The model's head as it is now, read off the model and proved against its own logits.

    The model runs three times on 16 tokens, in evaluation mode and without gradients; no other logits are made.
    Weights, modes and random states are afterwards what they were; until then no other thread may run the model. Every
    process of a sharded model has to call it. A change to the model's code, settings or weights behind its head has to
    be followed by another call; :func:`with_head` makes the first one itself.

    Args:
        model: a causal language model, of transformers or any module whose forward takes ``input_ids`` (B, L) and
            returns logits, alone, first in a tuple or as ``logits`` of its output. With or without PEFT adapters,
            torch.compile, DDP, FSDP2 or DeepSpeed around it.

    Returns:
        A :class:`Head` with the model's own parameters, not copies of them, but for a weight into which PEFT puts
            trained tokens. Under ``disable_adapter()`` it is the teacher's. Where FSDP2 or DeepSpeed has sharded the
            parameters they are sharded here, too, and whole only inside :func:`with_head`.

    Raises:
        ModelError: a ValueError, in one line with the difference in nats, where the logits are not
            softcap · tanh(logit_scale · (h (W + s·B A)ᵀ + b) / softcap), or depend on later tokens.
    """
    base, found = language_model(model), _prove(model)
    try:
        return head_at(module_at(base, found.path), found.frame)
    except ModelError as refusal:  # of the mode that the model is in
        raise ModelError(f"model: {type(base).__name__}: {refusal}") from None


@eager
def found_in(model: nn.Module) -> Found:
    """What an earlier proof has found, while its head is still of the same kind; else a proof's."""
    base = language_model(model)
    with _lock:
        for kind, found in vars(base).get(_KEPT, {}).items():
            try:
                if kind_of(module_at(base, found[0])) == kind:
                    return Found(*found)
            except AttributeError:  # there is no such module any more
                continue
        return _prove(model)


def _prove(model: nn.Module) -> Found:
    base = language_model(model)
    with _lock:
        found = prove(model)
        # Plain values: they hold in a deep copy as well, and a pickle of the model asks for no class of this package.
        vars(base).setdefault(_KEPT, {})[kind_of(module_at(base, found.path))] = tuple(found)
    return found


def prove(model: nn.Module) -> Found:
    """The proof itself."""
    model, base = unwrapped(model), language_model(model)
    name = type(base).__name__
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), evaluating(model):
            return _proof(model, base)
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # whatever a model's forward may raise
        text = _line(failure).removeprefix(f"model: {name}: ")
        if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
            text = f"model: {name} is an encoder-decoder: its encoder would read the answer that it is to write"
        elif isinstance(failure, ModelError):
            text = f"model: {name}: {text}"
        else:
            text = f"model: {name}: its hidden states cannot be read: {type(failure).__name__}: {text}"
        raise ModelError(text) from failure


def _proof(model: nn.Module, base: nn.Module) -> Found:
    ids = _probe(base)
    arguments, changed = {"input_ids": ids}, {"input_ids": torch.cat([ids[:, :-1], ids[:, :1]], dim=1)}
    # Modules that look for hooks on their parts may round otherwise without them: hooks are on in all forwards.
    with _random_adapters(model), _noting_calls(base) as calls:
        own = logits_of(model(**arguments)).clone()  # nothing that follows may change it in place
        path, hidden = _head_among(base, [*calls], own.shape[-1])
        module = module_at(base, path)
        logits, hidden_before_another, dtypes = _ladder_through(model, module, changed)
        roundoff = _roundoff(own, dtypes)
        try:
            found = Found(path, *behind_head(logits.flatten(0, -2), size_of(module)))
        except ModelError as refusal:
            off = _off_without(model, module, own, arguments)
            raise ModelError(f"{refusal}: log p would be off by {off:.3g} nat, which is not supported") from None
        (logits, error), _ = run(model, path, found.frame, functools.partial(our_logits, roundoff), arguments)
    if own.shape != logits.shape:
        raise ModelError(f"its logits are {tuple(own.shape)}, those of its head {tuple(logits.shape)}")
    # Over several devices each is where what made it is.
    own, hidden = own.to(logits.device), hidden.to(hidden_before_another.device)
    off, allowed = difference(own.float(), logits, error, roundoff)
    _check_causal(hidden, hidden_before_another, roundoff)
    if not off <= allowed:  # NaN, too
        raise ModelError(
            f"log p from its last hidden states is off by {off:.3g} nat where rounding allows {allowed:.2g}: it does "
            "more between them and its logits than a linear head does, which is not supported"
        )
    return found


# --------------------------------------------------------------------------------------------------------- the ladder


def ladder(size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """(V,): both signs of numbers from 1e-4, where no tanh bends yet, to 1e7, where every tanh is 1."""
    magnitudes = torch.logspace(-4, 7, (size + 1) // 2, dtype=dtype)
    return torch.cat([-magnitudes.flip(0), magnitudes])[-size:].to(device)


def behind_head(logits: Tensor, size: int) -> Behind:
    """What made (N, V) ``logits`` of the ladder; a ModelError where it is no factor above 0 and softcap."""
    if logits.shape[-1] != size:
        raise ModelError(f"it makes {logits.shape[-1]} logits of the {size} that its head returns")
    seen = logits.double()
    steps = ladder(size, logits.device, compute_dtype(logits.dtype)).double()
    tolerance = max(1e-4, 2 * torch.finfo(logits.dtype).eps)

    def explains(expected: Tensor) -> bool:
        return bool(((seen - expected).abs() <= tolerance * expected.abs()).all())

    ratio, cap = seen / steps, None
    factor = ratio.mean().item()
    if not explains(factor * steps):
        cap = seen.abs().max().item()
        # Where tanh bends so little that its inverse loses no digit, or else as near to it as the ladder has steps.
        straight = seen.abs() <= max(1e-3 * cap, seen.abs().min().item())
        factor = (cap * (seen / cap).atanh() / steps)[straight].mean().item()
        if not explains(cap * (factor * steps / cap).tanh()):
            raise ModelError("it masks or changes its logits behind the head by more than a scale and a softcap")
    if not 0 < factor < math.inf:
        raise ModelError(f"it multiplies its logits by {factor:.6g} behind the head")
    return Behind(1.0 if abs(factor - 1) <= tolerance else factor, cap)


def _ladder_through(
    model: nn.Module, module: nn.Module, arguments: dict[str, Tensor]
) -> tuple[Tensor, Tensor, list[torch.dtype]]:
    """(logits, hidden, the dtypes of the head's weights there) of a forward whose head returns the ladder."""
    read: list[tuple[Tensor, list[torch.dtype]]] = []

    def steps(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        # FSDP2's policy for mixed precision casts the weights for the forward.
        read.append((hidden.detach(), [tensor.dtype for tensor in tensors_of(head_at(module, Head))]))
        # A gradient from here on is that of a parameter behind the head.
        torch.set_grad_enabled(True)
        # Not in 16 bits: rounded numbers would fit nothing.
        return (
            ladder(size_of(module), hidden.device, compute_dtype(hidden.dtype)).expand(*hidden.shape[:-1], -1).clone()
        )

    with torch.no_grad(), redirected(module, steps):
        logits = logits_of(model(**arguments))
    if logits.requires_grad:
        raise ModelError("a parameter that is trained changes its logits behind the head, which is not supported")
    if len(read) != 1:
        raise ModelError(f"its forward calls its head {len(read)} times, which is not supported")
    return logits, *read[0]


def _off_without(model: nn.Module, module: nn.Module, own: Tensor, arguments: dict[str, Tensor]) -> float:
    """By how many nats the log p of what the head alone makes differs from the model's."""
    plain_logits: list[Tensor] = []

    def read(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        plain_logits.append(our_logits(0.0, hidden, head_at(module, Head))[0])
        return plain_logits[0].clone()

    with redirected(module, read):
        model(**arguments)
    logp = plain_logits[0].log_softmax(-1)[..., : own.shape[-1]]
    return (logp - own.to(logp.device).float().log_softmax(-1)).abs().nan_to_num(nan=torch.inf).max().item()


# ------------------------------------------------------------------------------------------------------ the criterion


def difference(own: Tensor, ours: Tensor, error: Tensor, roundoff: float) -> tuple[float, float]:
    """(the largest difference of two models' log p, what was allowed there), nats, of logits (..., V).

    The entry that exceeds most what it may is the one that is reported. ``error``: of each of our logits.
    """
    logp, expected = ours.log_softmax(-1), own.log_softmax(-1)
    size = ours.abs() * roundoff
    allowed = ROUNDINGS * (size + (logp.exp() * size).sum(-1, keepdim=True)) + error + error.amax(-1, keepdim=True)
    off = (logp - expected).abs().nan_to_num(nan=torch.inf)
    worst = (off / allowed.clamp(min=torch.finfo(torch.float32).tiny)).argmax()
    return off.flatten()[worst].item(), allowed.flatten()[worst].item()


def our_logits(roundoff: float, hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Our logits (..., V) in float32, and how far sums in another order, and a LoRA's roundings, may be from each."""
    (hidden,) = checks.autocast(hidden)  # the head's product would round its operands so, and its result, too
    hidden = hidden.float()
    order = 4 * math.sqrt(hidden.shape[-1]) * 2**-24 * hidden.norm(dim=-1, keepdim=True)
    a, b, scale = head.low_rank or (None, None, 0.0)
    with torch.autocast(hidden.device.type, enabled=False):
        if a is not None:
            (a,) = checks.autocast(a)
            low, low_order = functional.linear(hidden, a.float()), order * a.float().norm(dim=-1)
        parts, errors = [], []
        for start in range(0, len(head.weight), VOCABULARY_BLOCK):
            cut = slice(start, start + VOCABULARY_BLOCK)
            rows = head.weight[cut].float()
            product, error = functional.linear(hidden, rows), order * rows.norm(dim=-1)
            if b is not None:
                rows = scale * b[cut].float()
                added = functional.linear(low, rows)
                error = error + functional.linear(low_order + roundoff * low.abs(), rows.abs())
                error = error + roundoff * (product.abs() + 2 * added.abs())
                product = product + added
            parts.append(product)
            errors.append(error)
        logits, error = torch.cat(parts, -1), torch.cat(errors, -1)
    if head.bias is not None:
        logits = logits + head.bias.float()
    logits, error = logits * head.logit_scale, error * head.logit_scale
    return (logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()), error


def _roundoff(logits: Tensor, dtypes: list[torch.dtype]) -> float:
    """u of the coarsest dtype that the model rounds its logits to; many return in float32 what 16 bits have held."""
    dtypes = [logits.dtype, *dtypes]
    if torch.is_autocast_enabled(logits.device.type):
        dtypes.append(torch.get_autocast_dtype(logits.device.type))
    return max(torch.finfo(dtype).eps for dtype in dtypes) / 2


def _check_causal(hidden: Tensor, other: Tensor, roundoff: float) -> None:
    """A ModelError where what the head has read before the last token depends on that token."""
    # Prompt tuning puts rows of its own before those of the tokens.
    if hidden.shape != other.shape or hidden.ndim != 3 or hidden.shape[0] != 1 or hidden.shape[1] < TOKENS:
        raise ModelError(f"its head reads {tuple(hidden.shape)} of a row of {TOKENS} tokens, which is not supported")
    one, two = hidden[:, :-1].float(), other[:, :-1].float()
    off = ((one - two).norm(dim=-1) / two.norm(dim=-1)).max().item()
    # Experts that meet other tokens may sum in another order, and a tie between two of them fall otherwise. What they
    # sum in float64 differs by float32's roundings where a layer, or this comparison, rounds to it.
    if not off <= CAUSAL_ROUNDINGS * max(roundoff, 2**-24):
        raise ModelError(f"its hidden states depend on tokens that follow them (by {off:.2g} of their size)")


# ------------------------------------------------------------------------------------------------------------ the head


def _probe(base: Any) -> Tensor:
    """(1, 16) ordinary tokens."""
    config: Any = getattr(base, "config", None)
    parts = [config, config.get_text_config()] if hasattr(config, "get_text_config") else []
    # A padding, image or end token may be treated as more than text.
    named = {name: value for part in parts for name, value in part.to_dict().items()}
    values = [v for name, v in named.items() if name.endswith(("token_id", "token_index", "token_ids"))]
    special = {one for value in values for one in (value if isinstance(value, (list, tuple)) else [value])}
    embedded = [module.num_embeddings for module in base.modules() if isinstance(module, nn.Embedding)]
    size = getattr(parts[-1], "vocab_size", None) if parts else None
    size = size or max(embedded, default=TOKENS)
    ordinary = [token for token in range(min(size, 10 * TOKENS + len(special))) if token not in special]
    order = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(0))
    picked = [ordinary[index] for index in order.tolist()]
    device = next((parameter.device for parameter in base.parameters()), torch.device("cpu"))
    return torch.tensor([(picked * TOKENS)[:TOKENS]], device=getattr(base, "device", device))


class _Call(NamedTuple):
    path: str
    hidden: Tensor
    width: int


@contextmanager
def _noting_calls(base: nn.Module) -> Iterator[list[_Call]]:
    """While this is entered, the list collects the calls of modules that could be a head: with a (V, D) weight.

    Where PEFT trains some tokens of a head (``token_adapter``), the module that wraps it has the weight.
    """
    calls: list[_Call] = []

    def note(path: str, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        hidden = next((x for x in (*arguments, *named.values()) if isinstance(x, Tensor)), None)
        if hidden is not None and hidden.is_floating_point() and isinstance(out, Tensor):
            calls.append(_Call(path, hidden.detach(), out.shape[-1]))

    handles = [
        module.register_forward_hook(functools.partial(note, path), with_kwargs=True)
        for path, module in base.named_modules(remove_duplicate=False)
        if module._parameters.get("weight") is not None or "token_adapter" in module._modules
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _head_among(base: Any, calls: Sequence[_Call], width: int) -> tuple[str, Tensor]:
    """(path, what it has read) of the module that makes logits (..., ``width``), by what the model says, or does."""
    named = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    inside = {id(module) for module in named.modules()} if named is not None else set()
    chosen = [call for call in calls if id(base.get_submodule(call.path)) in inside]
    chosen = chosen or [call for call in calls if call.width == width]
    chosen = chosen or [call for call in calls[-1:] if call.width > width]  # whose logits are cut
    if not chosen:
        raise ModelError("its logits come from no module with a weight of its own, which is not supported")
    path = place_of(base, chosen[-1].path)
    return path, next(call.hidden for call in calls if call.path.startswith(path))


# ----------------------------------------------------------------------------------------------------------- the model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradient checkpointing; afterwards each module is in its own mode again."""
    training = [module for module in every_module(model) if module.training]
    # Flags alone, both ways: a module's own eval() may do more than train() takes back.
    _set_training(training, False)
    try:
        yield
    finally:
        _set_training(training, True)


def _set_training(modules: list[nn.Module], flag: bool) -> None:
    for module in modules:
        if "training" in (held := vars(module)):
            held["training"] = flag  # nn.Module's way to it looks for parameters of that name
        else:  # torch.compile's
            module.training = flag


@contextmanager
def _random_adapters(model: nn.Module) -> Iterator[None]:
    """Adapters that change what the model computes: fresh ones are the identity, and would show nothing."""
    adapted = any({"base_layer", "original_module"} & {*module._modules} for module in model.modules())
    _reshard(model)
    held = [_held(parameter) for parameter in model.parameters() if parameter.requires_grad] if adapted else []
    kept = [values.clone() for values in held]
    random = torch.Generator().manual_seed(0)
    try:
        for values in held:
            values.copy_(torch.randn(values.shape, generator=random) * 0.02)
        torch.clear_autocast_cache()  # within a region of autocast, 16-bit copies outlive the values they are of
        yield
    finally:
        for values, before in zip(held, kept, strict=True):
            values.copy_(before)
        torch.clear_autocast_cache()
        _reshard(model)


def _reshard(model: Any) -> None:
    """FSDP2's root keeps what it has gathered in a forward without gradients, and would go on with old values.

    What a forward in progress has gathered stays, for that forward.
    """
    in_progress = model.module if isinstance(model, InForward) else None
    for module in model.modules():
        if module is not in_progress and hasattr(type(module), "reshard"):
            module.reshard()


def _held(parameter: Any) -> Tensor:
    """What this process holds of a parameter: all of it, or its shard under FSDP2 or ZeRO-3."""
    held: Tensor = parameter.data
    if hasattr(parameter, "to_local"):
        held = parameter.to_local()
    elif not held.numel():
        held = getattr(parameter, "ds_tensor", held)
    return held


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
