"""A job on two real nodes as Prometheus meets it: each node at its own address, how a life ended, nothing at last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.lab.slurm import Slurm
from tests.cluster.slurm.runs import LAUNCHER, TWO_NODES, Watch, environment, settings

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def found(folder: Path) -> dict[str, dict[str, Any]]:
    """What Prometheus finds in a folder, by node."""
    files = [json.loads(path.read_text())[0] for path in sorted(folder.glob("*.json"))]
    return {one["labels"]["node"]: one for one in files}


def test_a_job_is_found_where_its_nodes_are_until_it_is_complete(lab: Slurm, digits: Path, tmp_path: Path) -> None:
    run_dir, targets = tmp_path / "run", tmp_path / "targets"
    targets.mkdir()
    site = {**environment(), "FDSCALE_SETTINGS": f"log.prometheus_port=0 log.prometheus_targets={targets}"}
    output = f"--output={tmp_path}/job.out"
    job = lab.sbatch(*TWO_NODES, output, "--signal=B:USR1@60", LAUNCHER, *settings(run_dir, digits), env=site)
    watch = Watch(lab, job, run_dir)

    watch.steps(1, 1)
    first = found(targets)
    assert [one["labels"] for one in first.values()] == [{"run": "run", "node": name} for name in ("n1", "n2")]
    hosts = [one["targets"][0].rpartition(":")[0] for one in first.values()]
    assert hosts == ["10.77.0.1", "10.77.0.2"]
    scraped = [lab.client("curl", "-sS", f"http://{one['targets'][0]}/metrics") for one in first.values()]
    assert ["fdscale_loss{" in text for text in scraped] == [True, False]

    lab.client("scancel", "--signal=USR1", job)
    ended = [{"run": "run", "node": name, "ended": "stopped"} for name in ("n1", "n2")]
    watch.until(lambda: [one["labels"] for one in found(targets).values()] == ended, "its targets say it will be back")

    watch.steps(2, 1)
    second = found(targets)
    assert all("ended" not in one["labels"] for one in second.values())
    assert len(list(targets.iterdir())) == 2, "the first life's are gone"
    watch.completed()
    assert found(targets) == {}
