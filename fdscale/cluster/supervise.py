"""Child processes that live and die together: started, signalled, waited for. No torch in here."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeAlias

from fdscale.cluster.ranks import REQUEUE_EXIT_CODE

Process: TypeAlias = subprocess.Popen[bytes]

FORWARDED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 30.0
COMMIT_SECONDS = 600.0  # from a user's TERM or INT to the end: a checkpoint of billions of parameters takes minutes
LAST_SECONDS = 2.0  # from a last TERM to KILL: srun and deepspeed pass the former on to their ranks, not the latter
POLL_SECONDS = 0.05
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

log = logging.getLogger(__name__)


def supervise(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    on_orphaned: signal.Signals = signal.SIGKILL,
    forward_as: Mapping[signal.Signals, signal.Signals] | None = None,
    grace: float = GRACE_SECONDS,
    commit: float = COMMIT_SECONDS,
) -> int:
    """Run `command` once per environment and return one exit code for all of them.

    USR1, TERM and INT reach every process, changed by `forward_as`. When one fails, the others get SIGTERM
    and are killed `grace` seconds later; `commit` seconds after the first TERM or INT all are, and at a second
    INT at once. Should this process be killed, each child gets `on_orphaned` (Linux). The code is that of the
    first to fail (128 + n for signal n), else 85 when one asks for it, else 0.
    """
    processes: list[Process] = []
    with _received_signals() as received:
        try:
            for environment in environments:
                processes.append(_start(command, environment, on_orphaned))
            return _wait(processes, received, forward_as or {}, grace, commit)
        finally:
            _kill([process for process in processes if process.returncode is None])


def _start(command: Sequence[str], env: Mapping[str, str], on_orphaned: signal.Signals) -> Process:
    """Start one process in a session of its own, so that a terminal's Ctrl-C reaches it once: through us."""
    bind = _bind_to_this_process(on_orphaned)
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=bind)


def _bind_to_this_process(on_orphaned: signal.Signals) -> Callable[[], None] | None:
    """What a new child calls before it becomes the command, so that it does not outlive us."""
    if sys.platform != "linux":
        return None
    return partial(_die_with, os.getpid(), ctypes.CDLL(None), int(on_orphaned))


def _die_with(parent: int, libc: ctypes.CDLL, on_orphaned: int) -> None:
    libc.prctl(PR_SET_PDEATHSIG, on_orphaned)
    if os.getppid() != parent:  # it died before the call: no signal will come
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _received_signals() -> Iterator[list[signal.Signals]]:
    """Collect the forwarded signals in a list instead of dying of them."""
    received: list[signal.Signals] = []
    former = {
        signum: signal.signal(signum, lambda got, _: received.append(signal.Signals(got))) for signum in FORWARDED
    }
    try:
        yield received
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


def _wait(
    processes: Sequence[Process],
    received: list[signal.Signals],
    forward_as: Mapping[signal.Signals, signal.Signals],
    grace: float,
    commit: float,
) -> int:
    running, failure, deadline, interrupts = list(processes), 0, float("inf"), 0
    while running := _still_running(running):
        while received:
            signum = received.pop(0)
            _send(running, forward_as.get(signum, signum))
            interrupts += signum == signal.SIGINT
            if signum in (signal.SIGTERM, signal.SIGINT):  # SLURM and deepspeed may send TERM twice, only people INT
                deadline = min(deadline, time.monotonic() + (commit if interrupts < 2 else 0))
        if not failure and (failure := _failed(processes)):
            log.error("a rank ended with code %d: stopping the other %d", failure, len(running))
            deadline = min(deadline, time.monotonic() + grace)
            _send(running, signal.SIGTERM)
        if time.monotonic() >= deadline:
            log.error("%d processes have not stopped in time: killing them", len(running))
            _kill(running)
        time.sleep(POLL_SECONDS)
    return failure or _failed(processes) or _requeue(processes)


def _still_running(processes: Sequence[Process]) -> list[Process]:
    """Those that have not ended; what the others left behind (data loader workers) is killed at once."""
    ended = [process for process in processes if process.poll() is not None]
    for process in ended:
        _kill_session(process)
    return [process for process in processes if process not in ended]


def _send(processes: Sequence[Process], signum: signal.Signals) -> None:
    for process in processes:
        process.send_signal(signum)


def _kill(processes: Sequence[Process]) -> None:
    """End them and whatever they started, after one last TERM."""
    _send(processes, signal.SIGTERM)
    deadline = time.monotonic() + LAST_SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for process in processes:
        _kill_session(process)
        process.wait()


def _kill_session(process: Process) -> None:
    with suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)


def _failed(processes: Sequence[Process]) -> int:
    """The code of a process that ended neither well nor with a wish to be requeued; 0 when there is none."""
    codes = (process.returncode or 0 for process in processes)
    return next((128 - code if code < 0 else code for code in codes if code not in (0, REQUEUE_EXIT_CODE)), 0)


def _requeue(processes: Sequence[Process]) -> int:
    return REQUEUE_EXIT_CODE if any(p.returncode == REQUEUE_EXIT_CODE for p in processes) else 0
