"""What a model does with its head's logits, read off the model itself, and the proof that we compute the same.

A model may transform hidden states before its head, and scale, cap, mask or cut what the head returns. No list of names
can know that of the next model, so the model is asked, with 16 tokens and three forwards:

1. The head returns a ladder of chosen numbers, from tiny to huge of both signs. What the forward makes of them shows
   the factor and the softcap behind the head. The last token differs from that of the other forwards: what enters the
   head before it may not depend on it.
2. The model's own logits.
3. Our logits, from the hidden states that the loss will read.

Rounding the model's logits z once to their dtype (unit roundoff u) moves log p_v = z_v − logsumexp z by at most
u (|z_v| + Σ_j p_j |z_j|). A model makes up to four such roundings: of the product, and of a softcap's quotient, tanh
and product. Float32 sums of D products in another order differ by 4 √D 2^-24 ‖h‖‖W_v‖ at most (Higham and Mary, 2019).
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.nn import functional

from egrsd_kernels import checks

from .errors import ModelError

TOKENS = 16
ROUNDINGS = 4
CAUSAL_ROUNDINGS = 64
VOCABULARY_BLOCK = 8192  # entries of the head that are held in float32 at once


class BehindHead(NamedTuple):
    """softcap · tanh(factor · z / softcap), or factor · z where softcap is None."""

    factor: float
    softcap: float | None


def prove_head(model: Any) -> float | None:
    """The model's softcap, None where it has none, once its logits are shown to be h·Wᵀ + b, softcapped.

    Args:
        model: a causal language model whose forward hands out hidden states, with or without PEFT adapters. Weights,
            modes and random states are afterwards what they were.

    Raises:
        ModelError: in one line, with the difference in nats or with what follows the head and is not supported.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    name = type(base).__name__
    if base.config.is_encoder_decoder:
        raise ModelError(f"model: {name} is an encoder-decoder: its encoder would read the answer that it is to write")
    head = base.get_output_embeddings()
    if getattr(type(head), "forward", None) is not nn.Linear.forward:  # which FSDP2's own class still has
        raise ModelError(
            f"model: expected a plain nn.Linear as LM head, got {type(head).__name__}: leave the head out of "
            "modules_to_save, target_modules and quantisation"
        )
    try:
        with torch.no_grad(), evaluating(model), _random_adapters(model):
            arguments = _probe(base, head)
            ids = arguments["input_ids"]
            other = arguments | {"input_ids": torch.cat([ids[:, :-1], ids[:, :1]], dim=1)}
            with _ladder_for(head) as read:
                ladder = model(**other).logits
            behind = behind_head(ladder.flatten(0, -2), head.out_features)
            with _reading(head) as read_again:
                own = model(**arguments).logits
            roundoff = _roundoff(own, head)
            _check_causal(read, read_again, roundoff)
            ours, error = model(**arguments, read_hidden=functools.partial(_logits, softcap=behind.softcap))
    except torch.OutOfMemoryError:
        raise
    except ValueError as refusal:
        raise ModelError(f"model: {name}: {_line(refusal)}") from refusal
    except Exception as failure:  # whatever a model's forward may raise
        raise ModelError(
            f"model: {name}: its hidden states cannot be read: {type(failure).__name__}: {_line(failure)}"
        ) from failure
    if own.shape != ours.shape:
        raise ModelError(f"model: {name}: its logits are {tuple(own.shape)}, those of its head {tuple(ours.shape)}")
    off, allowed = difference(own.float(), ours, error, roundoff)
    if not off <= allowed:  # NaN, too
        raise ModelError(
            f"model: {name}: log p from its last hidden states is off by {off:.3g} nat where rounding allows "
            f"{allowed:.2g}: it does more between them and its logits than a linear head does, which is not supported"
        )
    return behind.softcap


def behind_head(logits: Tensor, size: int) -> BehindHead:
    """What made (N, V) ``logits`` of the ladder; a ValueError where it is no softcap, or a factor that is not 1."""
    if logits.shape[-1] != size:
        raise ValueError(f"it makes {logits.shape[-1]} logits of the {size} that its head returns: not supported")
    steps = ladder(size, logits.device).double()
    seen = logits.double()
    smallest = steps.abs() == steps.abs().min()
    factor = (seen / steps)[:, smallest].mean().item()
    tolerance = max(1e-4, 2 * torch.finfo(logits.dtype).eps)

    def explains(expected: Tensor) -> bool:
        return bool(((seen - expected).abs() <= tolerance * expected.abs()).all())

    if explains(factor * steps):
        behind = BehindHead(factor, None)
    else:
        cap = seen.abs().max().item()
        if not explains(cap * (factor * steps / cap).tanh()):
            raise ValueError("it masks or changes its logits behind the head by more than a softcap: not supported")
        behind = BehindHead(factor, cap)
    if not abs(factor - 1) <= tolerance:
        raise ValueError(f"it multiplies its logits by {factor:.6g} behind the head, which is not supported")
    return behind


def ladder(size: int, device: torch.device) -> Tensor:
    """(V,) float32: both signs of numbers from 1e-4, where no tanh bends yet, to 1e7, where every tanh is 1."""
    magnitudes = torch.logspace(-4, 7, (size + 1) // 2)
    return torch.cat([-magnitudes.flip(0), magnitudes])[-size:].to(device)


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


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Our logits (..., V) in float32, and how far sums in another order may be from each of them."""
    (hidden,) = checks.autocast(hidden)  # the head's product would round its operands so, and its result, too
    hidden = hidden.float()
    order = 4 * math.sqrt(hidden.shape[-1]) * 2**-24 * hidden.norm(dim=-1, keepdim=True)
    parts, errors = [], []
    for rows in weight.split(VOCABULARY_BLOCK):
        (rows,) = checks.autocast(rows)
        rows = rows.float()
        with torch.autocast(hidden.device.type, enabled=False):
            parts.append(functional.linear(hidden, rows))
        errors.append(order * rows.norm(dim=-1))
    logits, error = torch.cat(parts, -1), torch.cat(errors, -1)
    if bias is not None:
        logits = logits + bias.float()
    return (logits if softcap is None else softcap * (logits / softcap).tanh()), error


def _roundoff(logits: Tensor, head: nn.Linear) -> float:
    """u of the coarsest dtype that the model rounds its logits to; many return in float32 what 16 bits have held."""
    dtypes = [logits.dtype, head.weight.dtype]
    if torch.is_autocast_enabled(logits.device.type):
        dtypes.append(torch.get_autocast_dtype(logits.device.type))
    return max(torch.finfo(dtype).eps for dtype in dtypes) / 2


def _probe(base: Any, head: nn.Linear) -> dict[str, Tensor]:
    """What the trainer passes to a model, for one row of 16 ordinary tokens."""
    # A padding, image or end token may be treated as more than text.
    special = {value for key, value in base.config.get_text_config().to_dict().items() if key.endswith("token_id")}
    special |= {value for key, value in base.config.to_dict().items() if key.endswith(("token_id", "token_index"))}
    ordinary = [token for token in range(min(head.out_features, 10 * TOKENS + len(special))) if token not in special]
    order = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(0))
    picked = [ordinary[index] for index in order.tolist()]
    ids = torch.tensor([(picked * TOKENS)[:TOKENS]], device=base.device)
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(1) - 1}


@contextmanager
def _reading(
    head: nn.Linear, replace: Callable[[Tensor], Tensor | None] = lambda logits: None
) -> Iterator[list[Tensor]]:
    """While this is entered, the list collects what enters the head, and ``replace`` may change what it returns."""
    read: list[Tensor] = []

    def hook(module: nn.Module, arguments: tuple[Tensor], logits: Tensor) -> Tensor | None:
        read.append(arguments[0].detach())
        return replace(logits)

    handle = head.register_forward_hook(hook)
    try:
        yield read
    finally:
        handle.remove()


def _ladder_for(head: nn.Linear) -> AbstractContextManager[list[Tensor]]:
    """The head returns the ladder. It stays float32: rounded numbers would fit nothing."""
    return _reading(head, lambda logits: ladder(logits.shape[-1], logits.device).expand(logits.shape).clone())


def _check_causal(read: Sequence[Tensor], other: Sequence[Tensor], roundoff: float) -> None:
    """A ValueError where what the head has read before the last token depends on that token."""
    for one, two in zip(read, other, strict=True):
        if one.shape[1] == TOKENS:  # else the head has read something else than a row of tokens
            one, two = one[:, :-1].float(), two[:, :-1].float()
            off = ((one - two).norm(dim=-1) / two.norm(dim=-1)).max().item()
            # Experts that meet other tokens may sum in another order, and a tie between two of them fall otherwise.
            if off > CAUSAL_ROUNDINGS * roundoff:
                raise ValueError(f"its hidden states depend on tokens that follow them (by {off:.2g} of their size)")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradient checkpointing; afterwards each module is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _random_adapters(model: nn.Module) -> Iterator[None]:
    """Adapters that change what the model computes: fresh ones are the identity, and would show nothing."""
    trained = [p for p in model.parameters() if p.requires_grad] if is_peft_model(model) else []
    held = [_held(parameter) for parameter in trained]
    kept = [values.clone() for values in held]
    random = torch.Generator().manual_seed(0)
    try:
        for values in held:
            values.copy_(torch.randn(values.shape, generator=random) * 0.02)
        yield
    finally:
        for values, before in zip(held, kept, strict=True):
            values.copy_(before)


def _held(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a parameter: all of it, or its shard under FSDP2 or ZeRO-3."""
    if hasattr(parameter, "to_local"):
        return parameter.to_local()
    return parameter.data if parameter.numel() else getattr(parameter, "ds_tensor", parameter.data)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
