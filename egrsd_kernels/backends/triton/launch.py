"""Kernels that are launched with less to do for the host.

With each launch Triton binds arguments by name, asks of each what a kernel is compiled for, and looks whether a global
has changed. A small step is bound by that; here, what Triton found for such arguments before is looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from .common import TensorDescriptor


class Kernel:
    """A kernel of Triton, launched as one: ``kernel[grid](*arguments, **constants)``, constexprs and options by name.

    Triton compiles a kernel for the device and the constants; for each argument's type; and, unless it is not to
    specialise it, for an integer that is 1, and for integers and addresses that are divisible by 16.
    """

    def __init__(self, function: Any):
        self.jit = function
        self._special = [not x.do_not_specialize for x in function.params if not x.is_constexpr]
        self._constexprs = [x.name for x in function.params if x.is_constexpr]
        assert all(x.is_constexpr for x in function.params[len(self._special) :]), "constexprs come last"
        self._known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            active = driver.active
            device = active.get_current_device()
            kinds = [device, *constants, *constants.values()]
            for x, special in zip(arguments, self._special, strict=True):
                kind = type(x)
                if kind is int:
                    kinds += (x >> 31, -1 if x == 1 else x & 15) if special else (x >> 31,)
                elif x is None or isinstance(x, float):  # NumPy's float64 as well
                    kinds.append(kind)
                elif kind is TensorDescriptor:
                    kinds += x.base.dtype, *x.block_shape
                elif special:
                    kinds += x.dtype, x.data_ptr() & 15
                else:
                    kinds.append(x.dtype)
            key = tuple(kinds)
            known = self._known.get(key)
            if known is not None:
                compiled, constexprs = known
                stream = active.get_current_stream(device)
                compiled[(*grid, 1, 1)[:3]](*arguments, *constexprs, stream=stream)
            else:
                compiled = self.jit[grid](*arguments, **constants)
                self._known[key] = compiled, tuple(constants[name] for name in self._constexprs)

        return launch


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """``triton.jit``, launched by :class:`Kernel` on NVIDIA's GPUs. AMD's kernels are compiled for the sizes of tensors
    as well: there, and in the interpreter, Triton launches by itself."""
    if function is None:
        return lambda function: kernel(function, **options)
    made = triton.jit(function, **options)
    return made if isinstance(made, InterpretedFunction) or torch.version.hip is not None else Kernel(made)
