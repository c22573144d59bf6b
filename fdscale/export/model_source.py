"""The source of a network that stock timm does not have, in one file that needs torch and timm alone."""

from __future__ import annotations

import ast
from pathlib import Path

from fdscale.students import swin_v2, window_attention


def network_source(*further: Path) -> str:
    """SwinV2 with extra norms, and what is written on top of it in `further` files, without fdscale's imports."""
    return "\n\n".join(map(_own_lines, (Path(window_attention.__file__), Path(swin_v2.__file__), *further)))


def _own_lines(path: Path) -> str:
    """A module without its imports from fdscale; the first one's `__future__` stands for all."""
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    dropped = ("fdscale",) if path == Path(window_attention.__file__) else ("fdscale", "__future__")
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(dropped):
            last = node.end_lineno or node.lineno
            lines[node.lineno - 1 : last] = [""] * (last - node.lineno + 1)
    return "".join(lines)
