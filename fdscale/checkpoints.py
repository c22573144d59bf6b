"""The checkpoints of a run from outside: listed, verified and pruned by their manifests. No torch in here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fdscale.config.errors import UserError
from fdscale.training.lineage import STEP, attempt_folders, lineage_of, step_of
from fdscale.training.manifest import MANIFEST, damage, read_manifest
from fdscale.training.run_directory import RunDirectory

SET_ASIDE, CONVERTED = "damaged_", "universal_"  # how a run names what it skipped, and what it converted
SHOWN = 3  # problems of one checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """A folder of a run's checkpoints; without a manifest it was never committed.

    A `disowned` one was committed by an attempt after a newer one had gone on from an earlier step: it is never read.
    """

    folder: Path
    manifest: dict[str, Any] | None
    disowned: bool = False

    def __str__(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def is_converted(self) -> bool:
        return self.folder.name.startswith(CONVERTED)

    @property
    def step(self) -> int:
        return step_of(self.folder)

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def problems(self, hashes: bool) -> list[str]:
        """Why it is not whole, by its files' sizes alone or by reading every byte."""
        if self.manifest is None:
            return ["never committed: its save was interrupted, or is under way"]
        return damage(self.folder, self.manifest, sorted(self.manifest["files"]), hashes)


def checkpoint_table(run: Path) -> Table:
    """One row a folder, newest first; raises UserError for what is no run, or has no checkpoint."""
    table = Table(caption="complete: every file is there in its size; `fdscale checkpoint verify` reads them")
    for column in ("checkpoint", "date", "size", "ranks", "state"):
        table.add_column(column, justify="right" if column in ("size", "ranks") else "left", overflow="fold")
    for found in _found(run):
        committed = found.manifest is not None
        written = (found.folder / MANIFEST if committed else found.folder).stat().st_mtime
        ranks = found.manifest.get("world_size", "any") if found.manifest else "?"
        cells = (
            str(found),
            datetime.fromtimestamp(written).strftime("%Y-%m-%d %H:%M:%S"),
            _size(found.size),
            str(ranks),
            _state(found),
        )
        table.add_row(*map(Text, cells))
    return table


def _state(found: Checkpoint) -> str:
    if found.manifest is None:
        return "never committed"
    if problems := found.problems(hashes=False):
        return f"damaged: {len(problems)} of {len(found.manifest['files'])} files"
    return "too late: not continued" if found.disowned else "complete"


def verify_checkpoints(run: Path) -> Iterator[str]:
    """Read all of them, one line each when it is done; raises UserError at the end when one is damaged."""
    damaged, whole = [], []
    for found in _found(run):
        problems = found.problems(hashes=True)
        yield f"{found}: {_shortened(problems) or 'whole'}{', not continued' if found.disowned else ''}"
        if found.disowned or found.manifest is None or found.folder.name.startswith(SET_ASIDE):
            continue
        if problems:
            damaged.append(f"{found.folder}: {_shortened(problems)}")
        elif not found.is_converted:
            whole.append(str(found))
    if damaged:
        newest = f"the newest whole one is {whole[0]}" if whole else "no whole one is left"
        raise UserError("damaged: " + "\n  ".join([*damaged, newest]))


def prune_checkpoints(run: Path, keep: int, dry_run: bool) -> Iterator[str]:
    """Remove all but the newest `keep` whole ones, one line for each that goes; the kept ones are read in full.

    What is newer than the newest whole one stays when it was never committed: a save may be under way. Raises
    UserError, and removes nothing, when no checkpoint is whole.
    """
    everything = _found(run)
    kept: list[Checkpoint] = []
    for found in everything:
        candidate = found.folder.name.startswith(STEP) and not found.disowned
        if candidate and len(kept) < keep and not found.problems(hashes=True):
            kept.append(found)
    if not kept:
        raise UserError(f"{run}: no checkpoint is whole: nothing was removed; `fdscale checkpoint verify` says more")
    for found in everything:
        under_way = found.manifest is None and found.step >= kept[0].step
        if found in kept or under_way or _converted_from(found) in {one.folder for one in kept}:
            continue
        yield f"{'would remove' if dry_run else 'removed'} {found.folder} ({_size(found.size)})"
        if not dry_run:
            _remove(found.folder)
    yield f"kept {', '.join(map(str, kept))}"


def _found(run: Path) -> list[Checkpoint]:
    """Every folder of checkpoints, newest first."""
    attempts = RunDirectory(run).attempts
    if not attempts.is_dir():
        raise UserError(f"{run}: not a run directory: it has no folder {attempts.name}")
    disowned = {commit.folder for commit in lineage_of(attempts).disowned}
    paths = [path for attempt in attempt_folders(attempts) for path in attempt.glob("*step_*")]
    paths = [path for path in paths if path.is_dir() and path.name.rpartition("_")[2].isdigit()]
    if not paths:
        raise UserError(f"{run}: it has no checkpoint yet")
    found = [Checkpoint(path, read_manifest(path), path in disowned) for path in paths]
    return sorted(found, key=lambda one: (one.step, not one.is_converted, one.folder.parent.name), reverse=True)


def _converted_from(found: Checkpoint) -> Path | None:
    """The checkpoint that this is the converted form of, for another number of ranks."""
    name = found.folder.name
    return found.folder.with_name(name.removeprefix(CONVERTED)) if found.is_converted and found.manifest else None


def _remove(folder: Path) -> None:
    try:
        (folder / MANIFEST).unlink(missing_ok=True)  # first: half removed it is none
        shutil.rmtree(folder)
    except OSError as error:
        raise UserError(f"{folder} could not be removed: {error}; remove it, then prune again") from error


def _shortened(problems: list[str]) -> str:
    more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"
