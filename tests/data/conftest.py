"""Tiny real shard folders: images made of seeded noise, written with tarfile."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Members = Mapping[str, bytes]
WriteShards = Callable[[Sequence[Members]], Path]


@pytest.fixture(scope="session")
def png() -> Callable[[int], bytes]:
    """An RGB noise PNG whose size and content depend on its number."""

    def make(number: int) -> bytes:
        draw = np.random.default_rng(number)
        pixels = draw.integers(0, 256, (10 + number % 5, 12 + number % 3, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "png")
        return stream.getvalue()

    return make


@pytest.fixture
def write_shards(tmp_path: Path) -> WriteShards:
    """A folder of tars, one per mapping of member name -> bytes."""

    def write(shards: Sequence[Members]) -> Path:
        folder = tmp_path / "shards"
        folder.mkdir()
        for number, members in enumerate(shards):
            with tarfile.open(folder / f"s{number}.tar", "w") as tar:
                for name, data in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return folder

    return write


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory, png: Callable[[int], bytes]) -> Path:
    """One shard of 26 good images with labels 0..4."""
    folder = tmp_path_factory.mktemp("plain")
    with tarfile.open(folder / "only.tar", "w") as tar:
        for number in range(26):
            for suffix, data in (("cls", str(number % 5).encode()), ("png", png(number))):
                info = tarfile.TarInfo(f"image-{number:02d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder
