"""Checks of what users pass, and the flat (N, D) form that the backends work on.

Checks of shape, dtype and device always run. Checks of values would make a GPU wait; they run on CPU tensors, and on
any device when the environment variable EGRSD_KERNELS_CHECK is 1.
"""

from __future__ import annotations

import importlib.util
import math
import os
from numbers import Integral, Real
from types import ModuleType

import torch

from .problem import IGNORE_INDEX, Head


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return repr(value)


def expect(condition: bool, name: str, got: object, expected: str, error: type[Exception] = ValueError) -> None:
    """Raise ``error`` naming the argument, what it got and what it expects, unless ``condition``."""
    if not condition:
        raise error(f"{name}: expected {expected}, got {_describe(got)}")


def values_checked(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" or os.environ.get("EGRSD_KERNELS_CHECK") == "1"


def tensor(name: str, value: object, *, shape: tuple | None = None, like: torch.Tensor | None = None) -> torch.Tensor:
    expect(isinstance(value, torch.Tensor), name, value, "a tensor", TypeError)
    if shape is not None:
        expect(tuple(value.shape) == tuple(shape), name, value, f"shape {tuple(shape)}")
    if like is not None:
        expect(value.device == like.device, name, value, f"a tensor on {like.device}")
    return value


def number(name: str, value: object, *, low: float = -math.inf, high: float = math.inf, strict: bool = False) -> float:
    """A finite real number in [low, high], or in (low, high] with ``strict``."""
    expect(isinstance(value, Real) and not isinstance(value, bool), name, value, "a number", TypeError)
    fits = low <= value <= high and math.isfinite(value) and not (strict and value == low)
    bounds = f"{'above' if strict else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
    expect(fits, name, value, f"a finite number {bounds}")
    return float(value)


def integer(name: str, value: object, *, low: int) -> int:
    fits = isinstance(value, Integral) and not isinstance(value, bool)
    expect(fits, name, value, "an integer", TypeError)
    expect(value >= low, name, value, f"at least {low}")
    return int(value)


def scalar(name: str, value: object, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A number or a 0-d tensor, as a 0-d tensor of ``dtype`` beside ``like``; positive where that can be checked."""
    if not isinstance(value, torch.Tensor):
        return torch.full((), number(name, value, low=0, strict=True), dtype=dtype, device=like.device)
    expect(value.ndim == 0, name, value, "a number or a 0-d tensor")
    if values_checked(value):
        expect(bool(value > 0), name, value.item(), "a positive number")
    if value.device.type == "cpu":  # a copy would wait for the device
        return torch.full((), value.item(), dtype=dtype, device=like.device)
    return value.detach().to(device=like.device, dtype=dtype)


def head(prefix: str, hidden_name: str, hidden, weight, bias, softcap, temperature) -> Head:
    """The LM head that belongs to ``hidden``; prefix: "student_", "teacher_" or ""."""
    name = f"{prefix}weight"
    tensor(name, weight, like=hidden)
    expect(weight.ndim == 2 and weight.shape[0] > 0, name, weight, "shape (V, D) with V > 0")
    fits = weight.shape[1] == hidden.shape[-1]
    expect(fits, name, weight, f"{hidden.shape[-1]} columns, the hidden size of {hidden_name}")
    expect(weight.dtype == hidden.dtype, name, weight, f"the dtype of {hidden_name}, {hidden.dtype}", TypeError)
    if bias is not None:
        tensor(f"{prefix}bias", bias, shape=(weight.shape[0],), like=hidden)
        expect(bias.is_floating_point(), f"{prefix}bias", bias, "a floating-point tensor", TypeError)
        bias = bias.contiguous()
    if softcap is not None:
        softcap = number("softcap", softcap, low=0, strict=True)
    return Head(weight, bias, softcap, number("temperature", temperature, low=0, strict=True))


def hidden_states(name: str, value: object) -> torch.Tensor:
    tensor(name, value)
    expect(value.is_floating_point(), name, value, "a floating-point tensor", TypeError)
    expect(value.ndim in (2, 3) and value.shape[-1] > 0, name, value, "shape (B, T, D) or packed (N, D), D > 0")
    return value


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as a linear layer would take them: in autocast's dtype where autocast is on."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def needs_grad(*operands: torch.Tensor | None) -> tuple[bool, ...]:
    """Which of the operands a gradient will be asked for."""
    return tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in operands)


def batched(hidden: torch.Tensor) -> torch.Tensor:
    """(B, T, D) as it is; packed (N, D) as one batch (1, N, D). Never a copy."""
    return hidden if hidden.ndim == 3 else hidden.unsqueeze(0)


def targets(value: object, hidden: torch.Tensor, vocabulary: int, mask: object) -> tuple[torch.Tensor, torch.Tensor]:
    """(target_ids, valid), both flat (N,): valid is mask and not -100."""
    tensor("target_ids", value, shape=hidden.shape[:-1], like=hidden)
    integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    expect(integer, "target_ids", value, "an integer tensor", TypeError)
    value = value.long()  # in a narrow dtype -100 and the vocabulary's size could wrap around to valid ids
    valid = value != IGNORE_INDEX
    if mask is not None:
        tensor("mask", mask, shape=value.shape, like=hidden)
        expect(not mask.is_complex(), "mask", mask, "a bool or 0/1 tensor", TypeError)
        if mask.dtype != torch.bool and values_checked(mask):
            expect(bool(((mask == 0) | (mask == 1)).all()), "mask", mask, "only 0 and 1")
        valid = valid & (mask != 0)
    if values_checked(value):
        outside = valid & ((value < 0) | (value >= vocabulary))
        if outside.any():
            raise ValueError(f"target_ids: expected ids in [0, {vocabulary}), got {int(value[outside][0])}")
    return value.reshape(-1).contiguous(), valid.reshape(-1).contiguous()


def boundaries(cu_seqlens: object, hidden: torch.Tensor) -> torch.Tensor:
    """Sequence boundaries (S + 1,) on the flat layout: given for packed input, every T tokens for padded."""
    if hidden.ndim == 3:
        expect(cu_seqlens is None, "cu_seqlens", cu_seqlens, "None with padded (B, T, D) hidden states")
        b, t = hidden.shape[:2]
        return torch.arange(b + 1, device=hidden.device) * t
    n = hidden.shape[0]
    if cu_seqlens is None:
        return torch.arange(2, device=hidden.device) * n
    tensor("cu_seqlens", cu_seqlens, like=hidden)
    integer = cu_seqlens.dtype in (torch.int32, torch.int64)
    expect(integer, "cu_seqlens", cu_seqlens, "an int32 or int64 tensor", TypeError)
    expect(cu_seqlens.ndim == 1 and cu_seqlens.numel() >= 2, "cu_seqlens", cu_seqlens, "shape (S + 1,), S >= 1")
    if values_checked(cu_seqlens):
        ends = int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == n
        expect(ends, "cu_seqlens", cu_seqlens.tolist(), f"boundaries from 0 to N = {n}")
        expect(bool((cu_seqlens.diff() >= 0).all()), "cu_seqlens", cu_seqlens.tolist(), "ascending boundaries")
    return cu_seqlens.long()


def sequence_of(cu_seqlens: torch.Tensor, n: int) -> torch.Tensor:
    """The sequence (N,) that each token belongs to."""
    position = torch.arange(n, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], position, right=True).clamp_(max=cu_seqlens.numel() - 2)


def token_advantages(
    value: object, hidden: torch.Tensor, valid: torch.Tensor, sequence: torch.Tensor, sequences: int
) -> torch.Tensor:
    """A (N,): one advantage a token, from one a token or one a sequence."""
    tensor("advantages", value, like=hidden)
    expect(value.is_floating_point(), "advantages", value, "a floating-point tensor", TypeError)
    per_token, per_sequence = tuple(hidden.shape[:-1]), (sequences,)
    fits = tuple(value.shape) in (per_token, per_sequence)
    expect(fits, "advantages", value, f"one a sequence, shape {per_sequence}, or one a token, shape {per_token}")
    value = value.detach()
    flat = (value.reshape(-1) if tuple(value.shape) == per_token else value[sequence]).contiguous()
    if values_checked(value):
        expect(not flat[valid].isnan().any(), "advantages", value, "no NaN at a valid position")
    return flat


def backend(name: object, *hidden: torch.Tensor) -> ModuleType:
    """The module that does the work on these hidden states: ``triton_backend`` or ``torch_backend``."""
    expect(name in ("auto", "triton", "torch"), "backend", name, '"auto", "triton" or "torch"')
    from . import torch_backend

    if name == "torch" or (name == "auto" and hidden[0].device.type != "cuda"):
        return torch_backend
    if importlib.util.find_spec("triton") is None:
        if name == "auto":
            return torch_backend
        raise ModuleNotFoundError('backend: "triton" needs the package triton; install it or use backend="torch"')
    from . import triton_backend

    for x in hidden:
        if not triton_backend.runs_on(x.device) or x.dtype not in triton_backend.DTYPES:
            if name == "auto":
                return torch_backend
            needs = "bfloat16, float16 or float32 tensors on a GPU (or on a CPU with TRITON_INTERPRET=1)"
            raise ValueError(f'backend: "triton" needs {needs}, got {_describe(x)}')
    return triton_backend


def gradients(grad_mode: object, sparse_tol: object) -> tuple[str, float]:
    """(grad_mode, sparse_tol): how gradients are made, and what sparse ones may leave out."""
    expected = '"exact", "sparse" or "auto"'
    expect(grad_mode in ("exact", "sparse", "auto"), "grad_mode", grad_mode, expected)
    return grad_mode, number("sparse_tol", sparse_tol, low=0, high=1, strict=True)


def refuse_second_derivative(function: str) -> None:
    """To be called in a backward pass: under create_graph=True its result would silently lack a graph of its own."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{function} is differentiable once only; its gradient has no gradient (create_graph=True)")
