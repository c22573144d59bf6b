"""Attempts at a run: each claims the next number, writes under it alone, and finds out when a newer one has begun.

`RUN/attempts/0003` is put in place by one rename, which one process alone can win, on any file system. No torch here.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fdscale.cluster.ranks import REQUEUE_EXIT_CODE
from fdscale.config.errors import StartAgain, UserError
from fdscale.training.lineage import RECORD, Commit, attempt_folders, read_record, step_folder, step_folders, step_of
from fdscale.training.run_directory import write_text
from fdscale.training.writer import ALIVE, Heartbeat, clock_of, is_alive, this_process

ENDED = "ended.json"
CODES = {UserError: 2, StartAgain: REQUEUE_EXIT_CODE, KeyboardInterrupt: 130}  # as the command line ends with them

_current: list[Path] = []


class Attempt:
    """One start of a run: its number, and its folder, which nobody else writes to.

    The process that claimed it has its `heartbeat`. As a context manager it records an exception as its end.
    """

    def __init__(self, folder: Path, heartbeat: Heartbeat | None = None) -> None:
        self.folder, self.number = folder, int(folder.name)
        self._heartbeat = heartbeat

    def step_folder(self, step: int) -> Path:
        """Where this attempt puts the checkpoint of a step."""
        return step_folder(self.folder, step)

    def refuse_if_superseded(self) -> None:
        """Raise UserError when a newer attempt was claimed: nothing may be written, or removed, any more."""
        newest = max(int(folder.name) for folder in (self.folder, *attempt_folders(self.folder.parent)))
        if newest > self.number:
            raise UserError(
                f"{self.folder.parent.parent}: attempt {newest} has begun meanwhile, this one ({self.number}) writes "
                "nothing more: what it did since its last checkpoint is done again there"
            )

    def adopt(self, commit: Commit) -> Commit:
        """Take the commit that this attempt goes on from into its own folder, where no other attempt removes it."""
        if commit.attempt == self.number:
            return commit
        try:  # with it goes its conversion for another number of ranks
            for path in sorted(commit.folder.parent.glob(f"*{commit.folder.name}"), reverse=True):
                os.rename(path, self.folder / path.name)
        except OSError as error:
            raise UserError(
                f"{commit.folder} cannot be moved to {self.folder}: {error}; make the folder writable, then start again"
            ) from error
        return Commit(commit.step, self.number, self.step_folder(commit.step))

    def record_start(self, commit: Commit | None) -> None:
        """Write down, once, which commit this attempt goes on from (None: from none)."""
        if "continues" not in read_record(self.folder):
            before = None if commit is None else {"attempt": commit.attempt, "step": commit.step}
            self._add({"continues": before})

    def record_ranks(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Write down where each rank runs: host, pid and the pid's start, in rank order."""
        self._add({"ranks": [{"rank": rank, **where} for rank, where in enumerate(ranks)]})

    def record_startup(self, seconds: Mapping[str, float]) -> None:
        """Write down how long each phase lasted between the command and the end of the first step."""
        with suppress(OSError):  # what is only told must not end a run
            self._add({"startup": {phase: round(lasted, 3) for phase, lasted in seconds.items()}})

    def end(self, code: int, reason: str) -> None:
        """Write down, once, with which exit code this attempt ends, and why; only who claimed it does so."""
        if self._heartbeat is None:
            return
        self._heartbeat.stop()
        self._heartbeat = None
        with suppress(OSError):  # on a disk that is full the process's own last words must do
            write_text(self.folder / ENDED, json.dumps({"code": code, "reason": reason, "time": time.time()}) + "\n")

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            code = next((code for known, code in CODES.items() if issubclass(kind, known)), 1)
            self.end(code, f"{kind.__name__}: {error}")

    def _add(self, facts: dict[str, Any]) -> None:
        write_text(self.folder / RECORD, json.dumps(read_record(self.folder) | facts, indent=1) + "\n")


def claim(attempts: Path, world_size: int, most_without_progress: int, env: Mapping[str, str]) -> Attempt:
    """The next attempt at a run, claimed by this process, which writes it from here on.

    Raises UserError when another process is at it, when one submission (a SLURM job, or what FDSCALE_SUBMISSION
    names) has made `most_without_progress` attempts without a new checkpoint, and when the folder cannot be written.
    """
    try:
        return _claim(attempts, world_size, most_without_progress, env)
    except OSError as error:
        raise UserError(
            f"run_dir: {attempts.parent} cannot be written: {error}; name another with run_dir=…"
        ) from error


def _claim(attempts: Path, world_size: int, most_without_progress: int, env: Mapping[str, str]) -> Attempt:
    attempts.mkdir(parents=True, exist_ok=True)
    folders = attempt_folders(attempts)
    submission = env.get("SLURM_JOB_ID") or env.get("FDSCALE_SUBMISSION")
    if folders:
        _refuse_second_writer(folders[-1], submission, env.get("SLURM_RESTART_COUNT"))
        _refuse_crash_loop(folders, submission, most_without_progress)
    number = int(folders[-1].name) + 1 if folders else 1
    record = {
        "number": number,
        "started": clock_of(attempts),
        "world_size": world_size,
        "submission": submission,
        "slurm_restarts": env.get("SLURM_RESTART_COUNT"),
        "writer": this_process(),
    }
    folder = attempts / f"{number:04d}"
    _put_in_place(folder, record)
    return Attempt(folder, Heartbeat(folder))


def _put_in_place(folder: Path, record: dict[str, Any]) -> None:
    """Make an attempt's folder with its record and heartbeat in it, at once: a rename onto one that is there fails."""
    with tempfile.TemporaryDirectory(prefix=".claim_", dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        beside = Path(scratch, "attempt")
        beside.mkdir()
        (beside / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        (beside / ALIVE).touch()
        try:
            os.rename(beside, folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            told = f"{folder.parent.parent}: another start has just claimed attempt {record['number']}"
            raise UserError(told) from None


def note_current(attempt: Attempt) -> None:
    """Remember this process's attempt, so that its end can be told where it is known."""
    _current[:] = [attempt.folder]


def current_folder() -> Path | None:
    """The folder of the attempt that this process last belonged to."""
    return _current[0] if _current else None


def _refuse_second_writer(newest: Path, submission: str | None, restarts: str | None) -> None:
    """One run directory, one writer; a job that SLURM started again takes over, whatever its former life still does."""
    record = read_record(newest)
    next_life = submission == record.get("submission") and restarts != record.get("slurm_restarts")
    if (newest / ENDED).exists() or next_life or "writer" not in record:
        return
    writer = record["writer"]
    if is_alive(newest, writer):
        raise UserError(
            f"run_dir: {newest.parent.parent} is being written by attempt {newest.name} (process {writer['pid']} on "
            f"{writer['host']}): stop that one first, or name another folder with run_dir=…"
        )


def _refuse_crash_loop(folders: Sequence[Path], submission: str | None, most: int) -> None:
    made = attempts_without_progress(folders, submission)
    if submission is not None and made >= most:
        raise UserError(
            f"{folders[-1].parent.parent}: {made} attempts of {submission} in a row made no new checkpoint, "
            f"guards.attempts allows {most}: `fdscale doctor {folders[-1].parent.parent}` says what ended them; mend "
            "that and submit anew, which begins to count anew, or set guards.attempts higher"
        )


def attempts_without_progress(folders: Sequence[Path], submission: str | None) -> int:
    """How many of the latest attempts of a submission have gone on from the same commit without adding one."""
    before = read_record(folders[-1]).get("continues")
    start = before["step"] if before else -1
    if any(step_of(path) > start and (path / "manifest.json").exists() for path in step_folders(folders[-1])):
        return 0
    made = 0
    for record in map(read_record, reversed(folders)):
        continues = record.get("continues", before)  # absent: it died before it had looked
        if record.get("submission") != submission or (continues["step"] if continues else -1) != start:
            break
        made += 1
    return made
