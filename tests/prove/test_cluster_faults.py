"""Faults of a SLURM cluster: jobs that are disturbed, a node that is cut off the network and comes back, four nodes.

`python -m pytest -m prove tests/prove/test_cluster_faults.py`, as root, after `python -m tests.cluster.lab packages`,
writes docs/measurements/slurm_faults.json and docs/reliability.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fdscale.cluster.orphans import process_start
from fdscale.data.packing.digits import pack_digits
from fdscale.training.lineage import lineage_of
from tests.cluster.lab.daemons import wait_until
from tests.cluster.lab.slurm import Slurm
from tests.cluster.slurm.runs import (
    LAUNCHER,
    Watch,
    attempts,
    curve,
    environment,
    pids,
    run_here,
    settings,
)
from tests.cluster.slurm.test_jobs import test_a_signal_a_preemption_and_a_time_limit_are_outlived as disturbed
from tests.prove.reliability import prove

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1500)]

STEPS = 240
LONG = ["epochs=60", f"max_steps={STEPS}", "checkpoint.every=10"]  # longer than it takes SLURM to give a node up
ONE_RANK = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]


@pytest.fixture(scope="module")
def lab() -> Iterator[Slurm]:
    """Four nodes; one that is silent for ten seconds counts as down."""
    cluster = Slurm.new(4, node_timeout=10)
    yield cluster
    cluster.down()


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Slurm]:
    cluster = Slurm.new(2)
    yield cluster
    cluster.down()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "digits"
    pack_digits(folder, "test")
    return folder


def test_a_job_that_is_disturbed(two_nodes: Slurm, digits: Path, tmp_path: Path) -> None:
    def done() -> tuple[str, bool]:
        expected = tmp_path / "expected"
        run_here(settings(expected, digits))
        disturbed(two_nodes, expected, digits, tmp_path)
        found = "one job, four attempts with codes 85, 85, 85, 0; curve and student file are the undisturbed ones"
        return found, True

    did = (
        "on 2 nodes: scancel --signal=USR1, preemption by a job of higher priority, the time limit, one after the other"
    )
    prove("slurm_faults", "sbatch; scancel --signal, preemption, time limit", did, done)


def test_a_node_that_is_cut_off_and_comes_back(lab: Slurm, digits: Path, tmp_path: Path) -> None:
    def done() -> tuple[str, bool]:
        seconds = cut_off_and_back(lab, digits, tmp_path)
        found = (
            f"SLURM starts the job on another node after {seconds:.0f} s; the rank cut off, alive until then, ends "
            "at its next commit without making it; nothing of its is read, no step is in the curve twice"
        )
        return found, True

    did = "the cable of the job's node is pulled for good while its rank trains on, and plugged in again at the end"
    prove("slurm_faults", "node cut off the network and back", did, done)


def cut_off_and_back(lab: Slurm, digits: Path, folder: Path) -> float:
    """Its rank goes on alone, and could commit, until it finds that the job has begun anew; seconds until then."""
    expected, run_dir = folder / "expected", folder / "run"
    run_here([*settings(expected, digits), *LONG], ranks=1)
    nodes = ["--nodes=1", *ONE_RANK, f"--output={folder}/job.out"]
    job = lab.sbatch(*nodes, LAUNCHER, *settings(run_dir, digits), *LONG, env=environment())
    watch = Watch(lab, job, run_dir)
    watch.steps(1, 15)
    host, zombie = lab.told(job, "BatchHost"), pids(run_dir, 1)[0]
    lab.nodes.cut_off(host)
    began = time.monotonic()
    watch.until(lambda: len(attempts(run_dir)) == 2, "a second attempt", seconds=180)
    seconds = time.monotonic() - began
    assert process_start(zombie) is not None, "it ended by itself: nothing was proved"
    assert lab.told(job, "BatchHost") != host
    wait_until(lambda: process_start(zombie) is None, 60, "the end of the rank that was cut off")
    lab.nodes.back(host)
    watch.until(lambda: lab.state(job) == "COMPLETED", "completion", seconds=600)

    assert lab.told(job, "Restarts") == "1", "the former life must not requeue the one that runs"
    assert len(attempts(run_dir)) == 2
    assert {commit.attempt for commit in lineage_of(run_dir / "attempts").believed} <= {2}
    assert [row[0] for row in curve(run_dir)] == list(range(1, STEPS + 1)), "rows of the rank that was cut off"
    assert curve(run_dir) == curve(expected)
    assert "has begun meanwhile" in (run_dir / "logs" / f"{job}_0.log").read_text()
    return seconds


def test_four_nodes(lab: Slurm, digits: Path, tmp_path: Path) -> None:
    def done() -> tuple[str, bool]:
        wait_until(lab.all_idle, 120, "four idle nodes")
        more = ["data.global_batch=64", "max_steps=6"]
        run_here([*settings(tmp_path / "expected", digits), *more], ranks=4)
        nodes = ["--nodes=4", *ONE_RANK, f"--output={tmp_path}/job.out"]
        run_dir = tmp_path / "run"
        job = lab.sbatch(*nodes, LAUNCHER, "--ranks=4", *settings(run_dir, digits), *more, env=environment())
        Watch(lab, job, run_dir).completed()
        hosts = [where["host"] for where in attempts(run_dir)[0]["ranks"]]
        same = curve(run_dir) == curve(tmp_path / "expected")
        return "ranks on n1 to n4; the curve of one machine", same and hosts == ["n1", "n2", "n3", "n4"]

    prove("slurm_faults", "sbatch on 4 SLURM nodes", "one rank a node, 6 steps", done)
