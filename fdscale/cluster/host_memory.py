"""Host memory: what this machine or its job has, what it can still give, what this process holds. No torch in here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fdscale.config.errors import UserError

# of control groups, versions 2 and 1: folder, limit, usage, and what of that the kernel would give back at once
VERSIONS = {
    2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def limit(root: Path = Path("/")) -> int:
    """Bytes that this machine has, or that its control groups leave this process."""
    limits = (_number(group / VERSIONS[version][1]) for version, group in _groups(root))
    return min([_of_meminfo(root, "MemTotal"), *(size for size in limits if size is not None)])


def available(root: Path = Path("/")) -> int:
    """Bytes that can still be had here before something is killed; page cache that can be dropped counts as free."""
    left = [_of_meminfo(root, "MemAvailable")]
    for version, group in _groups(root):
        _, limit_file, usage_file, droppable = VERSIONS[version]
        size, usage = _number(group / limit_file), _number(group / usage_file)
        if size is not None and usage is not None:
            left.append(size - usage + _of_stat(group / "memory.stat", droppable))
    return max(min(left), 0)


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _of_meminfo(root: Path, name: str) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise UserError(f"{root / 'proc/meminfo'} has no {name} line: how much memory is there?")


def _groups(root: Path) -> Iterator[tuple[int, Path]]:
    """This process's control groups of memory, each with its version, every ancestor included."""
    memberships = root / "proc/self/cgroup"
    lines = memberships.read_text().splitlines() if memberships.exists() else []
    for controllers, name in (line.split(":", 2)[1:] for line in lines if line.count(":") >= 2):
        version = 2 if controllers == "" else 1
        if version == 2 or "memory" in controllers.split(","):
            here = Path(name.lstrip("/"))
            for folder in dict.fromkeys((here, *here.parents)):
                yield version, root / VERSIONS[version][0] / folder


def _number(file: Path) -> int | None:
    """None where there is no such file, or no limit in it."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _of_stat(file: Path, name: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
