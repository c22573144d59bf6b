"""Shard folders, settings and machines of this room's tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fdscale.data.index import build_index


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., str]:
    """A folder of real tar shards: `shards(samples=8, number=2, labels=True)`."""

    def make(samples: int = 8, number: int = 2, labels: bool = True) -> str:
        folder = tmp_path / f"shards-{samples}-{number}-{labels}"
        folder.mkdir()
        image = io.BytesIO()
        Image.new("RGB", (8, 8)).save(image, "PNG")
        for shard in range(number):
            with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
                for sample in range(shard, samples, number):
                    _add(tar, f"{sample:05}.png", image.getvalue())
                    if labels:
                        _add(tar, f"{sample:05}.cls", str(sample % 4).encode())
        build_index(folder)
        return str(folder)

    return make


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
