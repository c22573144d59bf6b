"""Export a run's weights in this process, watched: bytes from torch's allocator, and from the system.

Prints JSON: `allocated`, the peak of the allocator's events that `torch.profiler` recorded, without those of mapping a
file, which torch reports as if it were an allocation; `mapped`, what those come to; `anonymous`, the growth of RssAnon,
which leaves mapped files out; `peak`, that of VmHWM, which counts the pages of mapped files that are in memory.
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


def peak_of(watched: Any, mapped: set[int], of_files: bool) -> int:
    """The largest sum of all allocations less all frees so far; `mapped` are the sizes of the files that are mapped."""
    held = largest = 0
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        if (abs(event.nbytes()) in mapped) == of_files:
            held += event.nbytes()
            largest = max(largest, held)
    return largest


def watched_export(run: Path, output: Path) -> dict[str, float]:
    """Export, and what it took."""
    mapped = {path.stat().st_size for path in run.glob("checkpoints/*/*_states.pt")}
    peak, anonymous = status("VmHWM"), Anonymous()
    anonymous.start()
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        written = export_weights(run, output)
    anonymous.ended.set()
    return {
        "bytes": written.stat().st_size,
        "allocated": peak_of(watched, mapped, of_files=False),
        "mapped": peak_of(watched, mapped, of_files=True),
        "anonymous": anonymous.growth,
        "peak": status("VmHWM") - peak,
        "seconds": time.perf_counter() - began,
    }


if __name__ == "__main__":
    print(json.dumps(watched_export(Path(sys.argv[1]), Path(sys.argv[2]))))
