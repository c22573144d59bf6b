"""The shards of coming steps, brought into the node's cache by a process beside each rank; no torch.

It is forked like the loader's workers, before them. Whatever it cannot fetch is left to the worker that needs it, which
tries again and tells.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, Generic, TypeVar

from fdscale.config.errors import UserError
from fdscale.data.remote.cache import RENEWED_SECONDS

Shard = TypeVar("Shard", bound=Hashable)
PARALLEL = 4  # fetches at a time and rank
LOOK_SECONDS = 0.1  # between looks at the rank's step
FULL_SECONDS = 1.0  # before it asks again whether there is room
FAILED_SECONDS = 60.0  # before it tries a shard again


class FetchAhead(Generic[Shard]):
    """While it is entered, `bring` is called on the shards of the next `ahead` steps, nearest first, a few at a time.

    `shards_of` gives those that a step's rows on this rank need; `bring` fetches one, at once where it is there, and
    says whether there was room. Both run in a process of their own. The steps end before `last`.
    """

    def __init__(
        self,
        shards_of: Callable[[int], Iterable[Shard]],
        bring: Callable[[Shard], bool],
        first: int,
        last: int,
        ahead: int,
    ) -> None:
        context = multiprocessing.get_context("fork")
        self._step = context.RawValue("q", first)
        walk = _Walk(shards_of, first, last, ahead)
        arguments = (walk, bring, self._step, os.getpid())
        self._process = context.Process(target=_run, args=arguments, name="fetching ahead", daemon=True)

    def note(self, step: int) -> None:
        """Say which step the rank has come to."""
        self._step.value = step

    def close(self) -> None:
        """End the process, whatever it does, and the programs that fetch for it: nothing is left."""
        atexit.unregister(self.close)
        pid = self._process.pid
        if pid is not None and self._process.is_alive():
            with suppress(ProcessLookupError):  # no group yet: it has not begun
                os.killpg(pid, signal.SIGKILL)
            self._process.kill()
        self._process.join()

    def __enter__(self) -> FetchAhead[Shard]:
        self._process.start()
        # Registered after multiprocessing's exit handler, hence run before that one waits for the process.
        atexit.register(self.close)
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Walk(Generic[Shard]):
    """The shards of the steps ahead, each step asked for once."""

    def __init__(self, shards_of: Callable[[int], Iterable[Shard]], first: int, last: int, ahead: int) -> None:
        self._shards_of = shards_of
        self._next, self._last, self._ahead = first, last, ahead
        self._coming: deque[tuple[int, list[Shard]]] = deque()
        self._at, self._wanted = -1, list[Shard]()

    def from_step(self, step: int) -> list[Shard]:
        """The shards of steps `step` .. `step + ahead`, in the order of their first use."""
        if step == self._at:
            return self._wanted
        self._at = step
        while self._coming and self._coming[0][0] < step:
            self._coming.popleft()
        self._next = max(self._next, step)
        while self._next < min(step + self._ahead, self._last):
            self._coming.append((self._next, list(self._shards_of(self._next))))
            self._next += 1
        self._wanted = list(dict.fromkeys(shard for _, shards in self._coming for shard in shards))
        return self._wanted


class _Fetches(Generic[Shard]):
    """The fetches under way, and when each shard may be asked for again."""

    def __init__(self, bring: Callable[[Shard], bool]) -> None:
        self._bring = bring
        self._pool = ThreadPoolExecutor(PARALLEL)
        self._under_way: dict[Future[bool], Shard] = {}
        self._not_before: dict[Shard, float] = {}
        self._room_at = 0.0

    def keep_up(self, wanted: list[Shard]) -> None:
        """Begin fetches of the wanted shards, as many as there may be, and wait a moment for one to end."""
        now, under_way = time.monotonic(), set(self._under_way.values())
        self._not_before = {shard: self._not_before[shard] for shard in wanted if shard in self._not_before}
        due = [shard for shard in wanted if shard not in under_way and self._not_before.get(shard, 0.0) <= now]
        for shard in due[: PARALLEL - len(under_way)] if now >= self._room_at else ():
            self._under_way[self._pool.submit(self._bring, shard)] = shard
        if not self._under_way:
            time.sleep(LOOK_SECONDS)
        for ended in wait(self._under_way, LOOK_SECONDS, FIRST_COMPLETED).done:
            self._settle(self._under_way.pop(ended), ended)

    def _settle(self, shard: Shard, ended: Future[bool]) -> None:
        now = time.monotonic()
        try:
            there = ended.result()
        except UserError:  # told by the worker that needs it
            self._not_before[shard] = now + FAILED_SECONDS
            return
        if there:  # asked for again in time: it stays in use
            self._not_before[shard] = now + RENEWED_SECONDS
        else:
            self._room_at = now + FULL_SECONDS


def _run(walk: _Walk[Any], bring: Callable[[Any], bool], step: Any, rank: int) -> None:
    """In the process: until the rank is gone. Stop signals are the rank's affair, which first finishes its step.

    It leads a process group, which ends with it: a program that fetches, and says nothing, would not notice.
    """
    os.setpgid(0, 0)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, lambda *_: None)  # not ignored: what it starts would ignore them, too
    fetches = _Fetches(bring)
    while os.getppid() == rank:
        fetches.keep_up(walk.from_step(step.value))
    os.killpg(os.getpgrp(), signal.SIGKILL)
