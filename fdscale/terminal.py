"""The one console: progress, log lines and tables must share it, or they overwrite each other."""

from __future__ import annotations

from functools import cache

from rich.console import Console


@cache
def terminal() -> Console:
    """The console of this process, on standard output."""
    return Console(highlight=False)
