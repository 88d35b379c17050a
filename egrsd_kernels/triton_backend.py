"""The backend in Triton: chunk by chunk through the kernels, with every count kept on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .kernels.common import ROW_TILE, interpreted
from .kernels.credit import lookahead_entropy, token_credit
from .kernels.gather import Chunk, gather_kernel
from .kernels.gradient import ChunkGradients, multiply
from .kernels.plan import ceil_div, chunk_plan
from .kernels.tuning import machine
from .kernels.vocab import VocabPass
from .problem import Head, Rows

__all__ = ["DTYPES", "lookahead_entropy", "multiply", "runs_on", "statistics", "student_pass", "token_credit"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STATISTICS_ROWS = 4096  # nothing logits-sized is kept there: enough rows to fill any GPU


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on tensors of this device: a GPU, or a CPU under TRITON_INTERPRET=1."""
    return device.type == "cuda" or (device.type == "cpu" and interpreted(gather_kernel))


def statistics(head: Head, hidden, target_ids, rows: Rows, chunk_bytes: int):
    """(logp, entropy, logsumexp), each (N,) float32, in nats, 0 at masked rows."""
    n = target_ids.numel()
    logp, entropy, logsumexp = torch.zeros(3, n, dtype=torch.float32, device=hidden.device)
    if n:
        chunk = Chunk(head, min(STATISTICS_ROWS, ceil_div(n, ROW_TILE) * ROW_TILE), machine(head.weight))
        vocab = VocabPass(chunk)
        for first_row in range(0, n, chunk.rows):
            chunk.gather(hidden, target_ids, rows, first_row)
            vocab.statistics(rows.order[first_row:], logp, entropy, logsumexp)
    return logp, entropy, logsumexp


def student_pass(
    head: Head, hidden, target_ids, rows: Rows, logp, gradient_of: Callable[[int, int], torch.Tensor],
    needs: tuple[bool, bool, bool], chunk_bytes: int,
):  # fmt: skip
    """Write log p of the targets into ``logp`` (N,) and return the gradients (hidden, weight, bias) that are needed.

    gradient_of: called with (first row, number of rows) once their ``logp`` is there; gives dL/dlogp, an (N,) tensor.
    The weight and bias gradients are float32, that of the hidden states in their dtype.
    """
    n, device = target_ids.numel(), hidden.device
    d_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=device) if needs[0] else None
    new = torch.empty if n else torch.zeros
    d_weight = new(head.weight.shape, dtype=torch.float32, device=device) if needs[1] else None
    d_bias = new(head.bias.shape, dtype=torch.float32, device=device) if needs[2] else None
    if n:
        how = machine(head.weight)
        shape = ceil_div(n, ROW_TILE), *head.weight.shape, hidden.dtype.itemsize
        plan = chunk_plan(*shape, how, chunk_bytes, needs)
        chunk = Chunk(head, plan.rows, how)
        gradients = ChunkGradients(chunk, plan.slice_tiles, d_hidden, d_weight, d_bias)
        for first_row in range(0, n, chunk.rows):
            order = rows.order[first_row:]
            chunk.gather(hidden, target_ids, rows, first_row)
            gradients.forward(order, logp)
            gradients.backward(order, gradient_of(first_row, chunk.rows), accumulate=first_row > 0)
    return d_hidden, d_weight, d_bias
