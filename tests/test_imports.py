"""Imports without a search for garbage, and what is garbage later on."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fdscale.imports import importing

MODULE = "a_module_of_this_test"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One that can be imported, and is not yet."""
    (tmp_path / f"{MODULE}.py").write_text("import gc\nlooked_for = gc.isenabled()\nkept = [[] for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield MODULE
    gc.unfreeze()
    sys.modules.pop(MODULE, None)


def test_nothing_is_looked_through_while_it_is_imported_or_afterwards(module: str) -> None:
    before = gc.get_freeze_count()
    with importing():
        imported = __import__(module)
    assert not imported.looked_for
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + 1000
    assert not any(thing is imported.kept for thing in gc.get_objects())


def test_where_all_was_imported_before_garbage_stays_garbage() -> None:
    before = gc.get_freeze_count()
    with importing():
        import json  # noqa: F401
    assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_an_import_that_fails_leaves_python_as_it_was() -> None:
    with pytest.raises(ModuleNotFoundError), importing():
        __import__("a_module_that_is_nowhere")
    assert gc.isenabled()
