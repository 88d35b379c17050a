"""bfloat16 in Triton's interpreter, which stores it as uint16: products of bits, and conversions that cut off.

:func:`as_on_a_gpu` makes products of the numbers, and rounds to the nearest one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch


def numbers(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16's bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bits(numbers: np.ndarray) -> np.ndarray:
    """bfloat16's bits of float32, rounded to the nearest, as PyTorch and a GPU do."""
    rounded = torch.from_numpy(np.array(numbers, np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        a, b = (TensorHandle(numbers(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    def rounding(converted):
        def convert(self, src, dst_type, *mode):
            if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
                return TensorHandle(bits(src.data), tl.bfloat16)
            return converted(self, src, dst_type, *mode)

        return convert

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    for name in ("cast_impl", "create_fp_to_fp"):
        monkeypatch.setattr(InterpreterBuilder, name, rounding(getattr(InterpreterBuilder, name)))
