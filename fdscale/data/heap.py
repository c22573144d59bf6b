"""What a process keeps of the memory that it lets go of, by glibc's settings; other C libraries have none."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed(size: int) -> None:
    """Hold on to so many bytes, and take what is not larger than half of that from them.

    glibc would give memory back to the kernel, and have it faulted in again, page by page.
    """
    _set(M_TRIM_THRESHOLD, size)
    _set(M_MMAP_THRESHOLD, size // 2)


def give_back() -> None:
    """Give what lies free among the blocks in use back to the kernel.

    A heap in whose gaps the next block does not fit grows, and what was faulted in for them stays. To be called now and
    then: all that is given back is faulted in again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _set(option: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)
