from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pytest

from fdscale.config.data_settings import DataSettings
from fdscale.config.errors import UserError
from fdscale.data.remote import cache as cache_module
from fdscale.data.remote.cache import Cache, cache_of

SIZE = 100_000
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Room for three files and a little."""
    return Cache(tmp_path / "cache", 3 * SIZE + 1000)


@pytest.fixture
def home(cache: Cache) -> Path:
    return cache.made("in1k", "https://host/in1k")


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "JUST_USED_SECONDS", 0.0)
    monkeypatch.setattr(cache_module, "ROOM_SECONDS", 0.01)


def filled(letter: bytes) -> Callable[[BinaryIO], object]:
    return lambda file: file.write(letter * SIZE)


def unasked(file: BinaryIO) -> None:
    raise AssertionError("it is there already")


def age(path: Path, seconds: float) -> None:
    """As if it had been used so long ago."""
    os.utime(path, (time.time() - seconds, path.stat().st_mtime))


def disk_of(folder: Path) -> int:
    with (folder / ".lock").open("rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # while nothing comes and goes
        return sum(path.stat().st_size for path in folder.rglob("*.tar*"))


def test_a_file_is_brought_once_and_counted(cache, home):
    assert cache.keep(home / "a.tar", SIZE, filled(b"a")).read_bytes() == b"a" * SIZE
    cache.keep(home / "a.tar", SIZE, unasked)
    assert cache.keep_ahead(home / "a.tar", SIZE, unasked)
    assert cache.fetched_bytes == SIZE
    assert sorted(path.name for path in home.iterdir()) == [".fetched", "a.tar"]
    assert (home / ".fetched").read_text() == "https://host/in1k\n"


def test_a_file_of_another_size_is_brought_again(cache, home):
    (home / "a.tar").write_bytes(b"a" * 7)
    assert cache.keep(home / "a.tar", SIZE, filled(b"b")).read_bytes() == b"b" * SIZE


def test_the_least_recently_used_shard_goes_first(cache, home):
    for seconds, name in ((30, "a.tar"), (20, "b.tar"), (10, "c.tar")):
        age(cache.keep(home / name, SIZE, filled(b"x")), seconds)
    cache.keep(home / "a.tar", SIZE, unasked)  # used now
    cache.keep(home / "d.tar", SIZE, filled(b"x"))
    assert sorted(path.name for path in home.glob("*.tar")) == ["a.tar", "c.tar", "d.tar"]
    assert disk_of(cache.folder) <= cache.limit


def test_use_is_told_by_the_time_of_access_alone(cache, home):
    path = cache.keep(home / "a.tar", SIZE, filled(b"a"))
    age(path, 1000)
    written = path.stat().st_mtime_ns
    cache.keep(path, SIZE, unasked)
    assert path.stat().st_mtime_ns == written
    assert time.time() - path.stat().st_atime < 10


def test_a_shard_is_removed_under_its_reader(cache, home):
    path = cache.keep(home / "a.tar", SIZE, filled(b"a"))
    with path.open("rb") as reader:
        for name in "bcdef":
            time.sleep(0.01)
            cache.keep(home / f"{name}.tar", SIZE, filled(b"x"))
        assert not path.exists()
        assert reader.read() == b"a" * SIZE


def test_what_is_not_of_the_cache_is_never_touched(cache, home):
    mine = cache.folder / "mine"
    mine.mkdir()
    (mine / "old.tar").write_bytes(b"m" * 10 * SIZE)
    (cache.folder / "old.tar").write_bytes(b"m" * 10 * SIZE)
    for name in "abcdef":
        cache.keep(home / f"{name}.tar", SIZE, filled(b"x"))
    assert (mine / "old.tar").exists()
    assert (cache.folder / "old.tar").exists()


def test_data_sets_share_the_room_and_keep_their_indices(cache, home):
    other = cache.made("in22k", "https://host/in22k")
    cache.keep(other / "samples.npy", SIZE, filled(b"i"))
    for seconds, name in ((30, "a.tar"), (20, "b.tar")):
        age(cache.keep(other / name, SIZE, filled(b"x")), seconds)
    cache.keep(home / "c.tar", SIZE, filled(b"x"))
    assert sorted(path.name for path in cache.folder.glob("*/*[ry]")) == ["b.tar", "c.tar", "samples.npy"]


def test_a_file_that_can_never_fit_is_told(cache, home):
    cache.keep(home / "samples.npy", 2 * SIZE, lambda file: file.write(b"i" * 2 * SIZE))
    with pytest.raises(UserError, match=r"a\.tar of .* GiB does not fit into data\.cache_gib = .*indices hold"):
        cache.keep(home / "a.tar", 2 * SIZE, unasked)
    assert not list(home.glob(".*.part"))


def test_what_is_fetched_ahead_makes_no_room_among_shards_in_use(cache, home):
    for name in "abc":
        cache.keep(home / f"{name}.tar", SIZE, filled(b"x"))
    assert not cache.keep_ahead(home / "d.tar", SIZE, unasked)
    age(home / "b.tar", 1000)
    assert cache.keep_ahead(home / "d.tar", SIZE, filled(b"x"))
    assert sorted(path.name for path in home.glob("*.tar")) == ["a.tar", "c.tar", "d.tar"]


def test_who_needs_a_shard_waits_for_the_room_of_one_just_used(cache, home, monkeypatch):
    monkeypatch.setattr(cache_module, "JUST_USED_SECONDS", 300.0)
    for name in "abc":
        cache.keep(home / f"{name}.tar", SIZE, filled(b"x"))
    looks: list[int] = []

    def looked(seconds: float) -> None:
        looks.append(len(list(home.glob("*.tar"))))
        if len(looks) == 3:
            age(home / "b.tar", 1000)

    monkeypatch.setattr(cache_module.time, "sleep", looked)
    cache.keep(home / "d.tar", SIZE, filled(b"x"))
    assert looks == [3, 3, 3]
    assert sorted(path.name for path in home.glob("*.tar")) == ["a.tar", "c.tar", "d.tar"]


def test_a_fill_that_fails_leaves_nothing(cache, home):
    def broken(file: BinaryIO) -> None:
        file.write(b"half")
        raise UserError("the server is gone")

    with pytest.raises(UserError, match="the server is gone"):
        cache.keep(home / "a.tar", SIZE, broken)
    assert [path.name for path in home.iterdir()] == [".fetched"]
    assert cache.fetched_bytes == 0


def _keep_slowly(cache: Cache, path: Path, begun, letter: bytes) -> None:
    def fill(file: BinaryIO) -> None:
        with begun.get_lock():
            begun.value += 1
        time.sleep(0.2)
        file.write(letter * SIZE)

    assert cache.keep(path, SIZE, fill).stat().st_size == SIZE


def test_processes_that_want_the_same_file_fetch_it_once(cache, home):
    begun = FORK.Value("i")
    wanting = [FORK.Process(target=_keep_slowly, args=(cache, home / "a.tar", begun, b"a")) for _ in range(4)]
    for process in wanting:
        process.start()
    for process in wanting:
        process.join(20)
    assert [process.exitcode for process in wanting] == [0] * 4
    assert begun.value == 1
    assert cache.fetched_bytes == SIZE  # counted by the others, too


def test_a_shard_that_another_process_fetches_is_not_waited_for_ahead(cache, home):
    begun = FORK.Value("i")
    process = FORK.Process(target=_keep_slowly, args=(cache, home / "a.tar", begun, b"a"))
    process.start()
    while not begun.value:
        time.sleep(0.01)
    assert cache.keep_ahead(home / "a.tar", SIZE, unasked)
    assert not (home / "a.tar").exists()
    process.join(20)


def _hang(cache: Cache, path: Path, begun) -> None:
    def fill(file: BinaryIO) -> None:
        file.write(b"h" * 1000)
        file.flush()
        begun.value = True
        time.sleep(60)

    cache.keep(path, SIZE, fill)


def test_a_fetch_that_is_killed_leaves_nothing_that_counts(cache, home):
    for name in "ab":
        cache.keep(home / f"{name}.tar", SIZE, filled(b"x"))
    begun = FORK.RawValue("b")
    process = FORK.Process(target=_hang, args=(cache, home / "k.tar", begun))
    process.start()
    while not begun.value:
        time.sleep(0.01)
    assert (home / ".k.tar.part").stat().st_size == SIZE  # its room is taken
    waiting = threading.Thread(target=cache.keep, args=(home / "k.tar", SIZE, filled(b"w")))
    waiting.start()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    waiting.join(20)
    assert (home / "k.tar").read_bytes() == b"w" * SIZE
    assert not list(home.glob(".*.part"))


def test_a_part_that_nobody_fills_is_swept_and_one_that_somebody_fills_is_not(cache, home):
    (home / ".left.tar.part").write_bytes(b"l" * 10 * SIZE)
    with (home / ".held.tar.part").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write(b"h" * SIZE)
        held.flush()
        for name in "abc":
            cache.keep(home / f"{name}.tar", SIZE, filled(b"x"))
        assert sorted(path.name for path in home.glob(".*.part")) == [".held.tar.part"]
        assert len(list(home.glob("*.tar"))) == 2  # the third has the room of the one that is held


def test_many_processes_stay_within_the_bound(cache, home):
    def work(seed: int) -> None:
        for number in range(20):
            name = f"{(seed * 7 + number * 5) % 9}"
            path = cache.keep(home / f"{name}.tar", SIZE, filled(name.encode()))
            with suppress(FileNotFoundError):  # it may give way at once, with JUST_USED_SECONDS at 0
                assert set(path.read_bytes()) == {ord(name)}
            assert disk_of(cache.folder) <= cache.limit

    workers = [FORK.Process(target=work, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


def test_a_full_disk_is_told(tmp_path, request):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    request.addfinalizer(lambda: subprocess.run(["umount", disk], check=True))
    cache = Cache(disk / "cache", 10**9)
    home = cache.made("in1k", "https://host/in1k")
    cache.keep(home / "a.tar", SIZE, filled(b"a"))
    with pytest.raises(UserError, match=r"the disk of data\.cache is full: .*b\.tar takes .* data\.cache_gib = "):
        cache.keep(home / "b.tar", SIZE, unasked)
    assert sorted(path.name for path in home.iterdir()) == [".fetched", "a.tar"]


def test_a_cache_that_vanishes_is_told(cache, home):
    (home / ".fetched").unlink()
    home.rmdir()
    with pytest.raises(UserError, match=r"cannot write .*a\.tar: No such file or directory; check data\.cache"):
        cache.keep(home / "a.tar", SIZE, filled(b"a"))


def test_it_needs_no_torch():
    rooms = "fdscale.data.remote.shards, fdscale.data.remote.fetching"
    program = f"import sys, {rooms}; assert not {{'torch', 'webdataset'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_error_is_told_by_its_number(cache, home):
    def full(file: BinaryIO) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with pytest.raises(UserError, match=r"the disk of data\.cache is full"):
        cache.keep(home / "a.tar", SIZE, full)


@pytest.mark.skipif(os.getuid() != 0, reason="being another user takes root")
def test_shards_of_another_user_are_read():
    with tempfile.TemporaryDirectory() as shared:  # pytest's own folders are closed to others
        cache = Cache(Path(shared) / "cache", 10 * SIZE)
        path = cache.keep(cache.made("in1k", "https://host/in1k") / "a.tar", SIZE, filled(b"a"))
        Path(shared).chmod(0o755)

        def read_as_another() -> None:
            os.setuid(65534)
            assert cache.keep(path, SIZE, unasked).stat().st_size == SIZE

        process = FORK.Process(target=read_as_another)
        process.start()
        process.join(20)
        assert process.exitcode == 0


def test_the_cache_is_as_the_settings_say():
    assert cache_of(DataSettings(global_batch=2, shards="a")) is None
    cache = cache_of(DataSettings(global_batch=2, shards="a", cache="/local", cache_gib=0.5, allow_pipe=True))
    assert cache == Cache(Path("/local"), 2**29, allow_pipe=True)
