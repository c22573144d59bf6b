"""Which sample each data worker is at, in memory that it shares with its rank: told when a worker dies."""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

NOTHING = -1
PATIENCE = 2.0  # seconds: a process closes its connections before it has ended


class Holding:
    """A place for each of so many workers: its process, and the number of the sample that it decodes."""

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("fork")
        self._processes, self._samples = (context.RawArray("q", [NOTHING] * workers) for _ in range(2))

    def begin(self, worker: int) -> None:
        """In a worker: what `note` is told from here on stands in this worker's place."""
        global _place
        self._samples[worker] = NOTHING  # not what an earlier one held
        self._processes[worker] = os.getpid()
        _place = (self._samples, worker)

    def of_the_dead(self) -> list[int]:
        """The samples that workers held which have ended, or are about to; for their rank, whose children they are."""
        patience = time.monotonic() + PATIENCE
        while True:
            places = enumerate(self._processes)
            held = [self._samples[i] for i, process in places if self._samples[i] != NOTHING and _has_ended(process)]
            if held or time.monotonic() > patience:
                return held
            time.sleep(0.01)


def _has_ended(child: int) -> bool:
    if child == NOTHING:  # not begun yet
        return False
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # whoever started it has waited for it
        return True


_place: tuple[Any, int] | None = None  # of this process: there is one worker in each


def note(sample: int) -> None:
    """Say which sample is decoded now, or `NOTHING`; free where nobody asks."""
    if _place is not None:
        samples, worker = _place
        samples[worker] = sample
