"""The processes that another one has started, and whether they end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest


def descendants(pid: int) -> list[int]:
    """Everything that a process has started, and what that has: each before its own."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return []
    return children + [further for child in children for further in descendants(child)]


def assert_end(pids: list[int]) -> None:
    until = time.monotonic() + 30
    while any(running(pid) for pid in pids):
        if time.monotonic() > until:
            left = [pid for pid in pids if running(pid)]
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{left} do not end")
        time.sleep(0.02)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
