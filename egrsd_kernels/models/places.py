"""Where a model's head is, below what wraps the model and what wraps the head, and what its weights are.

Wrappers and adapters are told by what they hold: torch.compile's ``_orig_mod``; PEFT's ``base_layer``,
``original_module``, ``modules_to_save`` and ``token_adapter``. Nothing of PEFT is imported, so such modules are typed
as Any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from egrsd_kernels.head import Head

from .errors import ModelError


def unwrapped(model: Any) -> Any:
    """The model without torch.compile's and DDP's wrappers: each process can call it alone."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        else:
            return model


def language_model(model: Any) -> Any:
    """The module whose forward makes the logits, below PEFT and everything that wraps a model as its ``module``."""
    while True:
        model = unwrapped(model)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "module", None)
        if inner is None or not (hasattr(model, "get_base_model") or [*model.children()] == [inner]):
            return model
        model = inner


def every_module(model: nn.Module) -> Iterator[nn.Module]:
    """As ``modules()``, in another order and in a tenth of its time: there each passes through all generators above."""
    seen, todo = {model}, [model]
    while todo:
        module = todo.pop()
        yield module
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                todo.append(child)


def module_at(base: nn.Module, path: str) -> Any:
    """The module that is called for the head at ``path``: of PEFT's copies the active one."""
    module: Any = base.get_submodule(path)
    while True:
        if "_orig_mod" in module._modules:  # torch.compile's
            module = module._orig_mod
        elif "modules_to_save" in module._modules:  # PEFT's
            copies, active = module._modules["modules_to_save"], _active(module)
            module = copies[active[0]] if active and active[0] in copies else module.original_module
        else:
            return module


def place_of(base: nn.Module, path: str) -> str:
    """The path of a head, of the module's at ``path`` that is called for it: the outermost of what wraps it."""
    while "." in path:
        above = path.rpartition(".")[0]
        module = base.get_submodule(above)
        if not (
            isinstance(module, nn.ModuleDict) or {"_orig_mod", "original_module", "base_layer"} & {*module._modules}
        ):
            break
        path = above
    return path


def plain(module: nn.Module) -> Any:
    """The module that holds a head's (V, D) weight: below an adapter's layer, if there is one."""
    return module._modules.get("base_layer", module)


def size_of(module: nn.Module) -> int:
    """V of a head, however it is sharded."""
    weight = plain(module).weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def kind_of(module: nn.Module) -> str:
    """What a head's class computes, and with which adapters: what a proof holds for.

    FSDP2's classes have the forward of those they stand for.
    """
    forward = type(module).forward
    adapters = _adapters(module) if plain(module) is not module else []
    return " ".join([f"{forward.__module__}.{forward.__qualname__}", *adapters])


def head_at(module: Any, frame: Callable[..., Head]) -> Head:
    """The head that the module is now, with its own parameters.

    A ModelError for an adapter that is no plain LoRA, and for quantised weights.
    """
    layer = plain(module)
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if not weight.is_floating_point():
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ModelError(f"its head's weights are {dtype}: leave the head out of the quantisation")
    if layer is module or not _adapters(module):
        return frame(weight, bias)
    factors, scales = [], []
    for name in _adapters(module):
        _check_lora(module, name)
        a, b, scale = module.lora_A[name], module.lora_B[name], module.scaling[name]
        factors.append((a.weight, b.weight))
        scales.append(scale)
        if b.bias is not None:  # lora_bias=True
            bias = scale * b.bias + (0 if bias is None else bias)
    if len(factors) == 1:
        return frame(weight, bias, low_rank=(*factors[0], scales[0]))
    a = torch.cat([scale * a for (a, _), scale in zip(factors, scales, strict=True)])
    return frame(weight, bias, low_rank=(a, torch.cat([b for _, b in factors], dim=1), 1.0))


def check_whole(head: Head) -> None:
    """A ModelError where this process holds a part of the head's weights, or none that a product could take."""
    for tensor in tensors_of(head):
        if hasattr(tensor, "full_tensor"):
            raise ModelError("a part of its head is on other processes: tensor parallelism is not supported")
        if hasattr(tensor, "ds_status") and not tensor.numel():
            raise ModelError(
                "its head is not gathered where its forward begins: a LoRA on it under ZeRO-3 is not supported"
            )
        if tensor.is_meta:
            raise ModelError("its head's weights are offloaded where its forward begins, which is not supported")


def tensors_of(head: Head) -> list[Tensor]:
    a, b, _ = head.low_rank or (None, None, None)
    return [x for x in (head.weight, head.bias, a, b) if x is not None]


def _active(wrapper: Any) -> list[str]:
    if wrapper.disable_adapters:
        return []
    names = wrapper.active_adapter
    return [names] if isinstance(names, str) else [*names]


def _adapters(layer: Any) -> list[str]:
    """The names of the adapters that a PEFT layer applies now."""
    if layer.disable_adapters:
        if layer.merged:
            layer.unmerge()  # as its own forward does
        return []
    if layer.merged:
        return []
    held: list[Any] = [layer._modules.get(name, ()) for name in layer.adapter_layer_names]
    return [name for name in _active(layer) if any(name in adapters for adapters in held)]


def _check_lora(layer: Any, name: str) -> None:
    """A ModelError where the layer computes more than x Wᵀ + s·(x Aᵀ) Bᵀ."""
    kind, factors = type(layer).__name__, getattr(layer, "lora_A", {})
    if name not in factors or not isinstance(factors[name], nn.Linear):
        raise ModelError(f"its head has an adapter that is no LoRA ({kind}): leave the head out of target_modules")
    if name in getattr(layer, "lora_variant", ()) or getattr(layer, "use_dora", {}).get(name):
        raise ModelError("its head has a DoRA or another variant of LoRA: leave the head out of target_modules")
    dropout = layer.lora_dropout[name]
    if layer.training and getattr(dropout, "p", 0):
        raise ModelError(f"its head has a LoRA with lora_dropout {dropout.p:g}: leave the head out, or set it to 0")
