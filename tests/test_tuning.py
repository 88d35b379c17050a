"""Every configuration of the tuning list is right, and the choice among them is measured once and kept."""

from __future__ import annotations

import errno
import json

import pytest
import torch

from egrsd_kernels.backends import triton as triton_backend
from egrsd_kernels.backends.triton import tuning
from egrsd_kernels.backends.triton.common import Configs, Machine
from tests.support.kernel_case import CHUNK_BYTES, CUDA, DEVICE, GRADIENT_ERROR, Case, relative

HALF_DTYPE = torch.bfloat16 if CUDA else torch.float16


@pytest.mark.parametrize("tma", [True, False], ids=["tma", "pointer"])
@pytest.mark.parametrize("config", tuning.HALF, ids=lambda c: f"{c.rows}x{c.cols}x{c.depth}")
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@(pytest.mark.cuda if CUDA else pytest.mark.heavy)
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
    tuning.configs.cache_clear()
    yield tmp_path / "new" / "tuning", timed
    tuning.configs.cache_clear()


def choose(dtype=torch.bfloat16) -> Configs:
    return tuning.configs(dtype, torch.device("cuda", 0), False, 232_448)


def test_the_choice_is_measured_once_and_kept(unknown_gpu):
    folder, timed = unknown_gpu
    chosen = choose()
    assert timed == list(tuning.HALF)
    assert chosen.vocab.cols == 256 and chosen.hidden.depth == 32 and chosen.head.warps == 4
    assert choose() == chosen and len(timed) == len(tuning.HALF)
    tuning.configs.cache_clear()  # another process
    assert choose() == chosen and len(timed) == len(tuning.HALF)
    choose(torch.float16)
    assert len(timed) == 2 * len(tuning.HALF)
    assert len(list(folder.iterdir())) == 2  # whole files, nothing else


def changed(**roles) -> str:
    kept = {role: [128, 128, 64, 4, 3] for role in Configs._fields}
    return json.dumps({role: value for role, value in {**kept, **roles}.items() if value is not ...})


@pytest.mark.parametrize(
    "text",
    [
        "{", "[" * 100_000, "[]", "null", '"vocab"', "3", "{}", "\udcff", changed(head=...), changed(vocab=None),
        changed(vocab=[128, 128]), changed(vocab=[[128], 128, 64, 4, 3]), changed(vocab="128"), changed(vocab={}),
        changed(vocab=["128", 128, 64, 4, 3]), changed(vocab=[128, 1 << 40, 64, 4, 3]),
        changed(vocab=[0, 0, 0, 0, 0]), changed(vocab=[128, 128, 64, 4, float("nan")]),
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_a_damaged_file_is_measured_again(unknown_gpu, caplog, text):
    folder, timed = unknown_gpu
    chosen = choose()
    (path,) = folder.iterdir()
    whole = path.read_text()
    timed.clear()
    path.write_text(text, errors="surrogateescape")
    tuning.configs.cache_clear()
    assert choose() == chosen and timed == list(tuning.HALF) and path.read_text() == whole
    assert f"{path}: expected tiles of the tuning list, ignored" in caplog.text


def test_tiles_that_no_longer_fit_are_measured_again(unknown_gpu):
    _, timed = unknown_gpu
    choose()
    timed.clear()
    tuning.configs(torch.bfloat16, torch.device("cuda", 0), False, 65_536)
    assert timed and set(timed) < set(tuning.HALF)


def test_two_that_measure_at_once_keep_both_choices(unknown_gpu, monkeypatch):
    _, timed = unknown_gpu
    replace = tuning.os.replace

    def meanwhile(source, target):  # another process writes its own between this one's reading and writing
        monkeypatch.setattr(tuning.os, "replace", replace)
        choose(torch.float16)
        replace(source, target)

    monkeypatch.setattr(tuning.os, "replace", meanwhile)
    chosen = choose()
    timed.clear()
    tuning.configs.cache_clear()
    assert (choose(), choose(torch.float16)) == (chosen, chosen) and not timed


def test_a_folder_that_cannot_be_written_stops_nothing(unknown_gpu, caplog):
    folder, _ = unknown_gpu
    folder.parent.write_text("a file where the folder should be")
    assert choose().vocab.cols == 256
    assert "could not be kept" in caplog.text


def test_a_full_disk_leaves_no_file(unknown_gpu, caplog, monkeypatch):
    folder, _ = unknown_gpu

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tuning.os, "replace", full)
    assert choose().vocab.cols == 256
    assert "could not be kept" in caplog.text and "No space left" in caplog.text
    assert not list(folder.iterdir())


def test_measuring_can_be_switched_off(unknown_gpu, monkeypatch):
    folder, timed = unknown_gpu
    monkeypatch.setenv("EGRSD_KERNELS_TUNE", "0")
    assert choose().vocab == tuning.HALF[0]
    assert not timed and not folder.exists()


@pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")
@pytest.mark.cuda
def test_measured_for_real(monkeypatch, tmp_path):
    monkeypatch.setenv("EGRSD_KERNELS_CACHE", str(tmp_path))
    best = tuning.measure(torch.bfloat16, DEVICE, False, tuning.HALF[:2])
    assert set(best) <= set(tuning.HALF[:2])
    (path,) = (tmp_path / "tuning").iterdir()
    assert tuning._read(path, tuning.HALF) == best
