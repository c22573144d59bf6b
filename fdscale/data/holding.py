"""Which sample each data worker is at, in memory that it shares with its rank: told when a worker dies."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

NOTHING = -1


class Holding:
    """A place for each of so many workers: its process, and the number of the sample that it decodes."""

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("fork")
        self._processes, self._samples = (context.RawArray("q", [NOTHING] * workers) for _ in range(2))

    def begin(self, worker: int) -> None:
        """In a worker: what `note` is told from here on stands in this worker's place."""
        global _place
        self._processes[worker] = os.getpid()
        _place = (self._samples, worker)

    def of_the_dead(self) -> list[int]:
        """The samples that workers held which have ended since; of a rank, whose children they are."""
        held = zip(self._processes, self._samples, strict=True)
        return [sample for process, sample in held if sample != NOTHING and _has_ended(process)]


def _has_ended(child: int) -> bool:
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
