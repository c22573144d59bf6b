"""A folder of shards, a server of it, and a cache; a fetch that fails is tried again at once."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fdscale.data.index import build_index
from fdscale.data.remote import transfer
from fdscale.data.remote.cache import GIB, Cache
from tests.data.shard_server import ShardServer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, png: Callable[[int], bytes]) -> Path:
    """An indexed folder of three shards of two images."""
    folder = tmp_path_factory.mktemp("made") / "shards"
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"s{shard}.tar", "w") as tar:
            for image in range(2):
                info, data = tarfile.TarInfo(f"{shard}-{image}.png"), png(10 * shard + image)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    build_index(folder, workers=1)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of one's own."""
    return Path(shutil.copytree(made, tmp_path / "shards"))


@pytest.fixture
def server(folder: Path) -> Iterator[ShardServer]:
    with ShardServer(folder).serving() as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", GIB)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "WAITS", (0.05, 0.05))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
