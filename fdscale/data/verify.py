"""A shard folder read whole: every byte against the index, every image decoded, whatever is wrong named; no torch."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fdscale.config.errors import UserError
from fdscale.data.images import BadImage, ImageReader, to_rgb
from fdscale.data.index import Index, Shard, index_again
from fdscale.data.processes import import_once, in_processes, usable_cores
from fdscale.data.progress import progress
from fdscale.data.remote.cache import Cache
from fdscale.data.remote.shards import RemoteShards
from fdscale.data.scan import Scanned, member_name, scan_shard


class Fault(NamedTuple):
    """What is wrong with a shard (`member` None), or with one image in it; `unread` images were not checked for it."""

    shard: str
    member: str | None
    reason: str
    unread: int = 0

    def __str__(self) -> str:
        where = self.shard if self.member is None else f"{self.shard}:{self.member}"
        return f"{where} ({self.reason})"


@dataclass(frozen=True)
class Verified:
    """What reading all of it gave: how many samples in how many shards, and everything that is wrong, by shard."""

    samples: int
    shards: int
    faults: tuple[Fault, ...]

    @property
    def bad_samples(self) -> int:
        """How many images are not as they should be."""
        return len({(fault.shard, fault.member) for fault in self.faults if fault.member is not None})

    @property
    def bad_shards(self) -> int:
        """How many shards have a fault of their own, beyond their images'."""
        return len({fault.shard for fault in self.faults if fault.member is None})

    @property
    def unread(self) -> int:
        """How many images were not checked, since their shard or its rows cannot be read."""
        return sum(fault.unread for fault in self.faults)


def verify(index: Index, workers: int | None = None) -> Verified:
    """Hash every shard, compare each row with the tar and decode every image, in `workers` processes (None: one a CPU).

    Nothing that is wrong with the data raises.
    """
    workers = min(usable_cores() if workers is None else workers, len(index.shards))
    faults = list(_unknown_shards(index))
    if index.remote is not None:
        import_once("webdataset")  # which opens URLs, and imports torch
    with progress(len(index), 0, "images") as advance:
        for shard, found in zip(index.shards, in_processes(_faults, _jobs(index), workers), strict=True):
            faults += found
            advance(shard.samples)
    return Verified(len(index), len(index.shards), tuple(faults))


class _Job(NamedTuple):
    """One shard as another process verifies it: its number, its own rows, and the URL and the cache that it is from."""

    folder: Path
    number: int
    shard: Shard
    rows: NDArray[np.void]
    classes: tuple[str, ...] | None
    home: tuple[str, Path, int, bool] | None


def _jobs(index: Index) -> Iterator[_Job]:
    home = None
    if index.remote is not None:
        cache = index.remote.cache
        home = index.remote.url, cache.folder, cache.limit, cache.allow_pipe
    for number, shard in enumerate(index.shards):
        rows = index.samples[index.starts[number] : index.starts[number + 1]]
        yield _Job(index.folder, number, shard, rows, index.classes, home)


def _faults(job: _Job) -> list[Fault]:
    return [Fault(job.shard.name, *fault) for fault in _found(job)]


def _remote(job: _Job) -> RemoteShards | None:
    if job.home is None:
        return None
    url, folder, limit, allow_pipe = job.home
    return RemoteShards(url, job.folder, (job.shard,), Cache(folder, limit, allow_pipe))


def _found(job: _Job) -> Iterator[tuple[str | None, str] | tuple[None, str, int]]:
    """(member or None, reason) of everything that is wrong with one shard, and how many images that leaves unread."""
    shard, rows, scanned = job.shard, job.rows, None
    index = Index(job.folder, (shard,), job.classes, rows, remote=_remote(job))
    try:
        path = index.ready(0)
        size = path.stat().st_size
    except FileNotFoundError:
        yield None, "missing", shard.samples
        return
    except (UserError, OSError) as error:
        yield None, str(error), shard.samples
        return
    try:
        scanned = scan_shard(path, job.number, job.classes)
    except (UserError, OSError) as error:
        yield None, str(error)
    if zlib.crc32(rows.tobytes()) != shard.rows_crc:
        again = index_again(path.parent)
        yield None, f"its rows in the index are damaged; make it again: {again}", 0 if scanned else len(rows)
        rows = rows[:0] if scanned is None else scanned.samples
    elif scanned is not None:
        yield from _differences(shard, path, rows, scanned)
    yield from _undecodable(index, path, size, rows)


def _differences(
    shard: Shard, path: Path, rows: NDArray[np.void], scanned: Scanned
) -> Iterator[tuple[str | None, str]]:
    """Where the tar is another than the one indexed; other bytes of an image are told when it is read."""
    if scanned.bytes != shard.bytes:
        yield None, f"{scanned.bytes} bytes, indexed {shard.bytes}"
    elif scanned.sha256 != shard.sha256:
        yield None, f"SHA-256 {scanned.sha256[:12]}…, indexed {shard.sha256[:12]}…"
    indexed, there = ({int(row["key"]): row for row in table} for table in (rows, scanned.samples))
    for key, row in indexed.items():
        name = member_name(path, int(row["offset"]), key)
        if key not in there:
            yield name, "indexed, and no longer in the shard"
        elif row["label"] != there[key]["label"]:
            yield name, f"label {there[key]['label']}, indexed {row['label']}"
    for key in there.keys() - indexed.keys():
        yield member_name(path, int(there[key]["offset"]), key), "in the shard, and not indexed"


def _undecodable(index: Index, path: Path, size: int, rows: NDArray[np.void]) -> Iterator[tuple[str, str]]:
    """Each image whose bytes are not those indexed, or cannot be decoded: read as training reads it."""
    own = rows.copy()
    own["shard"] = 0
    shard = replace(index.shards[0], samples=len(own), bytes=size, rows_crc=zlib.crc32(own.tobytes()))
    reader = ImageReader(replace(index, shards=(shard,), samples=own))
    for sample, row in enumerate(own):
        try:
            reader.seen(sample, to_rgb)
        except BadImage as error:
            _, _, reason = str(error).partition(" (")
            yield member_name(path, int(row["offset"]), int(row["key"])), reason.removesuffix(")")
        except UserError:
            yield member_name(path, int(row["offset"]), int(row["key"])), "outside of the shard"
    reader.close()


def _unknown_shards(index: Index) -> Iterator[Fault]:
    if index.remote is None:
        known = {shard.name for shard in index.shards}
        for path in sorted(index.folder.glob("*.tar")):
            if path.name not in known:
                yield Fault(path.name, None, f"not in the index; make it again: {index_again(index.folder)}")
