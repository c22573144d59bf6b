"""Faults done to whole runs: what is committed stays, what went wrong is said, and the same command goes on.

`python -m pytest -m prove tests/prove/test_faults.py` writes docs/measurements/faults.json and docs/reliability.md.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fdscale.cluster.orphans import process_start
from tests.prove.lives import Launch, Undisturbed, printed_by, steps_done
from tests.prove.reliability import prove
from tests.test_runs import curve, environment, ranks_of
from tests.test_runs import test_a_deepspeed_runner_that_is_killed_leaves_a_commit_and_nobody_behind as kill_the_runner

__all__ = ["environment"]  # the fixture

pytestmark = [
    pytest.mark.prove,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root"),
]
LIFE_SECONDS = 150


def until(what: Callable[[], bool], process: subprocess.Popen[bytes], run: Path) -> None:
    deadline = time.monotonic() + LIFE_SECONDS
    while not what():
        assert process.poll() is None, printed_by(run)
        assert time.monotonic() < deadline, printed_by(run)
        time.sleep(0.01)


def commits(run: Path) -> list[Path]:
    return sorted(run.glob("attempts/*/step_*/manifest.json"))


def is_the_undisturbed(run: Path, usual: Undisturbed) -> bool:
    student = "student.safetensors"
    same = (run / student).read_bytes() == (usual.run / student).read_bytes()
    return same and curve(run) == curve(usual.run)


def goes_on(launch: Launch, run: Path, usual: Undisturbed) -> bool:
    """The same command once more: it completes, and the whole is the undisturbed run."""
    return launch(run).wait(LIFE_SECONDS) == 0 and is_the_undisturbed(run, usual)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_fills_up(launch: Launch, undisturbed: Undisturbed, tmp_path: Path) -> None:
    def done() -> tuple[str, bool]:
        with small_disk(tmp_path / "disk", "600M") as disk:
            run = disk / "run"
            process = launch(run)
            until(lambda: len(commits(run)) >= 2, process, run)
            filler = disk / "filler"
            with filler.open("wb") as file:
                file.write(bytes(shutil.disk_usage(disk).free - (1 << 20)))
            code = process.wait(LIFE_SECONDS)
            told = "could not write" in printed_by(run) and "is intact" in printed_by(run)
            kept = len(commits(run))
            filler.unlink()
            resumed = goes_on(launch, run, undisturbed)
            found = f"exit code {code}, says how much is free; {kept} commits intact; with room again it completes"
            return found, code == 2 and told and kept >= 1 and resumed

    prove("faults", "disk full during a save", "a file fills the disk after the second commit, then goes", done)


def test_a_run_directory_that_turns_read_only(launch: Launch, undisturbed: Undisturbed, tmp_path: Path) -> None:
    def done() -> tuple[str, bool]:
        run = tmp_path / "run"
        process = launch(run)
        until(lambda: len(commits(run)) >= 1, process, run)
        attempt = run / "attempts" / "0001"
        subprocess.run(["mount", "--bind", attempt, attempt], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", attempt], check=True)
        try:
            code = process.wait(LIFE_SECONDS)
            told = "Read-only file system" in printed_by(run)
            kept = len(commits(run))
        finally:
            subprocess.run(["umount", "--lazy", attempt], check=True)
        resumed = goes_on(launch, run, undisturbed)
        found = f"exit code {code}, said so; {kept} commits intact; writable again it completes"
        return found, code == 2 and told and kept >= 1 and resumed

    prove(
        "faults", "run directory read-only", "the attempt's folder is remounted read-only after the first commit", done
    )


def test_a_rank_that_is_frozen(launch: Launch, undisturbed: Undisturbed, tmp_path: Path) -> None:
    limit = 15

    def done() -> tuple[str, bool]:
        run = tmp_path / "run"
        process = launch(run, f"guards.hang_seconds={limit}")
        until(lambda: steps_done(run) >= 4, process, run)
        frozen = ranks_of(process.pid)[1]
        os.kill(frozen, signal.SIGSTOP)
        began = time.monotonic()
        code = process.wait(LIFE_SECONDS)
        seconds = time.monotonic() - began
        stacks = [path.name for path in run.glob("attempts/0001/stacks/*.txt")]
        named = "rank 1" in printed_by(run)
        gone = not Path(f"/proc/{frozen}").exists()
        resumed = goes_on(launch, run, undisturbed)
        found = (
            f"after {seconds:.0f} s: {', '.join(stacks)} on disk, rank 1 named and killed, code {code}; it completes"
        )
        held = code == 85 and stacks == ["rank_0.txt"] and named and gone and resumed and seconds < limit + 45
        return found, held

    prove("faults", "one rank frozen (SIGSTOP)", f"rank 1 stopped in a step, guards.hang_seconds={limit}", done)


def test_two_starts_on_one_run_directory(launch: Launch, undisturbed: Undisturbed, tmp_path: Path) -> None:
    def done() -> tuple[str, bool]:
        run = tmp_path / "run"
        first = launch(run)
        until(lambda: steps_done(run) >= 1, first, run)
        code = launch(run).wait(LIFE_SECONDS)
        refused = "is being written by attempt 0001" in printed_by(run)
        completed = first.wait(LIFE_SECONDS) == 0 and is_the_undisturbed(run, undisturbed)
        found = f"the second ends with code {code} and names the first one's process; the first completes undisturbed"
        return found, code == 2 and refused and completed

    prove("faults", "two runs started on one run directory", "the same command twice", done)


def test_a_launcher_that_is_killed(
    environment: dict[str, str], launch: Launch, tmp_path: Path, port: Callable[[], int]
) -> None:
    def done() -> tuple[str, bool]:
        kill_the_runner(environment, launch.shards, tmp_path, port)
        ours = tmp_path / "ours" / "run"
        process = launch(ours, "max_steps=70", "epochs=5", "checkpoint.every=1000")
        until(lambda: steps_done(ours) >= 2, process, ours)
        family = list(ranks_of(process.pid).values())
        process.kill()
        process.wait()
        until_gone(family)
        found = "DeepSpeed's runner and ours, SIGKILL: the ranks notice, commit their step and end; nobody is left"
        return found, len(commits(ours)) == 1

    prove("faults", "the launcher process killed", "SIGKILL of `deepspeed` and of `fdscale launch` in a step", done)


def until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(process_start(pid) is not None for pid in pids):
        assert time.monotonic() < deadline, "ranks outlive their launcher"
        time.sleep(0.1)
