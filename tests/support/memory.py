"""Memory as a long run leaves it, and a watch over what kernels do to it in Triton's interpreter.

A kernel that reads what nobody wrote mostly gets away with it: a new process's memory is zero, and NaN fails every
comparison. Plausible numbers do not, and a write out of bounds shows, if ever, as somebody else's wrong result.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

POOL = 1 << 22  # words; larger tensors repeat them


class Used(TorchDispatchMode):
    """New tensors hold small integers, of both signs or none, or floats of both signs, and others the next time.

    They are copied from pools: compute-sanitizer slows a kernel that would draw them, and leaves a copy alone.
    """

    def __init__(self, device: torch.device | str, seed: int = 0):
        super().__init__()
        self.random = random.Random(seed)
        words = torch.empty(POOL, dtype=torch.int32, device=device)
        generator = torch.Generator(device).manual_seed(seed)
        self.pools = (
            words.clone().random_(-300, 1000, generator=generator),
            words.clone().random_(0, 1000, generator=generator),
            words.view(torch.float32).normal_(generator=generator).view(torch.int32),
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "empty" in func.__name__ and isinstance(out, torch.Tensor) and out.device.type == self.pools[0].device.type:
            storage = out.untyped_storage()
            words = torch.tensor([], dtype=torch.int32, device=out.device)
            words.set_(storage, 0, (storage.nbytes() // 4,))
            pool = self.pools[self.random.choice((0, 1, 2, 2))]
            for part in words.split(POOL):
                first = self.random.randint(0, POOL - len(part))
                part.copy_(pool[first : first + len(part)])
        return out


def _spans(value: Any) -> Iterator[tuple[int, int]]:
    """(first byte, byte past the last) of each tensor that a kernel is given."""
    if isinstance(value, tuple):
        for one in value:
            yield from _spans(one)
    elif isinstance(value := getattr(value, "base", value), torch.Tensor) and value.numel():
        last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        yield value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()


@contextmanager
def watched() -> Iterator[None]:
    """An AssertionError where an interpreted kernel reads or writes outside of the tensors that it was given."""
    builder, launch = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store
    now: dict[str, Any] = {}

    def check(what: str, pointers: Any, mask: Any) -> None:
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        touched = np.asarray(pointers.data)[np.broadcast_to(np.asarray(mask.data, bool), np.shape(pointers.data))]
        first = touched.astype(np.int64)
        inside = np.zeros(first.shape, bool)
        for start, end in now["spans"]:
            inside |= (first >= start) & (first + size <= end)
        assert inside.all(), f"{now['kernel']}: a {what} of {(~inside).sum()} of {inside.size} elements out of bounds"

    def watched_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        now.update(kernel=self.fn.__name__, spans=list(_spans((*args, *kwargs.values()))))
        return launch(self, *args, **kwargs)

    def watched_load(self: Any, pointers: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        check("load", pointers, mask)
        return load(self, pointers, mask, *args, **kwargs)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        check("store", pointers, mask)
        return store(self, pointers, value, mask, *args, **kwargs)

    interpreter.GridExecutor.__call__ = watched_launch
    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = launch
        builder.create_masked_load, builder.create_masked_store = load, store
