"""What one launch leaves in its run directory: its own log, and its exit codes beside the attempt that it started."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fdscale.training.failures import read_failures
from fdscale.training.lineage import attempt_folders
from fdscale.training.run_directory import LOGS, RunDirectory, write_text


def newest_attempt(run_dir: Path | None) -> Path | None:
    """The folder of the last attempt at a run, `RUN/attempts/0003`; None before the first one, and for no run."""
    return None if run_dir is None else next(reversed(attempt_folders(RunDirectory(run_dir).attempts)), None)


def claimed_since(run_dir: Path | None, before: Path | None) -> Path | None:
    """The attempt that a launch has claimed, which began when `before` was the newest; None when it claimed none.

    The first one after that: should this node be cut off, later ones are other lives'.
    """
    folders = [] if run_dir is None else attempt_folders(RunDirectory(run_dir).attempts)
    return next((folder for folder in folders if before is None or int(folder.name) > int(before.name)), None)


def record_codes(attempt: Path | None, codes: Mapping[str, int]) -> None:
    """Keep a launch's exit codes, by rank or by the program that started the ranks elsewhere, beside its attempt."""
    if attempt is not None:
        with suppress(OSError):  # a full disk may be what ended it
            write_text(attempt / "launcher.json", json.dumps({"codes": dict(codes)}) + "\n")


def is_mistake(attempt: Path) -> bool:
    """Whether a rank of an attempt left a user's mistake: srun tells the highest code alone, its peers' 137."""
    return any(failure.is_mistake for failure in read_failures(attempt))


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
