"""Tiny runs as batch jobs: their settings, their curves, and where they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fdscale.training.lineage import attempt_folders, read_record
from tests.cluster.lab.slurm import Slurm

REPOSITORY = Path(__file__).parents[3]
LAUNCHER = REPOSITORY / "launchers" / "fd_swinv2g.sh"
STEPS = 33
SETTINGS = ["--smoke", "epochs=3", "checkpoint.every=2", "log.every=1"]
# three blocks of ZeRO-3's start-up cost are enough; the extra norm stays
SETTINGS += ["student.geometry.depths=[1,1,2,1]", "student.geometry.extra_norm_period=2"]
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]


def environment() -> dict[str, str]:
    """A machine without GPU, and this interpreter's programs first."""
    unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in unset and "SLURM" not in name}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "FDSCALE_PYTHON": sys.executable,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def settings(run_dir: Path, digits: Path, steps: int = STEPS) -> list[str]:
    return [*SETTINGS, f"max_steps={steps}", f"run_dir={run_dir}", f"data.shards={digits}"]


def run_here(given: list[str], ranks: int = 2) -> None:
    """`fdscale launch` on this machine alone, to its end."""
    command = [sys.executable, "-m", "fdscale", "launch", "distill", "swinv2_g", f"--ranks={ranks}", *given]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def curve(run_dir: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of each step of a run, as its rows are."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def attempts(run_dir: Path) -> list[dict[str, Any]]:
    """What each attempt recorded, in their order."""
    return [read_record(folder) for folder in attempt_folders(run_dir / "attempts")]


def codes(run_dir: Path) -> list[int | None]:
    """The exit code of each attempt as its launcher saw it; None where the launcher did not live to see it."""
    told = [folder / "launcher.json" for folder in attempt_folders(run_dir / "attempts")]
    return [json.loads(path.read_text())["codes"]["srun"] if path.exists() else None for path in told]


def pids(run_dir: Path, number: int) -> list[int]:
    """Those of an attempt's ranks, which nodes share with this machine; none before they are recorded."""
    records = attempts(run_dir)
    return [where["pid"] for where in records[number - 1].get("ranks", [])] if len(records) >= number else []


def steps_of_this_life(run_dir: Path, number: int) -> int:
    """How many steps the attempt of that number has made so far; -1 before it knows where it goes on from."""
    records = attempts(run_dir)
    if len(records) < number or "continues" not in records[number - 1]:
        return -1
    before = records[number - 1]["continues"]
    done = [step for step, _, _ in curve(run_dir)] if (run_dir / "metrics.jsonl").exists() else []
    return max([0, *done]) - (before["step"] if before else 0)


def targets_in(folder: Path) -> dict[str, dict[str, Any]]:
    """What Prometheus finds in a folder, by node."""
    files = [json.loads(path.read_text())[0] for path in sorted(folder.glob("*.json"))]
    return {one["labels"]["node"]: one for one in files}


class Watch:
    """Waits for a job to come somewhere, and says what its log holds when it does not."""

    def __init__(self, lab: Slurm, job: str, run_dir: Path) -> None:
        self.lab, self.job, self.run_dir = lab, job, run_dir

    def until(self, what: Callable[[], bool], told: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            state = self.lab.state(self.job)
            assert state not in ("FAILED", "CANCELLED", "TIMEOUT"), f"{state} before {told}\n{self.logs()}"
            assert time.monotonic() < deadline, f"{state}, not within {seconds} s: {told}\n{self.logs()}"
            time.sleep(0.2)  # each look asks SLURM, on the cores that the ranks run on

    def steps(self, number: int, count: int) -> None:
        """Until the attempt of that number has made so many steps."""
        self.until(lambda: steps_of_this_life(self.run_dir, number) >= count, f"step {count} of attempt {number}")

    def told_to_stop(self, restart: int) -> None:
        """Until that life has heard of its time limit; its ranks hold still meanwhile, so as not to end before."""
        log = self.run_dir / "logs" / f"{self.job}_{restart}.log"
        frozen = pids(self.run_dir, restart + 1)
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        try:
            self.until(lambda: "SIGUSR1: passed on" in log.read_text(), "USR1 before the time limit")
        finally:
            for pid in frozen:
                os.kill(pid, signal.SIGCONT)

    def completed(self) -> None:
        self.until(lambda: self.lab.state(self.job) == "COMPLETED", "completion", seconds=150)

    def logs(self) -> str:
        """The end of each life's log."""
        logs = sorted((self.run_dir / "logs").glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in logs)
