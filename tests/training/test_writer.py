"""Whether the writer of an attempt lives: by its process here, by its heartbeat elsewhere."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from fdscale.cluster.orphans import process_start
from fdscale.training import writer
from fdscale.training.writer import ALIVE, Heartbeat, is_alive, this_process

ELSEWHERE = {"host": "n7", "kernel": "another", "pid": 1, "started": 1}


def test_a_process_of_this_machine_is_looked_up() -> None:
    process = subprocess.Popen(["sleep", "60"])
    there = this_process() | {"pid": process.pid, "started": process_start(process.pid)}
    assert is_alive(Path("/nowhere"), there)
    assert not is_alive(Path("/nowhere"), there | {"started": 1})  # its number went to another process
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(Path("/nowhere"), there)  # a zombie, nobody has waited for it yet
    process.wait()
    assert not is_alive(Path("/nowhere"), there)


def test_this_very_process_is_no_other_writer() -> None:
    assert not is_alive(Path("/nowhere"), this_process())


def test_a_silent_writer_elsewhere_is_dead_and_a_beating_one_lives(tmp_path: Path) -> None:
    assert not is_alive(tmp_path, ELSEWHERE)  # it never beat
    beat = tmp_path / ALIVE
    beat.touch()
    assert not is_alive(tmp_path, ELSEWHERE, silent=0.5)
    timer = threading.Timer(0.4, lambda: os.utime(beat))
    timer.start()
    assert is_alive(tmp_path, ELSEWHERE, silent=20)
    timer.join()
    assert list(tmp_path.iterdir()) == [beat]


def test_a_beat_long_ago_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / ALIVE).touch()
    os.utime(tmp_path / ALIVE, (time.time() - 100, time.time() - 100))
    began = time.monotonic()
    assert not is_alive(tmp_path, ELSEWHERE, silent=60)
    assert time.monotonic() - began < 10


def test_the_heart_beats_until_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BEAT_SECONDS", 0.05)
    heartbeat = Heartbeat(tmp_path)
    assert is_alive(tmp_path, ELSEWHERE, silent=10)
    heartbeat.stop()
    assert not is_alive(tmp_path, ELSEWHERE, silent=0.5)


def test_a_disk_that_is_gone_does_not_stop_the_heart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BEAT_SECONDS", 0.05)
    heartbeat = Heartbeat(tmp_path)
    (tmp_path / ALIVE).unlink()
    time.sleep(0.3)
    (tmp_path / ALIVE).touch()
    assert is_alive(tmp_path, ELSEWHERE, silent=10)
    heartbeat.stop()
