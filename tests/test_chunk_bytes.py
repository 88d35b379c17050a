"""What functions hold: chunk_bytes, however many tokens there are; and what divergences ask of GPUs.

A CPU's allocations are the profiler's to tell. tests/test_torch_features.py has the loss on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from egrsd_kernels import Head, fused_egrsd_loss, linear_divergence, linear_logp, token_statistics
from tests.support.devices import two_gpus

VOCABULARY, WIDTH, CHUNK_BYTES = 1003, 32, 1 << 19
A_ROW = 4 * 4 * WIDTH + 200  # gradients and directions, and numbers of a token
SLOW = [pytest.param({"kind": kind}, marks=pytest.mark.slow) for kind in ("reverse_kl", "forward_kl", "jsd")]
kinds = pytest.mark.parametrize("kind", [{"kind": "jsd", "top_k": 5}, *SLOW], ids=str)
backends = pytest.mark.parametrize("backend", ["triton", "torch"])


def held(step: Callable[[], object]) -> tuple[int, int]:
    """(the most bytes that a CPU's tensors made by it hold at a time, those that are left)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del kept
    return most, now


def operands(n: int, trained: bool) -> tuple[torch.Tensor, Head, torch.Tensor, Head]:
    g = torch.Generator().manual_seed(n)
    hidden, teacher = torch.randn(2, n, WIDTH, generator=g)
    weight, bias = torch.randn(VOCABULARY, WIDTH, generator=g), torch.randn(VOCABULARY, generator=g)
    head = Head(weight.clone().requires_grad_(trained), bias, softcap=5.0)
    return hidden.requires_grad_(), head, teacher, Head(weight, bias, softcap=5.0)


FUNCTIONS = {
    "loss": lambda h, head, t, y: fused_egrsd_loss(
        h, head, t, y, torch.ones(1), divergence="jsd", chunk_bytes=CHUNK_BYTES
    ).backward(),
    "log p": lambda h, head, t, y: linear_logp(h, head, y, chunk_bytes=CHUNK_BYTES).sum().backward(),
    "statistics": lambda h, head, t, y: token_statistics(h, head, y, chunk_bytes=CHUNK_BYTES),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_softcaps_factors_are_counted(function):
    n = 100
    hidden, head, teacher, _ = operands(n, trained=False)
    most, _ = held(lambda: function(hidden, head, teacher, torch.arange(n)))
    assert most <= CHUNK_BYTES + n * A_ROW


@kinds
def test_a_frozen_heads_memory_does_not_depend_on_the_tokens(kind):
    """Beside what a token has of its own: chunk_bytes, where one matrix of logits is larger."""
    for n in (40, 200):
        given = operands(n, trained=False)

        def step(given=given):
            linear_divergence(*given, **kind, chunk_bytes=CHUNK_BYTES, return_stats=True).divergence.sum().backward()

        most, _ = held(step)
        assert most <= CHUNK_BYTES + n * A_ROW, n
    assert 4 * n * VOCABULARY > CHUNK_BYTES + n * A_ROW


@pytest.mark.parametrize("keep_rows", [60, pytest.param(0, marks=pytest.mark.slow)])
def test_a_trained_head_keeps_its_budget(keep_rows):
    """Between forward and backward keep_bytes, and in all a chunk and the head's gradient beside it."""
    n, keep_bytes = 150, keep_rows * 4 * VOCABULARY
    given, of_head = operands(n, trained=True), 2 * 4 * VOCABULARY * (WIDTH + 1)

    def forward():
        return linear_divergence(*given, kind="jsd", chunk_bytes=CHUNK_BYTES, keep_bytes=keep_bytes)

    _, left = held(forward)
    assert left <= keep_bytes + n * A_ROW
    most, _ = held(lambda: forward().sum().backward())
    assert most <= keep_bytes + CHUNK_BYTES + of_head + n * A_ROW


def on_gpu(n: int, device: str = "cuda", trained: bool = False) -> tuple[torch.Tensor, ...]:
    hidden, teacher = torch.randn(2, n, 512, device=device, dtype=torch.bfloat16) / 4
    weight = torch.randn(32768, 512, device=device, dtype=torch.bfloat16)
    return hidden.requires_grad_(), weight.requires_grad_(trained), teacher, weight.detach()


@pytest.mark.cuda
@backends
@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_memory_on_a_gpu(backend, kind):
    """As of the loss: chunk_bytes, what a token has, and buffers that their number does not change (128 MiB)."""
    for n in (2048, 8192):
        given = on_gpu(n)

        def step(given=given):
            given[0].grad = None
            linear_divergence(*given, kind=kind, backend=backend, chunk_bytes=64 << 20).sum().backward()

        step()
        given[0].grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        most = torch.cuda.max_memory_allocated() - before
        assert most <= (64 + 128 << 20) + n * (3 * 2 * 512 + 200), n


@pytest.mark.cuda
@backends
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_host_never_waits(backend, trained):
    given = on_gpu(300, trained=trained)
    ids, ones = torch.randint(32768, (300,), device="cuda"), torch.ones(1, device="cuda")

    def step():
        options = {"target_ids": ids, "mask": ids % 5 > 0, "backend": backend, "return_stats": True}
        found = linear_divergence(*given, kind="jsd", keep_bytes=100 << 16, **options)
        loss = fused_egrsd_loss(*given[:3], ids, ones, divergence="reverse_kl", backend=backend)
        (found.divergence.sum() + loss).backward()

    step()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@two_gpus
@backends
def test_the_second_gpu(backend):
    there = on_gpu(200, device="cuda:1")
    here = tuple(x.detach().to("cuda:0").requires_grad_(x.requires_grad) for x in there)
    assert torch.cuda.current_device() == 0
    made = []
    for given in (here, there):
        d = linear_divergence(*given, kind="jsd", backend=backend)
        d.sum().backward()
        made.append((d.detach().cpu(), given[0].grad.cpu()))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True)) and torch.cuda.current_device() == 0
