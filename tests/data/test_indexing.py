"""Shards scanned by several processes, which end with the one that started them."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import time

import pytest

from fdscale.config.errors import UserError
from fdscale.data.index import build_index
from fdscale.data.packing.pack import pack
from tests.data.packing.small import tar_bytes
from tests.descendants import assert_end, descendants

HOURS = 2**40  # bytes that one process reads in no less


def test_several_processes_give_the_index_of_one(write_shards, png):
    folder = write_shards([{f"{shard}-{n}.png": png(n) for n in range(3)} for shard in range(7)])
    build_index(folder, workers=1)
    alone = [(folder / name).read_bytes() for name in ("index.json", "samples.npy")]
    build_index(folder, workers=3)
    assert [(folder / name).read_bytes() for name in ("index.json", "samples.npy")] == alone
    (folder / "s5.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match=r"s5\.tar is not a whole tar"):
        build_index(folder, workers=3)


def test_images_that_webdatasets_rule_leaves_out_are_counted_and_named(write_shards, png, caplog):
    folder = write_shards([{"a.png": png(0), "a.seg.png": png(1), "r.left.png": png(2)}, {"d/b.png": png(3)}])
    assert len(build_index(folder)) == 2
    assert "1 members end as images do and are not indexed (s0.tar:r.left.png): a key ends at the first" in caplog.text
    (folder / "s1.tar").write_bytes(tar_bytes({"x.v0.png": png(0)}))
    with pytest.raises(UserError, match=r"s1\.tar holds no image; expected .*; x\.v0\.png is none: a key ends at the"):
        build_index(folder)


def test_a_compressed_tar_under_a_tars_name_is_told_how_to_unpack(write_shards, png):
    folder = write_shards([{"a.png": png(0)}])
    path = folder / "s0.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))
    told = rf"it is compressed by gzip: mv {path} {path}\.gz && gzip -d {path}\.gz$"
    with pytest.raises(UserError, match=told):
        build_index(folder)
    with pytest.raises(UserError, match=told):
        pack(path, folder.parent / "out")
    subprocess.run(f"mv {path} {path}.gz && gzip -d {path}.gz", shell=True, check=True)
    assert len(build_index(folder)) == 1


def test_one_that_is_killed_leaves_no_process(tmp_path):
    for number in range(2):
        with (tmp_path / f"s{number}.tar").open("wb") as file:
            file.truncate(HOURS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "fdscale", "shards", "index", str(tmp_path), "--workers", "2"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while len(others := descendants(process.pid)) < 4:  # two workers, the server that forks and its tracker
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert_end(others)
