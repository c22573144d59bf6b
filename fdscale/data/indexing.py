"""Many shards scanned by several processes; no torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from fdscale.data.processes import in_processes, usable_cores
from fdscale.data.progress import progress
from fdscale.data.scan import FIRST_DOT, Scanned, printable, scan_shard

SMALL = 64 * 2**20  # bytes: fewer than these one process reads before others would have started
TOLD = 5  # members that the terminal names

LOG = logging.getLogger(__name__)


def scan_shards(paths: Sequence[Path], classes: tuple[str, ...] | None, workers: int | None) -> list[Scanned]:
    """`scan.scan_shard` of each path, in their order; the first that is refused ends it."""
    if workers is None:
        workers = 1 if sum(path.stat().st_size for path in paths) < SMALL else usable_cores()
    jobs, scanned = ((path, number, classes) for number, path in enumerate(paths)), []
    with progress(len(paths), 0, "shards") as advance:
        for shard in in_processes(_scan, jobs, min(workers, len(paths))):
            scanned.append(shard)
            advance(1)
    _tell_strays(paths, scanned)
    return scanned


def _tell_strays(paths: Sequence[Path], scanned: Sequence[Scanned]) -> None:
    strays = [
        f"{path.name}:{printable(name)}" for path, shard in zip(paths, scanned, strict=True) for name in shard.strays
    ]
    if strays:
        few = ", ".join(strays[:TOLD]) + (", …" if len(strays) > TOLD else "")
        LOG.warning("%d members end as images do and are not indexed (%s): %s", len(strays), few, FIRST_DOT)


def _scan(job: tuple[Path, int, tuple[str, ...] | None]) -> Scanned:
    return scan_shard(*job)
