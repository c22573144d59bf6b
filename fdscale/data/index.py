"""The index beside a folder of tar shards, so that any sample is one read away; no torch.

Two files: `index.json` (version, sample count, class names; name, samples, bytes and SHA-256 of each shard)
and `samples.npy` (one `scan.SAMPLE` row per image: shards by name, images in the order of the tar).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fdscale.config.errors import UserError
from fdscale.data.scan import CLASSES_FILE, SAMPLE, member_name, scan_shard

VERSION = 1
INDEX_FILE = "index.json"
SAMPLES_FILE = "samples.npy"


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, how many images it holds, its size in bytes and its SHA-256."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """Every sample of a shard folder; `samples` (N,) are `scan.SAMPLE` rows (label -1: none)."""

    setting: ClassVar[str] = "shards"

    folder: Path
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None
    samples: NDArray[np.void]

    def __len__(self) -> int:
        return len(self.samples)

    def fingerprint(self) -> str:
        """The SHA-256 of the index, which holds every shard's."""
        return hashlib.sha256((self.folder / INDEX_FILE).read_bytes()).hexdigest()

    def shard_path(self, shard: int) -> Path:
        """Path of the shard with this number."""
        return self.folder / self.shards[shard].name

    def name(self, sample: int) -> str:
        """`SHARD:MEMBER` of a sample, for messages."""
        row = self.samples[sample]
        path = self.shard_path(int(row["shard"]))
        return f"{path.name}:{member_name(path, int(row['offset']), int(row['key']))}"


def build_index(folder: str | Path) -> Index:
    """Scan every `*.tar` of `folder` (KEY.jpg|jpeg|png|webp + optional KEY.cls) and write the index there.

    Class names come from `classes.json` (a list) where the folder has one. Raises UserError for a missing or
    empty folder, a shard that is no whole tar or holds no image, a key met twice, and a wrong label.
    """
    folder = Path(folder)
    paths = _shard_paths(folder)
    classes = _read_classes(folder)
    rows = [scan_shard(path, number, classes) for number, path in enumerate(paths)]
    shards = [_describe(path, len(samples)) for path, samples in zip(paths, rows, strict=True)]
    index = Index(folder, tuple(shards), classes, np.concatenate(rows))
    _refuse_duplicates(index)
    _write_index(index)
    return index


def load_index(folder: str | Path) -> Index:
    """Open the index of `folder` (samples memory-mapped) after checking every shard's presence and size.

    Raises UserError for a folder without index, a damaged index, and shards missing, changed or not indexed.
    """
    folder = Path(folder)
    on_disk = {path.name for path in _shard_paths(folder)}
    manifest = _read_manifest(folder)
    index = _described(folder, manifest)
    _check_shards(folder, index.shards, on_disk)
    _check_samples(index)
    return index


def _described(folder: Path, manifest: Mapping[str, Any]) -> Index:
    try:
        shards = tuple(Shard(**shard) for shard in manifest["shards"])
        classes, samples = manifest["classes"], manifest["samples"]
    except (KeyError, TypeError) as error:
        path, again = folder / INDEX_FILE, _index_again(folder)
        raise UserError(f"{path} is damaged (no {error} as it should be); make it again: {again}") from error
    return Index(folder, shards, None if classes is None else tuple(classes), _read_samples(folder, samples))


def _check_samples(index: Index) -> None:
    """Every row lies inside a shard: a damaged row must not have gigabytes read elsewhere."""
    rows, sizes = index.samples, np.array([shard.bytes for shard in index.shards])
    inside = (rows["shard"] >= 0) & (rows["shard"] < len(sizes)) & (rows["offset"] >= 0) & (rows["size"] > 0)
    inside[inside] = (rows["offset"] + rows["size"])[inside] <= sizes[rows["shard"][inside]]
    if not inside.all():
        first, path = int(np.flatnonzero(~inside)[0]), index.folder / SAMPLES_FILE
        raise UserError(f"{path}: row {first} lies outside its shard; make it again: {_index_again(index.folder)}")


def _shard_paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"shard folder {folder} does not exist; make one with 'fdscale shards pack'")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"shard folder {folder} holds no *.tar file; make shards with 'fdscale shards pack'")
    return paths


def _read_classes(folder: Path) -> tuple[str, ...] | None:
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


def _describe(path: Path, samples: int) -> Shard:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(path.name, samples, path.stat().st_size, digest)


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


def _write_index(index: Index) -> None:
    manifest = {
        "version": VERSION,
        "samples": len(index),
        "classes": None if index.classes is None else list(index.classes),
        "shards": [asdict(shard) for shard in index.shards],
    }
    # A kill between the two files leaves "no index", never an old index.json beside new samples.
    (index.folder / INDEX_FILE).unlink(missing_ok=True)
    temporary = index.folder / f".{SAMPLES_FILE}.{os.getpid()}"
    with temporary.open("wb") as file:
        np.save(file, index.samples)
    os.replace(temporary, index.folder / SAMPLES_FILE)
    temporary = index.folder / f".{INDEX_FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, index.folder / INDEX_FILE)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    if not path.exists():
        raise UserError(f"shard folder {folder} has no {INDEX_FILE}; make it: {_index_again(folder)}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); make it again: {_index_again(folder)}") from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        again = _index_again(folder)
        raise UserError(f"{path} has version {version!r}, allowed: {VERSION}; make it again: {again}")
    return dict(manifest)


def _check_shards(folder: Path, shards: tuple[Shard, ...], on_disk: set[str]) -> None:
    again = f"put the right shards there, or index these: {_index_again(folder)}"
    indexed = {shard.name for shard in shards}
    if missing := sorted(indexed - on_disk):
        raise UserError(f"{len(missing)} indexed shard(s) missing from {folder}: {_few(missing)}; {again}")
    if unknown := sorted(on_disk - indexed):
        raise UserError(f"{len(unknown)} shard(s) in {folder} are not in its index: {_few(unknown)}; {again}")
    for shard in shards:
        size = (folder / shard.name).stat().st_size
        if size != shard.bytes:
            path = folder / shard.name
            raise UserError(f"shard {path} has {size} bytes, its index says {shard.bytes}; {again}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read_samples(folder: Path, expected: int) -> NDArray[np.void]:
    path = folder / SAMPLES_FILE
    try:
        samples: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}); make it again: {_index_again(folder)}") from error
    if samples.dtype != SAMPLE or samples.shape != (expected,):
        again = _index_again(folder)
        raise UserError(f"{path} does not belong to its {INDEX_FILE}; make both again: {again}")
    return samples


def _index_again(folder: Path) -> str:
    return f"fdscale shards index {folder}"
