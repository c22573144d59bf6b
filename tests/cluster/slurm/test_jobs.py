"""Batch jobs on two real SLURM nodes: submitted once, disturbed, complete with the curve of the undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.lab.slurm import Slurm
from tests.cluster.slurm.runs import (
    LAUNCHER,
    TWO_NODES,
    Watch,
    attempts,
    codes,
    curve,
    environment,
    pids,
    settings,
    steps_of_this_life,
    targets_in,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

KILLS, SEED = 5, 2022
STUDENT = "student.safetensors"


def submitted(lab: Slurm, folder: Path, *words: str | Path, site: str = "") -> str:
    """The number of a job of the shipped launcher on two nodes, of a site that sets so much for all its runs."""
    output, variables = f"--output={folder}/job.out", {**environment(), "FDSCALE_SETTINGS": site}
    return lab.sbatch(*TWO_NODES, output, "--signal=B:USR1@60", *words, env=variables)


def test_two_nodes_compute_what_one_machine_computes(
    lab: Slurm, undisturbed: Path, digits: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "a run"
    watch = Watch(lab, submitted(lab, tmp_path, LAUNCHER, *settings(run_dir, digits, steps=6)), run_dir)
    watch.completed()
    assert curve(run_dir) == curve(undisturbed)[:6]
    assert [where["host"] for where in attempts(run_dir)[0]["ranks"]] == ["n1", "n2"]
    assert codes(run_dir) == [0]
    log = run_dir / "logs" / f"{watch.job}_0.log"
    assert (tmp_path / "job.out").read_text() == f"job {watch.job}, restart 0: {log}\n"
    assert "complete: " in log.read_text()


def test_a_signal_a_preemption_and_a_time_limit_are_outlived(
    lab: Slurm, undisturbed: Path, digits: Path, tmp_path: Path
) -> None:
    """And Prometheus finds the run while it lives: each node at its own address, how a life ended, nothing at last."""
    run_dir, targets = tmp_path / "run", tmp_path / "targets"
    targets.mkdir()
    site = f"log.prometheus_port=0 log.prometheus_targets={targets}"
    job = submitted(lab, tmp_path, "--partition=low", LAUNCHER, *settings(run_dir, digits), site=site)
    watch = Watch(lab, job, run_dir)

    watch.steps(1, 1)
    assert_served(lab, targets)
    lab.client("scancel", "--signal=USR1", job)
    ended = [{"run": "run", "node": node, "ended": "stopped"} for node in ("n1", "n2")]
    watch.until(lambda: [one["labels"] for one in targets_in(targets).values()] == ended, "that it will be back")
    watch.steps(2, 1)
    assert not any("ended" in one["labels"] for one in targets_in(targets).values())
    assert len(list(targets.iterdir())) == 2, "the first life's are gone"
    lab.sbatch("--partition=high", "--nodes=2", "--exclusive", f"--output={tmp_path}/high.out", "--wrap=sleep 2")
    watch.steps(3, 1)
    lab.client("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    watch.told_to_stop(restart=2)
    watch.until(lambda: lab.told(job, "Restarts") == "3", "the third restart")
    lab.client("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    watch.completed()

    assert curve(run_dir) == curve(undisturbed)
    assert (run_dir / STUDENT).read_bytes() == (undisturbed / STUDENT).read_bytes()
    assert [record["slurm_restarts"] for record in attempts(run_dir)] == [None, "1", "2", "3"]
    assert codes(run_dir) == [85, 85, 85, 0]
    logs = sorted(path.name for path in (run_dir / "logs").iterdir())
    assert logs == [f"{job}_{restart}.log" for restart in range(4)]
    assert targets_in(targets) == {}


def assert_served(lab: Slurm, targets: Path) -> None:
    """Both nodes, each at its own address; the main one serves what is the whole run's."""
    found = targets_in(targets)
    assert [one["labels"] for one in found.values()] == [{"run": "run", "node": node} for node in ("n1", "n2")]
    hosts = [one["targets"][0].rpartition(":")[0] for one in found.values()]
    assert hosts == ["10.77.0.1", "10.77.0.2"]
    scraped = [lab.client("curl", "-sS", f"http://{one['targets'][0]}/metrics") for one in found.values()]
    assert ["fdscale_loss{" in text for text in scraped] == [True, False]
    assert ["fdscale_rank_host_memory_bytes{" in text for text in scraped] == [True, True]


def test_ranks_that_are_killed_at_random_moments_cost_nothing_but_time(
    lab: Slurm, undisturbed: Path, digits: Path, tmp_path: Path
) -> None:
    run_dir, chance = tmp_path / "run", random.Random(SEED)
    job = submitted(lab, tmp_path, LAUNCHER, *settings(run_dir, digits), f"guards.attempts={KILLS + 1}")
    watch = Watch(lab, job, run_dir)
    # by steps, not seconds: however fast the machine is, the run is not complete before its last kill
    for number, steps in enumerate(chance.sample(range(-1, KILLS), KILLS), start=1):
        watch.until(lambda number=number: len(pids(run_dir, number)) == 2, f"attempt {number}")
        watch.steps(number, steps)
        time.sleep(chance.uniform(0, 0.3))
        print(f"attempt {number}: killed after {steps_of_this_life(run_dir, number)} steps")
        with suppress(ProcessLookupError):
            os.kill(pids(run_dir, number)[chance.randrange(2)], signal.SIGKILL)
    watch.completed()

    assert curve(run_dir) == curve(undisturbed)
    assert (run_dir / STUDENT).read_bytes() == (undisturbed / STUDENT).read_bytes()
    assert len(attempts(run_dir)) == KILLS + 1, watch.logs()
    assert codes(run_dir)[-1] == 0
    assert not {0, 2, 85} & set(codes(run_dir)[:-1]), codes(run_dir)
