"""Gradients that have no gradient of their own, and say so when one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


class _Once(torch.autograd.Function):
    """function(*arguments), tensors; whoever differentiates it is refused."""

    @staticmethod
    def forward(name: str, made: Callable[..., tuple[Any, ...]], structure: Any, *leaves: Any) -> tuple[Any, ...]:
        return made(*_pytree.tree_unflatten(leaves, structure))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        raise RuntimeError(f"{ctx.name} is differentiable once only; its gradient has no gradient (create_graph=True)")


def once(name: str, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
    """function(*arguments) in a backward pass, tensors or None; under create_graph=True with a graph that says once.

    A result without a graph would be a silent zero as its own gradient. name: of the public function.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    leaves, structure = _pytree.tree_flatten(arguments)
    made: tuple[Any, ...] = _Once.apply(name, function, structure, *leaves)
    return made
