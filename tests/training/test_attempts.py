"""One writer a run directory, numbers that are claimed once, and no crash loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fdscale.cluster.orphans import process_start
from fdscale.config.errors import StartAgain, UserError
from fdscale.training.attempts import Attempt, claim
from fdscale.training.lineage import lineage_of, read_record
from fdscale.training.manifest import write_manifest
from fdscale.training.writer import this_process

CLAIM_AND_WAIT = """
import os, sys
from pathlib import Path
from fdscale.training.attempts import claim
claim(Path(sys.argv[1]), 2, 3, os.environ)
print("claimed", flush=True)
sys.stdin.read()
"""


def slurm(job: str, restarts: str | None = None) -> dict[str, str]:
    return {"SLURM_JOB_ID": job} | ({} if restarts is None else {"SLURM_RESTART_COUNT": restarts})


@pytest.fixture
def attempts(tmp_path: Path) -> Path:
    return tmp_path / "run" / "attempts"


@pytest.fixture
def other_process(attempts: Path) -> Iterator[Any]:
    """Another process that has claimed an attempt and lives on, in the environment it is given."""
    started: list[subprocess.Popen[str]] = []

    def start(env: dict[str, str]) -> subprocess.Popen[str]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        command = [sys.executable, "-c", CLAIM_AND_WAIT, str(attempts)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env={**plain, **env}, **pipes))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "claimed\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def taken(attempts: Path, env: dict[str, str] | None = None, most: int = 3) -> Attempt:
    return claim(attempts, 2, most, env or {})


def commit(attempt: Attempt, step: int) -> None:
    attempt.step_folder(step).mkdir()
    write_manifest(attempt.step_folder(step), {"files": {}})


def test_attempts_are_numbered_and_say_who_they_are(attempts: Path) -> None:
    first = taken(attempts, slurm("7"))
    first.record_ranks([this_process(), this_process()])
    record = read_record(first.folder)
    assert first.folder == attempts / "0001"
    assert record["number"] == 1
    assert record["submission"] == "7"
    assert record["world_size"] == 2
    assert record["ranks"][1]["rank"] == 1
    assert record["ranks"][1]["pid"] == os.getpid()
    first.end(85, "stopped")
    assert json.loads((first.folder / "ended.json").read_text())["code"] == 85
    assert taken(attempts).number == 2


def test_of_many_starts_at_once_each_number_goes_to_one(attempts: Path) -> None:
    def try_it(_: int) -> int | str:
        try:
            return taken(attempts).number
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(try_it, range(16)))
    numbers = [answer for answer in answers if isinstance(answer, int)]
    assert len(numbers) == len(set(numbers))
    assert all("has just claimed attempt" in answer for answer in answers if isinstance(answer, str))


def test_a_second_start_is_refused_while_the_first_one_lives(attempts: Path, other_process: Any) -> None:
    process = other_process({})
    with pytest.raises(UserError, match=f"is being written by attempt 0001 .process {process.pid} on"):
        taken(attempts)
    assert [path.name for path in attempts.iterdir()] == ["0001"]
    process.kill()
    process.wait()
    assert taken(attempts).number == 2


@pytest.mark.parametrize(("restarts", "refused"), [("1", False), (None, True)])
def test_a_job_that_slurm_started_again_takes_over(
    attempts: Path, other_process: Any, restarts: str | None, refused: bool
) -> None:
    """Its first life may still run on a node that was cut off; two starts in one life are a mistake."""
    other_process(slurm("7"))
    if refused:
        with pytest.raises(UserError, match="is being written"):
            taken(attempts, slurm("7", restarts))
    else:
        assert taken(attempts, slurm("7", restarts)).number == 2


def test_a_superseded_attempt_is_told_so(attempts: Path) -> None:
    first = taken(attempts)
    first.refuse_if_superseded()
    taken(attempts)
    with pytest.raises(UserError, match=r"attempt 2 has begun meanwhile, this one \(1\) writes nothing more"):
        first.refuse_if_superseded()


def test_what_is_adopted_lies_with_the_new_attempt_and_stays_on_the_line(attempts: Path) -> None:
    first = taken(attempts)
    first.record_start(None)
    for step in (10, 20):
        commit(first, step)
    (first.folder / "universal_step_00000020").mkdir()
    second = taken(attempts)
    newest = lineage_of(attempts).believed[0]
    second.record_start(newest)
    adopted = second.adopt(newest)
    assert adopted.folder == second.step_folder(20)
    assert sorted(path.name for path in first.folder.glob("*step_*")) == ["step_00000010"]
    assert (second.folder / "universal_step_00000020").is_dir()
    commit(first, 30)  # too late
    lineage = lineage_of(attempts)
    assert [(one.attempt, one.step) for one in lineage.believed] == [(2, 20), (1, 10)]
    assert [(one.attempt, one.step) for one in lineage.disowned] == [(1, 30)]
    second.record_start(None)  # a second word is not heard
    assert read_record(second.folder)["continues"] == {"attempt": 1, "step": 20}


def test_a_submission_that_makes_no_progress_is_stopped(attempts: Path) -> None:
    for restarts in range(3):
        attempt = taken(attempts, slurm("7", str(restarts)))
        if restarts != 1:  # this one died before it had looked
            attempt.record_start(None)
    with pytest.raises(UserError, match=r"3 attempts of 7 in a row made no new checkpoint, guards.attempts allows 3"):
        taken(attempts, slurm("7", "3"))
    assert taken(attempts, slurm("8")).number == 4
    assert taken(attempts, {}).number == 5  # started by hand: a person looks on
    assert taken(attempts, slurm("7", "4"), most=4).number == 6


def test_progress_starts_the_count_anew(attempts: Path) -> None:
    for restarts in range(6):
        attempt = taken(attempts, slurm("7", str(restarts)))
        before = next(iter(lineage_of(attempts).believed), None)
        attempt.record_start(before)
        if before is not None:
            attempt.adopt(before)
        if restarts % 2:
            commit(attempt, 10 * restarts)
    attempt = taken(attempts, slurm("7", "6"))
    assert attempt.number == 7


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("u"), 2), (StartAgain("s"), 85), (RuntimeError("r"), 1), (KeyboardInterrupt(), 130)]
)
def test_an_exception_is_an_end(attempts: Path, error: BaseException, code: int) -> None:
    attempt = taken(attempts)
    with pytest.raises(type(error)), attempt:
        raise error
    told = json.loads((attempt.folder / "ended.json").read_text())
    assert told["code"] == code
    assert told["reason"].startswith(type(error).__name__)


def test_only_who_claimed_it_ends_it(attempts: Path) -> None:
    attempt = taken(attempts)
    Attempt(attempt.folder).end(0, "another rank's word")
    assert not (attempt.folder / "ended.json").exists()
    attempt.end(0, "complete")
    attempt.end(85, "again")
    assert json.loads((attempt.folder / "ended.json").read_text())["reason"] == "complete"


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"run_dir: .*/run cannot be written"):
        taken(tmp_path / "run" / "attempts")


def test_a_start_tells_processes_of_one_number_apart() -> None:
    assert process_start(os.getpid()) == process_start(os.getpid())
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert process_start(gone.pid) is None
