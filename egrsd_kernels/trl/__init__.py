"""EGRSD and CL-EGRSD (arXiv 2605.13255) in Hugging Face TRL.

>>> from egrsd_kernels.trl import EGRSDConfig, EGRSDTrainer
>>> trainer = EGRSDTrainer(model, reward_function, EGRSDConfig("run", gamma=0.3), train_dataset=dataset)
>>> trainer.train()

:data:`PRESETS` maps the names of ready configurations to their YAML files.
"""

from importlib.util import find_spec

if find_spec("trl") is None:
    raise ModuleNotFoundError("egrsd_kernels.trl needs TRL: pip install 'egrsd-kernels[trl]'", name="trl")

from egrsd_kernels.presets import PRESETS

from .config import EGRSDConfig
from .trainer import EGRSDTrainer

__all__ = ["PRESETS", "EGRSDConfig", "EGRSDTrainer"]
