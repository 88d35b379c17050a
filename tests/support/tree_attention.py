"""Attention over a pack by segments in plain tensors, in any dtype: what the GPU's operator is compared with, and what
takes its place on CPUs, where everything around it is tested."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from egrsd_kernels.operators import LIBRARY
from egrsd_kernels.packing import varlen
from egrsd_kernels.packing.segments import segment_sum


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """(N, H, D) of (N, H, D), and keys and values (G, K, D): over those that (N, G) ``seen`` lets each query see."""
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


def seen_in(positions: Tensor, ends: Tensor, window: int) -> Tensor:
    """(N, N) bool: which packed token (row) sees which (column)."""
    index = torch.arange(len(ends))
    seen = (index <= index[:, None]) & (index[:, None] < ends)
    return seen & (positions[:, None] - positions < window) if window else seen


def _by_segments(query: Tensor, key: Tensor, value: Tensor, tree: Any, scale: float) -> Tensor:
    """The same of gathered keys and values, a segment at a time, aligned at its end."""
    cu_queries, cu_keys, *_ = tree.boundaries
    window = tree.window["window_size_left"]
    out = torch.zeros_like(query)
    for segment in range(len(cu_queries) - 1):
        q, k = slice(*cu_queries[segment : segment + 2].tolist()), slice(*cu_keys[segment : segment + 2].tolist())
        at, keys = torch.arange(k.stop - k.start)[q.start - q.stop :, None], torch.arange(k.stop - k.start)
        seen = keys <= at
        if not tree.causal:
            seen &= keys >= at - window
        out[q] = dense(query[q], key[k], value[k], seen, scale)
    return out


def _forward(query: Tensor, key: Tensor, value: Tensor, entries: Tensor, sizes: Tensor, scale: float) -> Any:
    tree = varlen._tree(entries, sizes)
    out = _by_segments(query, key[tree.keys], value[tree.keys], tree, scale)
    return out.contiguous(), query.new_zeros(query.shape[1], len(query), dtype=torch.float32)


def _backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, _: Tensor, __: Tensor, entries: Tensor,
              sizes: Tensor, scale: float) -> Any:  # fmt: skip
    tree = varlen._tree(entries, sizes)
    leaves = [one.detach().clone().requires_grad_() for one in (query, key[tree.keys], value[tree.keys])]
    with torch.enable_grad():
        out = _by_segments(*leaves, tree, scale)
    to_query, to_key, to_value = torch.autograd.grad(out, leaves, gradient)
    return (
        to_query.contiguous(),
        segment_sum(to_key, tree.copies, len(key)),
        segment_sum(to_value, tree.copies, len(value)),
    )


LIBRARY.impl("tree_attention", _forward, "CPU")
LIBRARY.impl("tree_attention_backward", _backward, "CPU")


@contextmanager
def on_cpus() -> Iterator[None]:
    """Models on CPUs attend by segments, in any dtype, while this is entered."""
    before = varlen.DEVICES, varlen.DTYPES
    varlen.DEVICES, varlen.DTYPES = ("cuda", "cpu"), (torch.float64, torch.float32, *varlen.DTYPES)
    try:
        yield
    finally:
        varlen.DEVICES, varlen.DTYPES = before
