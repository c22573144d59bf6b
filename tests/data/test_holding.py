from __future__ import annotations

import os
import signal
from collections.abc import Callable

from fdscale.data.holding import Holding, note


def child(work: Callable[[], None]) -> int:
    """A process that does some work, says that it has, and waits to be killed."""
    ready, told = os.pipe()
    process = os.fork()
    if process == 0:
        work()
        os.write(told, b"!")
        signal.pause()
    os.read(ready, 1)
    os.close(ready)
    os.close(told)
    return process


def test_the_dead_are_told_with_what_they_held() -> None:
    holding = Holding(4)  # the last one has not begun

    def worker(place: int, *samples: int) -> int:
        return child(lambda: (holding.begin(place), *map(note, samples))[0])

    alive, dead, idle = worker(0, 7), worker(1, 7, 8), worker(2, 9, -1)
    for process in (dead, idle):
        os.kill(process, signal.SIGKILL)
    os.waitpid(idle, 0)  # one that somebody has waited for is as dead
    assert holding.of_the_dead() == [8]
    os.kill(alive, signal.SIGKILL)
    os.waitpid(alive, 0)
    os.waitpid(dead, 0)


def test_a_new_worker_does_not_hold_what_an_earlier_one_held() -> None:
    holding = Holding(1)
    for samples in ((5,), ()):
        process = child(lambda samples=samples: (holding.begin(0), *map(note, samples))[0])
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert holding.of_the_dead() == []


def test_noting_is_free_where_nobody_asks() -> None:
    note(3)
