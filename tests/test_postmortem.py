"""What ended a run is told from what its attempts have left, written here by what writes it in a run."""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fdscale.cli import main
from fdscale.config.errors import StartAgain, UserError
from fdscale.evidence import innermost_frames, oom_kills
from fdscale.postmortem import post_mortem
from fdscale.training.attempts import Attempt, claim
from fdscale.training.failures import record_failure
from fdscale.training.lineage import Commit
from fdscale.training.manifest import write_manifest
from fdscale.training.writer import this_process

LOST_PEER = "[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:10139: Connection reset by peer"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.toml").write_text('program = "distill"\n[guards]\nattempts = 3\n')
    return folder


def begin(run: Path, before: Commit | None = None, job: str | None = None) -> Attempt:
    """A claimed attempt of two ranks, one on each of two hosts."""
    restarts = str(len(list((run / "attempts").glob("0*"))))
    env = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restarts} if job else {}
    attempt = claim(run / "attempts", 2, 100, env)
    attempt.record_ranks([{**this_process(), "host": host} for host in ("n1", "n2")])
    attempt.record_start(before)
    return attempt


def commit(attempt: Attempt, step: int) -> Commit:
    folder = attempt.step_folder(step)
    folder.mkdir()
    write_manifest(folder, {"step": step, "world_size": 2, "files": {}})
    return Commit(step, attempt.number, folder)


def fail(attempt: Attempt, rank: int, error: Exception) -> None:
    try:
        raise error
    except Exception as raised:
        record_failure(attempt.folder, rank, raised)


def give_up(attempt: Attempt) -> None:
    """As a killed process leaves it: no end is recorded, and nobody of its number and start lives."""
    assert attempt._heartbeat is not None
    attempt._heartbeat.stop()
    record = json.loads((attempt.folder / "attempt.json").read_text())
    record["writer"]["started"] = 1
    (attempt.folder / "attempt.json").write_text(json.dumps(record))


def codes(attempt: Attempt, **found: int) -> None:
    (attempt.folder / "launcher.json").write_text(json.dumps({"codes": found}))


def told(run: Path) -> str:
    return "\n".join(post_mortem(run))


def next_step(run: Path) -> str:
    return told(run).rsplit("next: ", 1)[1]


def test_each_attempt_is_told_and_the_last_one_completed(run: Path) -> None:
    first = begin(run, job="77")
    saved = commit(first, 200)
    first.end(85, "stopped by SIGUSR1")
    second = begin(run, saved, job="77")
    commit(second, 400)
    second.end(0, "complete")
    (run / "complete.json").write_text('{"step": 400}')
    lines = told(run).splitlines()
    assert lines[0] == f"{run}: complete at step 400, 2 attempts; the newest checkpoint is step 400 of attempt 2"
    assert "2 ranks on n1, n2, 77, from the beginning: has steps 200; stopped by SIGUSR1" in lines[1]
    assert "from step 200 of attempt 1: has steps 400; completed" in lines[2]
    assert next_step(run).startswith("nothing: the run is complete")


def test_of_two_failures_the_earlier_is_the_cause(run: Path) -> None:
    attempt = begin(run)
    fail(attempt, 1, ValueError("a row of the wrong shape"))
    fail(attempt, 0, RuntimeError(LOST_PEER))
    attempt.end(1, f"RuntimeError: {LOST_PEER}")
    assert "rank 1 on" in told(run)
    assert "raised an error\n  ValueError: a row of the wrong shape\n  1 other rank failed after it" in told(run)
    assert "nothing was ever committed" in told(run)


def test_a_rank_that_was_killed_is_the_cause_of_what_its_peers_raise(run: Path) -> None:
    attempt = begin(run)
    fail(attempt, 0, RuntimeError(LOST_PEER))
    attempt.end(1, f"RuntimeError: {LOST_PEER}")
    codes(attempt, **{"0": 1, "1": -9})
    (run / "memory.json").write_text('{"step": 20, "measured_bytes": 75161927680, "planned_bytes": 64424509440}')
    assert "rank 1 on n2 was killed by SIGKILL: by somebody, or by the kernel for want of memory" in told(run)
    assert "memory of rank 0 in step 20: planned 60.0 GiB, measured 70.0 GiB" in told(run)
    assert "train_micro_batch_size_per_gpu" in next_step(run)


def test_this_machines_kernel_is_asked_whether_it_killed_its_rank(run: Path) -> None:
    attempt = begin(run)
    attempt.record_ranks([this_process(), this_process()])
    give_up(attempt)
    codes(attempt, **{"0": -15, "1": -9})
    told_of = "by somebody, or by the kernel" if oom_kills() else "this machine has killed nothing for want of memory"
    assert told_of in told(run)
    assert ("train_micro_batch_size_per_gpu" in next_step(run)) == bool(oom_kills())


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"srun": 137}, "srun was killed by SIGKILL"),
        ({"0": -15, "1": -7}, "rank 1 on n2 died of SIGBUS: /dev/shm is full"),
        ({"0": -15, "1": -11}, "rank 1 on n2 died of SIGSEGV in a library"),
        ({"0": -6, "1": -9}, "rank 1 on n2 was killed by SIGKILL"),  # gloo's threads abort when a peer is gone
        ({"0": 143, "1": 1}, "rank 1 on n2 ended with code 1 and left no word"),
        ({"0": 143, "1": 143}, "rank 0 on n1, rank 1 on n2 was ended by SIGTERM before it could commit"),
    ],
)
def test_signals_are_told_apart(found: dict[str, int], expected: str, run: Path) -> None:
    attempt = begin(run)
    give_up(attempt)
    codes(attempt, **found)
    assert expected in told(run)


def test_without_the_launchers_word_the_rank_that_left_none_was_lost(run: Path) -> None:
    attempt = begin(run, job="77")
    fail(attempt, 0, RuntimeError(LOST_PEER))
    give_up(attempt)
    assert f"rank 1 on n2 was lost without a word\n  rank 0 on n1 then raised: RuntimeError: {LOST_PEER}" in told(run)
    assert "sacct -j 77" in next_step(run)


def test_nothing_at_all_is_told_as_that(run: Path) -> None:
    give_up(begin(run))
    (run / "recipe.toml").unlink()
    assert main(["doctor", str(run)]) == 0
    assert "ended without a word: its node, its launcher or all its ranks were lost at once" in told(run)


@pytest.mark.parametrize(
    ("error", "expected", "remedy"),
    [
        (UserError(f"rank 1 could not write step_2: {os.strerror(errno.ENOSPC)}"), "could not write", "make room"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "could not write to the disk", "make the folder writable"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "had no memory left", "train_micro_batch_size"),
        (UserError("3 steps in a row, up to step 9, had a loss that is not finite"), "not finite", "optim.lr"),
        (UserError("max_steps=4: this run has 6 steps behind it"), "ended it with a message", "do what it says"),
    ],
)
def test_errors_are_told_with_what_to_do(error: Exception, expected: str, remedy: str, run: Path) -> None:
    attempt = begin(run)
    fail(attempt, 1, error)
    fail(attempt, 0, RuntimeError(LOST_PEER))
    attempt.end(1, "RuntimeError: …")
    assert expected in told(run)
    assert remedy in next_step(run)


def test_a_guard_is_quoted(run: Path) -> None:
    attempt = begin(run)
    message = "step 5: rank 1 on n2: the weights of teacher have changed in its memory"
    fail(attempt, 1, StartAgain(message))
    attempt.end(85, f"StartAgain: {message}")
    assert f"a guard stopped it before harm was done\n  {message}" in told(run)


def waits_in_a_collective(file: Any) -> None:
    faulthandler.dump_traceback(file, all_threads=True)


def test_a_hang_names_the_frozen_rank_and_shows_where_another_waited(run: Path) -> None:
    attempt = begin(run)
    commit(attempt, 20)
    give_up(attempt)
    stacks = attempt.folder / "stacks"
    stacks.mkdir()
    with (stacks / "rank_0.txt").open("w") as file:
        file.write("rank 0 on n1, pid 7, 2026-11-27\nat: a step, step 31\nnothing was marked for 900.2 s\n\n")
        file.flush()
        waits_in_a_collective(file)
    (stacks / "frozen.json").write_text('[{"rank": 1, "host": "n2", "pid": 8, "started": 5}]')
    codes(attempt, **{"0": 85, "1": -9})
    assert "hung; rank 1 on n2 froze\n  rank 0 on n1 waited (at: a step, step 31) in\n" in told(run)
    assert "in waits_in_a_collective" in told(run)
    assert "leave that host out" in next_step(run)


def test_of_several_threads_the_one_that_trains_is_shown() -> None:
    frame = '  File "{0}.py", line 1 in {0}\n'
    dump = "Thread 0x01 (most recent call first):\n" + frame.format("beat")
    dump += "\nCurrent thread 0x02 (most recent call first):\n" + frame.format("watch")
    dump += "\nThread 0x03 (most recent call first):\n" + frame.format("wait") + frame.format("step")
    assert innermost_frames(dump) == ['File "wait.py", line 1 in wait', 'File "step.py", line 1 in step']


def test_steps_that_were_not_applied_are_told_with_the_rank(run: Path) -> None:
    attempt = begin(run)
    rows = [{"step": step, "losses": ["0.5", "nan"], "keys": [[1], [2]]} for step in (7, 8)]
    (attempt.folder / "skipped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn')
    attempt.end(85, "stopped by SIGTERM")
    assert "2 steps were not applied, the last ones 7, 8, the loss of rank 1 was not finite: samples in" in told(run)


def test_a_crash_loop_is_told_before_the_next_start_refuses(run: Path) -> None:
    for _ in range(3):
        attempt = begin(run, job="77")
        fail(attempt, 0, ValueError("again"))
        attempt.end(1, "ValueError: again")
    assert "a crash loop: 3 attempts of 77 in a row made no new checkpoint; the next is refused" in told(run)


def test_an_attempt_that_outlived_the_next_ones_start_was_superseded_and_its_commit_is_not_believed(run: Path) -> None:
    first = begin(run, job="77")
    saved = commit(first, 20)
    second = begin(run, saved, job="77")
    commit(first, 40)
    fail(first, 0, UserError(f"{run}: attempt 2 has begun meanwhile, this one (1) writes nothing more"))
    second.end(85, "stopped by SIGTERM")
    assert "was still alive when attempt 2 began, which took its place" in told(run)
    assert (
        "never read, as a newer attempt had gone on from elsewhere when they were committed: step 40 of attempt 1"
        in (told(run))
    )
    give_up(first)


def test_a_killed_rank_with_a_lost_save_is_told_so(run: Path) -> None:
    attempt = begin(run)
    attempt.step_folder(6).mkdir()
    give_up(attempt)
    assert "holds no checkpoint, a save of step 6 never finished" in told(run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_the_cause_though_nothing_could_be_written_there(small_disk: Path) -> None:
    run = small_disk / "run"
    attempt = begin(run)
    attempt.step_folder(6).mkdir()
    give_up(attempt)
    with suppress(OSError), (run / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    fail(attempt, 0, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert "left no word, and its disk is full: the save of step 6 never finished\n  0 MiB are free there" in told(run)
    assert next_step(run).startswith("make room")


def test_a_disk_that_turned_read_only_is_the_cause(small_disk: Path) -> None:
    attempt = begin(small_disk / "run")
    give_up(attempt)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "left no word, and its disk is read-only" in told(small_disk / "run")


LIVING = """
import sys, time
from pathlib import Path
from fdscale.training.attempts import claim
claim(Path(sys.argv[1]), 1, 3, {})
print("claimed", flush=True)
time.sleep(60)
"""


def test_a_run_that_lives_is_said_to_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", LIVING, str(run / "attempts")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as living:
        try:
            assert living.stdout is not None
            living.stdout.readline()
            assert main(["doctor", str(run)]) == 0
            assert f"is running (process {living.pid} on" in capsys.readouterr().out
        finally:
            living.kill()
    assert "ended without a word" in told(run)


def test_a_folder_without_attempts_is_a_mistake(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(run)]) == 2
    assert "no attempt was made at this run yet" in capsys.readouterr().err


def test_nothing_of_it_needs_torch(run: Path) -> None:
    begin(run).end(0, "complete")
    program = "import sys; from fdscale.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program, "doctor", str(run)], timeout=60).returncode == 0
