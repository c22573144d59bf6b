"""One tar shard to sample rows: where each image's bytes lie, their checksum, its label and its key; no torch."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from fdscale.config.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CLASSES_FILE = "classes.json"
NO_LABEL = -1
# crc: zlib.crc32 of the image's bytes
SAMPLE = np.dtype(
    [("shard", "<i4"), ("offset", "<i8"), ("size", "<i4"), ("label", "<i4"), ("key", "<u8"), ("crc", "<u4")]
)
LARGEST_IMAGE = 256 * 2**20  # bytes: a worker reads an image whole
LARGEST_HEADER = 2**20  # bytes of a long name or of PAX records, which tarfile reads whole
LABEL_BYTES = 64
FIRST_DOT = "a key ends at the first dot of the name (WebDataset's rule); rename it"
BLOCK = 64 * 1024  # bytes read at once
NAME_BLOCKS = 8  # that a long name may take before the header of its member, to be found again
DAMAGED = (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError)  # tarfile on garbage


COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}  # by how such a file begins
ENDINGS = {"gzip": ".gz", "bzip2": ".bz2", "xz": ".xz"}


class Scanned(NamedTuple):
    """One shard: `SAMPLE` rows of its images in their order, its size in bytes, its SHA-256.

    `strays` are members that end as images do and are none, as `stray_images` says.
    """

    samples: NDArray[np.void]
    bytes: int
    sha256: str
    strays: tuple[str, ...] = ()


class Member(NamedTuple):
    """One image in a shard: its member's name, where its bytes lie, how many, and their CRC-32."""

    name: str
    offset: int
    size: int
    crc: int


def key_hash(key: str) -> int:
    """The 64-bit number of a sample key (8-byte BLAKE2b, little endian), which all randomness starts from."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def key_of(member: str) -> str:
    """The sample key of a member's name: all of it up to the first dot of the base name, as WebDataset has it."""
    return _split_key(member)[0]


def is_dotted_image(member: str) -> bool:
    """Whether a member ends as an image does, but has a further dot before, so that WebDataset calls it no image."""
    return "." in (suffix := _split_key(member)[1]) and suffix.rpartition(".")[2] in IMAGE_SUFFIXES


def stray_images(dotted: Iterable[str], images: Iterable[str]) -> tuple[str, ...]:
    """The members whose key has no image: masks and the like (KEY.seg.png beside KEY.jpg) belong to one."""
    keys = {key_of(name) for name in images}
    return tuple(name for name in dotted if key_of(name) not in keys)


def scan_shard(path: Path, number: int, classes: tuple[str, ...] | None) -> Scanned:
    """Read a tar once: the rows of its images, with the labels of their KEY.cls members, and its SHA-256.

    Raises UserError for a file that is no whole tar, one without images, a member whose name leads out of the folder
    it would be unpacked to, an image that is a link, sparse or larger than 256 MiB, and a label that is no class.
    """
    images: list[Member] = []
    labels: dict[str, int] = {}
    dotted: list[str] = []
    with path.open("rb") as file:
        hashed = _Hashed(file)
        try:
            with tarfile.open(fileobj=cast(BinaryIO, hashed), mode="r|", bufsize=BLOCK, tarinfo=BoundedHeader) as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
                    _take(tar, member, path, classes, images, labels)
                    if is_dotted_image(member.name) and member.isreg():
                        dotted.append(member.name)
                check_end(path, tar.offset)
        except DAMAGED as error:
            raise UserError(f"shard {path} is not a whole tar file ({error}); {mending(path)}") from error
        size, sha256 = hashed.finish()
    strays = stray_images(dotted, (image.name for image in images))
    if not images:
        expected = f"expected members KEY.{{{','.join(IMAGE_SUFFIXES)}}}"
        why = f"; {printable(strays[0])} is none: {FIRST_DOT}" if strays else ""
        raise UserError(f"shard {path} holds no image; {expected}{why}")
    return Scanned(_rows(images, labels, number), size, sha256, strays)


def member_name(path: Path, offset: int, key: int) -> str:
    """Name of the member of this key hash whose data start at `offset`, from its tar header (the key if damaged)."""
    start = max(0, offset - (1 + NAME_BLOCKS) * tarfile.BLOCKSIZE)
    try:
        with path.open("rb") as file:
            file.seek(start)
            before = file.read(offset - start)
    except OSError:
        return f"key {key:016x}"
    for blocks in range(1, len(before) // tarfile.BLOCKSIZE + 1):
        name = _first_name(before[-blocks * tarfile.BLOCKSIZE :])
        if name is not None and key_hash(key_of(name)) == key:
            return printable(name)
    return f"key {key:016x}"


def label_of(data: bytes, where: str, classes: int | None) -> int:
    """The class number that a label's bytes say; UserError, with `where` it is, for one of no class."""
    text = data[:LABEL_BYTES].decode("utf-8", "replace").strip()
    highest = (2**31 if classes is None else classes) - 1
    if not (text.isascii() and text.isdigit() and int(text) <= highest):
        of_these = "" if classes is None else f" to {highest}, the {classes} names in {CLASSES_FILE}"
        raise UserError(f"label {where} is {text!r}; allowed: an integer from 0{of_these}")
    return int(text)


def check_end(path: Path, offset: int, start: int = 0, end: int | None = None) -> None:
    """Raise ReadError unless zeros alone follow `offset` in the tar from `start` to `end` of a file (None: all of it).

    `tarfile` ends quietly at a damaged header, between members and at a zero block: images would be lost unseen.
    """
    with path.open("rb") as file:
        end = file.seek(0, io.SEEK_END) if end is None else end
        file.seek(offset)
        block, zeros = file.read(max(0, min(tarfile.BLOCKSIZE, end - offset))), b"\0"
        if len(block) < tarfile.BLOCKSIZE or block.strip(zeros):
            raise tarfile.ReadError(f"truncated or damaged at byte {offset - start}")
        while block := file.read(min(BLOCK, end - file.tell())):
            if block.strip(zeros):
                raise tarfile.ReadError(f"it ends at byte {offset - start}, but something follows")


def mending(path: Path) -> str:
    """What to do with a file that is no whole tar: it may be a compressed one under a tar's name."""
    with path.open("rb") as file:
        start = file.read(8)
    for magic, program in COMPRESSED.items():
        if start.startswith(magic):
            ending = ENDINGS[program]
            return f"it is compressed by {program}: mv {path} {path}{ending} && {program} -d {path}{ending}"
    return "download, copy or pack it again"


def printable(name: str) -> str:
    """A member's name for a message: line ends, escape sequences and bytes that are no UTF-8 are written out."""
    return "".join(c if c.isprintable() else c.encode("utf-8", "surrogateescape").hex() for c in name)


class _Hashed:
    """A file that hashes whatever is read of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._bytes = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        self._bytes += len(data)
        return data

    def finish(self) -> tuple[int, str]:
        """Read the rest; the file's size and its SHA-256."""
        while self.read(2**20):
            pass
        return self._bytes, self._digest.hexdigest()


class BoundedHeader(tarfile.TarInfo):
    """A header whose size is possible: tarfile reads long names whole, and goes back where a size is negative."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> BoundedHeader:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise tarfile.ReadError(f"the header of {printable(header.name)} says {header.size} bytes")
        of_name = header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if (of_name or header.type in tarfile.GNU_TYPES[:2]) and header.size > LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {header.size} bytes; allowed: {LARGEST_HEADER}")
        return header


def _take(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    path: Path,
    classes: tuple[str, ...] | None,
    images: list[Member],
    labels: dict[str, int],
) -> None:
    key, suffix = _split_key(member.name)
    if why := _why_refused(member, suffix in IMAGE_SUFFIXES or suffix == "cls"):
        raise UserError(f"shard {path}: member {printable(member.name)} {why}")
    if not member.isreg():
        return
    if suffix in IMAGE_SUFFIXES:
        crc = 0
        for block in _blocks(tar, member):
            crc = zlib.crc32(block, crc)
        images.append(Member(member.name, member.offset_data, member.size, crc))
    elif suffix == "cls":
        where = f"{printable(member.name)} in shard {path}"
        label = label_of(next(_blocks(tar, member), b""), where, None if classes is None else len(classes))
        if labels.setdefault(key, label) != label:
            raise UserError(f"label {printable(member.name)} appears twice in shard {path}, and differs; remove one")


def _why_refused(member: tarfile.TarInfo, used: bool) -> str | None:
    """Why a member is not taken: it leads out of its folder, or would be `used` as a sample and is no plain file."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "leads out of the folder it would be unpacked to; rename it, and pack again"
    if not used or member.isdir():
        return None
    if member.issym() or member.islnk():
        return f"is a link to {printable(member.linkname)}; allowed: files (tar --dereference --hard-dereference)"
    if not member.isreg() or member.issparse():
        return "is a sparse or special file; allowed: plain files; pack it again"
    if member.size > LARGEST_IMAGE:
        return f"has {member.size} bytes; allowed: {LARGEST_IMAGE}; make it smaller, or remove it"
    return None


def _blocks(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    stream = tar.extractfile(member)
    assert stream is not None, "a regular member has a stream"
    left = member.size
    while left:
        block = stream.read(min(left, BLOCK))
        if not block:
            raise tarfile.ReadError(f"unexpected end of data in {printable(member.name)}")
        left -= len(block)
        yield block


def _rows(images: list[Member], labels: dict[str, int], number: int) -> NDArray[np.void]:
    keys = [key_of(image.name) for image in images]
    rows = [
        (number, image.offset, image.size, labels.get(key, NO_LABEL), key_hash(key), image.crc)
        for image, key in zip(images, keys, strict=True)
    ]
    return np.array(rows, dtype=SAMPLE)


def _first_name(blocks: bytes) -> str | None:
    """Name of the first member of a tar's blocks when they hold all its headers and nothing else."""
    try:
        with tarfile.open(fileobj=io.BytesIO(blocks), mode="r:", tarinfo=BoundedHeader) as tar:
            member = tar.firstmember  # type: ignore[attr-defined]
    except DAMAGED:
        return None
    return member.name if member is not None and member.offset_data == len(blocks) else None


def _split_key(member: str) -> tuple[str, str]:
    """WebDataset's rule: the key is everything up to the first dot of the base name."""
    folder, slash, base = member.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()
