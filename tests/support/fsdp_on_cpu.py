"""``egrsd`` with FSDP2 on CPUs, which PyTorch can do and Accelerate does not ask it to; it also says what is sharded.

python -m tests.support.fsdp_on_cpu; on GPUs it changes nothing.
"""

import os
import sys

import accelerate.state
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from egrsd_kernels import cli
from egrsd_kernels.trl import EGRSDTrainer

STATE, SHARDED = accelerate.state.AcceleratorState, "sharded parameters:"


def with_plugin(self, *args, fsdp_plugin=None, init=STATE.__init__, **options):
    init(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def and_count(self, *args, train=EGRSDTrainer.train, **options):
    result = train(self, *args, **options)
    parameters = list(self.model.parameters())
    sharded = sum(isinstance(parameter, DTensor) for parameter in parameters)
    sys.stdout.write(f"{SHARDED} {sharded} of {len(parameters)}\n")  # at once: two processes write
    return result


if __name__ == "__main__":
    STATE.__init__ = with_plugin
    EGRSDTrainer.train = and_count
    code = cli.main()
    sys.stdout.flush()
    os._exit(code)  # caches of DTensor hold the mesh, and gloo's threads with it, which may abort the interpreter's end
