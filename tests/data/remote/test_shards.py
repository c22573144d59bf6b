from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fdscale.config.errors import UserError
from fdscale.data.ahead import ShardsAhead
from fdscale.data.augment import Augmentation
from fdscale.data.batches import EvalBatches, TrainBatches
from fdscale.data.images import BadImage, ImageReader
from fdscale.data.index import Index, Shard, build_index, load_index
from fdscale.data.loader import EvalLoader, TrainLoader
from fdscale.data.mixture import Mixture
from fdscale.data.order import WindowedOrder
from fdscale.data.remote.cache import GIB, Cache
from fdscale.data.remote.shards import RemoteShards, bytes_at_once, room_problem
from fdscale.data.scan import SAMPLE
from tests.data.shard_server import ShardServer

SHARDS = 3


def shown(index: Index, workers: int, world_size: int = 1) -> list[bytes]:
    """The images of an epoch and more, by all ranks in turn."""
    mixture = Mixture((index,), shuffle=4)
    ranks = [
        TrainLoader(
            TrainBatches(mixture, 6, Augmentation((0.2, 1.0), (0.75, 1.33), "bilinear", 0.5), 5),
            mixture.order(2, 5),
            rank,
            world_size,
            2 // world_size,
            workers,
            torch.device("cpu"),
            ShardsAhead(mixture, 1.0, GIB),
        ).steps(0, 5)
        for rank in range(world_size)
    ]
    return [
        b"".join(batch.images.numpy().tobytes() for batch in step)
        for steps in zip(*ranks, strict=True)
        for step in steps
    ]


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (2, 1), (1, 2)])
def test_the_loader_shows_the_same_over_a_network_and_fetches_each_shard_once(
    server: ShardServer, folder: Path, tmp_path: Path, workers: int, world_size: int
) -> None:
    remote = load_index(server.url, Cache(tmp_path / "cache", GIB))
    assert shown(remote, workers, world_size) == shown(load_index(folder), workers, world_size)
    assert {name: times for name, times in server.asked.items() if name.endswith(".tar")} == {
        f"s{shard}.tar": 1 for shard in range(SHARDS)
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_counts_what_it_and_its_processes_fetch(server: ShardServer, cache: Cache, workers: int) -> None:
    mixture = Mixture((load_index(server.url, cache),), shuffle=4)
    batches = TrainBatches(mixture, 6, Augmentation((0.2, 1.0), (0.75, 1.33), "bilinear", 0.5), 5)
    ahead = ShardsAhead(mixture, 1.0, GIB)
    loader = TrainLoader(batches, mixture.order(2, 5), 0, 1, 2, workers, torch.device("cpu"), ahead)
    assert len(list(loader.steps(0, 3))) == 3
    assert loader.fetched_bytes == sum(path.stat().st_size for path in server.folder.iterdir())


def same_pixels(one: Index, other: Index) -> bool:
    readers = ImageReader(one), ImageReader(other)
    pairs = [[np.asarray(reader.decode(sample)) for reader in readers] for sample in range(len(other))]
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in pairs)


def changed_index(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "index.json").read_text())
    change(manifest)
    (folder / "index.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("scheme", ["http", "file", "pipe"])
def test_remote_images_are_those_of_the_folder(folder, server, cache, scheme):
    url = {"http": server.url, "file": folder.as_uri() + "/", "pipe": f"pipe:cat '{folder}'/{{}}"}[scheme]
    index = load_index(url, Cache(cache.folder, GIB, allow_pipe=scheme == "pipe"))
    assert not list(cache.folder.glob("*/*.tar"))  # nothing before it is needed
    assert same_pixels(index, load_index(folder))
    assert index.fingerprint() == load_index(folder).fingerprint()
    assert index.remote.cache.fetched_bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_workers_read_remote_shards_like_local_ones(folder, server, cache):
    def batches(index: Index) -> Iterator[tuple[list, list, list]]:
        dataset = EvalBatches(index, 8, "bilinear")
        for batch in EvalLoader(dataset, len(index), 0, 1, 2, 2, torch.device("cpu")):
            yield batch.images.tolist(), batch.keys.tolist(), batch.bad

    assert list(batches(load_index(server.url, cache))) == list(batches(load_index(folder)))
    assert all(server.asked[f"s{shard}.tar"] == 1 for shard in range(SHARDS))


def test_a_reader_lets_go_of_removed_shards_and_has_them_fetched_again(folder, cache, monkeypatch):
    monkeypatch.setattr(RemoteShards, "renewed_seconds", 0.0)
    index = load_index(folder.as_uri(), cache)
    reader = ImageReader(index)
    reader.decode(0)
    index.shard_path(0).unlink()
    reader.decode(2)
    assert [link for link in open_links() if str(cache.folder) in link and ".tar" in link] == [str(index.shard_path(1))]
    assert np.array_equal(reader.decode(0), ImageReader(load_index(folder)).decode(0))
    assert index.shard_path(0).exists()


def spoiled(shard: Path) -> None:
    """As a disk may leave it: other bytes, as many."""
    shard.write_bytes(bytes(byte ^ 1 for byte in shard.read_bytes()))


def test_a_shard_that_rots_in_the_cache_is_fetched_again(folder, server, cache):
    remote = load_index(server.url, cache)
    readers = ImageReader(remote), ImageReader(load_index(server.url, cache))
    for reader in readers:
        reader.read(0)
    spoiled(remote.shard_path(0))
    for reader in readers:  # the second has the spoiled file open when the first has mended it
        assert reader.read(0) == ImageReader(load_index(folder)).read(0)
    assert server.asked["s0.tar"] == 2


def test_rows_that_never_fitted_their_shard_are_bad_images_and_nothing_is_fetched_again(folder, server, cache):
    rows = np.load(folder / "samples.npy")
    rows["crc"][:2] += 1
    np.save(folder / "samples.npy", rows)
    content = (folder / "samples.npy").read_bytes()
    described = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    changed_index(folder, lambda manifest: manifest.update(samples_file=described))
    changed_index(folder, lambda manifest: manifest["shards"][0].update(rows_crc=zlib.crc32(rows[:2].tobytes())))
    reader = ImageReader(load_index(server.url, cache))
    for sample in (0, 1, 0):
        with pytest.raises(BadImage, match="its bytes are not those that were indexed"):
            reader.read(sample)
    assert server.asked["s0.tar"] == 1


def open_links() -> list[str]:
    """What this process has open."""
    return [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]


def test_a_second_start_fetches_the_small_index_alone(folder, server, cache):
    first = load_index(server.url, cache)
    first.ready(1)
    server.asked.clear()
    load_index(server.url, cache).ready(1)
    assert server.asked == {"index.json": 1}


def test_the_folder_in_the_cache_is_a_shard_folder_once_all_is_there(folder, server, cache):
    index = load_index(server.url, cache)
    for shard in range(SHARDS):
        index.ready(shard)
    assert same_pixels(load_index(index.folder), load_index(folder))


def test_a_changed_data_set_is_another_one(folder, server, cache):
    before = load_index(server.url, cache)
    before.ready(0)
    (folder / "s2.tar").unlink()
    build_index(folder, workers=1)
    after = load_index(server.url, cache)
    assert after.folder != before.folder
    assert after.fingerprint() != before.fingerprint()
    assert same_pixels(after, load_index(folder))


def test_rows_that_are_not_of_the_index_are_refused(folder, server, cache):
    server.faults["samples.npy"] = lambda content, n: (content[:-1] + b"\1", len(content))
    with pytest.raises(UserError, match=r"samples\.npy: \d+ bytes came, but not those that were indexed"):
        load_index(server.url, cache)


BEYOND = ["../escaped.tar", "/tmp/escaped.tar", "a/b.tar", "..", ".hidden.tar", "-o.tar", "a b.tar", "a;touch x.tar"]


BEYOND += [
    "$(touch marker).tar",
    "`touch marker`.tar",
    "a'b.tar",
    'a"b.tar',
    "a\nb.tar",
    "a|b.tar",
    "a.tar\n",
    "a*.tar",
]


BEYOND += [
    "index.json",
    "a.zip",
    "",
    "a{}.tar",
    "[1-9].tar",
    "a%2fb.tar",
    "?.tar",
    "x" * 300 + ".tar",
    "é.tar",
    7,
    None,
]


def test_an_index_names_plain_files_only(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = json.loads((folder / "index.json").read_text())
    for name in BEYOND:
        named["shards"][1]["name"] = name
        (folder / "index.json").write_text(json.dumps(named))
        with pytest.raises(UserError, match=r"index\.json.* is no index of shards \(shards\.1\.name: "):
            load_index(f"pipe:cat '{folder}'/{{}}", Cache(tmp_path / "cache", GIB, allow_pipe=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]  # no marker, no cache


HOSTILE = {
    "version": lambda manifest: manifest.update(version=1),
    "more": lambda manifest: manifest.update(more=1),
    "as a whole": lambda manifest: manifest["shards"].append(dict(manifest["shards"][0])),
    "shards.0.bytes": lambda manifest: manifest["shards"][0].update(bytes=2**60),
    "shards.2.samples": lambda manifest: manifest["shards"][2].update(samples=-1),
    "shards.0.sha256": lambda manifest: manifest["shards"][0].update(sha256="../../x"),
    "samples_file": lambda manifest: manifest.pop("samples_file"),
    "classes": lambda manifest: manifest.update(classes={"a": 1}),
    "shards": lambda manifest: manifest.update(shards=[]),
}


@pytest.mark.parametrize("where", HOSTILE)
def test_an_index_that_is_none_is_told(folder, cache, where):
    changed_index(folder, HOSTILE[where])
    with pytest.raises(
        UserError, match=rf"index\.json is no index of shards \({'it names' if ' ' in where else where}"
    ):
        load_index(folder.as_uri(), cache)
    assert not cache.folder.exists()


@pytest.mark.parametrize("content", [b"", b"[" * 10**6, b"\xff\xfe", b'{"version": 2}', b"<html>404</html>", b"null"])
def test_what_is_no_index_at_all_is_told(folder, cache, content):
    (folder / "index.json").write_bytes(content)
    with pytest.raises(UserError, match="is no index of shards"):
        load_index(folder.as_uri(), cache)


@pytest.mark.parametrize("content", [b"PK\3\4" + b"x" * 100, b"\x80\4]\x94.", b"", b"\x93NUMPY\1\0\x06\0{'a'}\n"])
def test_rows_that_are_none_are_told(folder, cache, content):
    (folder / "samples.npy").write_bytes(content or b"\0")
    digest = hashlib.sha256(content or b"\0").hexdigest()
    changed_index(folder, lambda manifest: manifest.update(samples_file={"bytes": len(content) or 1, "sha256": digest}))
    with pytest.raises(UserError, match=r"samples\.npy"):
        load_index(folder.as_uri(), cache)


def test_hostile_rows_read_nothing_outside_their_shards(folder, server, cache):
    rows = np.load(folder / "samples.npy")
    rows["offset"][1], rows["shard"][2] = 10**12, -1
    np.save(folder / "samples.npy", rows)
    content = (folder / "samples.npy").read_bytes()
    described = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    changed_index(folder, lambda manifest: manifest.update(samples_file=described))
    reader = ImageReader(load_index(server.url, cache))
    for sample in (1, 2):
        with pytest.raises(UserError, match="lies outside its shard"):
            reader.decode(sample)


@pytest.mark.parametrize("url", ["https://host/in1k", "pipe:cat /in1k/{}"])
def test_a_url_takes_a_cache(url):
    with pytest.raises(UserError, match=r"are fetched to the nodes that read them: set data\.cache to a folder"):
        load_index(url)


def test_a_cache_that_cannot_be_written_is_told(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache: cannot write to .*Not a directory.*; name a folder"):
        load_index(folder.as_uri(), Cache(tmp_path / "file", GIB))


def test_room_for_what_is_read_at_once(folder):
    index = load_index(folder)
    assert bytes_at_once(index, shuffle=6, share=0.1) == sum(shard.bytes for shard in index.shards)  # shuffled as one
    cache = Cache(folder, 3 * GIB)
    assert room_problem(cache, 3 * GIB) is None
    assert room_problem(cache, 6 * GIB).startswith("data.cache_gib: got 3, allowed: at least 6, ")


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("per_shard", [50, 500])
def test_the_room_that_is_asked_for_suffices_to_fetch_each_shard_about_once(nodes, per_shard):
    shards = tuple(Shard(f"{n}.tar", per_shard, 1000, "", 0) for n in range(100_000 // per_shard))
    index = Index(Path(), shards, None, np.empty(100_000, SAMPLE))
    order = WindowedOrder(index.starts, 256, 0, shuffle=16_384)
    room, fetched = bytes_at_once(index, 16_384, 1 / nodes) // 1000, 0
    assert room < len(shards)
    for node in range(nodes):
        cached: dict[int, None] = {}
        for step in range(order.steps_per_epoch):
            own = order.batch(step)[node * 256 // nodes : (node + 1) * 256 // nodes]
            for shard in np.unique(np.searchsorted(index.starts, own, side="right") - 1).tolist():
                fetched += shard not in cached
                cached.pop(shard, None)
                cached[shard] = None  # last in the dict: most recently used
                if len(cached) > room:
                    cached.pop(next(iter(cached)))
    assert fetched / len(shards) < 1.1 + 64 / len(shards)  # lanes begin within shards; half the room: 16 times
