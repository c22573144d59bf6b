"""What an attempt at a run has left under its number, read as it lies there. No torch in here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fdscale.training.attempts import ENDED
from fdscale.training.failures import Failure, read_failures
from fdscale.training.lineage import attempt_folders, read_record, step_folders, step_of
from fdscale.training.manifest import read_manifest
from fdscale.training.writer import ALIVE, is_alive

SILENT_SECONDS = 30.0  # three beats


@dataclass(frozen=True)
class Evidence:
    """One attempt: its records, the steps that it committed, and those whose save was never finished.

    `codes` are exit codes by rank, or by `srun`; `frozen` ranks wrote no `stacks` when nothing went on.
    """

    folder: Path
    record: dict[str, Any]
    ended: dict[str, Any]
    codes: dict[str, int]
    failures: list[Failure]
    stacks: dict[int, str]
    frozen: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    committed: list[int]
    unfinished: list[int]
    last_beat: float | None
    hosts: list[str] = field(default_factory=list)

    @property
    def number(self) -> int:
        return int(self.folder.name)

    def where(self, rank: int) -> str:
        """The rank with its host, where that is known."""
        return f"rank {rank}" + (f" on {self.hosts[rank]}" if rank < len(self.hosts) else "")

    def host(self, rank: str) -> str | None:
        """The host of a rank; None where that is not known, or for what started the ranks elsewhere."""
        return self.hosts[int(rank)] if rank.isdigit() and int(rank) < len(self.hosts) else None

    def is_running(self) -> bool:
        """Whether its writer lives; may wait half a minute for a sign of life from another machine."""
        if self.ended or "writer" not in self.record:
            return False
        try:
            return is_alive(self.folder, self.record["writer"], SILENT_SECONDS)
        except OSError:  # a folder that can only be read
            return False


def evidence_of(run: Path) -> list[Evidence]:
    """Of every attempt at a run, the oldest first."""
    return [_read(folder) for folder in attempt_folders(run / "attempts")]


def _read(folder: Path) -> Evidence:
    record, steps, alive = read_record(folder), step_folders(folder), folder / ALIVE
    stacks = {int(path.stem.removeprefix("rank_")): path.read_text() for path in (folder / "stacks").glob("rank_*.txt")}
    return Evidence(
        folder=folder,
        record=record,
        ended=_json(folder / ENDED, {}),
        codes=_json(folder / "launcher.json", {}).get("codes", {}),
        failures=read_failures(folder),
        stacks=dict(sorted(stacks.items())),
        frozen=_json(folder / "stacks" / "frozen.json", []),
        skipped=_json_lines(folder / "skipped.jsonl"),
        committed=[step_of(path) for path in steps if read_manifest(path) is not None],
        unfinished=[step_of(path) for path in steps if read_manifest(path) is None],
        last_beat=alive.stat().st_mtime if alive.exists() else None,
        hosts=[str(rank["host"]) for rank in record.get("ranks", [])],
    )


def _json(path: Path, absent: Any) -> Any:
    """What a JSON file holds; `absent` where there is none, or one that a full disk has cut short."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return absent


def _json_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def innermost_frames(stacks: str, count: int = 6) -> list[str]:
    """The innermost frames of the thread that trains, in a dump of faulthandler's, the innermost first."""
    threads = re.split(r"\n(?=(?:Current thread|Thread) 0x)", stacks)
    main = threads[-1]  # faulthandler tells the main thread last
    return [line.strip() for line in main.splitlines() if line.lstrip().startswith("File ")][:count]


def oom_kills() -> int:
    """How many processes this machine's kernel, or this container's limit, has killed for want of memory so far."""
    counted = [0]
    for path in ("/proc/vmstat", "/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        try:
            counted += [int(count) for count in re.findall(r"^oom_kill (\d+)$", Path(path).read_text(), re.MULTILINE)]
        except OSError:
            continue
    return max(counted)
