"""A small model of the same class, settings and adapters, on which the proof of packing is made.

Windows, chunks and rope limits are shorter than the rows of the probe: with those of the real model a window that is
left out would not show. Weights are random and of size 1/√inputs, so that every token looks at all that it may.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from egrsd_kernels.models import ModelError

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
# Settings of adapters that are sizes of the real model or come from its training: a small one has their defaults.
OF_THE_MODEL = (
    "alpha_pattern", "corda_config", "encoder_hidden_size", "eva_config", "init_lora_weights", "init_weights",
    "layer_replication", "loftq_config", "lora_ga_config", "num_attention_heads", "num_layers", "prompt_tuning_init",
    "rank_pattern", "token_dim",
)  # fmt: skip


class Adapters(NamedTuple):
    """PEFT's of a model: the class that wraps it, None where they are in its layers alone; all configs; active names.

    wrapper and configs are the model's own, and not to be changed.
    """

    wrapper: type | None
    configs: dict[str, Any]
    active: tuple[str, ...]

    @property
    def kinds(self) -> str:
        return ", ".join("aLoRA" if _invocation(one) else _kind(one) for one in self.configs.values())

    @property
    def invocations(self) -> list[list[int]]:
        """The ids from which on activated LoRAs act in a row."""
        return [ids for config in self.configs.values() if (ids := _invocation(config))]

    def same(self, other: Adapters | None) -> bool:
        """Whether it holds the other's very configs: they are compared at every pack, and copied with their model."""
        return (
            other is not None
            and (self.wrapper, self.active, [*self.configs]) == (other.wrapper, other.active, [*other.configs])
            and all(config is other.configs[name] for name, config in self.configs.items())
        )

    def put_on(self, small: Any) -> Any:
        """A small model with the same, fresh and the same of them active."""
        configs = {name: _small_adapter(config) for name, config in self.configs.items()}
        if self.wrapper is None:
            peft: Any = sys.modules["peft"]
            for name, config in configs.items():
                peft.inject_adapter_in_model(config, small, name)
            for module in small.modules():
                if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                    module.set_adapter([*self.active])
            return small
        (first, config), *others = configs.items()
        wrapped = self.wrapper(small, config, first)
        for name, config in others:
            wrapped.add_adapter(name, config)
        if len(self.active) == 1:
            wrapped.set_adapter(*self.active)
        else:
            wrapped.base_model.set_adapter([*self.active])
        return wrapped


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _invocation(config: Any) -> list[int]:
    return [*(getattr(config, "alora_invocation_tokens", None) or ())]


def _small_adapter(config: Any) -> Any:
    small = copy.deepcopy(config)
    for field in fields(config):
        if field.name in OF_THE_MODEL:
            made = field.default_factory
            setattr(small, field.name, field.default if made is MISSING else made())
    return small


def adapters_of(model: nn.Module, base: Any) -> Adapters | None:
    """PEFT's adapters of a model whose language model is ``base``; None without.

    Raises:
        ModelError: for adapters of two wrappers.
    """
    peft: Any = sys.modules.get("peft")  # who has adapters has imported it
    if peft is None:
        return None
    around = itertools.takewhile(lambda module: module is not base, model.modules())
    wrappers: list[Any] = [one for one in around if isinstance(one, peft.PeftModel)]
    inside: Any = getattr(base, "peft_config", None)
    held = [wrapper.peft_config for wrapper in wrappers]
    if len(wrappers) > 1 or (held and inside and inside is not held[0]):
        raise ModelError("packing expects PEFT adapters of one wrapper, got adapters within adapters")
    if wrappers:
        return Adapters(type(wrappers[0]), dict(held[0]), tuple(wrappers[0].active_adapters))
    if not inside:
        return None
    layers: Any = (one for one in base.modules() if isinstance(one, peft.tuners.tuners_utils.BaseTunerLayer))
    return Adapters(None, dict(inside), tuple(next((layer.active_adapters for layer in layers), ())))


def small_model(base: Any, adapters: Adapters | None, limit: int) -> Any:
    """A model of base's class and adapters with few layers, each kind of them in it, in float32 on the CPU.

    limit: from how many positions on a rope's frequencies change that depend on the longest row.

    Raises:
        ModelError: where none can be built.
    """
    failure: Exception | None = None
    smaller = False
    # Where a width is tied to another, or layers are told by their numbers, a smaller model cannot be built.
    for layers, narrow in itertools.product(_layers(base.config), (True, False)):
        whole = not narrow and len(layers) == setting(base.config, "num_hidden_layers")
        if adapters is not None and smaller and whole and len(layers) > 2:
            break  # adapters that fit on none smaller are not worth a model as large as the real one
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)  # torch.manual_seed would set every GPU's as well
                model = type(base)(_small_config(base.config, layers, narrow, limit)).float()
                smaller = True
                model = (model if adapters is None else adapters.put_on(model)).float().eval()
                for parameter in filter(Tensor.is_floating_point, model.parameters()):
                    if parameter.ndim > 1:
                        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
                    else:  # a gate that starts at 0 would hide what is behind it
                        parameter += 0.1 * torch.randn_like(parameter)
        except Exception as error:  # whatever a config, a model or an adapter may raise
            failure = error
            continue
        if not (missing := _classes(base) - _classes(model)):
            return model
        failure = ValueError(f"it has no {min(missing)}")
    of = "its class" if adapters is None else f"its class with its adapters ({adapters.kinds})"
    raise ModelError(f"packing cannot be proved, for want of a small model of {of}: {one_line(failure)}")


def _classes(model: nn.Module) -> set[str]:
    """The modules of the model's own library that it is made of, whatever wraps them, and the kinds of its adapters."""
    # Layers that have lost their last adapter are what they wrap.
    modules = (module for module in model.modules() if getattr(module, "active_adapters", None) != [])
    classes = {base for module in modules for base in type(module).__mro__}
    own = {
        one.__name__ for one in classes if one.__module__.startswith(("transformers.models.", "transformers_modules."))
    }
    # Layers of quantised weights have classes of their own.
    return own | {
        ".".join(one.__module__.split(".")[:3]) for one in classes if one.__module__.startswith("peft.tuners.")
    }


# --------------------------------------------------------------------------------------------------------- the settings


def setting(config: Any, name: str) -> int:
    value = getattr(config.get_text_config(), name, None)
    if not isinstance(value, int):
        raise ModelError(f"packing cannot be proved: its config does not say {name}")
    return value


def _layers(config: Any) -> Iterator[list[int]]:
    """Which layers to keep: one of each kind and two at least; else all."""
    text, count = config.get_text_config(), setting(config, "num_hidden_layers")
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
    for place, name in limits(text):
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
    far = any(part in name for part in ("window", "chunk", "local_attention", "index_topk", "block_size", "floor"))
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


def ropes(values: Any) -> Iterator[dict[str, Any]]:
    """The settings of ropes whose frequencies depend on how long a row is, wherever they stand."""
    if isinstance(values, dict):
        if values.get("rope_type", values.get("type")) in ("dynamic", "longrope"):
            yield values
        for value in values.values():
            yield from ropes(value)


def limits(text: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Where the lengths stand from which on those frequencies change."""
    found = list(ropes(text))
    names = ("original_max_position_embeddings", "max_position_embeddings")
    return [(place, name) for place in (*found, text) for name in names if found and isinstance(place.get(name), int)]


def one_line(error: Exception | None) -> str:
    return textwrap.shorten(str(error), 240, placeholder=" …")
