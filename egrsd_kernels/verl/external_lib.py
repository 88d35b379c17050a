"""For verl's setting ``external_lib``: an import fuses the heads of the process. See :mod:`egrsd_kernels.verl`."""

from .fused_head import fuse_heads

fuse_heads()
