"""Memory that is let go of is kept, or given back, as a process was told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
WORK = """
import torch
from pathlib import Path
from fdscale.data.heap import give_back, keep_freed
keep_freed(512 * 2**20)
blocks = [torch.ones(2**20) for _ in range(64)]  # 4 MiB each
above = torch.ones(1000)  # in the heap, where they are, too
del blocks
{told}
print(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20)
"""


def resident_mib(told: str) -> float:
    words = [sys.executable, "-c", WORK.format(told=told)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True, env=os.environ).stdout)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells what a process holds")
def test_a_process_keeps_or_gives_back_what_it_lets_go_of() -> None:
    kept, given = resident_mib(""), resident_mib("give_back()")
    assert kept - given > 200
