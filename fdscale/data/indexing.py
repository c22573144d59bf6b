"""Many shards scanned by many processes, with a progress bar on a terminal; no torch."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fdscale.config.errors import UserError
from fdscale.data.scan import Scanned, scan_shard
from fdscale.terminal import terminal

START_METHOD = "fork"  # at once, and without importing the caller's main module again, as spawn would
SMALL = 64 * 2**20  # bytes: fewer than these one process reads before others would have started
_INHERITED: list[Callable[[Any], Any]] = []  # in a worker: what it does, which need not be copied to it

Item = TypeVar("Item")
Result = TypeVar("Result")


def scan_shards(paths: Sequence[Path], classes: tuple[str, ...] | None, workers: int | None) -> list[Scanned]:
    """`scan.scan_shard` of each path, in their order; the first that is refused ends it."""
    sizes = [path.stat().st_size for path in paths]
    if workers is None:
        workers = 1 if sum(sizes) < SMALL else cpus()
    jobs = [(path, number, classes) for number, path in enumerate(paths)]
    scanned = dict(in_processes(_scan, jobs, workers, "indexing", sizes))
    return [scanned[number] for number in range(len(paths))]


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, what: str, sizes: Sequence[int]
) -> Iterator[tuple[int, Result]]:
    """(number, `work(item)`) of each item as it gets done, by up to `workers` processes under a progress bar.

    The bar counts the items' `sizes`. With one worker it happens here, in order. What `work` raises ends it all.
    """
    with _progress() as progress:
        task = progress.add_task(what, total=sum(sizes))
        for number, found in _results(work, items, min(workers, len(items))):
            progress.advance(task, sizes[number])
            yield number, found


def _results(work: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[tuple[int, Result]]:
    if workers <= 1:
        yield from ((number, work(item)) for number, item in enumerate(items))
        return
    context = multiprocessing.get_context(START_METHOD)
    pool = ProcessPoolExecutor(workers, context, initializer=_INHERITED.append, initargs=(work,))
    try:
        numbers: dict[Future[Result], int] = {pool.submit(_do, item): number for number, item in enumerate(items)}
        for future in as_completed(numbers):
            yield numbers.pop(future), future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} processes that read shards was killed; the usual cause is too little memory: "
            "start again with fewer (--workers)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _do(item: Any) -> Any:
    return _INHERITED[-1](item)


def _scan(job: tuple[Path, int, tuple[str, ...] | None]) -> Scanned:
    return scan_shard(*job)


def _progress() -> Progress:
    console = terminal()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
