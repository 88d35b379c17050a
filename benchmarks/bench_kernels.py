"""Microbenchmarks of the public functions and of the small kernels, beside the bare matrix products.

    python -m pytest benchmarks/bench_kernels.py

Unlike ``benchmarks.compare`` these times are the host's, from the call until the GPU is done: launches count.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.data import VOCABULARY
from benchmarks.problem import Problem
from egrsd_kernels import TokenStats, fused_egrsd_loss, linear_logp, token_statistics
from egrsd_kernels.credit import CreditOptions, Lookahead
from egrsd_kernels.rows import Rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

DEVICE = torch.device("cuda")
SHAPES = [(4096, 4096), (2560, 4096), (2560, 512)]  # (D, N)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"D{shape[0]}-N{shape[1]}")
def problem(request) -> Problem:
    return Problem.draw(*request.param, VOCABULARY, "peaked", DEVICE)


@pytest.fixture
def timed(benchmark, request) -> Callable[[str, Callable[[], object]], None]:
    """Times a call until the GPU is done, in a group of its own for each shape."""

    def run(group: str, call: Callable[[], object]) -> None:
        def finished() -> None:
            call()
            torch.cuda.synchronize()

        benchmark.group = f"{group}, {request.node.callspec.id}"
        benchmark.pedantic(finished, rounds=10, warmup_rounds=2)

    return run


def test_statistics_floor(timed, problem):
    timed("statistics", problem.products()["forward"])


def test_statistics(timed, problem):
    timed("statistics", lambda: token_statistics(problem.hidden, problem.weight, problem.targets))


def products(problem: Problem, names: tuple[str, ...]) -> Callable[[], None]:
    bare = problem.products()

    def run() -> None:
        for name in names:
            bare[name]()

    return run


def test_logp_floor(timed, problem):
    timed("linear_logp, forward and backward", products(problem, ("forward", "dhidden")))


def test_logp(timed, problem):
    def run() -> None:
        hidden, weight = problem.leaves(trained=False)
        linear_logp(hidden, weight, problem.targets).backward(problem.credit)

    timed("linear_logp, forward and backward", run)


def loss(problem: Problem, trained: bool) -> None:
    hidden, weight = problem.leaves(trained)
    fused_egrsd_loss(
        hidden, weight, problem.teacher_hidden, problem.targets, problem.advantages, lookahead=3
    ).backward()


def test_frozen_floor(timed, problem):
    timed("loss, frozen head", products(problem, ("forward", "forward", "dhidden")))


def test_frozen(timed, problem):
    timed("loss, frozen head", lambda: loss(problem, trained=False))


def test_trained_floor(timed, problem):
    timed("loss, trained head", products(problem, ("forward", "forward", "dhidden", "dweight")))


def test_trained(timed, problem):
    timed("loss, trained head", lambda: loss(problem, trained=True))


@pytest.mark.parametrize("n", [4096, 65536])
@pytest.mark.parametrize(
    "window",
    [
        Lookahead(3), Lookahead(3, "discounted", decay=0.9), Lookahead(3, "softmin", temperature=0.1),
        Lookahead(3, "quantile", quantile=0.5), Lookahead(64), Lookahead(64, "quantile", quantile=0.5),
    ],
    ids=lambda window: f"{window.filter} {window.window}",
)  # fmt: skip
def test_token_credit(timed, n, window):
    """The lookahead, then magnitude, gate and token advantage: what the method adds to log p and entropy."""
    from egrsd_kernels.backends import triton as triton_backend

    generator = torch.Generator(DEVICE).manual_seed(n)
    entropy, teacher_logp, logp, advantages = torch.rand(4, n, device=DEVICE, generator=generator)
    valid = torch.ones(n, dtype=torch.bool, device=DEVICE)
    rows, end = Rows.build(valid, valid), torch.full((n,), n - 1, dtype=torch.int32, device=DEVICE)
    options = CreditOptions(gamma=0.3, gate_floor=0.1, clip_eps=0.2)
    scale, made = torch.ones((), device=DEVICE), torch.empty(7, n, device=DEVICE)

    def run() -> None:
        lookahead = triton_backend.lookahead_entropy(entropy, valid, end, window)
        stats = TokenStats(logp, teacher_logp, entropy, lookahead, *made[:5])
        triton_backend.token_credit(rows, 0, n, advantages, scale, scale, options, stats, *made[5:])

    timed("token credit", run)
