"""One tar shard to sample rows: where each image's bytes lie, its label and its key; no torch."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fdscale.config.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CLASSES_FILE = "classes.json"
NO_LABEL = -1
SAMPLE = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("size", "<i4"), ("label", "<i4"), ("key", "<u8")])


def key_hash(key: str) -> int:
    """The 64-bit number of a sample key (8-byte BLAKE2b, little endian), which all randomness starts from."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def scan_shard(path: Path, number: int, classes: tuple[str, ...] | None) -> NDArray[np.void]:
    """`SAMPLE` rows of one tar's images, in its order, with the labels of their KEY.cls members.

    Raises UserError for a file that is no whole tar, one without images, and a label that is no class number.
    """
    images: list[tuple[str, int, int]] = []
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, suffix = _split_key(member.name)
                if member.isreg() and suffix in IMAGE_SUFFIXES:
                    images.append((key, member.offset_data, member.size))
                elif member.isreg() and suffix == "cls":
                    labels[key] = _read_label(tar, member, path, classes)
            _check_end(path, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"shard {path} is not a whole tar file ({error}); copy or pack it again") from error
    if not images:
        raise UserError(f"shard {path} holds no image; expected members KEY.{{{','.join(IMAGE_SUFFIXES)}}}")
    rows = [(number, offset, size, labels.get(key, NO_LABEL), key_hash(key)) for key, offset, size in images]
    return np.array(rows, dtype=SAMPLE)


def member_name(path: Path, offset: int, key: int) -> str:
    """Name of the member whose data start at `offset`, from its tar header (the key if that is damaged)."""
    try:
        with path.open("rb") as file:
            file.seek(offset - tarfile.BLOCKSIZE)
            header = file.read(tarfile.BLOCKSIZE)
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
    except (OSError, tarfile.HeaderError):
        return f"key {key:016x}"


def _split_key(member: str) -> tuple[str, str]:
    """WebDataset's rule: the key is everything up to the first dot of the base name."""
    folder, slash, base = member.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _read_label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path, classes: tuple[str, ...] | None) -> int:
    stream = tar.extractfile(member)
    assert stream is not None, "a regular member has a stream"
    text = stream.read(64).decode("utf-8", "replace").strip()
    highest = (2**31 if classes is None else len(classes)) - 1
    if not (text.isascii() and text.isdigit() and int(text) <= highest):
        of_these = "" if classes is None else f" to {highest}, the {len(classes)} names in {CLASSES_FILE}"
        raise UserError(f"label {member.name} in shard {path} is {text!r}; allowed: an integer from 0{of_these}")
    return int(text)


def _check_end(path: Path, offset: int) -> None:
    """`tarfile` ends quietly at a damaged header and between members: samples would be lost unseen."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
        raise tarfile.ReadError(f"truncated or damaged at byte {offset}")
