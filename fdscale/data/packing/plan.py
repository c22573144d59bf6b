"""Which image goes into which shard, and the hidden folder in which packing goes on after it was killed; no torch.

`.OUTPUT.packing` holds `plan.json` and `images.npy` (what was to be packed), `shards/` (which becomes OUTPUT when all
is there) and `records/`, where a shard counts as whole once its JSON is there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from fdscale.config.errors import UserError
from fdscale.data.index import INDEX_FILE
from fdscale.data.packing.sources import Source
from fdscale.data.scan import Scanned

FORMAT = 1  # of the shards' bytes: another one cannot go on with what an earlier version began
OPTIONS = {
    "format": "version of fdscale",
    "samples_per_shard": "--samples-per-shard",
    "seed": "--seed",
    "classes": "numbering of classes",
}


@dataclass(frozen=True)
class Plan:
    """`images` shuffled by `seed` (None: not at all) and cut into shards of `samples_per_shard`."""

    images: int
    samples_per_shard: int
    seed: int | None
    classes: tuple[str, ...] | None
    format: int = FORMAT

    @property
    def shards(self) -> int:
        return -(-self.images // self.samples_per_shard)

    def order(self) -> NDArray[np.int64]:
        """Numbers of the images in the order of the shards: int64 (images,)."""
        if self.seed is None:
            return np.arange(self.images)
        return np.random.Generator(np.random.Philox(self.seed)).permutation(self.images)


@dataclass(frozen=True)
class Record:
    """A whole shard: number, images, size and SHA-256 (none of one without images), and what was left out of it."""

    number: int
    samples: int
    bytes: int
    sha256: str
    left_out: tuple[str, ...]


class Work:
    """The hidden folder beside the output."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.parent / f".{output.name}.packing"
        self.shards = self.folder / "shards"

    def shard_path(self, number: int) -> Path:
        return self.shards / f"shard-{number:05d}.tar"

    @contextmanager
    def opened(self, plan: Plan, source: Source) -> Iterator[None]:
        """Begin, or go on with what lies there; UserError where it was begun with another source or other options."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("wb") as lock:
            self._lock(lock)
            if not self.shards.is_dir() or not (self.folder / "plan.json").exists():  # killed before, or at the end
                self._begin(plan, source)
            else:
                self._go_on(plan, source)
            yield

    def record(self, number: int) -> Record | None:
        """The record of a shard that is whole."""
        try:
            values = json.loads(self._record_path(number).read_text(encoding="ascii"))
            record = Record(**values | {"left_out": tuple(values["left_out"])})
            size = self.shard_path(number).stat().st_size if record.samples else 0
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None
        return record if size == record.bytes else None

    def scanned(self, record: Record) -> Scanned:
        """What was scanned of a whole shard."""
        rows = np.load(self._record_path(record.number).with_suffix(".npy"))
        return Scanned(rows, record.bytes, record.sha256)

    def write_rows(self, number: int, scanned: Scanned) -> None:
        """Keep the rows of a shard; they count once its record is there."""
        write_whole(self._record_path(number).with_suffix(".npy"), lambda file: np.save(file, scanned.samples))

    def write_record(self, record: Record) -> None:
        """From here on the shard is whole, whatever ends this process."""
        text = json.dumps(asdict(record)).encode("ascii")
        write_whole(self._record_path(record.number), lambda file: file.write(text))

    def finish(self) -> None:
        """The output appears."""
        os.replace(self.shards, self.output)
        shutil.rmtree(self.folder)

    def _record_path(self, number: int) -> Path:
        return self.folder / "records" / f"shard-{number:05d}.json"

    def _lock(self, lock: BinaryIO) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is packing {self.output} right now; wait for it, or end it") from error
        except OSError:  # a file system without locks: two at once would write the same bytes
            return

    def _begin(self, plan: Plan, source: Source) -> None:
        for name in ("shards", "records"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir()
        write_whole(self.folder / "images.npy", lambda file: np.save(file, source.fingerprint()))
        text = json.dumps(asdict(plan)).encode("ascii")
        write_whole(self.folder / "plan.json", lambda file: file.write(text))

    def _go_on(self, plan: Plan, source: Source) -> None:
        then, now = json.loads((self.folder / "plan.json").read_text(encoding="ascii")), _as_json(plan)
        marks = np.load(self.folder / "images.npy")
        if not np.array_equal(marks, source.fingerprint()):
            what = f"had {len(marks):,} images when packing {self.output} began and has {len(source):,}"
            self._refuse(f"the source {what}; the first that is new or changed is {_first_change(marks, source)}")
        for name, told in OPTIONS.items():
            if then[name] != now[name]:
                values = "" if name == "classes" else f": {then[name]} then, {now[name]} now"
                self._refuse(f"packing {self.output} was begun with another {told}{values}")
        for path in self.shards.glob(".*.partial"):
            path.unlink()

    def _refuse(self, why: str) -> NoReturn:
        raise UserError(f"{why}; have it as it was to go on, or remove {self.folder} to begin anew")


def refuse_taken(output: Path) -> None:
    """Raise UserError for an output that is anything but a new or empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        what = "already holds shards" if (output / INDEX_FILE).exists() else "is not an empty folder"
        raise UserError(f"output {output} {what}; nothing was written: name a new folder, or remove it first")
    parent = next(parent for parent in Path(os.path.abspath(output)).parents if os.path.exists(parent))
    if not parent.is_dir():
        raise UserError(f"output {output} cannot be written, since {parent} is a file; name another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"output {output} cannot be written; allow writing to {parent}, or name another folder")


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file that is there whole or not at all, even when the machine stops."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _as_json(plan: Plan) -> dict[str, Any]:
    return dict(json.loads(json.dumps(asdict(plan))))


def _first_change(then: NDArray[np.uint64], source: Source) -> str:
    now = source.fingerprint()
    both = min(len(then), len(now))
    first = next(iter(np.flatnonzero(then[:both] != now[:both])), both)
    return source.name(min(int(first), len(now) - 1))
