"""The direction of imports: the package in levels, no circle of files, and nothing heavy on the way to the loss."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.doc_examples import ROOT

NAME = "egrsd_kernels"
# From the bottom to the top. A module imports from its own unit and from the levels below it, never from a neighbour.
LEVELS = (
    ("head", "rows", "eager", "once", "operators", "extras", "presets", "replacing"),
    ("checks",),
    ("credit",),
    ("backends",),
    ("statistics", "logp", "loss", "divergence"),
    ("models",),
    ("packing", "adapters"),
    ("__init__",),  # the public names
    ("rl", "rollouts"),
    ("trl", "verl"),
    ("cli",),
    ("__main__",),
)
# What only trl/ imports; others do inside the function that needs it.
HEAVY = {"trl", "transformers", "peft", "accelerate", "datasets", "rich", "matplotlib", "yaml"}

Sources = Mapping[str, str]


def sources(folder: Path) -> dict[str, str]:
    """Each module's text by its name; a package's is its name and ``.__init__``."""
    parent = folder.parent
    return {
        ".".join(path.relative_to(parent).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in folder.rglob("*.py")
    }


def imported(modules: Sources, module: str) -> set[str]:
    """The modules of ``modules`` that one imports, inside functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(modules[module])):
        if isinstance(node, ast.Import):
            found |= {_resolve(modules, alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # The package that a relative import counts from; a package's own __init__ is in it.
            base = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            found |= {_resolve(modules, source, alias.name) for alias in node.names}
    return found - {None}


def _resolve(modules: Sources, source: str, name: str | None) -> str | None:
    """The module that ``from source import name`` reads: a submodule of that name, else source itself."""
    names = [f"{source}.{name}", f"{source}.{name}.__init__"] if name else []
    return next((one for one in (*names, source, f"{source}.__init__") if one in modules), None)


def unit(module: str) -> str:
    """The part of the package that a module belongs to: a file, or a folder with all in it."""
    return module.split(".")[1]


def upward(modules: Sources) -> list[str]:
    """The imports that do not go down."""
    level = {name: index for index, names in enumerate(LEVELS) for name in names}
    return sorted(
        f"{module} imports {other}"
        for module in modules
        for other in imported(modules, module)
        if unit(other) != unit(module) and level[unit(other)] >= level[unit(module)]
    )


def circles(modules: Sources) -> list[str]:
    """The modules that import themselves by way of others."""
    reached = {module: imported(modules, module) for module in modules}
    while True:
        further = {
            module: set().union(others, *(reached[other] for other in others)) for module, others in reached.items()
        }
        if further == reached:
            return sorted(module for module, others in reached.items() if module in others)
        reached = further


def at_import(tree: ast.AST) -> Iterator[str]:
    """The packages that a module imports when it is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from at_import(node)


def heavy(modules: Sources) -> list[str]:
    return sorted(
        f"{module} imports {package}"
        for module, text in modules.items()
        for package in set(at_import(ast.parse(text))) & HEAVY
        if unit(module) != "trl"
    )


PACKAGE = sources(ROOT / NAME)


def test_every_part_of_the_package_has_its_level():
    assert {unit(module) for module in PACKAGE} == {name for level in LEVELS for name in level}


def test_imports_go_down():
    assert upward(PACKAGE) == []


def test_no_circle_of_files():
    assert circles(PACKAGE) == []


def test_only_trl_imports_what_is_heavy():
    assert heavy(PACKAGE) == []


def test_the_import_adds_itself_alone_to_torch():
    """Counted in modules: Triton and PyTorch's compiler take seconds, and are imported where they are used."""
    code = """
import sys, torch
before = set(sys.modules)
import egrsd_kernels
print(*(name for name in set(sys.modules) - before if name.split(".")[0] != "egrsd_kernels"))
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    added = found.stdout.split()
    assert not {"triton", "sympy", "torch._dynamo", *HEAVY} & set(added)
    assert len(added) < 20, added  # small ones of the standard library


def test_what_is_wrong_is_found():
    fake = {
        "egrsd_kernels.__init__": "from .loss import loss",
        "egrsd_kernels.checks": "import torch",
        "egrsd_kernels.loss": "import yaml\nfrom . import checks\n\ndef f():\n    import rich\n",
        "egrsd_kernels.logp": "from .loss import loss",
        "egrsd_kernels.rl.__init__": "from .rewards import reward",
        "egrsd_kernels.rl.rewards": "def f():\n    from egrsd_kernels.trl import trainer\n",
        "egrsd_kernels.trl.__init__": "import transformers\nfrom .trainer import Trainer",
        "egrsd_kernels.trl.trainer": "from egrsd_kernels import loss\nfrom .teacher import Teacher",
        "egrsd_kernels.trl.teacher": "if TYPE_CHECKING:\n    from .trainer import Trainer",
    }
    assert upward(fake) == [
        "egrsd_kernels.logp imports egrsd_kernels.loss",
        "egrsd_kernels.rl.rewards imports egrsd_kernels.trl.trainer",
    ]
    assert circles(fake) == ["egrsd_kernels.trl.teacher", "egrsd_kernels.trl.trainer"]
    assert heavy(fake) == ["egrsd_kernels.loss imports yaml"]
