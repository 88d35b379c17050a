"""What takes the place of verl's ``linear_cross_entropy``, and how it gets there."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from egrsd_kernels import checks
from egrsd_kernels.logp import linear_logp
from egrsd_kernels.replacing import put_back, put_in_place

MODULE, NAME = "verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"
# Of log p alone, as there: its entropies are always one a token.
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda logp: logp, "sum": Tensor.sum, "mean": Tensor.mean}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """verl's function of that name by :func:`egrsd_kernels.linear_logp`: (log p of the labels, entropy), in nats.

    Logits are hidden @ weightᵀ / temperature. Both results are differentiable in hidden and weight.

    Args:
        hidden: (..., D), N rows; bfloat16, float16, float32 or float64, on any device. weight: (V, D), the same dtype.
        labels: N of any integer dtype and any shape, in [0, V), row by row; −100: a row that counts as 0.
        temperature: above 0.
        reduction: of log p: "none", "sum" or "mean" over the N rows.
        dist_process_group: None, or a group of one process: a head that is split over a vocabulary is verl's own to
            read, and what :func:`fuse_heads` installs hands it on.

    Returns:
        float32 (float64 for float64 input): log p (N,), or 0-d with a reduction; entropy (N,). Flat, whatever the
        shape of labels.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it expects; values of labels where
            :func:`egrsd_kernels.fused_egrsd_loss` checks values.
    """
    given = checks.instance("reduction", reduction, str, "a string").lower()
    checks.expect(given in REDUCTIONS, "reduction", reduction, " or ".join(map(repr, REDUCTIONS)))
    checks.expect(not _split(dist_process_group), "dist_process_group", dist_process_group, "one process at most")
    ids = checks.instance("labels", labels, Tensor, "an integer tensor").dtype in checks.INTEGERS
    checks.expect(ids, "labels", labels, "an integer tensor", TypeError)
    rows = checks.instance("hidden", hidden, Tensor, "a floating-point tensor").reshape(-1, hidden.shape[-1])
    checks.expect(labels.numel() == len(rows), "labels", labels, f"{len(rows)}, one for each hidden state")
    # verl asks for the entropy's gradient where calculate_entropy is on, and says so to nobody.
    logp, entropy = linear_logp(
        rows, weight, labels.reshape(-1), temperature=temperature, return_entropy=True, entropy_grad="lazy"
    )
    return REDUCTIONS[given](logp), entropy


def _split(group: Any) -> bool:
    return group is not None and dist.get_world_size(group) > 1


def _in_place_of(original: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`linear_cross_entropy`, and ``original`` for a head that is split over a vocabulary."""

    @functools.wraps(linear_cross_entropy)
    def fused(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        function = original if _split(dist_process_group) else linear_cross_entropy
        both: tuple[Tensor, Tensor] = function(hidden, weight, labels, temperature, reduction, dist_process_group)
        return both

    return fused


def _installed() -> Callable[..., Any]:
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(MODULE), NAME)
    except ModuleNotFoundError as error:
        if error.name not in {".".join(MODULE.split(".")[:depth]) for depth in range(1, 5)}:
            raise  # something that verl itself needs
        raise ModuleNotFoundError(
            f"egrsd_kernels.verl needs verl with {MODULE}, as 0.9.1 has it; there is no {error.name}", name=error.name
        ) from error
    return function


def fuse_heads() -> AbstractContextManager[Any]:
    """From now on verl takes log p and entropy from this package's kernels, in this process.

    :func:`linear_cross_entropy` takes the place of the function of that name in ``verl.utils.kernel``, which verl calls
    with ``use_fused_kernels`` and ``impl_backend=triton``, in every module that has imported it or will. A second call
    changes nothing. A ``dist_process_group`` of several processes, over which the head is split, gets verl's own.

    Returns:
        A context whose end undoes what this call has done; to call it alone is enough. :func:`unfuse_heads` is the way
        back from anywhere.

    Raises:
        ModuleNotFoundError: there is no verl, or not that module in it.
    """
    return put_in_place(_installed(), _in_place_of)


def unfuse_heads() -> None:
    """From now on verl takes them from its own kernel again.

    Raises:
        ModuleNotFoundError: as there.
    """
    put_back(_installed())
