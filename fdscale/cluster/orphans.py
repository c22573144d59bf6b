"""Ranks whose launcher has died notice it, and stop as if they had been told to. No torch in here.

DeepSpeed's runner leaves its launcher and all ranks behind when it dies, its launcher and torchrun their ranks.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

from fdscale.cluster.ranks import StopSignals

NOTED = "FDSCALE_LAUNCHED_BY"  # where the launchers are kept from the first moment on: "PID:BIRTH PID:BIRTH"
LOOK_SECONDS = 1.0
COMMIT_SECONDS = 600.0  # an orphan that has not ended by then hangs, and nobody else would end it
NODE_LAUNCHER = "deepspeed.launcher.launch"

log = logging.getLogger(__name__)


def note_launchers(env: MutableMapping[str, str]) -> None:
    """Remember who launched this rank; to be called first: whoever looks later may already be init's child.

    Only ranks of deepspeed, torchrun and the like are noted: srun ends its own tasks, and a program that was started
    by hand may outlive its shell.
    """
    env.pop(NOTED, None)
    if "RANK" in env:
        births = {pid: process_start(pid) for pid in _launchers(os.getppid())}
        env[NOTED] = " ".join(f"{pid}:{born}" for pid, born in births.items() if born is not None)


def watch_launchers(stop: StopSignals, env: Mapping[str, str]) -> None:
    """From now until the signals are restored: request the stop once a noted launcher is gone."""
    noted = [launcher.split(":") for launcher in env.get(NOTED, "").split()]
    launchers = {int(pid): int(born) for pid, born in noted}
    if launchers:
        threading.Thread(target=_watch, args=(launchers, stop), name="launchers", daemon=True).start()


def _watch(launchers: Mapping[int, int], stop: StopSignals) -> None:
    while all(process_start(pid) == born for pid, born in launchers.items()):
        if stop.ended.wait(LOOK_SECONDS):
            return
    log.warning("the process that launched this rank has died: committing, then ending")
    stop.request()
    if not stop.ended.wait(COMMIT_SECONDS):
        os.kill(os.getpid(), signal.SIGKILL)


def process_start(pid: int) -> int | None:
    """When a process of this machine was started, in clock ticks since boot; None when it is gone or a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if state in "ZX" else int(fields[18])


def _launchers(parent: int) -> list[int]:
    """The parent, and for a rank of DeepSpeed's launcher who started that: a runner, or sshd for pdsh."""
    if NODE_LAUNCHER not in _command(parent):
        return [parent]
    above = parent_of(parent)
    if any(NODE_LAUNCHER in word for word in _command(above)[1:]):  # the shell that sshd runs its command in
        above = parent_of(above)
    return [parent, above] if _is_runner(_command(above)) else [parent]


def _is_runner(command: list[str]) -> bool:
    """Not just any shell, which may go while its background jobs stay."""
    names = [Path(word.split(":")[0]).name for word in command[:4]]  # `sshd: somebody@notty`
    return not {"deepspeed", "deepspeed.launcher.runner"}.isdisjoint(names) or names[:1] == ["sshd"]


def _command(pid: int) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    return []


def parent_of(pid: int) -> int:
    """The process that a process of this machine belongs to; 0 when it is gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return 0
