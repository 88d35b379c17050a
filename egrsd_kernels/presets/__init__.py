"""The paper's settings by name, found without importing TRL."""

from pathlib import Path

PRESETS = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
"""YAML files with the keys of EGRSDConfig and of TRL's ModelConfig."""
