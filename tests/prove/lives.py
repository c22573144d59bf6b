"""Lives of real runs: the smoke student with three blocks on two CPU ranks, started by `fdscale launch`."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fdscale.training.json_lines import read_rows
from tests.test_runs import ranks_of

STEPS, LIFE_SECONDS = 24, 120
SETTINGS = [
    "swinv2_g",
    "--smoke",
    "student.geometry.depths=[1,1,2,1]",
    "student.geometry.extra_norm_period=2",
    f"max_steps={STEPS}",
    "checkpoint.every=2",
    "log.every=1",
]


@dataclass(frozen=True)
class Launch:
    """How every life of every run is started; `shards` hold the data."""

    shards: Path
    environment: dict[str, str]

    def __call__(self, run: Path, *further: str) -> subprocess.Popen[bytes]:
        run.parent.mkdir(parents=True, exist_ok=True)
        program = [sys.executable, "-m", "fdscale", "launch", "distill"]
        command = [*program, *SETTINGS, f"run_dir={run}", f"data.shards={self.shards}", *further, "--ranks", "2"]
        with _printed(run).open("ab") as printed:
            return subprocess.Popen(command, env=self.environment, stdout=printed, stderr=printed)


@dataclass(frozen=True)
class Undisturbed:
    """The run that nothing disturbed, and its seconds: from the ranks' start to the end of a step, a step, a save."""

    run: Path
    start_up: float
    step: float
    save: float


def printed_by(run: Path) -> str:
    """What all lives of a run have printed."""
    return _printed(run).read_text()


def _printed(run: Path) -> Path:
    """Beside the run's parent, which may be a disk that is to be full."""
    return run.parent.with_name(f"{run.parent.name}_printed.txt")


def uncommitted(run: Path) -> list[str]:
    """Checkpoint folders without a manifest: a save is under way, or was lost."""
    folders = list(run.glob("attempts/[0-9]*/step_*"))  # nothing that comes and goes meanwhile
    return sorted(str(folder.relative_to(run)) for folder in folders if not (folder / "manifest.json").exists())


def steps_done(run: Path) -> int:
    return steps_of_this_life(run, 0)


def steps_of_this_life(run: Path, since: float) -> int:
    rows = read_rows(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    return sum("loss" in row and row["time"] >= since for row in rows)


@dataclass
class Life:
    """One start of a run, which is to be killed."""

    process: subprocess.Popen[bytes]
    run: Path
    began: float
    before: list[str]

    def goes_on(self) -> bool:
        assert time.time() - self.began < LIFE_SECONDS, printed_by(self.run)
        time.sleep(0.002)
        return self.process.poll() is None

    def wait_for_ranks(self) -> dict[int, int]:
        while self.goes_on() and len(ranks_of(self.process.pid)) < 2:
            pass
        return ranks_of(self.process.pid)

    def wait_for_steps(self, count: int, at_most: float = LIFE_SECONDS) -> None:
        end = time.time() + at_most
        while self.goes_on() and time.time() < end and steps_of_this_life(self.run, self.began) < count:
            pass

    def saving(self) -> list[str]:
        return [folder for folder in uncommitted(self.run) if folder not in self.before]

    def wait_for_a_save(self) -> None:
        while self.goes_on() and not self.saving():
            pass
