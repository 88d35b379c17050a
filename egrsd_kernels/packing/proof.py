"""The proof that a model's rows in a pack are what each is alone, unpadded.

It is made on a small model of the same class and settings, with random weights, whose windows, chunks and rope limits
are shorter than the rows of the probe: with those of the real model a window that is left out would not show. Weights
of size 1/√inputs let every token look at all that it may, so what is overlooked moves log p by 1e-2 nat and more.

Where the longest row sets a rope's frequencies for all, rows on both sides of its limit change each other. Such a model
packs rows within its limit, which is proved with rows that are within and a pack that is not. A dynamic rope keeps the
longest row's frequencies until a forward that is shorter than the limit: it packs rows that are shorter, and no others.
"""

from __future__ import annotations

import itertools
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from egrsd_kernels.models import ModelError
from egrsd_kernels.models.places import language_model, unwrapped

from . import varlen
from .attention import FAST, ROADS, Road, by_small_blocks, implementation_of, road_of
from .tree import Pack, pack_rows

# In whose place another implementation is asked for a dense mask.
STANDS_FOR = {"flex_attention": "eager", "flash_attention_2": "sdpa", "flash_attention_3": "sdpa"}
REACH = 5  # positions of a window or a chunk; most rows of the probe are longer
TOKENS = 100  # of the probe
# Names of what is no length, whatever its value: widths and numbers of weights, tables of positions, ids, bases.
SIZES = re.compile(
    r"size|dim|rank|width|heads|expert|layers|embd|inner|vocab|index|theta|base|position|channels|features|scal(ar|ing)|"
    r"mult|seed|parts|extent|tokens|context|seq|freq|eps|ffn?|state|_d_|(^|_)ids?$|^(n|d|num|max)_|_num$"
)
LIMIT = 20  # positions of a rope limit; the probe has rows on both sides
WIDTH = 64  # of layers whose width nothing else depends on
# Of a float32 forward: sums of some hundred products, a few in a row, of either sign.
ROUNDOFF = 2**-24
ROUNDINGS = 1024
# Types of PEFT's adapters that give each token's vector what it gets in any row.
ADAPTERS = (
    "LORA", "ADALORA", "IA3", "LN_TUNING", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "FOURIERFT", "HRA", "VBLORA",
    "RANDLORA", "MISS", "BONE", "ROAD", "SHIRA", "C3A", "OSF", "TRAINABLE_TOKENS",
)  # fmt: skip
_KEPT = "_proved_packing"
_lock = threading.Lock()


def row_limit(model: nn.Module) -> float:
    """The length of the longest row that may be packed, by a proof that is kept with the model; math.inf for all.

    Raises:
        ModelError: in one line, with the difference in nats, where a row in a pack is not what it is alone.
    """
    base: Any = language_model(model)
    if not hasattr(base, "config") or not hasattr(base.config, "get_text_config"):
        raise ModelError(f"model: {type(base).__name__}: packing expects a model of transformers")
    _check_adapters(model, base)
    name = implementation_of(base)
    return float(_kept(base, name, lambda: _prove(base, _stand_in(name))))


def _stand_in(name: str) -> Road:
    """The way that is proved on CPUs in an implementation's place: of flex_attention's the blocks themselves."""
    return by_small_blocks if name == "flex_attention" else road_of(STANDS_FOR.get(name, name))


def _check_adapters(model: Any, base: Any) -> None:
    """A ModelError for adapters that are no function of a token's vector alone: the small model has none to show it."""
    for held in (getattr(one, "peft_config", None) for one in (unwrapped(model), base)):
        for config in held.values() if isinstance(held, dict) else ():
            kind = str(getattr(config.peft_type, "value", config.peft_type))
            kind = "aLoRA" if getattr(config, "alora_invocation_tokens", None) else kind
            if kind not in ADAPTERS:
                raise ModelError(
                    f"model: {type(base).__name__}: packing expects PEFT adapters that act on each token alone "
                    f"({', '.join(ADAPTERS)}), got {kind}"
                )


def remembers(model: nn.Module) -> bool:
    """Whether a row beyond :func:`row_limit` changes what later forwards give: it may not stand alone either."""
    text = language_model(model).config.get_text_config().to_dict()
    return any(rope.get("rope_type", rope.get("type")) == "dynamic" for rope in _ropes(text))


def fast_road(model: nn.Module) -> Callable[[Pack, int | None], AbstractContextManager[None]] | None:
    """The way by segments, where the model is on a GPU, computes in 16 bits, and its layers ask for nothing else.

    It is proved on that GPU and in that dtype, and the finding kept.

    Raises:
        ModelError: as :func:`row_limit`.
    """
    base: Any = language_model(model)
    name, device = implementation_of(base), base.device
    kind = device.type
    dtype: torch.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.dtype
    if name not in FAST or kind not in varlen.DEVICES or dtype not in varlen.DTYPES:
        return None
    road = FAST[name]
    served = _kept(base, f"{name} {kind} {dtype}", lambda: _prove_on(base, road, device, dtype))
    return road if served else None


def _kept(base: Any, what: str, prove: Callable[[], float | bool]) -> float | bool:
    try:
        with _lock:
            # Plain values, as a head's proof keeps: they hold in a deep copy as well.
            kept = vars(base).setdefault(_KEPT, {})
            if what not in kept:
                with (
                    torch.no_grad(),
                    torch.device("cpu"),
                    torch.autocast("cpu", enabled=False),
                    torch.compiler.set_stance("force_eager"),
                ):
                    kept[what] = prove()
            found: float | bool = kept[what]
            return found
    except torch.OutOfMemoryError:
        raise
    except ModelError as refusal:
        raise ModelError(f"model: {type(base).__name__}: {refusal}") from None


def _prove(base: Any, road: Road) -> float:
    text = base.config.get_text_config().to_dict()
    limit = min((place[name] for place, name in _limits(text)), default=math.inf)
    rows = _probe(base)
    off, allowed = _difference(base, road, rows, max(map(len, rows)))
    if not off <= allowed:  # NaN, too
        raise ModelError(
            f"log p of a row in a pack is off by {off:.3g} nat from the row alone where rounding allows "
            f"{allowed:.2g}: its layers see more than positions and a mask, so it cannot be packed"
        )
    if limit < math.inf:
        off, allowed = _difference(base, road, rows, LIMIT)
        if off <= allowed:
            return math.inf
        return limit - remembers(base)
    return limit


def _prove_on(base: Any, road: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether layers ask for nothing that the way by segments has not; a ModelError where it gives other numbers.

    Both a pack and the rows alone are compared with the rows alone in float32, so the pack may be off by as much as
    rounding makes the rows alone, and no more than four times that.
    """
    rows = _probe(base)
    (pack,) = pack_rows(rows, budget=sum(map(len, rows)))
    small = _small(base, max(map(len, rows))).to(dtype).float()
    expected = torch.cat([small(input_ids=row[None]).logits[0].log_softmax(-1) for row in rows])
    autocast = dtype != base.dtype
    small = small.to(device) if autocast else small.to(device, dtype)
    _use(small, implementation_of(base))
    with torch.device(device), torch.autocast(device.type, dtype, enabled=autocast):
        alone = torch.cat([small(input_ids=row[None].to(device)).logits[0] for row in rows])
        try:
            with road(pack, None):
                logits = small(**inputs_of(pack, device)).logits[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # whatever a model's forward may raise that is given a table for a mask
            if implementation_of(base) not in ROADS:
                raise ModelError(f"a pack does not pass through it: {_line(failure)}") from failure
            warnings.warn(
                f"{type(base).__name__}: packs take a dense mask, not attention by segments: {_line(failure)}",
                stacklevel=2,
            )
            return False
    in_pack = torch.cat([logits[places.to(device)] for places in pack.places])
    off, rounding = (
        (one.float().log_softmax(-1).cpu() - expected).square().mean().sqrt().item() for one in (in_pack, alone)
    )
    if not off <= 4 * rounding + ROUNDINGS * ROUNDOFF:  # what is compared with is rounded as well; NaN, too
        raise ModelError(
            f"log p of rows in a pack is off by {off:.3g} nat on {device.type} in {dtype} where that of the rows alone "
            f"is off by {rounding:.2g}: attention by segments sees something else"
        )
    return True


def _use(model: nn.Module, implementation: str) -> None:
    for config in (getattr(module, "config", None) for module in model.modules()):
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = implementation  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------------- the models


def _difference(base: Any, road: Road, rows: list[Tensor], limit: int) -> tuple[float, float]:
    """(the largest difference of log p, what was allowed there), nats, over the rows and the vocabulary."""
    small = _small(base, limit)
    (pack,) = pack_rows(rows, budget=sum(map(len, rows)))
    try:
        with road(pack):
            logits = small(**inputs_of(pack, torch.device("cpu"))).logits[0]
        alone = [small(input_ids=row[None]).logits[0] for row in rows]
    except ModelError:
        raise
    except Exception as failure:  # whatever a model's forward may raise
        raise ModelError(f"a pack does not pass through it: {_line(failure)}") from failure
    worst = 0.0, math.inf
    for places, expected in zip(pack.places, alone, strict=True):
        one, other = logits[places].float().log_softmax(-1), expected.float().log_softmax(-1)
        # log p_v = z_v - logsumexp z, as in the proof of a head.
        size = expected.float().abs()
        allowed = (ROUNDINGS * ROUNDOFF * (size + (other.exp() * size).sum(-1, keepdim=True))).nan_to_num(nan=0.0)
        off = (one - other).abs().nan_to_num(nan=torch.inf)
        at = (off / allowed.clamp(min=torch.finfo(torch.float32).tiny)).argmax()
        here = off.flatten()[at].item(), allowed.flatten()[at].item()
        worst = max(worst, here, key=lambda pair: pair[0] / pair[1])
    return worst


def inputs_of(pack: Pack, device: torch.device, size: int | None = None) -> dict[str, Tensor]:
    """What a model's forward takes for a pack: a row (1, N) each, or (1, size) with padding behind the tokens."""
    padding = (size or len(pack)) - len(pack)
    # Without a mask, transformers would take the positions for those of rows that stand one after another.
    columns = {
        "input_ids": pack.input_ids,
        "attention_mask": torch.ones_like(pack.input_ids),
        "position_ids": pack.position_ids,
    }
    return {name: varlen.moved(functional.pad(one, (0, padding))[None], device) for name, one in columns.items()}


def _probe(base: Any) -> list[Tensor]:
    """Rows that share prefixes to two depths, longer than REACH, and rows that share none, one of them shorter."""
    size = _setting(base.config, "vocab_size")
    random = torch.Generator().manual_seed(0)
    # Ids of no special meaning, for any config known.
    ids = torch.randint(min(10, size - 1), min(75, size), (TOKENS,), generator=random)
    trunk, left, right, deep, deeper, *others = ids.split([9, 8, 14, 7, 13, 31, 15, 3])
    tree = (trunk, left, deep), (trunk, left, deeper), (trunk, right), (trunk, left)
    return [*map(torch.cat, tree), *others]


def _small(base: Any, limit: int) -> Any:
    """A model of the same class with few layers, each kind of them in it, in float32 on the CPU."""
    failure: Exception | None = None
    # Where a width is tied to another, or layers are told by their numbers, a smaller model cannot be built.
    for layers, narrow in itertools.product(_layers(base.config), (True, False)):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)  # torch.manual_seed would set every GPU's as well
                model = type(base)(_small_config(base.config, layers, narrow, limit)).float().eval()
                for parameter in filter(Tensor.is_floating_point, model.parameters()):
                    if parameter.ndim > 1:
                        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
                    else:  # a gate that starts at 0 would hide what is behind it
                        parameter += 0.1 * torch.randn_like(parameter)
        except Exception as error:  # whatever a config or a model may raise
            failure = error
            continue
        if not (missing := _classes(base) - _classes(model)):
            return model
        failure = ValueError(f"it has no {min(missing)}")
    raise ModelError(f"packing cannot be proved, for want of a small model of its class: {_line(failure)}")


def _classes(model: nn.Module) -> set[str]:
    """The modules of the model's own library that it is made of, whatever wraps them."""
    return {
        base.__name__
        for module in model.modules()
        for base in type(module).__mro__
        if base.__module__.startswith(("transformers.models.", "transformers_modules."))
    }


# --------------------------------------------------------------------------------------------------------- the settings


def _setting(config: Any, name: str) -> int:
    value = getattr(config.get_text_config(), name, None)
    if not isinstance(value, int):
        raise ModelError(f"packing cannot be proved: its config does not say {name}")
    return value


def _layers(config: Any) -> Iterator[list[int]]:
    """Which layers to keep: one of each kind and two at least; else all."""
    text, count = config.get_text_config(), _setting(config, "num_hidden_layers")
    kinds = list(zip(*_by_layer(text.to_dict(), count).values(), strict=True)) or [()] * count
    first = {kinds.index(kind) for kind in kinds}
    few = sorted(first | {next((layer for layer in range(count) if layer not in first), 0)})
    yield few
    if len(few) < count:
        yield [*range(count)]


def _by_layer(values: dict[str, Any], count: int) -> dict[str, Any]:
    """The settings that have an entry for each layer."""
    return {
        name: value
        for name, value in values.items()
        if len(value if isinstance(value, (list, str)) else ()) == count
        and (isinstance(value, list) or "pattern" in name)
        and not name.endswith(("_id", "_ids", "section"))
    }


def _small_config(config: Any, layers: list[int], narrow: bool, limit: int) -> Any:
    values = config.to_dict()
    own = config.get_text_config()
    inner = next((name for name, value in vars(config).items() if value is own), None)
    text = values if inner is None else values[inner]
    count = own.num_hidden_layers
    for name, value in _by_layer(text, count).items():
        kept = [value[layer] for layer in layers]
        text[name] = "".join(kept) if isinstance(value, str) else kept
    text[own.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    if narrow:
        _narrow(text)
    for name, value in text.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and _reaches(name, value):
            text[name] = min(value, type(value)(REACH))
    for place, name in _limits(text):
        place[name] = limit
    values.update(use_cache=False)
    small = type(config).from_dict(values)
    parts = {"": config, **{name: getattr(config, name, None) for name in config.sub_configs}}
    small._attn_implementation = {
        name: STANDS_FOR.get(part._attn_implementation, part._attn_implementation)
        for name, part in parts.items()
        if hasattr(part, "_attn_implementation")
    }
    return small


def _reaches(name: str, value: float) -> bool:
    """Whether a setting says how far a layer sees, or may be a length that the probe would not come to."""
    far = any(part in name for part in ("window", "chunk", "local_attention", "index_topk", "floor"))
    return (far or (value > TOKENS and not SIZES.search(name))) and not name.endswith(("layers", "pattern"))


def _narrow(text: dict[str, Any]) -> None:
    """Heads stay as they are and become fewer, and the model as much narrower."""
    heads = ("num_attention_heads", "num_key_value_heads", "hidden_size")
    if all(isinstance(text.get(name), int) for name in heads):
        common = math.gcd(*(text[name] for name in heads))
        text.update({name: text[name] // common for name in heads})
    for name in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if isinstance(text.get(name), int):
            text[name] = min(text[name], WIDTH)


def _ropes(values: Any) -> Iterator[dict[str, Any]]:
    """The settings of ropes whose frequencies depend on how long a row is, wherever they stand."""
    if isinstance(values, dict):
        if values.get("rope_type", values.get("type")) in ("dynamic", "longrope"):
            yield values
        for value in values.values():
            yield from _ropes(value)


def _limits(text: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Where the lengths stand from which on those frequencies change."""
    ropes = list(_ropes(text))
    names = ("original_max_position_embeddings", "max_position_embeddings")
    return [(place, name) for place in (*ropes, text) for name in names if ropes and isinstance(place.get(name), int)]


def _line(error: Exception | None) -> str:
    return " ".join(str(error).split())
