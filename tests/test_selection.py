"""What `make test` and `make test-all` choose: each test in one of them, and in every file something quick."""

from __future__ import annotations

import re
from collections import defaultdict
from types import SimpleNamespace

from tests.support.doc_examples import ROOT
from tests.support.selection import COLLECTED, mark_slow_cases

WHOLE_RUNS = {
    "test_trl_distributed.py", "test_trl_equivalence.py", "test_trl_fuse_heads_distributed.py",
    "test_trl_fuse_heads_trainers.py", "test_trl_packing_distributed.py", "test_trl_without_logits_distributed.py",
    "test_vllm.py",
}  # fmt: skip  # each of them minutes of training


class Item:
    """As much of a collected test as the choice looks at."""

    def __init__(self, test: str, **parameters):
        self.nodeid, self.marks = f"{test}[{parameters}]", {"heavy"}
        if parameters:
            self.callspec = SimpleNamespace(params=parameters)

    def add_marker(self, name: str) -> None:
        self.marks.add(name)

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None


def test_the_first_case_with_each_dtype_and_family_is_quick():
    slow = {
        Item("a", dtype="float32", family="tma", size=1): False,
        Item("a", dtype="float32", family="tma", size=2): True,
        Item("a", dtype="float32", family="pointer", size=1): False,
        Item("a", dtype="float16", family="tma", size=2): False,
        Item("a", dtype="float16", family="pointer", size=1): True,
        Item("b", size=1): False,
        Item("b", size=2): True,
        Item("c"): False,
    }
    mark_slow_cases(slow)
    assert {item: "slow" in item.marks for item in slow} == slow


def test_every_file_has_a_quick_test(request):
    files = defaultdict(list)
    for test, slow in request.config.stash[COLLECTED].items():
        files[test.split("::")[0].rsplit("/")[-1]].append(slow)
    assert {name for name, slow in files.items() if all(slow)} <= WHOLE_RUNS


def test_the_two_commands_are_each_others_rest():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = dict(re.findall(r"^(test|test-all):.*\n\t.*pytest.* -m (\"not slow\"|slow)$", makefile, re.MULTILINE))
    assert commands == {"test": '"not slow"', "test-all": "slow"}


def test_what_was_asked_for_is_what_runs(request):
    """The marks are there before pytest chooses by them."""
    slow = {item.get_closest_marker("slow") is not None for item in request.session.items}
    if request.config.getoption("markexpr") == "not slow":
        assert slow == {False}
