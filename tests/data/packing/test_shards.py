"""Shards are written by any number of processes, whole or not at all, and on after a kill."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fdscale.config.errors import UserError
from fdscale.data.index import build_index
from fdscale.data.packing.folder import folder_source
from fdscale.data.packing.pack import pack
from fdscale.data.packing.plan import Plan, Record, Work
from fdscale.data.packing.shards import write_shards
from tests.data.packing.small import contents, jpeg, packed
from tests.descendants import assert_end, descendants


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """24 images of two classes."""
    for number in range(24):
        folder = tmp_path / "source" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.jpg").write_bytes(jpeg(number))
    return tmp_path / "source"


def many(folder: Path, images: int) -> Path:
    """A flat folder whose images are all one."""
    folder.mkdir()
    for number in range(images):
        (folder / f"{number:05d}.jpg").write_bytes(jpeg(0))
    return folder


def hidden(output: Path) -> Path:
    return output.parent / f".{output.name}.packing"


@contextmanager
def files_no_larger_than(size: int):
    """As a full disk, for what this process writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_any_number_of_workers_writes_the_same_bytes(source, tmp_path):
    (source / "cat" / "bad.jpg").write_bytes(b"")
    for workers in (1, 3):
        pack(source, tmp_path / f"out{workers}", 5, workers=workers, max_bad_ratio=0.1)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out1", tmp_path / "out3", source]


def test_the_index_is_that_which_reading_the_shards_gives(source, tmp_path):
    pack(source, tmp_path / "out", 5)
    before = contents(tmp_path / "out")
    build_index(tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_the_order_is_shuffled_once_over_everything():
    order = Plan(1000, 10, 0, None).order()
    assert sorted(order.tolist()) == list(range(1000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
    assert Plan(1000, 300, 0, None).shards == 4
    assert Plan(3, 10, None, None).order().tolist() == [0, 1, 2]


def packing(source: Path, output: Path, stderr: int) -> subprocess.Popen:
    """`fdscale shards pack` at work, in shards of two images."""
    command = [sys.executable, "-m", "fdscale", "shards", "pack", str(source), str(output)]
    options = ["--samples-per-shard", "2", "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [*command, *options], env=environment, text=True, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
    )


def wait_for_records(process: subprocess.Popen, output: Path) -> None:
    records = hidden(output) / "records"
    while not records.exists() or len(list(records.glob("*.json"))) < 5:
        assert process.poll() is None
        time.sleep(0.002)


def test_a_killed_one_goes_on_with_its_whole_shards(tmp_path):
    """SIGKILL at any time; the other processes of the killed one end, too."""
    source, output = many(tmp_path / "source", 400), tmp_path / "out"
    process = packing(source, output, subprocess.DEVNULL)
    wait_for_records(process, output)
    others = descendants(process.pid)
    process.kill()
    process.wait()
    assert len(others) >= 3  # the server that forks, and two workers
    assert_end(others)
    assert not output.exists()
    whole = {number: record for number in range(200) if (record := Work(output).record(number)) is not None}
    assert 5 <= len(whole) < 200
    times = {number: Work(output).shard_path(number).stat() for number in whole}
    pack(source, output, 2)
    for number, before in times.items():
        now = (output / f"shard-{number:05d}.tar").stat()
        assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    pack(source, tmp_path / "at_once", 2)
    assert contents(output) == contents(tmp_path / "at_once")
    assert not hidden(output).exists()


def test_a_terminated_one_ends_in_order(tmp_path):
    """SIGTERM to all of its processes, as a preempted job gets it."""
    output = tmp_path / "out"
    process = packing(many(tmp_path / "source", 400), output, subprocess.STDOUT)
    wait_for_records(process, output)
    others = descendants(process.pid)
    os.killpg(process.pid, signal.SIGTERM)
    told, _ = process.communicate()
    assert process.returncode == 130
    assert "interrupted; the same command goes on with the shards that are whole" in told
    assert "leaked" not in told
    assert "Traceback" not in told
    assert_end(others)


def test_a_full_disk_loses_nothing(source, tmp_path):
    """Its first four shards fit, the fifth is larger."""
    files = folder_source(source)
    (source / files.names[int(Plan(24, 3, 0, None).order()[12])]).write_bytes(jpeg(0) + b"\0" * 30_000)
    told = (
        r"cannot write to \S+\.out\.packing \(File too large\); its whole shards are kept: .* the same command goes on"
    )
    with files_no_larger_than(25_000), pytest.raises(UserError, match=told):
        pack(source, tmp_path / "out", 3)
    whole = [number for number in range(8) if Work(tmp_path / "out").record(number) is not None]
    assert whole == [0, 1, 2, 3]
    assert not list(hidden(tmp_path / "out").glob("*/.*.partial"))
    assert len(pack(source, tmp_path / "out", 3)) == 24


@pytest.fixture
def half(source: Path, tmp_path: Path) -> Path:
    """Packing in shards of 5 that ended at its third shard, where an image could not be read."""
    files = folder_source(source)
    victim = source / files.names[int(Plan(24, 5, 0, None).order()[12])]
    victim.rename(tmp_path / "away")
    with pytest.raises(UserError, match=rf"{victim} cannot be read \(No such file or directory\); .*it goes on"):
        write_shards(files, tmp_path / "out", 5, 0)
    (tmp_path / "away").rename(victim)
    assert [Work(tmp_path / "out").record(number) is not None for number in range(5)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    return tmp_path / "out"


def test_an_unreadable_image_ends_it_and_it_goes_on(half, source, caplog):
    caplog.set_level("INFO")
    assert len(pack(source, half, 5)) == 24
    assert "going on: 2 of 5 shards are whole" in caplog.text


@pytest.mark.parametrize("change", ["bytes", "new", "gone", "name"])
def test_a_source_that_changed_is_refused_by_name(half, source, change):
    first = source / "cat" / "05.jpg"
    if change == "bytes":
        first.write_bytes(jpeg(99))
    elif change == "new":
        (source / "cat" / "05a.jpg").write_bytes(jpeg(99))
    elif change == "gone":
        first.unlink()
    else:
        first.rename(source / "cat" / "06.jpg")
    named = {"bytes": "cat/05.jpg", "new": "cat/05a.jpg", "gone": "cat/07.jpg", "name": "cat/06.jpg"}[change]
    before = sorted(hidden(half).rglob("*"))
    with pytest.raises(
        UserError, match=rf"had 24 images when .* changed is {named}; have it as it was .*or remove \S+"
    ):
        pack(source, half, 5)
    assert sorted(hidden(half).rglob("*")) == before


def test_options_that_changed_are_refused_by_name(half, source, tmp_path):
    with pytest.raises(UserError, match=r"begun with another --samples-per-shard: 5 then, 6 now; have it as it was"):
        pack(source, half, 6)
    with pytest.raises(UserError, match=r"begun with another --seed: 0 then, 1 now"):
        pack(source, half, 5, seed=1)
    for name in ("ape", "cat", "dog"):
        (tmp_path / "three" / name).mkdir(parents=True)
        (tmp_path / "three" / name / "1.jpg").write_bytes(jpeg(1))
    pack(tmp_path / "three", tmp_path / "three.tars")
    with pytest.raises(UserError, match=r"begun with another numbering of classes; have it as it was"):
        pack(source, half, 5, classes_of=tmp_path / "three.tars")


def test_two_at_once_are_refused(half, source):
    work = Work(half)
    files = folder_source(source)
    with (
        work.opened(Plan(24, 5, 0, files.classes), files),
        pytest.raises(UserError, match="another process is packing"),
    ):
        pack(source, half, 5)


@pytest.mark.parametrize("damage", ["tar is cut", "no tar", "record is cut"])
def test_a_shard_counts_as_whole_with_its_record_and_its_size(half, source, tmp_path, damage):
    tar, record = Work(half).shard_path(0), hidden(half) / "records" / "shard-00000.json"
    if damage == "no tar":
        tar.unlink()
    else:
        path = tar if damage == "tar is cut" else record
        path.write_bytes(path.read_bytes()[:-20])
    assert Work(half).record(0) is None
    assert isinstance(Work(half).record(1), Record)
    pack(source, half, 5)
    pack(source, tmp_path / "at_once", 5)
    assert contents(half) == contents(tmp_path / "at_once")


BAD = {
    "empty.jpg": (b"", "it is empty"),
    "text.png": (b"<html>Not found</html>", "no image of a known format"),
    "cut.jpeg": (jpeg(1)[:20], "no image of a known format"),
}


def test_images_that_are_none_are_left_out_counted_and_named(tmp_path, caplog):
    source = many(tmp_path / "source", 20)
    for name, (data, _) in BAD.items():
        (source / name).write_bytes(data)
    with pytest.raises(UserError, match=r"3 of 23 images are left out, more than --max-bad-ratio 0\.01 allows: "):
        pack(source, tmp_path / "out", 6)
    index = pack(source, tmp_path / "out", 6, max_bad_ratio=0.2)
    assert len(index) == 20
    lines = (tmp_path / "out" / "left_out.txt").read_text().splitlines()
    assert sorted(lines) == sorted(f"{name}: {why}" for name, (_, why) in BAD.items())
    assert "left out 3 images, all named in" in caplog.text
    for name in BAD:
        assert name in caplog.text


def test_a_shard_of_which_nothing_is_left_is_not_written(tmp_path):
    source = many(tmp_path / "source", 4)
    (source / "bad.jpg").write_bytes(b"")
    index = pack(source, tmp_path / "out", 1, max_bad_ratio=0.5)
    assert [shard.samples for shard in index.shards] == [1, 1, 1, 1]
    assert index.samples["shard"].tolist() == [0, 1, 2, 3]
    assert set(packed(index)) == {f"{number:05d}.jpg" for number in range(4)}
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "bad.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"none of 1 images can be read, the first is bad\.jpg: no image"):
        pack(tmp_path / "none", tmp_path / "other", 1, max_bad_ratio=1)


def test_an_image_under_another_formats_name_stays_readable(tmp_path, png):
    source = many(tmp_path / "source", 1)
    (source / "really_a.bmp").write_bytes(png(3))
    assert packed(pack(source, tmp_path / "out", 5))["really_a.png"] == (png(3), -1)


def test_ctrl_c_is_told(source, tmp_path, caplog, monkeypatch):
    calls = []

    def read(self, number):
        calls.append(number)
        if len(calls) == 8:
            signal.raise_signal(signal.SIGINT)
        return original(self, number)

    from fdscale.data.packing.sources import Files

    original = Files.read
    monkeypatch.setattr(Files, "read", read)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", 5)
    signal.signal(signal.SIGINT, before)
    assert "interrupted; the same command goes on" in caplog.text
    assert len(pack(source, tmp_path / "out", 5)) == 24
