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


def give_back_from(size: int) -> None:
    """Give every block of so many bytes or more back to the kernel as soon as it is let go of.

    glibc comes to keep blocks of up to 32 MiB instead, in gaps between others, and a process grows while it works.
    """
    _set(M_TRIM_THRESHOLD, size)
    _set(M_MMAP_THRESHOLD, size)


def _set(option: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)
