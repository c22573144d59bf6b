"""Real distillations under the shipped alerts: one goes through the queue, one meets every fault and is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fdscale.cluster.ranks import REQUEUE_EXIT_CODE
from fdscale.data.pack import pack_digits
from fdscale.training.lineage import attempt_folders, read_record
from tests.cluster.lab.daemons import wait_until
from tests.cluster.lab.prometheus import Prometheus

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

REPOSITORY = Path(__file__).parents[2]
FAULTS = {"NaNStreak", "Straggler", "DataStarvation", "CheckpointTooOld"}
STEPS_LEFT = 80  # for the second life: a few seconds, in which it is scraped
IN_QUEUE = 4.0  # seconds: two minutes in the lab's time


class Run:
    """A run in a process group of its own; `settings` beside those that all have."""

    def __init__(self, folder: Path, digits: Path, targets: Path, start: list[str], *settings: str) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        common = [f"run_dir={folder}", f"data.shards={digits}", "log.every=1", "data.workers=0"]
        common += ["log.prometheus_port=0", f"log.prometheus_targets={targets}"]
        self.command = [*start, "distill", "vit_b_dino", "--smoke", *common, *settings]

    def start(self, **variables: str) -> None:
        unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        kept = {name: value for name, value in os.environ.items() if name not in unset and "SLURM" not in name}
        python = {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, env={**kept, **python, **variables}, stdout=log, stderr=log)

    def pids(self) -> list[int]:
        """Those of the newest attempt's ranks, once they are recorded."""
        folders = attempt_folders(self.folder / "attempts")
        return [rank["pid"] for rank in read_record(folders[-1]).get("ranks", [])] if folders else []

    def rows(self) -> list[str]:
        return (self.folder / "metrics.jsonl").read_text().splitlines()

    def kill(self) -> None:
        """SIGKILL for the launcher and its ranks, which could say something otherwise."""
        pids = self.pids() if self.process.poll() is None else []
        for pid in (self.process.pid, *pids):
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


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "digits"
    pack_digits(folder, "test")
    return folder


@pytest.fixture(scope="module", autouse=True)
def runs(
    prometheus: Prometheus, digits: Path, tmp_path_factory: pytest.TempPathFactory, port: Callable[[], int]
) -> Iterator[dict[str, Run]]:
    """Both runs from the start on, so that nobody waits for one after the other."""
    folder, python = tmp_path_factory.mktemp("runs"), Path(sys.executable)
    torchrun = [str(python.parent / "torchrun"), "--nproc_per_node=2", f"--master_port={port()}"]
    program = [*torchrun, str(Path(__file__).parent / "faulty_run.py")]
    common = (digits, prometheus.targets)
    runs = {
        "faulty": Run(folder / "faulty", *common, program, "checkpoint.every=4"),
        "a run": Run(folder / "a run", *common, [str(python), "-m", "fdscale"], "checkpoint.every=50", "epochs=1000"),
    }
    runs["faulty"].start()
    runs["a run"].start(SLURM_JOB_ID="7")
    yield runs
    for run in runs.values():
        run.kill()


def up(prometheus: Prometheus, run: str, ended: str = "") -> list[str]:
    """The values of `up` of a run's targets, of those that ended so."""
    samples = prometheus.query(f'up{{job="fdscale", run="{run}", ended="{ended}"}}')
    return [sample["value"][1] for sample in samples]


def test_every_fault_is_told_and_then_that_the_run_was_killed(prometheus: Prometheus, runs: dict[str, Run]) -> None:
    faulty, told = runs["faulty"], set()

    def all_told() -> bool:
        told.update(alert for alert, run in prometheus.told() if run == "faulty")
        return told >= FAULTS

    faulty.until(all_told, 150, f"{FAULTS}")
    faulty.kill()
    faulty.until(lambda: ("RunDisappeared", "faulty") in prometheus.told(), 30, "that it has gone")
    assert prometheus.fired("faulty") == {*FAULTS, "RunDisappeared"}
    assert {alert for alert, run in prometheus.told() if run == "faulty"} == {"RunDisappeared"}


def test_a_run_that_is_stopped_started_again_and_completes_fires_nothing(
    prometheus: Prometheus, runs: dict[str, Run]
) -> None:
    run = runs["a run"]
    run.until(lambda: up(prometheus, "a run") == ["1"], 90, "Prometheus to find it")
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.process.wait(60) == REQUEUE_EXIT_CODE, run.log.read_text()[-5000:]
    run.until(lambda: up(prometheus, "a run", "stopped") == ["0"], 15, "that it waits to be started")
    time.sleep(IN_QUEUE)
    run.command.append(f"max_steps={json.loads(run.rows()[-1])['step'] + STEPS_LEFT}")
    run.start(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    run.until(lambda: up(prometheus, "a run") == ["1"], 90, "Prometheus to find it again")
    assert run.process.wait(90) == 0, run.log.read_text()[-5000:]
    run.until(lambda: not up(prometheus, "a run") + up(prometheus, "a run", "stopped"), 15, "its target to go")
    samples = prometheus.query('count_over_time(run:fdscale_step:max{run="a run"}[10m])')
    assert float(samples[0]["value"][1]) > 20, "Prometheus has seen hardly anything"
    assert prometheus.fired("a run") == set()


def test_no_rule_fails_on_what_real_runs_tell(prometheus: Prometheus) -> None:
    failures = {rule["name"]: rule["lastError"] for rule in prometheus.rules() if rule["health"] != "ok"}
    assert failures == {}
