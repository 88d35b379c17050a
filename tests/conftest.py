"""What pytest needs to know, and the fixtures that every test has. What tests share is in tests/support/."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: this has to come first

import pytest

pytest.register_assert_rewrite("tests.support")  # before its first import

from tests.support.devices import INTERPRETED, interpreter_fault  # noqa: E402

with contextlib.suppress(ImportError):  # the tests that need it say so
    import hypothesis

    # How long an example takes says more about the machine than about the code.
    hypothesis.settings.register_profile("patient", deadline=None)
    hypothesis.settings.load_profile("patient")

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))


def pytest_configure(config):
    if INTERPRETED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # without Triton, none of its tests run
            if fault := interpreter_fault(*map(importlib.metadata.version, ("triton", "numpy"))):
                raise pytest.UsageError(fault)
    # Rows past the last valid one hold anything; the interpreter's numpy speaks up where a GPU computes in silence.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    config.addinivalue_line("filterwarnings", "ignore:overflow encountered in reduce:RuntimeWarning")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _memory_given_back():
    """Workers share one GPU: what a test's reference held is another's to have."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _no_precision_left_behind():
    """Older versions of transformers leave a run's mixed precision to the next one of the process."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
