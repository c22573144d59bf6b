"""What takes a SLURM cluster longer: a node that is cut off the network and comes back, and four nodes.

`python -m pytest -m prove tests/prove/test_cluster_faults.py`, as root, after `python -m tests.cluster.lab packages`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fdscale.cluster.orphans import process_start
from fdscale.data.pack import pack_digits
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

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1500)]

LONG = ["epochs=60", "max_steps=240", "checkpoint.every=10"]  # longer than it takes SLURM to give a node up
ONE_RANK = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]


@pytest.fixture(scope="module")
def lab() -> Iterator[Slurm]:
    """Four nodes; one that is silent for ten seconds counts as down."""
    cluster = Slurm.new(4, node_timeout=10)
    yield cluster
    cluster.down()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "digits"
    pack_digits(folder, "test")
    return folder


def test_a_node_that_is_cut_off_and_comes_back_changes_nothing(lab: Slurm, digits: Path, tmp_path: Path) -> None:
    """Its rank goes on alone, and could commit, until it finds that the job has begun anew elsewhere."""
    expected, run_dir = tmp_path / "expected", tmp_path / "run"
    run_here([*settings(expected, digits), *LONG], ranks=1)
    nodes = ["--nodes=1", *ONE_RANK, f"--output={tmp_path}/job.out"]
    job = lab.sbatch(*nodes, LAUNCHER, *settings(run_dir, digits), *LONG, env=environment())
    watch = Watch(lab, job, run_dir)
    watch.steps(1, 15)
    host, zombie = lab.told(job, "BatchHost"), pids(run_dir, 1)[0]
    lab.nodes.cut_off(host)
    watch.until(lambda: len(attempts(run_dir)) == 2, "a second attempt", seconds=180)
    assert process_start(zombie) is not None, "it ended by itself: nothing was proved"
    assert lab.told(job, "BatchHost") != host
    wait_until(lambda: process_start(zombie) is None, 60, "the end of the rank that was cut off")
    lab.nodes.back(host)
    watch.completed()

    assert lab.told(job, "Restarts") == "1", "the former life must not requeue the one that runs"
    assert len(attempts(run_dir)) == 2
    believed = {commit.attempt for commit in lineage_of(run_dir / "attempts").believed}
    assert believed <= {2}
    assert {row[0]: row[1:] for row in curve(run_dir)} == {row[0]: row[1:] for row in curve(expected)}
    assert [row[0] for row in curve(run_dir)] == list(range(1, 241)), "rows of the rank that was cut off"
    assert "has begun meanwhile" in (run_dir / "logs" / f"{job}_0.log").read_text()


def test_four_nodes_compute_what_one_machine_computes(lab: Slurm, digits: Path, tmp_path: Path) -> None:
    wait_until(lab.all_idle, 120, "four idle nodes")
    more = ["data.global_batch=64", "max_steps=6"]
    run_here([*settings(tmp_path / "expected", digits), *more], ranks=4)
    nodes = ["--nodes=4", *ONE_RANK, f"--output={tmp_path}/job.out"]
    run_dir = tmp_path / "run"
    job = lab.sbatch(*nodes, LAUNCHER, "--ranks=4", *settings(run_dir, digits), *more, env=environment())
    Watch(lab, job, run_dir).completed()
    assert curve(run_dir) == curve(tmp_path / "expected")
    assert [where["host"] for where in attempts(run_dir)[0]["ranks"]] == ["n1", "n2", "n3", "n4"]
