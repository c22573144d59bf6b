from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fdscale.config.errors import UserError
from fdscale.data.remote import fetching
from fdscale.data.remote.cache import Cache
from fdscale.data.remote.fetching import FetchAhead
from fdscale.data.remote.transfer import fetch_bytes
from fdscale.data.remote.urls import url_of

SIZE = 10_000
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(fetching, "FULL_SECONDS", 0.02)
    monkeypatch.setattr(fetching, "RENEWED_SECONDS", 0.05)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[tuple[Cache, Path]]:
    cache = Cache(tmp_path / "cache", 5 * SIZE + 1000)
    return cache, cache.made("in1k", "https://host/in1k")


def bringing(cache: Cache, folder: Path, log: Path) -> Callable[[int], bool]:
    """Brings shard n as a file, and writes n to a log when it begins to."""

    def bring(shard: int) -> bool:
        def fill(file) -> None:
            with log.open("a") as lines:
                lines.write(f"{shard}\n")
            file.write(bytes([shard]) * SIZE)

        return cache.keep_ahead(folder / f"{shard}.tar", SIZE, fill)

    return bring


def age(shard: Path) -> None:
    """As if it had not been used for long."""
    with suppress(FileNotFoundError):
        os.utime(shard, (time.time() - 1000, shard.stat().st_mtime))


def until(holds: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except OSError:
        return False


def shards_in(folder: Path) -> set[int]:
    return {int(path.stem) for path in folder.glob("*.tar")}


def several_looks(folder: Path) -> None:
    """Until it has renewed the use of a shard twice: it has had the time to bring another one."""
    for _ in range(2):
        shard = folder / f"{max(shards_in(folder))}.tar"
        age(shard)
        until(lambda shard=shard: shard.stat().st_atime > time.time() - 500)


def test_the_shards_of_coming_steps_are_there_and_no_others(home, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "PARALLEL", 1)  # several at a time come in any order
    cache, folder = home
    with FetchAhead(lambda step: (step, step + 1), bringing(cache, folder, tmp_path / "log"), 3, 100, ahead=2) as ahead:
        until(lambda: shards_in(folder) == {3, 4, 5})
        several_looks(folder)
        assert shards_in(folder) == {3, 4, 5}
        ahead.note(4)
        until(lambda: shards_in(folder) == {3, 4, 5, 6})
    assert (tmp_path / "log").read_text().split() == ["3", "4", "5", "6"]  # each once, nearest first
    assert cache.fetched_bytes == 4 * SIZE


def test_it_ends_with_the_last_step(home, tmp_path):
    cache, folder = home
    with FetchAhead(lambda step: (step,), bringing(cache, folder, tmp_path / "log"), 0, 2, ahead=50):
        until(lambda: shards_in(folder) == {0, 1})
        several_looks(folder)
    assert shards_in(folder) == {0, 1}


def test_it_fetches_within_the_bound_and_goes_on_when_there_is_room(home, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "PARALLEL", 1)  # of several at a time, any may find the last room
    cache, folder = home
    bring, refused = bringing(cache, folder, tmp_path / "log"), FORK.RawValue("i")

    def counted(shard: int) -> bool:
        there = bring(shard)
        refused.value += not there
        return there

    with FetchAhead(lambda step: (step,), counted, 0, 100, ahead=20) as ahead:
        until(lambda: refused.value > 2)
        assert shards_in(folder) == {0, 1, 2, 3, 4}  # all in use
        ahead.note(3)

        def unused_and_given_way() -> bool:
            for shard in shards_in(folder) & {0, 1, 2}:
                age(folder / f"{shard}.tar")
            return shards_in(folder) == {3, 4, 5, 6, 7}

        until(unused_and_given_way)


def test_what_is_wanted_stays_in_use(home, tmp_path):
    cache, folder = home
    with FetchAhead(lambda step: (step,), bringing(cache, folder, tmp_path / "log"), 0, 100, ahead=2):
        until(lambda: shards_in(folder) == {0, 1})
        age(folder / "1.tar")
        until(lambda: (folder / "1.tar").stat().st_atime > time.time() - 100)


def test_what_cannot_be_fetched_is_left_and_the_rest_comes(home, tmp_path):
    cache, folder = home
    good = bringing(cache, folder, tmp_path / "log")
    tries = FORK.Value("i")

    def bring(shard: int) -> bool:
        if shard == 1:
            with tries.get_lock():
                tries.value += 1
            raise UserError("the server is gone")
        return good(shard)

    with FetchAhead(lambda step: (step,), bring, 0, 4, ahead=4):
        until(lambda: shards_in(folder) == {0, 2, 3})
        several_looks(folder)
        assert tries.value == 1


def test_it_is_gone_when_it_is_left_even_in_a_fetch(home):
    def bring(shard: int) -> bool:
        time.sleep(60)
        return True

    begun = time.monotonic()
    with FetchAhead(lambda step: (step,), bring, 0, 4, ahead=4):
        time.sleep(0.1)
        (process,) = multiprocessing.active_children()
    assert time.monotonic() - begun < 10
    assert not process.is_alive()


def test_the_programs_that_fetch_end_with_it(tmp_path):
    command = f"pipe:echo $$ > {tmp_path}/{{}}.pid; exec sleep 60"

    def bring(shard: int) -> bool:
        fetch_bytes(url_of(command, str(shard)), 1, allow_pipe=True)
        return True

    notes = [tmp_path / f"{shard}.pid" for shard in range(2)]
    with FetchAhead(lambda step: (step,), bring, 0, 2, ahead=2):
        until(lambda: all(note.exists() and note.read_text().strip() for note in notes))
        programs = [int(note.read_text()) for note in notes]
        assert all(map(is_running, programs))
    until(lambda: not any(map(is_running, programs)))


def test_stop_signals_are_the_ranks_affair(home, tmp_path):
    cache, folder = home
    with FetchAhead(lambda step: (step,), bringing(cache, folder, tmp_path / "log"), 0, 9, ahead=1) as ahead:
        until(lambda: shards_in(folder) == {0})
        (process,) = multiprocessing.active_children()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(process.pid, signum)
        ahead.note(1)
        until(lambda: shards_in(folder) == {0, 1})
        assert process.is_alive()


RANK = """
import multiprocessing, os, subprocess, sys, time
from fdscale.data.remote.fetching import FetchAhead
def bring(shard):
    program = subprocess.Popen(["sleep", "60"])
    print(program.pid, flush=True)
    time.sleep(60)
ahead = FetchAhead(lambda step: (step,), bring, 0, 1, 1).__enter__()
print(multiprocessing.active_children()[0].pid, flush=True)
sys.stdin.readline()
{end}
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "sys.exit(3)", "raise ValueError"])
def test_it_dies_with_its_rank(end):
    rank = subprocess.Popen([sys.executable, "-c", RANK.format(end=end)], stdin=-1, stdout=-1, stderr=-1)
    begun = [int(rank.stdout.readline()) for _ in range(2)]  # the process and its program, in any order
    assert all(map(is_running, begun))
    rank.communicate(b"\n", timeout=20)
    assert rank.returncode == {"os": -9, "sy": 3, "ra": 1}[end[:2]]
    until(lambda: not any(map(is_running, begun)))
