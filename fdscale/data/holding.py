"""Which sample each data worker is at, in memory that it shares with its rank: told when a worker dies."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable
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

    def held_by(self, told: str, name: Callable[[int], str]) -> str:
        """The names of the samples that the dead processes held whose numbers stand in DataLoader's words."""
        dead = set(map(int, re.findall(r"\d+", told)))
        held = zip(self._processes, self._samples, strict=True)
        names = [name(sample) for process, sample in held if process in dead and sample != NOTHING]
        return ", ".join(names)


_place: tuple[Any, int] | None = None  # of this process: there is one worker in each


def note(sample: int) -> None:
    """Say which sample is decoded now, or `NOTHING`; free where nobody asks."""
    if _place is not None:
        samples, worker = _place
        samples[worker] = sample
