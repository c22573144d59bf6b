"""What a run's folder tells its metrics: how earlier attempts ended, and its newest commit. No torch in here."""

from __future__ import annotations

from pathlib import Path

from fdscale.cluster.ranks import REQUEUE_EXIT_CODE
from fdscale.config.errors import StartAgain
from fdscale.training.attempts import CODES, ENDED, attempts_without_progress
from fdscale.training.failures import read_failures
from fdscale.training.lineage import attempt_folders, lineage_of, read_object, read_record
from fdscale.training.manifest import MANIFEST, read_manifest
from fdscale.training.metrics import ENDS


def of_attempt(folder: Path) -> dict[str, float]:
    """Values of METRICS about an attempt that has just begun."""
    attempts, record = attempt_folders(folder.parent), read_record(folder)
    before = [one for one in attempts if int(one.name) < int(folder.name)]
    ends = {f"previous_end/{reason}": 0.0 for reason in ENDS}
    if before:
        ends[f"previous_end/{end_of(before[-1])}"] = 1.0
    starts = [started for one in attempts if (started := read_record(one).get("started")) is not None]
    return {
        "attempt": int(folder.name),
        "attempt_start_timestamp_seconds": record["started"],
        "checkpoint_timestamp_seconds": record["started"],  # until there is one
        "first_start_timestamp_seconds": min(starts),
        "attempts_without_commit": 1 + _fruitless(before, record.get("submission")),
        **ends,
    }


def _fruitless(before: list[Path], submission: str | None) -> int:
    return attempts_without_progress(before, submission) if before else 0


def end_of(attempt: Path) -> str:
    """How an attempt that is over ended, one of ENDS; `killed` where it left no word."""
    ended = read_object(attempt / ENDED)
    if ended.get("code") == 0:
        return "complete"
    if (attempt / "stacks").exists():
        return "hang"
    if ended.get("code") in (REQUEUE_EXIT_CODE, CODES[KeyboardInterrupt]):
        return "canary" if ended["reason"].startswith(StartAgain.__name__) else "stopped"
    failures = read_failures(attempt)
    if any(failure.is_mistake for failure in failures):
        return "mistake"
    return "error" if ended or failures else "killed"


def newest_commit(attempts: Path) -> dict[str, float]:
    """Values of METRICS about the newest commit; none before the first one."""
    believed = lineage_of(attempts).believed
    if not believed or (manifest := read_manifest(believed[0].folder)) is None:
        return {}
    return {
        "checkpoint_step": believed[0].step,
        "checkpoint_timestamp_seconds": (believed[0].folder / MANIFEST).stat().st_mtime,
        "checkpoint_bytes": sum(file["size"] for file in manifest["files"].values()),
    }
