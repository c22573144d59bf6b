"""Work done by several processes, a few jobs ahead, that end with whoever started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from types import FrameType
from typing import TypeVar

from fdscale.config.errors import UserError

AHEAD = 4  # jobs under way or waiting, per process

Job = TypeVar("Job")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def import_once(*modules: str) -> None:
    """Have what is slow to import imported once for all processes that are started from now on."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", *modules])


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, as of a preempted job, ends what is inside as Ctrl-C does: other processes first. The main thread's."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def in_processes(work: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """`work(job)` of each job, in the order of the jobs, which are taken a few at a time.

    With one worker all happens in this process. What `work` raises is raised here, once the jobs under way are done;
    a process that dies is a UserError.
    """
    if workers <= 1:
        yield from map(work, jobs)
        return
    pool = _started_pool(workers)
    under_way: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            under_way.append(pool.submit(work, job))
            if len(under_way) >= AHEAD * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} processes was killed, most often for want of memory; "
            "run the same command again, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _started_pool(workers: int) -> ProcessPoolExecutor:
    """Forked off a server of their own, which has no threads that hold locks, as this process may have."""
    context = multiprocessing.get_context("forkserver")
    resource_tracker.ensure_running()  # first: it would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is this process's to tell
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return ProcessPoolExecutor(workers, context, initializer=_serve)


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # jobs under way are finished
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed closes no queue: its workers would wait for ever, or write on beside the next ones."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"
    parent.join()
    os._exit(1)
