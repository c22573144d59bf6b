"""Two processes with a worker each: while they go on they live, then one is frozen, and both are gone in time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fdscale.cluster.orphans import process_start
from fdscale.cluster.ranks import REQUEUE_EXIT_CODE
from fdscale.training.watchdog import Member, Watchdog, members_of
from fdscale.training.writer import this_process

LIMIT = 5.0  # above what a busy machine's disk makes a process wait
PROGRAM = """
import json, os, subprocess, sys, time
from pathlib import Path
from fdscale.training.watchdog import Member, Watchdog
from fdscale.training.writer import this_process

def wait_for(*files):
    while not all(file.exists() for file in files):
        time.sleep(0.02)

def stuck_in_a_collective():
    time.sleep(600)

folder, rank, limit = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
worker = subprocess.Popen(["sleep", "600"])  # holds the pipe that the launcher reads from
own = [folder / f"member_{of}.json" for of in (0, 1)]
beside = own[rank].with_suffix(".new")
beside.write_text(json.dumps({"rank": rank, **this_process(), "host": "here"}))
beside.rename(own[rank])
wait_for(*own)
with Watchdog(folder / "stacks", [Member(**json.loads(file.read_text())) for file in own], rank, limit) as watchdog:
    for step in range(10**6):
        watchdog.mark("training", step)
        if step == 12:
            (folder / f"long_{rank}").touch()
        if (folder / "hang").exists():
            stuck_in_a_collective()
        time.sleep(limit / 10)
"""


def start(folder: Path, rank: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(rank), str(LIMIT)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    started = [start(tmp_path, rank) for rank in (0, 1)]
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_a_frozen_rank_is_named_and_killed_and_the_run_starts_again(
    processes: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    until(lambda: all((tmp_path / f"long_{rank}").exists() for rank in (0, 1)), 120)  # for longer than the limit
    assert not (tmp_path / "stacks").exists()
    processes[1].send_signal(signal.SIGSTOP)
    (tmp_path / "hang").touch()
    began = time.monotonic()
    told = processes[0].communicate(timeout=60)[0]  # returns when nobody holds the pipe any more
    assert processes[0].returncode == REQUEUE_EXIT_CODE
    processes[1].communicate(timeout=10)
    assert processes[1].returncode == -signal.SIGKILL
    assert time.monotonic() - began < 60
    assert "frozen, as they wrote none: rank 1 (here, pid" in told
    stacks = (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert stacks.startswith("rank 0 on here, pid ")
    assert "at: training, step " in stacks
    assert "in stuck_in_a_collective" in stacks
    assert sorted(path.name for path in (tmp_path / "stacks").iterdir()) == ["frozen.json", "rank_0.txt"]
    frozen = json.loads((tmp_path / "stacks" / "frozen.json").read_text())
    assert [(one["rank"], one["pid"]) for one in frozen] == [(1, processes[1].pid)]


def test_a_process_that_has_taken_a_frozen_ones_number_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        me = Member(0, **this_process())
        it = dataclasses.replace(me, rank=1, pid=other.pid, started=process_start(other.pid))
        assert it.started is not None
        for frozen, killed in (
            (dataclasses.replace(it, started=it.started - 1), False),
            (dataclasses.replace(it, kernel="of another machine"), False),
            (it, True),
        ):
            Watchdog(tmp_path, [me, frozen], 0, LIMIT)._kill(frozen)
            time.sleep(0.2)
            assert (other.poll() is not None) == killed


def test_it_ends_with_its_context_and_0_is_none(tmp_path: Path) -> None:
    me = [Member(0, **this_process())]
    threads = threading.active_count()
    for limit, more in ((60.0, 1), (0.0, 0)):
        with contextlib.suppress(KeyError), Watchdog(tmp_path, me, 0, limit) as watchdog:
            watchdog.mark("training", 3)
            assert threading.active_count() == threads + more
            raise KeyError
        assert threading.active_count() == threads


def members_here(connection: Any) -> list[Member]:
    return members_of(connection)


def test_everyone_knows_everyone(two_ranks: Any) -> None:
    first, second = two_ranks(members_here)
    assert first == second
    assert [member.rank for member in first] == [0, 1]
    assert all(process_start(member.pid) == member.started for member in first)
