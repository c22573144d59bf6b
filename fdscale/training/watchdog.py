"""When nothing goes on: every rank writes down where it is, the frozen ones are named, and the run starts again."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fdscale.cluster.orphans import parent_of, process_start
from fdscale.cluster.ranks import REQUEUE_EXIT_CODE
from fdscale.training.engine import Connection, gather_lists
from fdscale.training.run_directory import write_text
from fdscale.training.writer import this_process

logger = logging.getLogger(__name__)

PATIENCE = 4.0  # the rank that writes first waits for the one whose disk is slowest
BACKUP_SECONDS = 120.0  # after the limit: when not even the watchdog's thread can run
REARM_SECONDS = 5.0  # the backup is set anew at most so often
GRACE = (3.0, 30.0)  # seconds the others are given to write theirs, at least and at most


@dataclass(frozen=True)
class Member:
    """One rank's process: `kernel` is where its pid means it, `started` what a later process of its pid lacks."""

    rank: int
    host: str
    kernel: str
    pid: int
    started: int | None


def members_of(connection: Connection) -> list[Member]:
    """The processes of all ranks, in rank order; every rank calls it."""
    return gather_lists([Member(connection.rank.rank, **this_process())], connection)


def _children(pid: int) -> list[int]:
    """The processes of this machine whose parent is `pid`."""
    found = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    return [child for child in found if parent_of(child) == pid]


class Watchdog:
    """A thread of each rank that ends the process when nothing was marked for `limit` seconds.

    It writes the stacks of all threads to `folder`/rank_K.txt, waits a little for the other ranks' files, names in
    `frozen.json` those that wrote none (stopped, dead, or holding the interpreter), kills such of its own host, and
    leaves by the code that asks for another start. What the ranks do at a pace of their own (a save) is given
    `PATIENCE` times as long. `limit` 0: never. Start and stop it as a context.
    """

    def __init__(self, folder: Path, members: Sequence[Member], rank: int, limit: float) -> None:
        self.folder, self.members, self.me, self.limit = folder, tuple(members), members[rank], limit
        self._last, self._at, self._armed, self._patience = time.monotonic(), "the start", 0.0, 1.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self.limit:
            self.mark("the start")
            self._thread = threading.Thread(target=self._watch, name="hang watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def mark(self, phase: str, step: int | None = None, patience: float = 1.0) -> None:
        """Something went on; `phase` is what comes now, within `patience` limits. Costs about a microsecond."""
        self._last, self._at = time.monotonic(), phase if step is None else f"{phase}, step {step}"
        if self.limit and (self._last - self._armed > REARM_SECONDS or patience != self._patience):
            self._armed = self._last
            faulthandler.dump_traceback_later(self.limit * patience + BACKUP_SECONDS, exit=True)
        self._patience = patience

    def _watch(self) -> None:
        poll, before = min(self.limit / 20, 5.0), time.monotonic()
        while not self._ended.wait(poll):
            now = time.monotonic()
            if now - before > poll + self.limit / 4:  # a job that was suspended for a while stood still as a whole
                self._last += now - before
            before = now
            if now - self._last > self.limit * self._patience:
                try:
                    self._give_up()
                finally:  # whatever goes wrong in telling: nobody waits for ever
                    os._exit(REQUEUE_EXIT_CODE)

    def _give_up(self) -> None:
        at = self._at
        try:
            self._write_stacks(at)
        except OSError:  # a full disk: on the error stream they are better than nowhere
            faulthandler.dump_traceback(all_threads=True)
        frozen = self._without_stacks(min(max(self.limit / 10, GRACE[0]), GRACE[1]))
        self._tell(at, frozen)
        for child in _children(self.me.pid):  # data workers, who hold what the launcher reads from
            _send(child, signal.SIGKILL)
        for member in frozen:  # last, and then this process goes: the launcher shall see both at once
            self._kill(member)

    def _tell(self, at: str, frozen: Sequence[Member]) -> None:
        told = f"rank {self.me.rank}: nothing went on for {self.limit:g} s (at: {at}); stacks are in {self.folder}"
        if frozen:
            listed = ", ".join(f"rank {member.rank} ({member.host}, pid {member.pid})" for member in frozen)
            told += f"; frozen, as they wrote none: {listed}"
            if self.me == next(member for member in self.members if member not in frozen):
                with suppress(OSError):
                    write_text(self.folder / "frozen.json", json.dumps([vars(member) for member in frozen]) + "\n")
        logger.error("%s; the run is to be started again", told)

    def _write_stacks(self, at: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._stacks_of(self.me)
        beside = path.with_name(path.name + ".new")
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        with beside.open("w") as file:
            me = self.me
            file.write(f"rank {me.rank} on {me.host}, pid {me.pid}, {now}\nat: {at}\n")
            file.write(f"nothing was marked for {time.monotonic() - self._last:.1f} s\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        os.replace(beside, path)

    def _stacks_of(self, member: Member) -> Path:
        return self.folder / f"rank_{member.rank}.txt"

    def _without_stacks(self, grace: float) -> list[Member]:
        """The other ranks that have written no stacks when `grace` seconds are over."""
        others = [member for member in self.members if member != self.me]
        until = time.monotonic() + grace
        while any(not self._stacks_of(member).exists() for member in others) and time.monotonic() < until:
            time.sleep(0.1)
        return [member for member in others if not self._stacks_of(member).exists()]

    def _kill(self, member: Member) -> None:
        """End a frozen process of this machine, and its workers, if it is still the one that was there at the start."""
        if member.kernel == self.me.kernel and process_start(member.pid) == member.started is not None:
            children = _children(member.pid)
            for pid in (member.pid, *children):
                _send(pid, signal.SIGKILL)


def _send(pid: int, what: signal.Signals) -> None:
    try:
        os.kill(pid, what)
    except OSError as error:
        logger.warning("could not signal process %d: %s", pid, error)
