"""What a run's folder tells: written by the attempts themselves, or as a killed one leaves it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from fdscale.config.errors import StartAgain, UserError
from fdscale.training.attempts import Attempt, claim
from fdscale.training.failures import record_failure
from fdscale.training.history import end_of, newest_commit, of_attempt
from fdscale.training.lineage import attempt_folders
from fdscale.training.manifest import write_manifest
from fdscale.training.metrics import ENDS


def attempted(attempts: Path, submission: str = "77") -> Attempt:
    """The next life of a SLURM job, which takes over from a former one that may seem alive."""
    life = str(len(attempt_folders(attempts)) if attempts.exists() else 0)
    return claim(attempts, 2, 9, {"SLURM_JOB_ID": submission, "SLURM_RESTART_COUNT": life})


def raising(error: BaseException) -> Callable[[Attempt], None]:
    def end(attempt: Attempt) -> None:
        record_failure(attempt.folder, 1, error)
        with suppress(type(error)), attempt:
            raise error

    return end


def hanging(attempt: Attempt) -> None:
    (attempt.folder / "stacks").mkdir()


ENDINGS: dict[str, Callable[[Attempt], object]] = {
    "complete": lambda attempt: attempt.end(0, "complete"),
    "stopped": lambda attempt: attempt.end(85, "stopped by SIGTERM"),
    "canary": raising(StartAgain("step 7: rank 1: the weights of teacher have changed in its memory")),
    "hang": hanging,
    "killed": lambda attempt: None,
    "mistake": raising(UserError("5 of 40 samples cannot be decoded")),
    "error": raising(RuntimeError("Connection closed by peer")),
}


@pytest.mark.parametrize("reason", ENDS)
def test_how_an_attempt_ended(reason: str, tmp_path: Path) -> None:
    first = attempted(tmp_path)
    assert not any(of_attempt(first.folder)[f"previous_end/{one}"] for one in ENDS)
    ENDINGS[reason](first)
    assert end_of(first.folder) == reason
    second = attempted(tmp_path)
    values = of_attempt(second.folder)
    assert [one for one in ENDS if values[f"previous_end/{one}"]] == [reason]
    second.end(0, "complete")
    first.end(0, "complete")


def test_a_mistake_of_one_rank_is_one_though_its_peers_died_of_it(tmp_path: Path) -> None:
    attempt = attempted(tmp_path)
    record_failure(attempt.folder, 1, RuntimeError("Connection closed by peer"))
    record_failure(attempt.folder, 0, UserError("no such shard"))
    assert end_of(attempt.folder) == "mistake"
    attempt.end(1, "RuntimeError: Connection closed by peer")


def test_starts_without_a_commit_are_counted_per_submission(tmp_path: Path) -> None:
    lives = []
    for number in (1, 2, 3):
        lives.append(attempted(tmp_path))
        lives[-1].record_start(None)
        assert of_attempt(lives[-1].folder)["attempts_without_commit"] == number
    values = of_attempt(lives[-1].folder)
    assert values["attempt"] == 3
    assert values["first_start_timestamp_seconds"] < values["attempt_start_timestamp_seconds"]
    commit(lives[-1], 5)
    following = attempted(tmp_path)
    assert of_attempt(following.folder)["attempts_without_commit"] == 1
    for attempt in (*lives, following):
        attempt.end(0, "complete")


def commit(attempt: Attempt, step: int) -> None:
    folder = attempt.step_folder(step)
    folder.mkdir()
    write_manifest(folder, {"step": step, "files": {"a.pt": {"size": 7, "sha256": ""}, "b.pt": {"size": 30}}})


def test_the_newest_commit_is_that_of_the_line_that_is_believed(tmp_path: Path) -> None:
    assert newest_commit(tmp_path) == {}
    attempt = attempted(tmp_path)
    attempt.record_start(None)
    for step in (5, 10):
        commit(attempt, step)
    attempt.step_folder(15).mkdir()  # never committed
    found = newest_commit(tmp_path)
    manifest = attempt.step_folder(10) / "manifest.json"
    assert found == {
        "checkpoint_step": 10,
        "checkpoint_bytes": 37,
        "checkpoint_timestamp_seconds": manifest.stat().st_mtime,
    }
    attempt.end(0, "complete")
