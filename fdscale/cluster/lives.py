"""What one launch leaves in its run directory: its own log, and its exit codes beside the attempt that it started."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fdscale.training.lineage import attempt_folders
from fdscale.training.run_directory import LOGS, RunDirectory, write_text


def newest_attempt(run_dir: Path) -> Path | None:
    """The folder of the last attempt at a run, `RUN/attempts/0003`; None before the first one."""
    return next(reversed(attempt_folders(RunDirectory(run_dir).attempts)), None)


def record_codes(run_dir: Path, before: Path | None, codes: Mapping[str, int]) -> bool:
    """Keep a launch's exit codes, by rank or by the program that started the ranks elsewhere, beside its attempt.

    `before`: the newest attempt when it began. False when it has claimed none since, and there is nothing to keep.
    """
    attempt = newest_attempt(run_dir)
    if attempt is None or attempt == before:
        return False
    with suppress(OSError):  # a full disk may be what ended it
        write_text(attempt / "launcher.json", json.dumps({"codes": dict(codes)}) + "\n")
    return True


def log_apart(run_dir: Path, job: str, restarts: str) -> None:
    """Send what this process and its children print from here on to a file of this life's own.

    A SLURM job that is requeued keeps its id and its output file, so that all its lives would be told in one text. The
    output file gets one line for each life, which says where that life's log is.
    """
    path = run_dir / LOGS / f"{job}_{restarts}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        print(f"job {job}, restart {restarts}: {path.resolve()}", flush=True)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
