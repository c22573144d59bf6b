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
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from fdscale.cluster.ranks import REQUEUE_EXIT_CODE, USER_ERROR_EXIT_CODE

Process: TypeAlias = subprocess.Popen[bytes]

FORWARDED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 30.0
COMMIT_SECONDS = 600.0  # from a user's TERM or INT to the end: a checkpoint of billions of parameters takes minutes
LAST_SECONDS = 2.0  # from a last TERM to KILL: srun and deepspeed pass the former on to their ranks, not the latter
POLL_SECONDS = 0.05
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ended:
    """One exit code for all, and that of each process as Python tells it: -n for signal n."""

    code: int
    codes: tuple[int, ...]


def supervise(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    on_orphaned: signal.Signals = signal.SIGKILL,
    forward_as: Mapping[signal.Signals, signal.Signals] | None = None,
    grace: float = GRACE_SECONDS,
    commit: float = COMMIT_SECONDS,
) -> Ended:
    """Run `command` once per environment and return how all of them ended, with one exit code.

    USR1, TERM and INT reach every process, changed by `forward_as`. When one ends with anything but 0, the others
    are killed `grace` seconds later; all but 85 ("start me again") also sends them SIGTERM at once. `commit` seconds
    after the first TERM or INT all are killed, and at a second INT at once. Should this process be killed, each child
    gets `on_orphaned` (Linux). The code is the first one that is not 0, whatever becomes of the others (128 + n for
    signal n). Once a signal has come, later ones are ignored for good, so that they cannot change that code.
    """
    processes: list[Process] = []
    with _received_signals() as received:
        try:
            for environment in environments:
                processes.append(_start(command, environment, on_orphaned))
            code = _wait(processes, received, forward_as or {}, grace, commit)
            return Ended(code, tuple(process.returncode for process in processes))
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
    """Collect the forwarded signals in a list instead of dying of them; whoever got one dies of none afterwards."""
    received: list[signal.Signals] = []
    former = {
        signum: signal.signal(signum, lambda got, _: received.append(signal.Signals(got))) for signum in FORWARDED
    }
    try:
        yield received
    finally:
        for signum, handler in former.items():
            signal.signal(signum, signal.SIG_IGN if received else handler)


def _wait(
    processes: Sequence[Process],
    received: Sequence[signal.Signals],
    forward_as: Mapping[signal.Signals, signal.Signals],
    grace: float,
    commit: float,
) -> int:
    running, code, deadline, heeded = list(processes), 0, float("inf"), 0
    while running := _still_running(running):
        for signum in received[heeded:]:
            _send(running, forward_as.get(signum, signum))
            if signum not in received[:heeded]:
                log.info("%s: passed on, the ranks finish their step and commit", signum.name)
            heeded += 1
            if signum in (signal.SIGTERM, signal.SIGINT):  # SLURM and deepspeed may send TERM twice, only people INT
                at_once = received[:heeded].count(signal.SIGINT) > 1
                deadline = min(deadline, time.monotonic() + (0 if at_once else commit))
        if not code and (code := _first_code(processes)):
            deadline = min(deadline, time.monotonic() + grace)
            _tell_others(code, running)
        if time.monotonic() >= deadline:
            log.error("%d processes have not stopped in time: killing them", len(running))
            _kill(running)
        time.sleep(POLL_SECONDS)
    return code or _first_code(processes)


def _tell_others(code: int, running: Sequence[Process]) -> None:
    """Those of a rank that failed must be told to stop; one that asks to be started again has agreed with them."""
    if code != REQUEUE_EXIT_CODE:
        log.error("a rank ended with code %d: stopping the other %d", code, len(running))
        _send(running, signal.SIGTERM)


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


def _first_code(processes: Sequence[Process]) -> int:
    """The code of those that have ended, 0 when all ended well.

    Where several end at once, a mistake is told before the wish for a new start, and that before a failure: peers of a
    rank that has left fail in their collectives.
    """
    codes = {128 - code if code < 0 else code for code in (process.returncode or 0 for process in processes)}
    told = (code for code in (USER_ERROR_EXIT_CODE, REQUEUE_EXIT_CODE) if code in codes)
    return next(told, min(codes - {0}, default=0))
