"""Tiny images and tars, and what was packed of them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from fdscale.data.index import Index

WNIDS = ("n01440764", "n01443537", "n02084071")


def jpeg(number: int, mode: str = "RGB") -> bytes:
    """A noise JPEG whose content depends on its number."""
    channels = {"RGB": 3, "CMYK": 4}[mode]
    pixels = np.random.default_rng(number).integers(0, 256, (9, 11, channels), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels, mode).save(stream, "jpeg")
    return stream.getvalue()


def tar_bytes(members: Mapping[str, bytes | tarfile.TarInfo]) -> bytes:
    """A tar of files by name; a TarInfo is put in as it is, without data."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in members.items():
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = 0 if isinstance(data, tarfile.TarInfo) else len(data)
            tar.addfile(info, None if isinstance(data, tarfile.TarInfo) else io.BytesIO(data))
    return stream.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    """A tar member that is a link."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of everything in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def packed(index: Index) -> dict[str, tuple[bytes, int]]:
    """Member name -> encoded bytes and label."""
    found = {}
    for sample, row in enumerate(index.samples):
        data = index.shard_path(int(row["shard"])).read_bytes()
        found[index.name(sample).split(":")[1]] = (
            data[row["offset"] : row["offset"] + row["size"]],
            int(row["label"]),
        )
    return found
