from __future__ import annotations

import ctypes
import gc
import multiprocessing
import platform
import re
from pathlib import Path

import numpy as np
import pytest

from fdscale.data.large_pages import LARGE, gather, shared_memory


def address_of(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def mapping_of(address: int) -> str | None:
    """What the kernel tells of the mapping that begins at an address."""
    parts = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return next((part for part in parts if part.startswith(f"{address:x}-")), None)


def test_what_a_fork_writes_is_seen() -> None:
    memory = shared_memory(3 * LARGE)
    seen = np.frombuffer(memory, np.uint8)

    def write() -> None:
        gather(memory, LARGE, LARGE)
        seen[LARGE + 5] = 7

    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert seen[LARGE + 5] == 7
    assert not seen[:LARGE].any()


def test_it_is_given_back_when_nobody_looks_at_it_any_more() -> None:
    memory = shared_memory(LARGE + 1)
    address = address_of(memory)
    assert address % LARGE == 0
    view = np.frombuffer(memory, np.uint8)[10:]
    del memory
    gc.collect()
    assert mapping_of(address) is not None
    view[:] = 1
    del view
    gc.collect()
    assert mapping_of(address) is None


def test_a_gathered_part_is_in_large_pages() -> None:
    kernel = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    version = tuple(map(int, platform.release().split("-")[0].split(".")[:2]))
    if version < (6, 1) or not kernel.exists() or "[never]" in kernel.read_text():
        pytest.skip("this kernel has no large pages on demand")
    memory = shared_memory(2 * LARGE)
    gather(memory, 0, 2 * LARGE)
    np.frombuffer(memory, np.uint8)[:] = 1
    told = mapping_of(address_of(memory))
    assert told is not None
    assert re.search(r"ShmemPmdMapped: +4096 kB", told), told


def test_more_than_there_is_is_an_error() -> None:
    with pytest.raises(OSError, match=r"no \d{19} bytes of shared memory"):
        shared_memory(2**60)
