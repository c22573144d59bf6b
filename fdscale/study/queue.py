"""The queue of the study: each task is given to the next free worker once what it needs is there. No torch."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from fdscale.config.errors import UserError
from fdscale.study.tasks import Design, Task
from fdscale.study.worker import Answer, serve

END_SECONDS = 60.0  # a step and a commit


@dataclass
class Worker:
    """A process at the other end of a pipe, and what it is at."""

    process: SpawnProcess
    pipe: Connection
    task: Task | None = None


def work_off(
    tasks: Sequence[Task],
    done: set[str],
    workers: int,
    logs: Path,
    equipment: tuple[Design, Path],
    finished: Callable[[Task, Answer], None],
) -> None:
    """Have every task done that is not `done` yet; `finished` hears of each. Raises UserError where one fails.

    `equipment` is what workers know of the study. An exception, Ctrl-C among them, lets runs under way end their step
    and commit, where they are gone on from.
    """
    waiting = [task for task in tasks if task.name not in done]
    ready = set(done)
    with _started(min(workers, len(waiting)), logs, equipment) as team:
        while waiting or any(worker.task for worker in team):
            _hand_out(waiting, ready, team)
            for worker in _answered(team):
                task, answer = _taken_back(worker)
                if answer.values is None:
                    raise UserError(
                        f"{task.name}: {answer.problem or 'stopped by a signal'}\nwhat it said is in {logs}"
                    )
                ready.add(task.name)
                finished(task, answer)


def _hand_out(waiting: list[Task], ready: set[str], team: Sequence[Worker]) -> None:
    """The first tasks whose needs are met, to those who have nothing to do."""
    for worker in team:
        task = next((task for task in waiting if ready.issuperset(task.needs)), None)
        if worker.task is None and task is not None:
            waiting.remove(task)
            worker.task = task
            with suppress(BrokenPipeError, ConnectionResetError):  # it is dead, which is told where it is answered
                worker.pipe.send(task)


def _answered(team: Sequence[Worker]) -> list[Worker]:
    """Those who have an answer, waited for."""
    busy = [worker for worker in team if worker.task is not None]
    assert busy, "a task needs one that does not exist"
    spoken = set(wait([worker.pipe for worker in busy]))
    return [worker for worker in busy if worker.pipe in spoken]


def _taken_back(worker: Worker) -> tuple[Task, Answer]:
    task, worker.task = worker.task, None
    assert task is not None
    try:
        return task, worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join(END_SECONDS)
        problem = f"its process ended with code {worker.process.exitcode}; run the same command again"
        return task, Answer(None, problem=problem)


@contextmanager
def _started(workers: int, logs: Path, equipment: tuple[Design, Path]) -> Iterator[list[Worker]]:
    """So many workers; at the end they are asked to stop, and those that do not are killed."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a worker's libraries are loaded
    team = [_start(logs / f"worker_{number}.log", equipment) for number in range(workers)]
    os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
    try:
        yield team
    finally:
        for worker in team:
            worker.pipe.close()
            if worker.task is not None:
                worker.process.terminate()
        for worker in team:
            worker.process.join(END_SECONDS)
            worker.process.kill()


def _start(log: Path, equipment: tuple[Design, Path]) -> Worker:
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads and their locks
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, log, *equipment), name=log.stem, daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours)
