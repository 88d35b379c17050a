"""Which tiles each product takes on a GPU: known, found earlier and kept on disk, or measured now.

A GPU that nobody has measured yet gets a short list timed on a small problem, once: some seconds for each entry, most
of them compilation. The choice is kept in the folder ``tuning`` under EGRSD_KERNELS_CACHE (default: ``egrsd_kernels``
in the user's cache folder), in a file for each GPU, dtype, kernel family and Triton version, so that processes that
measure at once keep what each found. ``python -m egrsd_kernels.backends.triton.tuning`` measures again.
EGRSD_KERNELS_TUNE=0 measures nothing and takes the largest tiles that fit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import re
import statistics
import tempfile
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources

from egrsd_kernels.head import Head
from egrsd_kernels.rows import Rows

from .common import ROW_TILE, Config, Configs, Machine, ceil_div, device_limits, has_tma, tma_ready
from .gather import Chunk
from .gradient import ChunkGradients
from .plan import Plan, least_partial_tiles

HALF = (
    Config(ROW_TILE, 256, 64, 8, 3),
    Config(ROW_TILE, 256, 32, 8, 4),
    Config(ROW_TILE, 128, 64, 4, 3),
    Config(ROW_TILE, 128, 32, 4, 4),
    Config(ROW_TILE, 64, 64, 4, 3),
)
# Three TF32 products for each float32 one leave little room for a choice.
FLOAT32 = Config(ROW_TILE, 64, 32, 4, 3)
# Compute capabilities on which the first entry of the list was found best, by measurement of all of it.
KNOWN = ((9, 0),)
ROWS, HIDDEN_SIZE, VOCABULARY = 2048, 2048, 32768  # of the problem that a choice is measured on

log = logging.getLogger(__name__)


def machine(weight: torch.Tensor) -> Machine:
    """How products with this head (V, D) run on its device."""
    device = weight.device
    programs, shared = device_limits(device)
    tma = has_tma(device) and tma_ready(weight)
    return Machine(programs, tma, configs(weight.dtype, device, tma, shared))


@functools.cache
def configs(dtype: torch.dtype, device: torch.device, tma: bool, shared: int) -> Configs:
    """The tiles of the three products. shared: bytes of shared memory that a program can have."""
    if dtype == torch.float32:
        return Configs(FLOAT32, FLOAT32, FLOAT32)
    fitting = _fitting(shared)
    if device.type == "cuda":
        if found := _read(_path(_key(dtype, device, tma)), fitting):
            return found
        known = torch.version.hip is None and torch.cuda.get_device_capability(device) in KNOWN
        if not known and os.environ.get("EGRSD_KERNELS_TUNE") != "0":
            return measure(dtype, device, tma, fitting)
    return Configs(*fitting[:1] * 3)


def _fitting(shared: int) -> tuple[Config, ...]:
    """The list's entries whose operands fit into so many bytes, largest tiles first; at least the smallest."""
    return tuple(c for c in HALF if c.stages * (c.rows + c.cols) * c.depth * 2 <= shared) or HALF[-1:]


def measure(dtype: torch.dtype, device: torch.device, tma: bool, fitting: tuple[Config, ...]) -> Configs:
    """Time the list for each product, and keep the fastest of each on disk."""
    log.warning("measuring tiles for %s, %s: once, some seconds", torch.cuda.get_device_name(device), dtype)
    with torch.cuda.device(device), torch.no_grad():
        times = {config: _times(config, dtype, device, tma) for config in fitting}
    by_product = zip(*(times[config] for config in fitting), strict=True)
    best = Configs(*(fitting[found.index(min(found))] for found in by_product))
    for config, found in times.items():
        log.info("%s: %s ms", config, ", ".join(f"{ms:.3f}" for ms in found))
    _keep(_key(dtype, device, tma), best)
    return best


def _times(config: Config, dtype: torch.dtype, device: torch.device, tma: bool) -> tuple[float, ...]:
    """Milliseconds of hidden x head, E x head, and E^T x hidden with these tiles; infinite where they do not run."""
    generator = torch.Generator(device).manual_seed(0)
    weight, hidden = (
        torch.randn(n, HIDDEN_SIZE, device=device, generator=generator).to(dtype) for n in (VOCABULARY, ROWS)
    )
    order = torch.arange(ROWS, dtype=torch.int32, device=device)
    rows = Rows(order, torch.full((2,), ROWS, dtype=torch.int32, device=device))
    programs = device_limits(device)[0]
    chunk = Chunk(Head(weight / HIDDEN_SIZE**0.5), 1.0, ROWS, Machine(programs, tma, Configs(config, config, config)))
    chunk.gather(hidden[None], order, rows, 0)
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros(weight.shape, device=device)
    partial_tiles = least_partial_tiles(config, ROWS, HIDDEN_SIZE, programs)
    plan = Plan(ROWS, ceil_div(VOCABULARY, config.cols), partial_tiles)
    gradients = ChunkGradients(chunk, plan, d_hidden, head=True)
    calls = (
        lambda: gradients.vocab.store(chunk.row_counts, 0),
        lambda: gradients.hidden_product(chunk.row_counts, 0),
        lambda: gradients.head(d_weight, None, accumulate=True),
    )
    try:
        return tuple(_milliseconds(call) for call in calls)
    except OutOfResources:
        return (float("inf"),) * 3


def _milliseconds(call) -> float:
    call()
    found = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def _key(dtype: torch.dtype, device: torch.device, tma: bool) -> str:
    family = "tma" if tma else "pointer"
    return f"{torch.cuda.get_device_name(device)}, {dtype}, {family}, triton {triton.__version__}"


def _path(key: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(os.environ.get("EGRSD_KERNELS_CACHE") or Path(cache, "egrsd_kernels")) / "tuning"
    return folder / (re.sub(r"[^\w.+]+", "-", key) + ".json")


def _read(path: Path, fitting: tuple[Config, ...]) -> Configs | None:
    """The choice that is kept there; None where there is none, or none among ``fitting``."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        entries = [_values(config) for config in fitting]
        return Configs(*(fitting[entries.index(kept[role])] for role in Configs._fields))
    except FileNotFoundError:
        return None
    # Not readable, no JSON, or JSON of another shape, whoever wrote it.
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        log.warning("%s: expected tiles of the tuning list, ignored (%s: %s)", path, type(error).__name__, error)
        return None


def _keep(key: str, best: Configs) -> None:
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and moved: processes that start together never see half a file.
        with tempfile.TemporaryDirectory(dir=path.parent) as aside:
            file = Path(aside, path.name)
            file.write_text(json.dumps({role: _values(config) for role, config in best._asdict().items()}))
            os.replace(file, path)
    except OSError as error:
        log.warning("the choice of tiles could not be kept in %s: %s", path, error)


def _values(config: Config) -> list[int]:
    return list(dataclasses.astuple(config))


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device("cuda", torch.cuda.current_device())
    fitting = _fitting(device_limits(device)[1])
    for dtype in (torch.bfloat16, torch.float16):
        for tma in {has_tma(device), False}:
            print(f"{_key(dtype, device, tma)}: {measure(dtype, device, tma, fitting)}")


if __name__ == "__main__":
    main()
