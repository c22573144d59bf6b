"""Image bytes to RGB, a bad image replaced and named; and the bytes out of the shards, by (offset, size)."""

from __future__ import annotations

import io
import os
import resource
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import BinaryIO, Generic, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageFile

from fdscale.config.errors import UserError
from fdscale.data.index import SAMPLES_FILE, Index
from fdscale.data.jpeg import PlainJpeg
from fdscale.data.scan import LARGEST_IMAGE

MOST_AT_ONCE = 2**24  # bytes that a decoder is fed with
OPEN_SHARDS = 1024  # per process at most: the shards of all lanes and windows that a rank reads in turn, as a rule
# PIL alone would try each of its plugins on what a shard holds, whatever its name: EPS starts Ghostscript
FORMATS = ("JPEG", "PNG", "WEBP")
# Above it PIL warns. A worker holds at most 341 MiB (4 bytes a pixel) of an image, and as much for a copy in RGB.
MOST_PIXELS = 89_478_485
LONGEST_BAD_RUN = 1000  # bad samples in a row that are skipped in search of a replacement
AGAIN = "the shards are damaged: copy or pack them again, then run 'fdscale shards index'"


class BadImage(Exception):
    """The bytes of one sample are no image: truncated, of no known format, or a decompression bomb."""


Found = TypeVar("Found")
Stored = tuple[int, int, int, int, int, int]  # shard, offset, size, label, key, CRC-32: a row of the index


class Decoded(NamedTuple, Generic[Found]):
    """An RGB image (and what belongs to it), the number of its sample, and the name of the bad sample it replaces."""

    image: Found
    sample: int
    bad: str | None


class Reading:
    """Whatever PIL raises inside on garbage is a BadImage; but a node's want of memory must not change what a run sees.

    PIL's plugins raise anything; the caller names the image and counts it.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, BadImage | MemoryError):
            raise BadImage(f"{type(error).__name__}: {error}") from error


READING = Reading()


def open_image(file: BinaryIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The image that a file holds, not decoded yet: its header alone is read, and refused above MOST_PIXELS."""
    image = _opened(file, formats)
    if image.width * image.height > MOST_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels; allowed: {MOST_PIXELS}")
    image.decodermaxblock = MOST_AT_ONCE  # all in one go, not in pieces
    return image


def _opened(file: BinaryIO, formats: tuple[str, ...]) -> ImageFile.ImageFile:
    try:
        return PlainJpeg(file)
    except SyntaxError:
        return Image.open(file, formats=formats)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image decoded to RGB as PIL does it: palettes and CMYK converted, alpha dropped, no EXIF rotation.

    Of 16 bits the high byte is kept, in grey images as in others; PIL alone would clip grey ones to white. Raises
    BadImage, without a name, where its bytes cannot be decoded.
    """
    with READING:
        image.load()
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)  # of which PIL would warn, and drop it all the same
    return image.convert("RGB")


def decode_rgb(file: BinaryIO, name: str) -> Image.Image:
    """The RGB image that a file holds, as its pixels are stored; raises BadImage where it cannot be decoded."""
    with naming(lambda: name), opened(file) as image:
        return to_rgb(image)


def opened(file: BinaryIO) -> Image.Image:
    """The image in a file, not decoded yet; raises BadImage, without a name, where it is none."""
    with READING:
        return open_image(file)


@contextmanager
def naming(name: Callable[[], str]) -> Iterator[None]:
    """Give the BadImage of a sample the sample's name."""
    try:
        yield
    except BadImage as error:
        raise BadImage(f"{name()} ({error})") from error.__cause__


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


def open_shards() -> int:
    """How many shards a process keeps open: half of the files that it may open, at most."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_SHARDS if soft == resource.RLIM_INFINITY else min(OPEN_SHARDS, soft // 2)


class ImageReader:
    """Reads and decodes single samples of an index.

    Shards are opened on first use, so each worker process has file descriptors of its own, and read with
    `pread`, which moves no shared file position.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._open: dict[int, int] = {}
        self._most = open_shards()
        self._sound: set[int] = set()  # shards whose rows were checked
        self._until = 0.0

    def decode(self, sample: int) -> Image.Image:
        """The sample's RGB image; raises BadImage where it cannot be decoded."""
        return self.seen(sample, to_rgb)

    def seen(self, sample: int, view: Callable[[Image.Image], Found]) -> Found:
        """What `view` makes of the sample's image, opened and not yet decoded; BadImage where it cannot be opened.

        `view` decodes under `READING`, which tells a bad image from a mistake of its own.
        """
        with self.naming(sample), self.opened(sample, self.stored(sample)) as image:
            return view(image)

    def naming(self, sample: int) -> AbstractContextManager[None]:
        """Give a BadImage the sample's name."""
        return naming(lambda: self.index.name(sample))

    def stored(self, sample: int) -> Stored:
        """What the index has of a sample."""
        row: Stored = self.index.samples[sample].item()
        return row

    def opened(self, sample: int, stored: Stored) -> Image.Image:
        """The sample's image, not decoded yet, of which the index has `stored`; a BadImage here has no name."""
        return opened(io.BytesIO(self._read(sample, stored)))

    def decode_or_next(self, sample: int) -> Decoded[Image.Image]:
        """The sample's image, or that of the next decodable sample of the data set (cyclic)."""
        return decode_or_next(self.decode, sample, len(self.index), str(self.index.folder), AGAIN)

    def close(self) -> None:
        """Close this process's file descriptors; a later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, sample: int) -> bytes:
        """The sample's bytes as they were indexed, or BadImage."""
        with self.naming(sample):
            return self._read(sample, self.stored(sample))

    def _read(self, sample: int, stored: Stored) -> bytes:
        shard, offset, size, _, _, crc = stored
        self._refuse_outside(sample, shard, offset, size)
        data = self._bytes(shard, offset, size)
        if zlib.crc32(data) == crc:
            return data
        if self.index.remote is not None:
            os.close(self._open.pop(shard))
            self.index.remote.mend(shard)  # a node's disk that spoils a shard must not change what is trained on
            data = self._bytes(shard, offset, size)
            if zlib.crc32(data) == crc:
                return data
        self._refuse_changed(sample, shard, os.fstat(self._open[shard]))
        raise BadImage("its bytes are not those that were indexed")

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            path = self.index.shard_path(shard)
            raise UserError(f"cannot read shard {path}: {error}; check the file and its disk") from error

    def _refuse_outside(self, sample: int, shard: int, offset: int, size: int) -> None:
        """A damaged row must not have gigabytes read elsewhere."""
        shards = self.index.shards
        room = shards[shard].bytes - offset if 0 <= shard < len(shards) and offset >= 0 else -1
        if not 0 <= size <= min(LARGEST_IMAGE, room):
            path, again = self.index.folder / SAMPLES_FILE, f"fdscale shards index {self.index.folder}"
            raise UserError(f"{path}: row {sample} lies outside its shard; make it again: {again}")

    def _refuse_changed(self, sample: int, shard: int, now: os.stat_result) -> None:
        """A shard written anew under a run would give it other images, or none; one that was touched alone is read."""
        expected, written = self.index.shards[shard], self.index.written
        if now.st_size != expected.bytes or (written is not None and now.st_mtime_ns != written[shard]):
            path, member = self.index.shard_path(shard), self.index.name(sample).partition(":")[2]
            raise UserError(
                f"shard {path} changed while the run reads it: {member} is no longer what was indexed (the shard has "
                f"{now.st_size} bytes, had {expected.bytes}); put it back, or index it again and resume: "
                f"fdscale shards index {path.parent}"
            )

    def _descriptor(self, shard: int) -> int:
        if self.index.remote is not None and time.monotonic() > self._until:
            self.close()  # asking again tells the cache which shards are in use, and removed ones free their disk
            self._until = time.monotonic() + self.index.remote.renewed_seconds
        descriptor = self._open.pop(shard, None)
        if descriptor is None:
            descriptor = self._opened(shard)
        self._open[shard] = descriptor  # last in the dict: most recently used
        if len(self._open) > self._most:
            os.close(self._open.pop(next(iter(self._open))))
        return descriptor

    def _opened(self, shard: int) -> int:
        if shard not in self._sound:
            self.index.refuse_damaged_rows(shard)
            self._sound.add(shard)
        while True:
            try:
                return os.open(self.index.ready(shard), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if self.index.remote is None:  # else it was removed from the cache before it was opened
                    raise
