"""EGRSD and CL-EGRSD (arXiv 2605.13255) in Hugging Face TRL.

>>> from egrsd_kernels.trl import EGRSDConfig, EGRSDTrainer
>>> trainer = EGRSDTrainer(model, reward_function, EGRSDConfig("run", gamma=0.3), train_dataset=dataset)
>>> trainer.train()

:func:`fuse_heads` gives TRL's own trainers the same log p, and nothing else of the method:

>>> from egrsd_kernels.trl import fuse_heads
>>> fuse_heads()
>>> trainer = GRPOTrainer(...)

:func:`pack` has one of them read every prefix that its rollouts share once, and no padding:

>>> from egrsd_kernels.trl import pack
>>> pack(trainer)

:data:`PRESETS` maps the names of ready configurations to their YAML files.
"""

from importlib.util import find_spec

from egrsd_kernels.extras import how_to_install

if find_spec("trl") is None:
    raise ModuleNotFoundError(f"egrsd_kernels.trl needs TRL: {how_to_install('trl')}", name="trl")

from egrsd_kernels.presets import PRESETS

from .config import EGRSDConfig
from .fused_head import fuse_head
from .fusing import fuse_heads, unfuse_heads
from .packing import pack, unpack
from .self_distillation import without_logits
from .teacher import EarlierWeights, Teacher
from .trainer import EGRSDTrainer

__all__ = [
    "PRESETS", "EGRSDConfig", "EGRSDTrainer", "EarlierWeights", "Teacher", "fuse_head", "fuse_heads", "pack",
    "unfuse_heads", "unpack", "without_logits",
]  # fmt: skip
