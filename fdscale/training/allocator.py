"""Memory as measured: the allocator's own events, the device's own counter, the storages that a run holds."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

OWN_OBJECTS = ("deepspeed.", "torch.optim.", "torch.nn.", "fdscale.", "timm.", "fairscale.")


@dataclass
class Peak:
    """Bytes at the peak of what was measured; 0 until it is."""

    size: int = 0


@contextmanager
def peak_of_step(device: torch.device, *holders: object) -> Iterator[Peak]:
    """The most bytes that one step holds, known when the context ends.

    On CUDA the allocator's own maximum. On a CPU what `holders` (engine, teachers) hold at the beginning, and how far
    the allocator goes beyond that, by the profiler's memory events of this step. Never the size of the process.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.size = torch.cuda.max_memory_allocated(device)
        return
    before = sum(held_storages(*holders).values())
    with memory_profile() as profiler:
        yield peak
    peak.size = before + max((live for _, live in live_bytes(profiler)), default=0)


def memory_profile() -> profile:
    """A profiler of the CPU allocator's events."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def live_bytes(profiler: profile) -> list[tuple[int, int]]:
    """(time in ns, bytes that live then) at every event of the CPU allocator; what is older than the profile is out.

    The profiler sees what the profiled thread and its backward pass free, but not what gloo's threads do, which may
    hold a gathered buffer last. Such a buffer ends here when its address is handed out again.
    """
    addresses: list[int] = []
    sizes: dict[int, int] = {}
    live, series = 0, []
    for time, address, size in _events(profiler):
        if size > 0:
            live += size - _end_overlapped(addresses, sizes, address, size)
            sizes[address] = size
            insort(addresses, address)
        elif address in sizes:  # older blocks are not the profile's
            live -= _end(addresses, sizes, address)
        series.append((time, live))
    return series


def _end_overlapped(addresses: list[int], sizes: dict[int, int], address: int, size: int) -> int:
    """Forget what lay where something new lies now; returns its bytes."""
    ended, place = 0, bisect_left(addresses, address + size)
    while place and addresses[place - 1] + sizes[addresses[place - 1]] > address:
        ended += _end(addresses, sizes, addresses[place - 1])
        place -= 1
    return ended


def _end(addresses: list[int], sizes: dict[int, int], address: int) -> int:
    del addresses[bisect_left(addresses, address)]
    return sizes.pop(address)


def _events(profiler: profile) -> list[tuple[int, int, int]]:
    """(time, address, bytes; negative when freed) of the CPU allocator, in order."""
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    waiting, found = list(results.experimental_event_tree()), []
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return sorted(found)


def held_storages(*holders: object) -> dict[int, int]:
    """Bytes of each distinct storage that engines, optimizers and modules hold, by address; views count once.

    Weights, their partitions and gradients, masters and moments, buffers: whatever is reached through attributes and
    containers of torch's, DeepSpeed's, timm's and our own objects.
    """
    found: dict[int, int] = {}
    seen: set[int] = set()
    waiting: deque[object] = deque(holders)
    while waiting:
        thing = waiting.popleft()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        waiting.extend(_inside(thing))
    found.pop(0, None)  # of empty tensors
    return found


def _inside(thing: object) -> Iterator[object]:
    if isinstance(thing, dict):
        yield from thing.keys()
        yield from thing.values()
    elif isinstance(thing, list | tuple | set | frozenset | deque):
        yield from thing
    elif isinstance(thing, Tensor | nn.Module) or type(thing).__module__.startswith(OWN_OBJECTS):
        yield from vars(thing).values() if hasattr(thing, "__dict__") else ()
        yield from (thing.grad,) if isinstance(thing, Tensor) and thing.is_leaf else ()
