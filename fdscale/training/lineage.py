"""Which checkpoints of a run are believed: each attempt records the one commit that it goes on from. No torch in here.

A shared file system has no fence. Ranks on a node that was cut off may go on writing after the scheduler has given
their job to others, so no place and no date is trusted, only this line: the newest attempt's commits, then the one that
it continues, and what that attempt had committed before it. What an older attempt commits later is on no such line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdscale.training.manifest import read_manifest

RECORD = "attempt.json"
STEP = "step_"


@dataclass(frozen=True, order=True)
class Commit:
    """A committed checkpoint: `folder` holds its manifest."""

    step: int
    attempt: int
    folder: Path

    def __str__(self) -> str:
        return f"step {self.step} of attempt {self.attempt}"


@dataclass(frozen=True)
class Lineage:
    """Commits of a run, the newest first: those believed, and those of older attempts that nobody continued."""

    believed: tuple[Commit, ...]
    disowned: tuple[Commit, ...]


def step_folder(attempt: Path, step: int) -> Path:
    """Where an attempt puts the checkpoint of a step."""
    return attempt / f"{STEP}{step:08d}"


def attempt_folders(attempts: Path) -> list[Path]:
    """The folders of a run's attempts, oldest first."""
    found = (path for path in attempts.glob("[0-9]*") if path.name.isdigit() and path.is_dir())
    return sorted(found, key=lambda path: int(path.name))


def step_folders(attempt: Path) -> list[Path]:
    """The checkpoint folders of one attempt, committed or not, oldest first."""
    found = (path for path in attempt.glob(f"{STEP}*") if path.name.removeprefix(STEP).isdigit())
    return sorted(found, key=lambda path: int(path.name.removeprefix(STEP)))


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.rpartition("_")[2])


def read_record(attempt: Path) -> dict[str, Any]:
    """What an attempt says of itself; empty where it died before it said anything."""
    return read_object(attempt / RECORD)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, or half of one."""
    try:
        contents = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return contents if isinstance(contents, dict) else {}


def lineage_of(attempts: Path) -> Lineage:
    """The commits of a run as its attempts' records order them."""
    believed: list[Commit] = []
    disowned: list[Commit] = []
    newest_of_line, last_step = float("inf"), float("inf")
    for folder in reversed(attempt_folders(attempts)):
        number = int(folder.name)
        for commit in _commits(folder):
            on_line = number <= newest_of_line and commit.step <= last_step
            (believed if on_line else disowned).append(commit)
        if number > newest_of_line or "continues" not in (record := read_record(folder)):
            continue
        before = record["continues"] or {"attempt": -1, "step": -1}  # None: it began anew
        newest_of_line, last_step = before["attempt"], before["step"]
    return Lineage(tuple(sorted(believed, reverse=True)), tuple(sorted(disowned, reverse=True)))


def _commits(attempt: Path) -> Iterator[Commit]:
    for folder in step_folders(attempt):
        if read_manifest(folder) is not None:
            yield Commit(step_of(folder), int(attempt.name), folder)
