"""The processes that another one has started, and whether they end."""

from __future__ import annotations

import time
from pathlib import Path


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [further for child in children for further in descendants(child)]


def assert_end(pids: list[int]) -> None:
    until = time.monotonic() + 30
    while any(running(pid) for pid in pids):
        assert time.monotonic() < until, f"{pids} wait for ever"
        time.sleep(0.02)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
