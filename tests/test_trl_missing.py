"""What someone sees who has not installed TRL; it runs with and without it."""

import importlib.util
import runpy
from pathlib import Path

import pytest


def test_without_trl_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    package = Path(__file__).parents[1] / "egrsd_kernels" / "trl" / "__init__.py"
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[trl\]' in a checkout of egrsd_kernels"):
        runpy.run_path(str(package))
