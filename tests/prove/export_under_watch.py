"""Export a run's weights in this process, watched: bytes from torch's allocator, and from the system.

Prints JSON: `allocated`, the peak of the allocator's events that `torch.profiler` recorded; `anonymous`, the growth of
RssAnon, which leaves mapped files out; `peak`, that of VmHWM, which does not.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from fdscale.export.weights_format import export_weights


def status(name: str) -> int:
    """A size in /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


class Anonymous(threading.Thread):
    """Samples RssAnon every few milliseconds and keeps the largest."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.begun, self.ended = status("RssAnon"), threading.Event()
        self.largest = self.begun

    def run(self) -> None:
        while not self.ended.wait(0.003):
            self.largest = max(self.largest, status("RssAnon"))

    @property
    def growth(self) -> int:
        return self.largest - self.begun


def peak_of(watched: Any) -> int:
    """The largest sum of all allocations less all frees so far."""
    held = largest = 0
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        largest = max(largest, held)
    return largest


def watched_export(run: Path, output: Path) -> dict[str, float]:
    """Export, and what it took."""
    peak, anonymous = status("VmHWM"), Anonymous()
    anonymous.start()
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        written = export_weights(run, output)
    anonymous.ended.set()
    return {
        "bytes": written.stat().st_size,
        "allocated": peak_of(watched),
        "anonymous": anonymous.growth,
        "peak": status("VmHWM") - peak,
        "seconds": time.perf_counter() - began,
    }


if __name__ == "__main__":
    print(json.dumps(watched_export(Path(sys.argv[1]), Path(sys.argv[2]))))
