"""Each kernel compiles for GPUs that are not there, fits into their shared memory, and spills no more than is known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from egrsd_kernels.backends.triton.divergence.pair import FLOAT32, HALF, pair_config
from tests.support.doc_examples import ROOT

pytest.importorskip("triton.knobs")  # where cuobjdump is, as newer ones say

MATRIX = "^(vocab|pair|hidden|head)_kernel$"
# Bytes of a thread's stack, at most: tiles leave no register for what a pass may be asked for beside them.
SPILLED = {"vocab_kernel": 512, "pair_kernel": 896, "head_kernel": 1024, "hidden_kernel": 256}
SPILLED_BY_SOFTCAPS = {"vocab_kernel": 2560, "pair_kernel": 1280}
# A GPU, and what of the steps: all kernels once, and those with tiles in other dtypes, families and sizes.
CASES = {
    "h100": ["h100", "--dtype", "bfloat16", "--family", "tma", "--hidden", "4096"],
    "h100 one step": ["h100", "--dtype", "float16", "--hidden", "40", "--bias", "--step", "divergence"],
    "h100 float32": ["h100", "--dtype", "float32", "--family", "tma", "--hidden", "72", "--kernel", MATRIX],
    "a100": ["a100", "--dtype", "bfloat16", "--hidden", "4096", "--kernel", MATRIX],
    "b200": ["b200", "--dtype", "bfloat16", "--family", "tma", "--step", "divergence", "--kernel", MATRIX],
    "l40s": ["l40s", "--dtype", "float16", "float32", "--step", "divergence", "--hidden", "72", "--kernel", MATRIX],
}


def compiled(arguments: list[str]) -> list[SimpleNamespace]:
    """What ``python -m tests.support.offline`` finds; kernels that this process interprets cannot be compiled in it."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.offline", "--json", "--gpu", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [SimpleNamespace(**json.loads(line)) for line in run.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_kernels_fit(arguments):
    from tests.support.offline import GPUS

    found = compiled(arguments)
    assert {"pair_kernel", "hidden_kernel"} <= {x.kernel for x in found}
    assert [x for x in found if x.error] == []
    assert [x for x in found if x.shared > GPUS[arguments[0]].shared] == []
    most = SPILLED | (SPILLED_BY_SOFTCAPS if "--bias" in arguments else {})
    assert [x for x in found if x.spilled > most.get(x.kernel, 0)] == []


@pytest.mark.parametrize("dtype, tiles", [(torch.bfloat16, HALF), (torch.float32, FLOAT32)], ids=str)
@pytest.mark.parametrize("shared", [227, 163, 99], ids="{} KiB".format)
def test_pairs_have_a_tile_that_fits(shared, dtype, tiles):
    """The operands of one head and two models, and of two heads one after the other, beside the tile that is stored."""
    head, other = (SimpleNamespace(weight=torch.empty(8, 8, dtype=dtype)) for _ in range(2))
    chosen = pair_config(head, head, shared << 10), pair_config(head, other, shared << 10)
    assert tiles.index(chosen[1]) <= tiles.index(chosen[0]) < len(tiles)
    for matrices, c in zip((3, 2), chosen, strict=True):
        operands = c.stages * matrices * c.rows * c.depth * dtype.itemsize
        assert operands + c.rows * c.cols * dtype.itemsize <= shared << 10
