"""What the tests of several processes stand on: a failure in one of them is the test's, and says what it was."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("torch.distributed is not available", allow_module_level=True)

from tests.support.processes import in_processes


def fail(rank: int, how: str) -> torch.Tensor:
    """In process 1, while the other waits for it."""
    if rank == 1 and how == "raises":
        raise ValueError("of process 1")
    if rank == 1 and how == "dies":
        os.kill(os.getpid(), signal.SIGABRT)
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    return total


@pytest.mark.heavy
@pytest.mark.parametrize(
    "how, says",
    [
        ("dies", "process 1 of 2: exit code -6 before its work was done"),
        ("raises", "process 1 of 2: Traceback (?s:.*)ValueError: of process 1"),
    ],
)
def test_a_failure_is_passed_on(how, says):
    with pytest.raises(RuntimeError, match=says):
        in_processes(fail, how)


@pytest.mark.slow
def test_results_come_by_rank_and_nothing_is_left_behind():
    before = dict(os.environ)
    assert in_processes(fail, "in no way", world=3) == [torch.tensor(6)] * 3
    assert os.environ == before and not dist.is_initialized()
