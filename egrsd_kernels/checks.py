"""What users pass, refused in one line or brought into the flat (N,) form that the backends work on.

Checks of shape, dtype, layout and device always run. Checks of values run where :func:`values_checked` allows.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch._subclasses import FakeTensor

from .head import Head
from .rows import Sequences, by_token

IGNORE_INDEX = -100  # transformers' mark for a position without a target
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
FLOAT_TENSOR = "a floating-point tensor (bfloat16, float16, float32 or float64)"
DESCRIBED_CHARACTERS = 200  # of a value in a message: enough to recognise it by
# The modes in which PyTorch traces a program: no tensor holds the values of a call there.
TRACING = (
    torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)  # fmt: skip


def describe(value: object) -> str:
    """One line, whatever the value is."""
    if isinstance(value, torch.Tensor):
        if value.is_nested:  # has no shape that could be read
            return f"a nested {value.dtype} tensor on {value.device}"
        layout = "" if value.layout == torch.strided else f"{value.layout} "
        return f"a {layout}{value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    text = " ".join(repr(value).split())
    return text if len(text) <= DESCRIBED_CHARACTERS else text[: DESCRIBED_CHARACTERS - 1] + "…"


def expect(condition: bool, name: str, got: object, expected: str, error: type[Exception] = ValueError) -> None:
    """Raise ``error`` naming the argument, what it got and what it expects, unless ``condition``."""
    if not condition:
        raise error(f"{name}: expected {expected}, got {describe(got)}")


T = TypeVar("T")


def instance(name: str, value: object, kind: type[T], expected: str) -> T:
    """``value``, which is of that type."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    return value


def traced(tensor: torch.Tensor) -> bool:
    """Whether PyTorch traces (torch.compile, torch.export, FakeTensorMode, make_fx) or transforms (torch.func)."""
    if torch.compiler.is_compiling():  # first: what follows cannot be compiled
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return isinstance(tensor, FakeTensor) or any(torch._C._get_dispatch_mode(key) is not None for key in TRACING)


def values_checked(tensor: torch.Tensor) -> bool:
    """Whether values may be looked at: on a CPU, and on any device when EGRSD_KERNELS_CHECK is 1.

    Never where :func:`traced`: what depends on values fails there. On a GPU to look at them would make the host wait.
    """
    if torch.compiler.is_compiling():  # first: what follows cannot be compiled
        return False
    if tensor.device.type != "cpu" and (tensor.is_meta or os.environ.get("EGRSD_KERNELS_CHECK") != "1"):
        return False
    return not traced(tensor)


def tensor(
    name: str, value: object, *, shape: tuple[int, ...] | None = None, like: torch.Tensor | None = None
) -> torch.Tensor:
    """A dense tensor with values, all of them on this process."""
    value = instance(name, value, torch.Tensor, "a tensor")
    whole = not hasattr(value, "full_tensor")  # not by its class, whose module is slow to import
    expect(whole, name, value, "a whole tensor, not a DTensor: its full_tensor(), or what with_head gives", TypeError)
    dense = value.layout == torch.strided and not value.is_nested and not value.is_quantized
    expect(dense, name, value, "a dense tensor, neither sparse nor nested nor quantised", TypeError)
    if shape is not None:
        expect(tuple(value.shape) == tuple(shape), name, value, f"shape {tuple(shape)}")
    if like is not None:
        expect(value.device == like.device, name, value, f"a tensor on {like.device}")
    expect(value.device.type != "meta", name, value, "a tensor that holds values, on a CPU or GPU")
    return value


def mask_of(
    name: str, value: object, *, shape: tuple[int, ...] | None = None, like: torch.Tensor | None = None, why: str = ""
) -> torch.Tensor:
    """A mask as bools: bool, or 0/1 in any dtype of numbers."""
    value = tensor(name, value, shape=shape, like=like)
    if value.dtype == torch.bool:
        return value
    expect(value.dtype in (*INTEGERS, *FLOATS), name, value, "a bool or 0/1 tensor", TypeError)
    if values_checked(value):
        expect(bool(((value == 0) | (value == 1)).all()), name, value, "only 0 and 1" + why)
    return value != 0


def flag(name: str, value: object) -> bool:
    return instance(name, value, bool, "True or False")


def number(name: str, value: object, *, low: float = -math.inf, high: float = math.inf, strict: bool = False) -> float:
    """A finite real number in [low, high], or in (low, high] with ``strict``."""
    expect(not isinstance(value, bool), name, value, "a number", TypeError)
    try:
        # float first, as most are: isinstance asks Real's registry.
        real = value if isinstance(value, float) else float(instance(name, value, Real, "a number"))
    except OverflowError:  # an integer or a fraction beyond float64
        real = math.inf
    fits = low <= real <= high and -math.inf < real < math.inf and not (strict and real == low)
    if not fits:  # words only then: a number that is traced has none
        bounds = f" {'above' if strict else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
        expect(False, name, value, "a finite number" + (bounds if (low, high) != (-math.inf, math.inf) else ""))
    return real


def integer(name: str, value: object, *, low: int) -> int:
    expect(not isinstance(value, bool), name, value, "an integer", TypeError)
    whole = int(instance(name, value, Integral, "an integer"))
    expect(whole >= low, name, value, f"at least {low}")
    return whole


def names(name: str, value: object, known: Sequence[str]) -> tuple[str, ...]:
    """Those of ``known`` that a collection of names has, in the order of ``known``."""
    expected = f"names out of {', '.join(known)}"
    expect(not isinstance(value, str), name, value, f"a collection of {expected}", TypeError)
    given = list(instance(name, value, Collection, f"a collection of {expected}"))
    unknown = [x for x in given if x not in known]
    expect(not unknown, name, unknown, expected)
    return tuple(x for x in known if x in given)


def scalar(name: str, value: object, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A number or a 0-d tensor, as a 0-d tensor of ``dtype`` beside ``like``.

    Positive and finite in that dtype, where that can be checked: an infinite divisor would make a 0 of everything.
    """
    if not isinstance(value, torch.Tensor):
        value = number(name, value, low=0, high=torch.finfo(dtype).max, strict=True)
        return torch.full((), value, dtype=dtype, device=like.device)
    value = tensor(name, value)
    expect(value.ndim == 0, name, value, "a number or a 0-d tensor")
    expect(value.dtype in (*INTEGERS, *FLOATS), name, value, "a 0-d tensor of a real number", TypeError)
    value = value.detach()
    if values_checked(value):
        rounded = value.to(dtype)
        expect(bool((rounded > 0) & rounded.isfinite()), name, value.item(), f"a positive number, finite in {dtype}")
        if value.device.type == "cpu":  # a copy would wait for the device
            return torch.full((), value.item(), dtype=dtype, device=like.device)
    return value.to(device=like.device, dtype=dtype)


def head(prefix: str, hidden_name: str, hidden: torch.Tensor, weight: object, bias: object, softcap: object) -> Head:
    """The LM head that belongs to ``hidden``, out of a Head or of its parts; prefix: "student_", "teacher_" or ""."""
    name = f"{prefix}weight"
    if isinstance(weight, Head):
        for other, given in ((f"{prefix}bias", bias), ("softcap", softcap)):
            expect(given is None, other, given, f"None, since {name} is a Head, which has its own")
        return _head(weight, hidden_name, hidden, f"{name}.weight", f"{name}.bias", f"{name}.")
    parts: Any = {"weight": weight, "bias": bias, "softcap": softcap}
    return _head(Head(**parts), hidden_name, hidden, name, f"{prefix}bias", "")


def whole_head(name: str, hidden_name: str, hidden: torch.Tensor, value: object) -> Head:
    """The LM head that belongs to ``hidden``, out of one argument: a Head or a weight."""
    if isinstance(value, Head):
        return _head(value, hidden_name, hidden, f"{name}.weight", f"{name}.bias", f"{name}.")
    of: Any = value
    return _head(Head(of), hidden_name, hidden, name, "", "")


def _head(of: Head, hidden_name: str, hidden: torch.Tensor, name: str, bias_name: str, prefix: str) -> Head:
    weight = tensor(name, of.weight, like=hidden)
    expect(weight.ndim == 2 and weight.shape[0] > 0, name, weight, "shape (V, D) with V > 0")
    fits = weight.shape[1] == hidden.shape[-1]
    expect(fits, name, weight, f"{hidden.shape[-1]} columns, the hidden size of {hidden_name}")
    expect(weight.dtype == hidden.dtype, name, weight, f"the dtype of {hidden_name}, {hidden.dtype}", TypeError)
    bias = of.bias
    if bias is not None:
        bias = _floats(bias_name, bias, (weight.shape[0],), hidden).contiguous()
    softcap = None if of.softcap is None else number(f"{prefix}softcap", of.softcap, low=0, strict=True)
    logit_scale = number(f"{prefix}logit_scale", of.logit_scale, low=0, strict=True)
    low_rank = None if of.low_rank is None else _low_rank(f"{prefix}low_rank", of.low_rank, weight)
    return Head(weight, bias, logit_scale, softcap, low_rank)


def _floats(name: str, value: object, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    value = tensor(name, value, shape=shape, like=like)
    expect(value.dtype in FLOATS, name, value, FLOAT_TENSOR, TypeError)
    return value


def _low_rank(name: str, value: object, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    triple = isinstance(value, tuple) and len(value) == 3
    expect(triple, name, value, "(A, B, scale), with A (r, D) and B (V, r)", TypeError)
    a, b, scale = instance(name, value, tuple, "(A, B, scale)")
    vocabulary, width = weight.shape
    a = tensor(f"{name} A", a, like=weight)
    expect(a.ndim == 2 and a.shape[0] > 0, f"{name} A", a, f"shape (r, {width}) with r > 0")
    a = _floats(f"{name} A", a, (a.shape[0], width), weight)
    return a, _floats(f"{name} B", b, (vocabulary, a.shape[0]), weight), number(f"{name} scale", scale)


def hidden_states(name: str, value: object, like: torch.Tensor | None = None) -> torch.Tensor:
    value = tensor(name, value, like=like)
    expect(value.dtype in FLOATS, name, value, FLOAT_TENSOR, TypeError)
    expect(value.ndim in (2, 3) and value.shape[-1] > 0, name, value, "shape (B, T, D) or packed (N, D), D > 0")
    return value


def autocast(hidden: torch.Tensor, *weights: Any) -> tuple[Any, ...]:
    """The tensors, or a Head's weight, as a linear layer would take them: in autocast's dtype where autocast is on.

    What is no tensor of a dtype that the package takes stays as it is, to be refused by what checks it.
    """
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, *weights
    dtype = torch.get_autocast_dtype(kind)

    def low(x: Any) -> Any:
        if isinstance(x, Head):
            return replace(x, weight=low(x.weight))
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in FLOATS else x

    return low(hidden), *map(low, weights)


def batched(hidden: torch.Tensor) -> torch.Tensor:
    """(B, T, D) as it is; packed (N, D) as one batch (1, N, D). Never a copy."""
    return hidden if hidden.ndim == 3 else hidden.unsqueeze(0)


def targets(value: object, hidden: torch.Tensor, vocabulary: int, mask: object) -> tuple[torch.Tensor, torch.Tensor]:
    """(target_ids, valid), both flat (N,): valid is mask and not -100."""
    value = tensor("target_ids", value, shape=hidden.shape[:-1], like=hidden)
    expect(value.dtype in INTEGERS, "target_ids", value, "an integer tensor", TypeError)
    value = value.long()  # in a narrow dtype -100 and the vocabulary's size could wrap around to valid ids
    valid = value != IGNORE_INDEX
    if mask is not None:
        valid = valid & mask_of("mask", mask, shape=value.shape, like=hidden)
    if values_checked(value):
        outside = valid & ((value < 0) | (value >= vocabulary))
        if outside.any():
            raise ValueError(f"target_ids: expected ids in [0, {vocabulary}), got {int(value[outside][0])}")
    return value.reshape(-1).contiguous(), valid.reshape(-1).contiguous()


def optional_targets(
    value: object, hidden: torch.Tensor, vocabulary: int, mask: object
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(target_ids or None, valid), flat (N,) as by :func:`targets`; without targets valid is mask."""
    if value is not None:
        return targets(value, hidden, vocabulary, mask)
    valid = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    if mask is not None:
        valid = mask_of("mask", mask, shape=tuple(valid.shape), like=hidden)
    return None, valid.reshape(-1).contiguous()


def operands(
    hidden: object, weight: object, target_ids: object, bias: object, mask: object, temperature: object, softcap: object
) -> tuple[torch.Tensor, Head, float, torch.Tensor, torch.Tensor]:
    """(hidden, head, temperature, target_ids (N,), valid (N,)) of a function that reads one model, under autocast."""
    states, weight = autocast(hidden_states("hidden", hidden), weight)
    of = head("", "hidden", states, weight, bias, softcap)
    divisor = number("temperature", temperature, low=0, strict=True)
    return states, of, divisor, *targets(target_ids, states, of.weight.shape[0], mask)


def sequences(cu_seqlens: object, hidden: torch.Tensor) -> Sequences:
    """Where the sequences of the flat layout are: boundaries, given for packed input, or every T tokens."""
    if hidden.ndim == 3:
        expect(cu_seqlens is None, "cu_seqlens", cu_seqlens, "None with padded (B, T, D) hidden states")
        return Sequences(hidden.shape[1], None)
    n = hidden.shape[0]
    if cu_seqlens is None:
        return Sequences(n, None)
    cu_seqlens = tensor("cu_seqlens", cu_seqlens, like=hidden)
    integer = cu_seqlens.dtype in (torch.int32, torch.int64)
    expect(integer, "cu_seqlens", cu_seqlens, "an int32 or int64 tensor", TypeError)
    expect(cu_seqlens.ndim == 1 and cu_seqlens.numel() >= 2, "cu_seqlens", cu_seqlens, "shape (S + 1,), S >= 1")
    if values_checked(cu_seqlens):
        ends = int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == n
        expect(ends, "cu_seqlens", cu_seqlens.tolist(), f"boundaries from 0 to N = {n}")
        expect(bool((cu_seqlens.diff() >= 0).all()), "cu_seqlens", cu_seqlens.tolist(), "ascending boundaries")
    return Sequences(n, cu_seqlens.contiguous())


def refuse(name: str, value: torch.Tensor, flat: torch.Tensor, refused: torch.Tensor, expected: str) -> None:
    """Raise with the first element of ``flat``, made of ``value``, where ``refused``; where ``values_checked``."""
    if refused.any():
        raise ValueError(f"{name}: expected {expected}, got {flat[refused][0].item()} in {describe(value)}")


def token_advantages(
    value: object, hidden: torch.Tensor, valid: torch.Tensor, sequences: Sequences
) -> torch.Tensor:  # fmt: skip
    """One advantage a token or one a sequence, contiguous, as :func:`egrsd_kernels.rows.by_token` takes them."""
    value = tensor("advantages", value, like=hidden)
    expect(value.dtype in FLOATS, "advantages", value, FLOAT_TENSOR, TypeError)
    n = valid.numel()
    if sequences.boundaries is not None:
        n_sequences = sequences.boundaries.numel() - 1
    else:
        n_sequences = hidden.shape[0] if hidden.ndim == 3 else 1
    per_token, per_sequence = tuple(hidden.shape[:-1]), (n_sequences,)
    fits = tuple(value.shape) in (per_token, per_sequence)
    expect(fits, "advantages", value, f"one a sequence, shape {per_sequence}, or one a token, shape {per_token}")
    value = value.detach().contiguous()
    if values_checked(value):
        if per_token == per_sequence and sequences.boundaries is not None:
            # As many sequences as tokens are one token each, where both readings are one, unless there are empty ones.
            each = torch.equal(sequences.of(n, value.device), torch.arange(n, device=value.device))
            remedy = "(drop them, and what advantages holds for them)"
            ambiguous = f"as many as {n} sequences or {n} tokens may have"
            if not each:
                raise ValueError(
                    f"advantages: expected cu_seqlens without empty sequences {remedy}, got shape {per_token}, "
                    f"{ambiguous}"
                )
        flat, _ = by_token(value, n, sequences, value.dtype)
        refuse("advantages", value, flat, valid & ~flat.isfinite(), "no NaN and no infinity at a valid position")
    return value


def _rounding(dtype: torch.dtype) -> float:
    """How far log p may come out above 0, and an entropy below it, by rounding alone (nats).

    Both are differences, of a logit or a mean of logits and their logsumexp, so that they are off by what a logit is:
    64 u in 16-bit logits of up to 64 with u the dtype's unit roundoff, and less than 2^-7 in float32 for logits of up
    to 10^4. A negated log p, a probability or an entropy with its sign turned is beyond that at once.
    """
    return max(2.0**-7, 32 * torch.finfo(dtype).eps)


def teacher_statistic(
    name: str, value: object, target_ids: torch.Tensor, valid: torch.Tensor, why: str
) -> torch.Tensor:
    """``teacher_logp`` or ``teacher_entropy`` (N,), computed earlier: 0 where masked. why: there has to be one."""
    expect(value is not None, name, value, f"a tensor, since {why}")
    value = tensor(name, value, shape=target_ids.shape, like=target_ids)
    expect(value.dtype in FLOATS, name, value, FLOAT_TENSOR, TypeError)
    flat = value.detach().reshape(-1)
    if values_checked(flat):
        if name == "teacher_logp":  # -inf is one: a token that the teacher excludes
            possible, expected = flat <= _rounding(flat.dtype), "log probabilities, at most 0,"
        else:
            possible, expected = (flat >= -_rounding(flat.dtype)) & (flat < math.inf), "finite entropies of at least 0"
        refuse(name, value, flat, valid & ~possible, f"{expected} at valid positions")
    return torch.where(valid, flat, 0)


def token_ids(name: str, value: object) -> list[list[int]]:
    """Sequences of token ids as lists: sequences of integers, or arrays or tensors of them."""
    return [_token_ids(name, index, row) for index, row in enumerate(_items(name, value, "sequences of token ids"))]


def _token_ids(name: str, index: int, row: object) -> list[int]:
    expected = f"token ids, integers of at least 0, in sequence {index}"
    ids = _items(name, row, expected)
    ids = [tensor(name, x).tolist() if isinstance(x, torch.Tensor) else x for x in ids]  # of 0-d tensors, integers
    for x in ids:
        # int first, as nearly all are: isinstance asks Integral's registry.
        whole = type(x) is int or (isinstance(x, Integral) and not isinstance(x, bool))
        expect(whole, name, x, expected, TypeError)
        expect(0 <= x < 2**63, name, x, expected)
    return ids


def _items(name: str, value: Any, expected: str) -> list[Any]:
    if isinstance(value, torch.Tensor):
        value = tensor(name, value).tolist()
    elif hasattr(value, "tolist"):  # numpy's arrays
        value = value.tolist()
    fits = isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))
    expect(fits, name, value, expected, TypeError)
    return list(value)


def sparse_tolerance(grad_mode: object, sparse_tol: object) -> float | None:
    """What sparse gradients may leave out; None for exact ones."""
    known = isinstance(grad_mode, str) and grad_mode in ("exact", "sparse", "auto")
    expect(known, "grad_mode", grad_mode, '"exact" or "sparse"')
    if grad_mode == "auto":
        warnings.warn('grad_mode: "auto" is deprecated and means "exact" now', FutureWarning, stacklevel=3)
    tolerance = number("sparse_tol", sparse_tol, low=0, high=1, strict=True)
    return tolerance if grad_mode == "sparse" else None


def refuse_second_derivative(function: str) -> None:
    """To be called in a backward pass: under create_graph=True its result would silently lack a graph of its own."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{function} is differentiable once only; its gradient has no gradient (create_graph=True)")
