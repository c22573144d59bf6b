"""What the queue does when a worker is dead before it is given anything."""

from __future__ import annotations

from pathlib import Path

from fdscale.study.queue import _answered, _hand_out, _started, _taken_back
from fdscale.study.tasks import Design, Task


def test_a_worker_that_died_idle_is_told_as_one_that_died_at_work(tmp_path: Path) -> None:
    task = Task("seed_0/a", "probe", 0, "", "random")
    equipment = (Design("train", "test", "a", "b", 10, (0,), {}), tmp_path)
    with _started(1, tmp_path, equipment) as team:
        team[0].process.kill()
        team[0].process.join()
        _hand_out([task], set(), team)
        (worker,) = _answered(team)
        given, answer = _taken_back(worker)
    assert given == task
    assert answer.values is None
    assert answer.problem == "its process ended with code -9; run the same command again"
