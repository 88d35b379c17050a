"""One function in another's place, in every module that has it by a name."""

from __future__ import annotations

import functools
import sys
from types import ModuleType

import pytest

from egrsd_kernels.replacing import is_replacement, put_back, put_in_place


def original() -> str:
    return "original"


def above(function):
    return lambda: f"above {function()}"


@pytest.fixture
def module(monkeypatch):
    module = ModuleType("a_module_that_imported_it")
    module.one = module.another = original
    module.held = [original]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module
    put_back(module.one)


def test_every_name_is_replaced_and_given_back(module):
    before, here = original, sys.modules[__name__]
    with put_in_place(before, above):
        assert module.one is module.another is here.original is not before
        assert module.one() == "above original" and is_replacement(module.one)
        with put_in_place(module.one, above):  # there already
            assert module.one() == "above original"
        assert module.one() == "above original"
        assert module.held == [before]
    assert module.one is module.another is here.original is before and not is_replacement(before)


def test_it_stays_until_it_is_put_back(module):
    before = original
    undo = put_in_place(before, above)
    put_back(module.one)
    put_back(module.one)
    assert module.one is before
    with put_in_place(before, above):
        undo.close()  # what that one has done is undone already
        assert module.one() == "above original"


def test_somebody_elses_wrapper_around_ours_is_theirs(module):
    with put_in_place(original, above):
        module.another = wrapper = functools.wraps(module.one)(lambda: "theirs")
        assert not is_replacement(wrapper)
        put_back(wrapper)
        assert module.another is wrapper
    assert module.one() == "original" and module.another is wrapper
