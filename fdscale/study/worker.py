"""A worker: one process that imports torch and DeepSpeed once, then does one task after the other. No torch until then.

It is the only rank of a world of its own, so that its runs need nobody's consent.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path

from fdscale.cluster.ranks import Rank, export_rank, free_port
from fdscale.config.errors import UserError
from fdscale.imports import importing
from fdscale.study.tasks import Design, Task

THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Answer:
    """What became of a task: its values; None where it was stopped by a signal, or failed, which `problem` tells.

    `seconds` by the clock, of which its core worked `cpu_seconds`; what the process held afterwards.
    """

    values: dict[str, float] | None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    resident_bytes: int = 0
    problem: str | None = None


def serve(pipe: Connection, log: Path, design: Design, runs: Path) -> None:
    """Do what comes through the pipe until it is closed; everything that runs say goes to `log`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the study's to tell; it asks with SIGTERM
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    _become_a_rank(log)
    with importing():
        from fdscale.study.doing import done
    while True:
        try:
            task: Task = pipe.recv()
        except EOFError:
            return
        answer = _answer(task, partial(done, task, design, runs))
        with suppress(BrokenPipeError):  # the study has ended meanwhile; what comes next tells
            pipe.send(answer)


def _answer(task: Task, done: Callable[[], dict[str, float] | None]) -> Answer:
    print(f"--- {task.name}", flush=True)
    began, worked = time.perf_counter(), time.process_time()
    values, problem = None, None
    try:
        values = done()
    except UserError as error:
        problem = str(error)
    except Exception:
        problem = traceback.format_exc()
    gc.collect()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    return Answer(values, seconds, cpu_seconds, _resident_bytes(), problem)


def _become_a_rank(log: Path) -> None:
    """The only rank of a world, on one core, its output in a file; no launcher's variables are heeded."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    os.environ[THREADS] = "1"
    export_rank(Rank(0, 0, 1, 1, "127.0.0.1", free_port()))


def _stop_with_parent() -> None:
    """A study that is killed closes no run: ask this process to, as a signal would."""
    parent = parent_process()
    assert parent is not None, "runs in a worker"
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _resident_bytes() -> int:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
