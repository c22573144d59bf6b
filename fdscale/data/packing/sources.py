"""What is packed: images that a source lists once and reads one by one, and how each is stored; no torch."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fdscale.config.errors import UserError
from fdscale.data.images import FORMATS, open_image
from fdscale.data.scan import IMAGE_SUFFIXES, NO_LABEL, key_hash, printable

# These become PNG; IMAGE_SUFFIXES keep their bytes.
REENCODED_SUFFIXES = ("bmp", "gif", "pgm", "ppm", "tif", "tiff")
REENCODED_FORMATS = ("BMP", "GIF", "PPM", "TIFF")
SAME_KEYS = 5  # pairs of images that are told of
SUFFIX_OF = {"PNG": "png", "WEBP": "webp"}  # of a format under a name that says another; the rest are JPEG
# file: number of the file that holds the image, `size` bytes from `offset` on; mark: other when the image is changed
ROW = np.dtype([("file", "<i4"), ("label", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("mark", "<u8")])


class Sample(NamedTuple):
    """One image: where it lies (for messages), its key, its encoded bytes with their suffix, and its class number."""

    name: str
    key: str
    suffix: str
    data: bytes
    label: int | None


class Source(Protocol):
    """Images in an order that depends on their names alone."""

    @property
    def about(self) -> str:
        """What it is, in one line."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes that labels number."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Images that are not among its own, each `NAME: why`."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """Where an image lies, for messages."""

    def read(self, number: int) -> Sample:
        """An image; UserError for one that cannot be read, or that changed since it was listed."""

    def fingerprint(self) -> NDArray[np.uint64]:
        """One number per image (N,), another one when the image is changed."""

    def part(self, numbers: NDArray[np.int64]) -> Source:
        """Only these images, in this order: what another process needs to read them."""


class NoImage(Exception):
    """The bytes are no image, or one that no training could read; the text says why."""


@dataclass(frozen=True)
class Files:
    """Images in files of `root`, each a file of its own or somewhere inside of a tar.

    `names` (N) are paths as in a folder of class folders, which give the keys; `rows` (N,) are `ROW`, their `file`
    a place in `files`. A row and a name of 30 characters are 120 bytes.
    """

    root: Path
    files: Sequence[str]
    names: Sequence[str]
    rows: NDArray[np.void]
    classes: tuple[str, ...] | None
    about: str = ""
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def name(self, number: int) -> str:
        name, file = self.names[number], self.files[self.rows["file"][number]]
        return printable(file if file.endswith(name.rpartition("/")[2]) else f"{file}:{name}")

    def read(self, number: int) -> Sample:
        name, row = self.names[number], self.rows[number]
        path = self.root / self.files[row["file"]]
        try:
            data = _read_at(path, int(row["offset"]), int(row["size"]))
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); make it readable and run the same command again: it goes on"
            ) from error
        if len(data) < row["size"]:
            raise UserError(f"{path} is shorter than when packing began, at {self.name(number)}; {PACK_ANEW}")
        return Sample(self.name(number), key_of(name), suffix_of(name), data, _label(row))

    def fingerprint(self) -> NDArray[np.uint64]:
        marks: NDArray[np.uint64] = self.rows["mark"].copy()
        return marks

    def part(self, numbers: NDArray[np.int64]) -> Files:
        rows = self.rows[numbers]
        used, rows["file"] = np.unique(rows["file"], return_inverse=True)
        files, names = [self.files[i] for i in used], [self.names[i] for i in numbers]
        return replace(self, files=files, names=names, rows=rows, classes=None, left_out=())


PACK_ANEW = "pack it anew, into another folder, once it no longer changes"


def key_of(name: str) -> str:
    """Path without suffix; WebDataset ends a key at the base name's first dot: others become underscores."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + (base.rpartition(".")[0] or base).replace(".", "_")


def suffix_of(name: str) -> str:
    """What follows the last dot of a name, in lower case; "" where it has none, or begins with it."""
    stem, _, suffix = name.rpartition("/")[2].rpartition(".")
    return suffix.lower() if stem else ""


def is_image_name(name: str) -> bool:
    """Whether a name ends as images do that are packed."""
    return suffix_of(name) in IMAGE_SUFFIXES + REENCODED_SUFFIXES


def mark_of(name: str, size: int, file: os.stat_result) -> int:
    """The number of an image of this name and size in this file: another one when the file is written again."""
    return key_hash(f"{name}\0{size}\0{file.st_size}\0{file.st_mtime_ns}")


def refuse_same_keys(files: Files) -> Files:
    """The files; raises UserError where images would have one key."""
    keys = np.fromiter((key_hash(key_of(name)) for name in files.names), np.uint64, len(files))
    ordered = np.sort(keys)
    if (ordered[1:] == ordered[:-1]).any():
        raise UserError(_same_keys(files, keys))
    return files


def _same_keys(files: Files, keys: NDArray[np.uint64]) -> str:
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    twice = sorted((int(order[i]), int(order[i + 1])) for i in again)
    first, second = twice[0]
    both = f"{files.name(first)} and {files.name(second)} would both have the key {key_of(files.names[first])!r}"
    others = ", ".join(files.name(second) for _, second in twice[1:SAME_KEYS])
    more = f"; {len(twice) - 1:,} more have the key of another one: {others}" if others else ""
    return f"{both}{more}{', …' if len(twice) > SAME_KEYS else ''}; rename one of each"


def as_stored(sample: Sample) -> Sample:
    """As it goes into a shard: JPEG, PNG and WebP keep their bytes whatever their name; other formats become PNG.

    Its header alone is read where bytes are kept. Raises NoImage.
    """
    if not sample.data:
        raise NoImage("it is empty")
    try:
        with open_image(io.BytesIO(sample.data), FORMATS + REENCODED_FORMATS) as image:
            if image.format in REENCODED_FORMATS:
                return sample._replace(suffix="png", data=png(image))
            kept = sample.suffix in IMAGE_SUFFIXES
            return sample if kept else sample._replace(suffix=SUFFIX_OF.get(image.format or "", "jpg"))
    except UnidentifiedImageError as error:
        raise NoImage("no image of a known format") from error
    except MemoryError:  # which another machine would not want for: the shards must not depend on it
        raise
    except Exception as error:  # PIL's plugins raise anything on garbage
        raise NoImage(f"{type(error).__name__}: {error}") from error


def png(image: Image.Image) -> bytes:
    """An image as the bytes of an RGB PNG."""
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "png")
    return stream.getvalue()


def _label(row: np.void) -> int | None:
    return None if row["label"] == NO_LABEL else int(row["label"])


def _read_at(path: Path, offset: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
