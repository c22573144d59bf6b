"""The one file of a network that stock timm does not have."""

from __future__ import annotations

import ast

from fdscale.export.model_source import network_source
from fdscale.export.transformers_format import WRAPPER


def imports(source: str) -> list[str]:
    """The modules that a file imports from, in its order."""
    return [str(node.module) for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)]


def test_it_needs_neither_fdscale_nor_another_file() -> None:
    for source in (network_source(), network_source(WRAPPER)):
        found = imports(source)
        assert not any(name.startswith("fdscale") for name in found)
        assert found[0] == "__future__"
        assert found.count("__future__") == 1
        compile(source, "one file", "exec")


def test_it_computes_without_fdscale() -> None:
    names: dict[str, object] = {"__name__": "elsewhere"}
    exec(compile(network_source(), "elsewhere", "exec"), names)
    assert {"SwinV2", "load", "attend"} <= names.keys()
