"""What does the work: the choice of a backend, each a module that fulfils :class:`~.protocol.Backend`.

:mod:`.torch` is plain PyTorch, for CPUs and float64; :mod:`.triton` holds the kernels.
"""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor

from egrsd_kernels.checks import describe, expect

from .protocol import (
    DEFAULT_CHUNK_BYTES,
    EXTRAS,
    KINDS,
    Backend,
    Credit,
    Divergence,
    DivergenceBackend,
    DivergenceStatistics,
    EntropyGradient,
    Finish,
    Gradients,
    Kept,
    KeptDivergence,
    Kind,
    Needs,
    Pair,
    PairCredit,
    VocabularyStatistics,
    no_extras,
    no_statistics,
)
from .scaling import Scales, power_of_two, scale_rows
from .sparsity import DEFAULT_SPARSE_TOL, Sparse, exceeding

__all__ = [
    "DEFAULT_CHUNK_BYTES", "DEFAULT_SPARSE_TOL", "EXTRAS", "KINDS", "Backend", "Credit", "Divergence",
    "DivergenceBackend", "DivergenceStatistics", "EntropyGradient", "Finish", "Gradients", "Kept", "KeptDivergence",
    "Kind", "Needs", "Pair", "PairCredit", "Scales", "Sparse", "VocabularyStatistics", "choose", "choose_divergence",
    "exceeding", "known", "no_extras", "no_statistics", "power_of_two", "scale_rows",
]  # fmt: skip


def known(name: object) -> str:
    """A backend's name; a ValueError unless it is one of "auto", "triton", "torch"."""
    right = isinstance(name, str) and name in ("auto", "triton", "torch")
    expect(right, "backend", name, '"auto", "triton" or "torch"')
    return str(name)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose(name: object, *hidden: Tensor) -> Backend:
    """The backend that works on these hidden states.

    Raises:
        ValueError: ``name`` is none of "auto", "triton", "torch", or "triton" does not take the hidden states.
        ModuleNotFoundError: "triton" is asked for and not installed.
    """
    known(name)
    from . import torch as in_torch

    if name == "torch" or (name == "auto" and hidden[0].device.type != "cuda"):
        return in_torch
    if not has_triton():
        if name == "auto":
            return in_torch
        raise ModuleNotFoundError('backend: "triton" needs the package triton; install it or use backend="torch"')
    from . import triton as in_triton

    refused = [x for x in hidden if not in_triton.takes(x)]
    if refused and name == "triton":
        needs = "bfloat16, float16 or float32 tensors on a GPU (or on a CPU with TRITON_INTERPRET=1)"
        raise ValueError(f'backend: "triton" needs {needs}, got {describe(refused[0])}')
    return in_torch if refused else in_triton


def choose_divergence(name: object, pair: Pair) -> DivergenceBackend:
    """The one that makes the pair's divergence; "auto" leaves to plain PyTorch what kernels do not make.

    Raises:
        ValueError, ModuleNotFoundError: as :func:`choose`; or "triton" does not make this divergence.
    """
    from . import torch as plain
    from . import torch_divergence as in_torch

    if choose(name, pair.student_hidden, pair.teacher_hidden) is plain:
        return in_torch
    from .triton import divergence as in_triton

    made = in_triton.takes(pair)
    expect(made or name == "auto", "backend", name, '"auto" or "torch", since top_k is given')
    return in_triton if made else in_torch
