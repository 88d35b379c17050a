"""What sdist and wheel hold, what the metadata says, and that no text sends anyone to an index for this package."""

from __future__ import annotations

import email
import re
import subprocess
import sys

import pytest

import egrsd_kernels
from egrsd_kernels.extras import how_to_install
from egrsd_kernels.presets import PRESETS
from tests.support.devices import interpreter_fault
from tests.support.doc_examples import ROOT

TEXTS = ("*.py", "*.md", "*.yaml", "*.toml", "Makefile")


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The folder with what setuptools says of the package."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("metadata")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return folder / "egrsd_kernels.egg-info"


def test_the_sdist_is_a_whole_checkout(metadata):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    packed = (metadata / "SOURCES.txt").read_text(encoding="utf-8").split("\n")
    # What is left out serves the repository alone.
    expected = {name for name in tracked if not name.startswith(".") and (ROOT / name).exists()}
    assert expected <= set(packed)
    assert not [name for name in packed if "__pycache__" in name]


def test_the_version_and_the_extras_have_one_source(metadata):
    said = email.message_from_string((metadata / "PKG-INFO").read_text(encoding="utf-8"))
    assert said["Version"] == egrsd_kernels.__version__
    assert said["License-Expression"] == "Apache-2.0" and said["Requires-Python"] == ">=3.10"
    extras = said.get_all("Provides-Extra")
    assert {"train", "trl", "bench", "test-core", "test", "all", "docs", "types"} == set(extras)
    named = {name for line in said.get_all("Requires-Dist") for name in re.findall(r"egrsd-kernels\[([^]]*)\]", line)}
    assert {extra for names in named for extra in names.split(",")} <= set(extras)


def test_a_wheel_holds_what_the_package_reads(tmp_path):
    pytest.importorskip("setuptools")
    folders = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run([sys.executable, "setup.py", "-q", *folders], cwd=ROOT, capture_output=True, check=True)
    package = ROOT / "egrsd_kernels"
    read = {path.relative_to(ROOT) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    packed = {path.relative_to(tmp_path / "lib") for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    assert packed == read
    pages = {f"rollouts/page.{kind}" for kind in ("html", "css", "js")}
    assert {str(path.relative_to("egrsd_kernels")) for path in packed} > pages
    assert {path.stem for path in packed if path.parent.name == "presets" and path.suffix == ".yaml"} == set(PRESETS)


def test_no_hint_names_a_package_that_no_index_has():
    assert how_to_install("trl") == "pip install '.[trl]' in a checkout of egrsd_kernels"
    hint = re.compile(r"""pip3? install (-\S+ )*['"]?egrsd[-_]kernels\b""")
    assert hint.search("pip install -U 'egrsd-kernels[trl]'")
    folders = ("egrsd_kernels", "benchmarks", "docs", "examples", "reference")
    files = [*ROOT.glob("*"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    found = {
        str(path.relative_to(ROOT)): match[0]
        for path in files
        if path.is_file() and any(path.match(pattern) for pattern in TEXTS)
        for match in hint.finditer(path.read_text(encoding="utf-8"))
    }
    assert not found


def test_an_interpreter_that_cannot_run_here_is_one_line():
    assert interpreter_fault("3.6.0", "2.4.6") == "triton 3.6.0's interpreter needs numpy<2.4, got 2.4.6"
    assert not any(interpreter_fault(*pair) for pair in (("3.3.1", "2.3.5"), ("3.7.0", "2.4.6"), ("3.10.0", "2.4")))
