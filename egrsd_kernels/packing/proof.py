"""The proof that a model's rows in a pack are what each is alone, unpadded.

It is made on a small model of the same class, settings and adapters, with random weights, whose windows, chunks and
rope limits are shorter than the rows of the probe. What is overlooked moves its log p by 1e-2 nat and more.

Where the longest row sets a rope's frequencies for all, rows on both sides of its limit change each other. Such a model
packs rows within its limit, which is proved with rows that are within and a pack that is not. A dynamic rope keeps the
longest row's frequencies until a forward that is shorter than the limit: it packs rows that are shorter, and no others.
"""

from __future__ import annotations

import math
import re
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from egrsd_kernels.models import ModelError
from egrsd_kernels.models.places import every_module, language_model

from . import varlen
from .attention import FAST, ROADS, Road, by_small_blocks, implementation_of, road_of
from .layers import is_dropping, may_drop
from .small_model import LIMIT, STANDS_FOR, TOKENS, Adapters, adapters_of, limits, one_line, ropes, setting, small_model
from .tree import Pack, pack_rows

# Of a float32 forward: sums of some hundred products, a few in a row, of either sign.
ROUNDOFF = 2**-24
ROUNDINGS = 1024
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
    adapters, name = _adapters_of(model, base), implementation_of(base)
    return float(_kept(base, adapters, name, lambda: _prove(base, adapters, _stand_in(name))))


def _adapters_of(model: nn.Module, base: Any) -> Adapters | None:
    try:
        return adapters_of(model, base)
    except ModelError as refusal:
        raise ModelError(f"model: {type(base).__name__}: {refusal}") from None


def _stand_in(name: str) -> Road:
    """The way that is proved on CPUs in an implementation's place: of flex_attention's the blocks themselves."""
    return by_small_blocks if name == "flex_attention" else road_of(STANDS_FOR.get(name, name))


def remembers(model: nn.Module) -> bool:
    """Whether a row beyond :func:`row_limit` changes what later forwards give: it may not stand alone either."""
    text = language_model(model).config.get_text_config().to_dict()
    return any(rope.get("rope_type", rope.get("type")) == "dynamic" for rope in ropes(text))


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
    road, adapters = FAST[name], _adapters_of(model, base)
    of = f"{name} {kind} {dtype}"
    served = _kept(base, adapters, of, lambda: _prove_on(base, adapters, road, device, dtype))
    return road if served else None


def draws(model: nn.Module) -> bool:
    """Whether a forward draws random numbers in training, by modules of dropout or otherwise; kept with the model.

    Raises:
        ModelError: where there is no small model to see it by.
    """
    base: Any = language_model(model)
    adapters = _adapters_of(model, base)
    return bool(_kept(base, adapters, "draws", lambda: _draws(base, adapters)))


def drops(model: nn.Module, *, in_training: bool = False) -> bool:
    """Whether a forward drops anything as the model is set, or would in training: by a module of dropout, or as
    :func:`draws` finds."""
    dropping = may_drop if in_training else is_dropping
    return any(map(dropping, every_module(model))) or ((in_training or model.training) and draws(model))


def _draws(base: Any, adapters: Adapters | None) -> bool:
    row = _probe(base, adapters)[0]
    small = small_model(base, adapters, len(row)).train()
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        try:
            small(input_ids=row[None])
        except Exception:  # whatever a model's forward may raise in training: it may draw as well
            return True
        return not torch.get_rng_state().equal(before)


class _Finding(NamedTuple):
    of: str
    adapters: Adapters | None
    value: float | bool

    def holds(self, of: str, adapters: Adapters | None) -> bool:
        same = self.adapters is None if adapters is None else adapters.same(self.adapters)
        return self.of == of and same


def _kept(base: Any, adapters: Adapters | None, of: str, prove: Callable[[], float | bool]) -> float | bool:
    """What is proved, found once for a model: the finding is kept with it, and holds in a deep copy as well."""
    try:
        with _lock:
            kept: list[_Finding] = vars(base).setdefault(_KEPT, [])
            found = next((one for one in kept if one.holds(of, adapters)), None)
            if found is None:
                with (
                    torch.no_grad(),
                    torch.device("cpu"),
                    torch.autocast("cpu", enabled=False),
                    torch.compiler.set_stance("force_eager"),
                ):
                    found = _Finding(of, adapters, prove())
                kept.append(found)
            return found.value
    except torch.OutOfMemoryError:
        raise
    except ModelError as refusal:
        name = type(base).__name__ if adapters is None else f"{type(base).__name__} with {adapters.kinds}"
        raise ModelError(f"model: {name}: {refusal}") from None


def _prove(base: Any, adapters: Adapters | None, road: Road) -> float:
    text = base.config.get_text_config().to_dict()
    limit = min((place[name] for place, name in limits(text)), default=math.inf)
    rows = _probe(base, adapters)
    off, allowed = _difference(small_model(base, adapters, max(map(len, rows))), road, rows)
    if not off <= allowed:  # NaN, too
        raise ModelError(
            f"log p of a row in a pack is off by {off:.3g} nat from the row alone where rounding allows "
            f"{allowed:.2g}: its layers see more than positions and a mask, so it cannot be packed"
        )
    if limit < math.inf:
        off, allowed = _difference(small_model(base, adapters, LIMIT), road, rows)
        if off <= allowed:
            return math.inf
        return limit - remembers(base)
    return limit


def _prove_on(base: Any, adapters: Adapters | None, road: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether layers ask for nothing that the way by segments has not; a ModelError where it gives other numbers.

    Both a pack and the rows alone are compared with the rows alone in float32, so the pack may be off by as much as
    rounding makes the rows alone, and no more than four times that.
    """
    rows = _probe(base, adapters)
    (pack,) = pack_rows(rows, budget=sum(map(len, rows)))
    small = small_model(base, adapters, max(map(len, rows))).to(dtype).float()
    expected = torch.cat([small(input_ids=row[None]).logits[0].log_softmax(-1) for row in rows])
    autocast = dtype != base.dtype
    small = small.to(device) if autocast else _cast_as(base, small.to(device, dtype))
    _use(small, implementation_of(base))
    with torch.device(device), torch.autocast(device.type, dtype, enabled=autocast):
        try:
            alone = torch.cat([small(input_ids=row[None].to(device)).logits[0] for row in rows])
            with road(pack, None):
                logits = small(**inputs_of(pack, device)).logits[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # whatever a model's forward may raise that is given a table for a mask
            if implementation_of(base) not in ROADS:
                raise ModelError(f"a pack does not pass through it: {one_line(failure)}") from failure
            warnings.warn(
                f"{type(base).__name__}: packs take a dense mask, not attention by segments: {one_line(failure)}",
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


def _cast_as(base: nn.Module, small: Any) -> Any:
    """What stays in float32 in a 16-bit ``base``, as PEFT's adapters do, is so in the small model."""
    of_any_layer = re.compile(r"\.\d+")
    wide = {of_any_layer.sub("", name) for name, one in base.named_parameters() if one.dtype == torch.float32}
    for name, one in language_model(small).named_parameters():
        if of_any_layer.sub("", name) in wide:
            one.data = one.data.float()
    return small


def _use(model: nn.Module, implementation: str) -> None:
    for config in (getattr(module, "config", None) for module in model.modules()):
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = implementation  # type: ignore[union-attr]


# ----------------------------------------------------------------------------------------------------------- the rows


def _difference(small: Any, road: Road, rows: list[Tensor]) -> tuple[float, float]:
    """(the largest difference of log p, what was allowed there), nats, over the rows and the vocabulary."""
    (pack,) = pack_rows(rows, budget=sum(map(len, rows)))
    try:
        with road(pack):
            logits = small(**inputs_of(pack, torch.device("cpu"))).logits[0]
        alone = [small(input_ids=row[None]).logits[0] for row in rows]
    except ModelError:
        raise
    except Exception as failure:  # whatever a model's forward may raise
        raise ModelError(f"a pack does not pass through it: {one_line(failure)}") from failure
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


def _probe(base: Any, adapters: Adapters | None) -> list[Tensor]:
    """Rows that share prefixes to two depths, longer than REACH, and rows that share none, one of them shorter.

    What activated LoRAs wait for stands in some of them, at different places.
    """
    size = setting(base.config, "vocab_size")
    random = torch.Generator().manual_seed(0)
    # Ids of no special meaning, for any config known.
    ids = torch.randint(min(10, size - 1), min(75, size), (TOKENS,), generator=random)
    trunk, left, right, deep, deeper, *others = ids.split([9, 8, 14, 7, 13, 31, 15, 3])
    for invocation in adapters.invocations if adapters is not None else ():
        deep, right = (torch.cat([one[:4], torch.tensor(invocation), one[4:]]) for one in (deep, right))
    tree = (trunk, left, deep), (trunk, left, deeper), (trunk, right), (trunk, left)
    return [*map(torch.cat, tree), *others]
