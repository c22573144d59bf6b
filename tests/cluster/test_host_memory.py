"""Host memory read from files of the kernel's formats, and from this machine's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from fdscale.cluster import host_memory
from fdscale.config.errors import UserError

GIB = 2**30
MEMINFO = f"MemTotal: {64 * GIB // 1024} kB\nMemFree: 100 kB\nMemAvailable: {50 * GIB // 1024} kB\n"


def machine(root: Path, membership: str = "", files: Mapping[str, object] | None = None) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, "proc/self/cgroup": membership, **(files or {})}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def test_a_machine_of_its_own(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n")
    assert host_memory.limit(root) == 64 * GIB
    assert host_memory.available(root) == 50 * GIB


def test_the_share_of_a_job_with_dropped_cache_counted_as_free(tmp_path: Path) -> None:
    job = "sys/fs/cgroup/slurm/job_7"
    files = {
        f"{job}/step_0/memory.max": "max",
        f"{job}/step_0/memory.current": 3 * GIB,
        f"{job}/memory.max": 8 * GIB,
        f"{job}/memory.current": 6 * GIB,
        f"{job}/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7",
    }
    root = machine(tmp_path, "0::/slurm/job_7/step_0", files)
    assert host_memory.limit(root) == 8 * GIB
    assert host_memory.available(root) == 3 * GIB


def test_version_one_of_control_groups(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/job"
    files = {
        f"{group}/memory.limit_in_bytes": 4 * GIB,
        f"{group}/memory.usage_in_bytes": 4 * GIB,
        f"{group}/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}",
    }
    root = machine(tmp_path, "5:cpu,cpuacct:/elsewhere\n4:memory:/job", files)
    assert host_memory.limit(root) == 4 * GIB
    assert host_memory.available(root) == GIB // 2


def test_a_group_filled_beyond_its_limit_has_nothing_left(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/job/memory.max": GIB, "sys/fs/cgroup/job/memory.current": 2 * GIB}
    assert host_memory.available(machine(tmp_path, "0::/job", files)) == 0


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemFree: 1 kB\n")
    with pytest.raises(UserError, match="no MemTotal line"):
        host_memory.limit(tmp_path)


def test_this_machine_and_this_process() -> None:
    assert 0 < host_memory.available() <= host_memory.limit()
    before, ballast = host_memory.resident(), bytearray(os.urandom(64 << 20))
    assert 60 << 20 < host_memory.resident() - before < 100 << 20
    del ballast
