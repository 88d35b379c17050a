"""Every configuration of the tuning list is right, and the choice among them is measured once and kept."""

from __future__ import annotations

import json

import pytest
import torch

from egrsd_kernels import triton_backend
from egrsd_kernels.kernels import tuning
from egrsd_kernels.kernels.common import Configs, Machine
from tests.test_kernels import CHUNK_BYTES, CUDA, DEVICE, GRADIENT_ERROR, Case, relative

HALF_DTYPE = torch.bfloat16 if CUDA else torch.float16


@pytest.mark.parametrize("tma", [True, False], ids=["tma", "pointer"])
@pytest.mark.parametrize("config", tuning.HALF, ids=lambda c: f"{c.rows}x{c.cols}x{c.depth}")
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@(pytest.mark.cuda if CUDA else lambda test: test)
def test_every_configuration(config, trained, tma, monkeypatch):
    """Other GPUs choose other tiles than the one that the remaining tests run on."""
    monkeypatch.setattr(triton_backend, "machine", lambda weight: Machine(5, tma, Configs(config, config, config)))
    case = Case(261, 72, 515, HALF_DTYPE)
    expected, *_, expected_gradients = case.reference()
    logp, gradients = case.student_pass(needs=(True, trained, False), chunk_bytes=CHUNK_BYTES if trained else 1)
    assert (logp - expected)[case.valid].abs().max() <= case.tolerance
    for actual, e in zip(gradients, expected_gradients, strict=False):
        assert actual is None or relative(actual, e) <= GRADIENT_ERROR[HALF_DTYPE]


def test_the_largest_tiles_that_fit():
    cpu = torch.device("cpu")
    for shared, cols, depth in (
        (232_448, 256, 64),
        (166_912, 256, 64),
        (101_376, 256, 32),
        (65_536, 128, 32),
        (0, 64, 64),
    ):
        c = tuning.configs(torch.bfloat16, cpu, False, shared).vocab
        assert (c.cols, c.depth) == (cols, depth), shared
    assert tuning.configs(torch.float32, cpu, False, 0).head == tuning.FLOAT32


@pytest.fixture
def unknown_gpu(monkeypatch, tmp_path):
    """A CUDA device that nobody has measured, its cache folder, and how often the list was timed on it."""
    timed = []

    def times(config, dtype, device, tma):
        timed.append(config)
        return (1.0 / config.cols, config.depth, float("inf") if config.warps == 8 else 1.0)

    monkeypatch.setenv("EGRSD_KERNELS_CACHE", str(tmp_path / "new"))
    monkeypatch.delenv("EGRSD_KERNELS_TUNE", raising=False)
    monkeypatch.setattr(tuning, "_times", times)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Unknown")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    tuning._chosen.cache_clear()
    yield tmp_path / "new" / "tuning.json", timed
    tuning._chosen.cache_clear()


def choose(dtype=torch.bfloat16) -> Configs:
    return tuning.configs(dtype, torch.device("cuda", 0), False, 232_448)


def test_the_choice_is_measured_once_and_kept(unknown_gpu):
    path, timed = unknown_gpu
    chosen = choose()
    assert timed == list(tuning.HALF)
    assert chosen.vocab.cols == 256 and chosen.hidden.depth == 32 and chosen.head.warps == 4
    assert choose() == chosen and len(timed) == len(tuning.HALF)
    tuning._chosen.cache_clear()  # another process
    assert choose() == chosen and len(timed) == len(tuning.HALF)
    choose(torch.float16)
    assert len(timed) == 2 * len(tuning.HALF) and len(json.loads(path.read_text())) == 2


def test_a_damaged_file_is_measured_again(unknown_gpu):
    path, timed = unknown_gpu
    path.parent.mkdir()
    path.write_text("{")
    chosen = choose()
    assert timed and len(json.loads(path.read_text())) == 1
    tuning._chosen.cache_clear()
    assert choose() == chosen


def test_a_folder_that_cannot_be_written_stops_nothing(unknown_gpu, caplog):
    path, _ = unknown_gpu
    path.parent.write_text("a file where the folder should be")
    assert choose().vocab.cols == 256
    assert "could not be kept" in caplog.text


def test_measuring_can_be_switched_off(unknown_gpu, monkeypatch):
    path, timed = unknown_gpu
    monkeypatch.setenv("EGRSD_KERNELS_TUNE", "0")
    assert choose().vocab == tuning.HALF[0]
    assert not timed and not path.exists()


@pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")
@pytest.mark.cuda
def test_measured_for_real(monkeypatch, tmp_path):
    monkeypatch.setenv("EGRSD_KERNELS_CACHE", str(tmp_path))
    best = tuning.measure(torch.bfloat16, DEVICE, False, tuning.HALF[:2])
    assert set(best) <= set(tuning.HALF[:2])
    assert len(json.loads((tmp_path / "tuning.json").read_text())) == 1
