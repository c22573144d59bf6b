"""Memory that forked processes share, and large tensors, in pages of 2 MiB where the kernel has them.

What a process has not touched for a while it has to find again, page by page: a matter of nanoseconds on a machine of
one's own, of 4 to 25 microseconds on a virtual one whose host watches what is in use. A batch of 64 views lies in 2,350
pages of 4 KiB, or in five of these.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from weakref import finalize

LARGE = 2 * 2**20
NOBODY, MAP_FIXED, MADV_HUGEPAGE, MADV_COLLAPSE = 0, 0x10, 14, 25  # Linux's; the last one since 6.1

_c = ctypes.CDLL(None)
_c.mmap.restype = ctypes.c_void_p
_c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_c.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_c.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def put_tensors_in_large_pages() -> None:
    """From 2 MiB on, by torch's own switch, which it looks at once: to be called before it makes the first tensor."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def shared_memory(size: int) -> memoryview:
    """So many bytes, aligned to large pages, which forked processes share; given back with the last reference.

    Python's `mmap` lets nobody choose where memory lies. Raises OSError where there is none.
    """
    reserved = size + LARGE
    start = _mapped(None, reserved, NOBODY, mmap.MAP_PRIVATE)
    aligned = -(-start // LARGE) * LARGE
    _mapped(aligned, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED)
    memory = (ctypes.c_char * size).from_address(aligned)
    finalize(memory, _c.munmap, start, reserved).atexit = False
    return memoryview(memory).cast("B")


def _mapped(address: int | None, size: int, protection: int, flags: int) -> int:
    start = _c.mmap(address, size, protection, flags | mmap.MAP_ANONYMOUS, -1, 0)
    if start in (None, ctypes.c_void_p(-1).value):
        raise OSError(f"no {size} bytes of shared memory")
    return int(start)


def gather(memory: memoryview, start: int, size: int) -> None:
    """Have a part of shared memory, of which nobody needs the contents, in large pages; best effort."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory, start))
    ctypes.memset(address, 0, size)  # only what is there is gathered
    _c.madvise(address, size, MADV_HUGEPAGE)
    _c.madvise(address, size, MADV_COLLAPSE)
