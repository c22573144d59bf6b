"""What a process holds, by three sources that know nothing of each other or of any planner."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator

import torch


def live_storages() -> dict[int, int]:
    """Bytes of every distinct live tensor storage by its address: views and shared storages count once."""
    gc.collect()
    storages: dict[int, int] = {}
    for tensor in _tensors():
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes()
    return storages


def _tensors() -> Iterator[torch.Tensor]:
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            yield thing
            if thing.is_leaf and thing.grad is not None:
                yield thing.grad  # held from C++, where the collector does not look


class _Mallinfo2(ctypes.Structure):
    """glibc's account of the heap; the names are its own (man mallinfo2)."""

    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in NAMES)


def allocated_by_c() -> int:
    """Bytes that the process has from malloc and not given back: tensors, C++ and large Python objects alike."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    account = mallinfo2()
    return int(account.uordblks + account.hblkhd)


def python_blocks() -> int:
    """Memory blocks that Python's own allocator has given out: small objects, up to 512 bytes each."""
    return sys.getallocatedblocks()
