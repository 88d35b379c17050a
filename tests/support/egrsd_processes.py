"""``egrsd train`` in two processes, as ``accelerate launch`` starts it; also with FSDP2 on CPUs."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

import accelerate.state
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from egrsd_kernels import cli
from egrsd_kernels.trl import EGRSDTrainer
from tests.support.processes import in_processes

STATE, SHARDED = accelerate.state.AcceleratorState, "sharded parameters:"


def train_in_two(home: Path, *arguments: str, fsdp: bool = False) -> str:
    """What both print, in the folder ``home``; with ``fsdp`` also, behind SHARDED, how many parameters are sharded."""
    return "".join(in_processes(_train, home, arguments, fsdp, gloo=False))


def _train(rank: int, home: Path, arguments: tuple[str, ...], fsdp: bool) -> str:
    os.chdir(home)
    if fsdp:
        STATE.__init__, EGRSDTrainer.train = _with_plugin, _and_count
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = cli.main(["train", *arguments])
    assert code == 0
    return said.getvalue()


def _with_plugin(self, *args, fsdp_plugin=None, init=STATE.__init__, **options):
    """FSDP2 on CPUs, which PyTorch can do and Accelerate does not ask it to; on GPUs nothing changes."""
    init(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def _and_count(self, *args, train=EGRSDTrainer.train, **options):
    result = train(self, *args, **options)
    parameters = list(self.model.parameters())
    sharded = sum(isinstance(parameter, DTensor) for parameter in parameters)
    sys.stdout.write(f"{SHARDED} {sharded} of {len(parameters)}\n")
    return result
