"""Work of several processes: in order, a few jobs ahead, and no process that dies goes unnoticed."""

from __future__ import annotations

import os
import signal

import pytest

from fdscale.config.errors import UserError
from fdscale.data.processes import AHEAD, in_processes


def own_number(job: int) -> tuple[int, int]:
    return job, os.getpid()


def refused(job: int) -> int:
    if job == 3:
        raise UserError("job 3 is refused")
    return job


def killed(job: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return job


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_jobs_are_taken_as_they_are_needed(workers):
    taken = []
    jobs = (taken.append(job) or job for job in range(100))
    results = in_processes(own_number, jobs, workers)
    first, pid = next(results)
    assert first == 0
    assert (pid == os.getpid()) == (workers == 1)
    assert len(taken) <= AHEAD * workers
    assert [job for job, _ in results] == list(range(1, 100))


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_job_raises_is_raised(workers):
    with pytest.raises(UserError, match="job 3 is refused"):
        list(in_processes(refused, range(10), workers))


def test_a_killed_process_is_told():
    with pytest.raises(UserError, match=r"one of 2 processes was killed.*with fewer --workers"):
        list(in_processes(killed, range(4), 2))
