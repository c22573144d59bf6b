"""Real distillations as processes, found by Prometheus through the files that they write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fdscale.cluster.ranks import REQUEUE_EXIT_CODE
from fdscale.training.lineage import attempt_folders, read_record
from tests.cluster.lab.daemons import wait_until
from tests.cluster.lab.prometheus import Prometheus

HERE = Path(__file__).parent
SETTINGS = ["vit_b_dino", "--smoke", "epochs=1000", "log.every=1", "data.workers=0", "log.prometheus_port=0"]
STEPS_LEFT = 160  # for the second life: some ten seconds on a fast machine, in which it is scraped
IN_QUEUE = 4.0  # seconds: two minutes in the lab's time


class Run:
    """A run in `folder`, whose name it has; `program` starts its ranks."""

    def __init__(self, folder: Path, program: list[str], *settings: str) -> None:
        self.folder, self.name, self.log = folder, folder.name, folder.with_suffix(".log")
        self.command = [*program, "distill", *SETTINGS, f"run_dir={folder}", *settings]

    def start(self, **variables: str) -> None:
        unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        kept = {name: value for name, value in os.environ.items() if name not in unset and "SLURM" not in name}
        python = {"PYTHONPATH": str(HERE.parents[1]), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, env={**kept, **python, **variables}, stdout=log, stderr=log)

    def steps(self) -> int:
        return json.loads((self.folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]

    def kill(self) -> None:
        """SIGKILL for the launcher and the ranks, which could say something otherwise."""
        if self.process.poll() is not None:
            return
        folders = attempt_folders(self.folder / "attempts")
        ranks = read_record(folders[-1]).get("ranks", []) if folders else []
        for pid in (self.process.pid, *(rank["pid"] for rank in ranks)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def until(self, what: Callable[[], bool], seconds: float, told: str) -> None:
        try:
            wait_until(what, seconds, told)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.log.read_text()[-5000:]}") from None

    def ends(self, code: int) -> None:
        assert self.process.wait(240) == code, self.log.read_text()[-5000:]


def faulty_run(folder: Path, port: int, *settings: str) -> Run:
    """Two ranks that meet one fault after the other."""
    torchrun = str(Path(sys.executable).parent / "torchrun")
    program = [torchrun, "--nproc_per_node=2", f"--master_port={port}", str(HERE / "faulty_run.py")]
    return Run(folder, program, "checkpoint.every=2", *settings)


def healthy_run(folder: Path, *settings: str) -> Run:
    """One rank that nothing happens to."""
    return Run(folder, [sys.executable, "-m", "fdscale"], "checkpoint.every=50", *settings)


def through_the_queue(run: Run, prometheus: Prometheus) -> None:
    """What a job goes through: it is stopped, waits, is started again, and completes; all of it seen by Prometheus."""
    run.start(SLURM_JOB_ID="7", FDSCALE_REQUEUES="1")
    run.until(lambda: prometheus.answers(run.name) == ["1"], 180, "Prometheus to find it")
    time.sleep(IN_QUEUE)
    os.kill(run.process.pid, signal.SIGTERM)
    run.ends(REQUEUE_EXIT_CODE)
    run.until(lambda: prometheus.answers(run.name, "stopped") == ["0"], 60, "that it waits to be started")
    time.sleep(IN_QUEUE)
    run.command.append(f"max_steps={run.steps() + STEPS_LEFT}")
    run.start(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1", FDSCALE_REQUEUES="1")
    run.until(lambda: prometheus.answers(run.name) == ["1"], 180, "Prometheus to find it again")
    run.ends(0)
    run.until(
        lambda: prometheus.answers(run.name) == prometheus.answers(run.name, "stopped") == [], 60, "its target to go"
    )
