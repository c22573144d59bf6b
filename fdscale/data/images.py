"""Image bytes to RGB, a bad image replaced and named; and the bytes out of the shards, by (offset, size)."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import BinaryIO, Generic, NamedTuple, TypeVar

from PIL import Image

from fdscale.config.errors import UserError
from fdscale.data.index import Index

OPEN_SHARDS = 128  # per process: a data set of thousands of shards must not run into the limit on open files
# PIL alone would try each of its plugins on what a shard holds, whatever its name: EPS starts Ghostscript
FORMATS = ("JPEG", "PNG", "WEBP")
LONGEST_BAD_RUN = 1000  # bad samples in a row that are skipped in search of a replacement
AGAIN = "the shards are damaged: copy or pack them again, then run 'fdscale shards index'"


class BadImage(Exception):
    """The bytes of one sample are no image: truncated, of no known format, or a decompression bomb."""


Found = TypeVar("Found")


class Decoded(NamedTuple, Generic[Found]):
    """An RGB image (and what belongs to it), the number of its sample, and the name of the bad sample it replaces."""

    image: Found
    sample: int
    bad: str | None


def decode_rgb(file: BinaryIO, name: str) -> Image.Image:
    """The RGB image that a file holds, as its pixels are stored; raises BadImage where it cannot be decoded."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL's plugins raise anything on garbage; the caller counts and names it
        raise BadImage(f"{name} ({type(error).__name__}: {error})") from error


def decode_or_next(decode: Callable[[int], Found], sample: int, samples: int, where: str, again: str) -> Decoded[Found]:
    """What `decode` gives for a sample of `samples`, or for the next decodable one (cyclic).

    Raises UserError after a long run of bad images `where` they lie; `again` says what to do then.
    """
    bad = None
    for step in range(min(LONGEST_BAD_RUN, samples)):
        candidate = (sample + step) % samples
        try:
            return Decoded(decode(candidate), candidate, bad)
        except BadImage as error:
            bad = bad or str(error)
    raise UserError(f"no image can be decoded in {where} from {bad} on (tried {step + 1}); {again}")


class ImageReader:
    """Reads and decodes single samples of an index.

    Shards are opened on first use, so each worker process has file descriptors of its own, and read with
    `pread`, which moves no shared file position.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._open: dict[int, int] = {}

    def decode(self, sample: int) -> Image.Image:
        """The sample's RGB image; raises BadImage where it cannot be decoded."""
        return decode_rgb(io.BytesIO(self._read(sample)), self.index.name(sample))

    def decode_or_next(self, sample: int) -> Decoded[Image.Image]:
        """The sample's image, or that of the next decodable sample of the data set (cyclic)."""
        return decode_or_next(self.decode, sample, len(self.index), str(self.index.folder), AGAIN)

    def close(self) -> None:
        """Close this process's file descriptors; a later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _read(self, sample: int) -> bytes:
        row = self.index.samples[sample]
        shard, size, offset = int(row["shard"]), int(row["size"]), int(row["offset"])
        try:
            return os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            path = self.index.shard_path(shard)
            raise UserError(f"cannot read shard {path}: {error}; check the file and its disk") from error

    def _descriptor(self, shard: int) -> int:
        descriptor = self._open.pop(shard, None)
        if descriptor is None:
            descriptor = os.open(self.index.shard_path(shard), os.O_RDONLY | os.O_CLOEXEC)
        self._open[shard] = descriptor  # last in the dict: most recently used
        if len(self._open) > OPEN_SHARDS:
            os.close(self._open.pop(next(iter(self._open))))
        return descriptor
