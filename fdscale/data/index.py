"""The index beside a folder of tar shards, so that any sample is one read away; no torch.

Two files: `index.json` (version, sample count, class names; name, samples, bytes and SHA-256 of each shard; bytes and
SHA-256 of the other file) and `samples.npy` (one `scan.SAMPLE` row per image: shards by name, images in the order of
the tar).
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fdscale.config.errors import UserError
from fdscale.data.indexing import scan_shards
from fdscale.data.remote.urls import is_remote
from fdscale.data.scan import CLASSES_FILE, SAMPLE, Scanned, member_name

if TYPE_CHECKING:
    from fdscale.data.remote.cache import Cache
    from fdscale.data.remote.shards import RemoteShards

VERSION = 2
INDEX_FILE = "index.json"
SAMPLES_FILE = "samples.npy"


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, how many images it holds, its size in bytes, its SHA-256, and the CRC-32 of its rows."""

    name: str
    samples: int
    bytes: int
    sha256: str
    rows_crc: int


SHARD_FIELDS = tuple(field.name for field in fields(Shard))


@dataclass(frozen=True)
class Index:
    """Every sample of a shard folder; `samples` (N,) are `scan.SAMPLE` rows (label -1: none), ordered by shard.

    `written` are the shards' times of change (ns) when the index was loaded: a reader notices one that changes after
    that. None where they are `remote`, and fetched on use.
    """

    folder: Path
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None
    samples: NDArray[np.void]
    written: tuple[int, ...] | None = None
    remote: RemoteShards | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """First row of each shard, and N: int64 (S + 1,)."""
        if not self._whole:
            return np.searchsorted(self.samples["shard"], np.arange(len(self.shards) + 1)).astype(np.int64)
        return np.cumsum([0, *(shard.samples for shard in self.shards)], dtype=np.int64)

    @cached_property
    def _whole(self) -> bool:
        """Whether these are all rows that the folder has, and not some of them."""
        return len(self.samples) == sum(shard.samples for shard in self.shards)

    def fingerprint(self) -> str:
        """The SHA-256 of the index, which holds every shard's, after the version of how shards are read."""
        return f"{VERSION}:{hashlib.sha256((self.folder / INDEX_FILE).read_bytes()).hexdigest()}"

    def fingerprints(self, table: str) -> dict[str, str]:
        """The same by the setting that names the folder."""
        return {f"{table}.shards": self.fingerprint()}

    def shard_path(self, shard: int) -> Path:
        """Path of the shard with this number, whether it is there or not."""
        return self.folder / self.shards[shard].name

    def ready(self, shard: int) -> Path:
        """Path of the shard with this number, fetched first where it is not on this machine."""
        return self.shard_path(shard) if self.remote is None else self.remote.ready(shard)

    def refuse_damaged_rows(self, shard: int) -> None:
        """Raise UserError where a shard's rows are not as they were written; a chosen few cannot be told."""
        if not self._whole:
            return
        rows = self.samples[self.starts[shard] : self.starts[shard + 1]]
        if zlib.crc32(rows.tobytes()) != self.shards[shard].rows_crc:
            path, again = self.folder / SAMPLES_FILE, index_again(self.folder)
            raise UserError(f"{path}: the rows of shard {self.shards[shard].name} are damaged; make it again: {again}")

    def name(self, sample: int) -> str:
        """`SHARD:MEMBER` of a sample, for messages."""
        row = self.samples[sample]
        path = self.shard_path(int(row["shard"]))
        return f"{path.name}:{member_name(path, int(row['offset']), int(row['key']))}"


def build_index(folder: str | Path, workers: int | None = None) -> Index:
    """Scan every `*.tar` of `folder` (KEY.jpg|jpeg|png|webp + optional KEY.cls) and write the index there.

    `workers` processes read the shards (None: one per CPU). Class names come from `classes.json` (a list) where the
    folder has one. Raises UserError for a missing or empty folder, a key met twice, and as `scan.scan_shard` does.
    """
    folder = Path(folder)
    paths = _shard_paths(folder)
    classes = read_classes(folder)
    scanned = scan_shards(paths, classes, workers)
    write_index(folder, classes, {path.name: shard for path, shard in zip(paths, scanned, strict=True)})
    return load_index(folder)


def load_index(folder: str | Path, cache: Cache | None = None) -> Index:
    """Open the index of `folder` (samples memory-mapped) after checking every shard's presence and size.

    A URL's shards are fetched into `cache`. Raises UserError for a folder without index, a damaged index, and shards
    missing, changed or not indexed.
    """
    if is_remote(folder):
        from fdscale.data.remote.shards import open_remote

        return open_remote(str(folder), cache)
    folder = Path(folder)
    on_disk = _shard_files(folder)
    index = read_index(folder)
    return replace(index, written=_checked_shards(folder, index.shards, on_disk))


def read_index(folder: Path) -> Index:
    """The index files of `folder` alone, whether its shards are there or not; UserError where they are damaged."""
    _refuse_missing(folder)
    index = _described(folder, _read_manifest(folder))
    _check_ends(index)
    return index


def _described(folder: Path, manifest: Mapping[str, Any]) -> Index:
    path, again = folder / INDEX_FILE, index_again(folder)
    try:
        shards = tuple(_shard(shard) for shard in manifest["shards"])
        classes, samples = manifest["classes"], manifest["samples"]
        if not (classes is None or (isinstance(classes, list) and all(isinstance(name, str) for name in classes))):
            raise KeyError("classes")
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged (no {error} as it should be); make it again: {again}") from error
    return Index(folder, shards, None if classes is None else tuple(classes), _read_samples(folder, samples))


def _shard(shard: Mapping[str, Any]) -> Shard:
    """One shard's entry, whatever else it holds; KeyError where a value is not what it should be."""
    for name in SHARD_FIELDS:
        text = name in ("name", "sha256")
        if not (isinstance(shard[name], str) if text else type(shard[name]) is int and shard[name] >= 0):
            raise KeyError(name)
    name = shard["name"]
    if Path(name).name != name or not name.endswith(".tar") or "\0" in name:  # another file would be read as a shard
        raise KeyError("name")
    return Shard(**{name: shard[name] for name in SHARD_FIELDS})


def _check_ends(index: Index) -> None:
    """Rows and shards belong together; each row's bounds are checked when it is read, since there may be millions."""
    counts = [shard.samples for shard in index.shards]
    ends = index.samples["shard"][[0, -1]].tolist() if len(index) else []
    if sum(counts) != len(index) or min(counts, default=0) < 1 or ends != [0, len(counts) - 1]:
        path, again = index.folder / SAMPLES_FILE, index_again(index.folder)
        raise UserError(f"{path} does not belong to its {INDEX_FILE}; make both again: {again}")


def _shard_files(folder: Path) -> dict[str, os.stat_result]:
    _refuse_missing(folder)
    with os.scandir(folder) as entries:
        found = {entry.name: entry.stat() for entry in entries if entry.name.endswith(".tar") and entry.is_file()}
    if not found:
        raise UserError(f"shard folder {folder} holds no *.tar file; make shards with 'fdscale shards pack'")
    return found


def _refuse_missing(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"shard folder {folder} does not exist; make one with 'fdscale shards pack'")


def _shard_paths(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(_shard_files(folder))]


def read_classes(folder: Path) -> tuple[str, ...] | None:
    """The names in `classes.json` of a folder, where it has one."""
    path = folder / CLASSES_FILE
    if not path.exists():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); allowed: a list of class names") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} holds something else than names; allowed: a list with one string per class")
    return tuple(names)


def _refuse_duplicates(index: Index) -> None:
    keys = index.samples["key"]
    order = np.argsort(keys, kind="stable")
    twice = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(twice):
        first, second = (index.name(int(order[twice[0] + i])) for i in (0, 1))
        raise UserError(
            f"{len(twice)} sample key(s) appear twice in {index.folder}, the first in {first} and {second}; "
            "every image needs a key of its own: rename or remove one"
        )


def write_index(folder: Path, classes: tuple[str, ...] | None, scanned: Mapping[str, Scanned]) -> None:
    """Write the index of the shards in `folder`, by name (and sorted so), from what was scanned of each.

    Raises UserError for a key met twice.
    """
    for number, shard in enumerate(scanned.values()):
        shard.samples["shard"] = number
    shards = tuple(
        Shard(name, len(shard.samples), shard.bytes, shard.sha256, zlib.crc32(shard.samples.tobytes()))
        for name, shard in scanned.items()
    )
    index = Index(folder, shards, classes, np.concatenate([shard.samples for shard in scanned.values()]))
    _refuse_duplicates(index)
    _write(index)


def _write(index: Index) -> None:
    # A kill between the two files leaves "no index", never an old index.json beside new samples.
    (index.folder / INDEX_FILE).unlink(missing_ok=True)
    temporary = index.folder / f".{SAMPLES_FILE}.{os.getpid()}"
    with temporary.open("wb") as file:
        np.save(file, index.samples)
    with temporary.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = {
        "version": VERSION,
        "samples": len(index),
        "classes": None if index.classes is None else list(index.classes),
        "samples_file": {"bytes": temporary.stat().st_size, "sha256": digest},
        "shards": [asdict(shard) for shard in index.shards],
    }
    os.replace(temporary, index.folder / SAMPLES_FILE)
    temporary = index.folder / f".{INDEX_FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, index.folder / INDEX_FILE)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    if not path.exists():
        raise UserError(f"shard folder {folder} has no {INDEX_FILE}; make it: {index_again(folder)}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); make it again: {index_again(folder)}") from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        again = index_again(folder)
        raise UserError(f"{path} has version {version!r}, allowed: {VERSION}; make it again: {again}")
    return dict(manifest)


def _checked_shards(folder: Path, shards: tuple[Shard, ...], on_disk: Mapping[str, os.stat_result]) -> tuple[int, ...]:
    """Times of change (ns) of the shards, each of which is there and as long as it was."""
    again = f"put the right shards there, or index these: {index_again(folder)}"
    indexed = {shard.name for shard in shards}
    if missing := sorted(indexed - on_disk.keys()):
        raise UserError(f"{len(missing)} indexed shard(s) missing from {folder}: {_few(missing)}; {again}")
    if unknown := sorted(on_disk.keys() - indexed):
        raise UserError(f"{len(unknown)} shard(s) in {folder} are not in its index: {_few(unknown)}; {again}")
    for shard in shards:
        size = on_disk[shard.name].st_size
        if size != shard.bytes:
            path = folder / shard.name
            raise UserError(f"shard {path} has {size} bytes, its index says {shard.bytes}; {again}")
    return tuple(on_disk[shard.name].st_mtime_ns for shard in shards)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read_samples(folder: Path, expected: int) -> NDArray[np.void]:
    path = folder / SAMPLES_FILE
    try:
        # Which opens no archives and no pickles; as a plain array, since np.memmap takes microseconds more for each row
        samples: NDArray[np.void] = np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except Exception as error:  # NumPy parses a header as Python text, and raises anything on garbage
        raise UserError(f"{path} cannot be read ({error}); make it again: {index_again(folder)}") from error
    if samples.dtype != SAMPLE or samples.shape != (expected,):
        again = index_again(folder)
        raise UserError(f"{path} does not belong to its {INDEX_FILE}; make both again: {again}")
    return samples


def index_again(folder: Path) -> str:
    """The command that makes the index of a folder again."""
    return f"fdscale shards index {folder}"
