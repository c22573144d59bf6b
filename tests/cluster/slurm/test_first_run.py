"""docs/first-cluster-run.md, every command of it in its order, on two SLURM nodes; the hub is on this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.lab.daemons import wait_until
from tests.cluster.lab.nodes import CONTROLLER
from tests.cluster.lab.slurm import Slurm
from tests.cluster.slurm.runs import environment
from tests.test_fetch import Hub, hub
from tests.test_first_cluster_run import COMMANDS

__all__ = ["hub"]  # the fixture

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

RUN = Path("runs/vit_b_clip_b-smoke")


def told_by(lab: Slurm, words: list[str], env: dict[str, str]) -> str:
    """What a command of the page prints: the one that needs a network where there is one, all others on the cluster."""
    command = [part for word in words for part in ([sys.executable, "-m", "fdscale"] if word == "fdscale" else [word])]
    command = command if "fetch" in words else lab.nodes.on(CONTROLLER, command)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_walk_through_on_the_cluster(lab: Slurm, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.port}", "HF_HOME": str(tmp_path / "hf")}
    env = environment() | endpoint | {"FDSCALE_WEIGHTS": str(tmp_path / "weights")}
    told: dict[str, list[str]] = {}
    for words in COMMANDS:
        name = words[words.index("fdscale") + 1] if "fdscale" in words else words[0]
        told.setdefault(name, []).append(told_by(lab, words, env))
        if name == "squeue":
            job = told["submit"][0].split()[1]
            wait_until(lambda job=job: lab.state(job) == "COMPLETED", 150, f"job {job} to complete")

    assert "nothing to fix" in told["doctor"][0] or "fix first" in told["doctor"][0]
    assert "2 ranks" in told["doctor"][0]
    assert job in told["squeue"][0]
    assert "complete" in told["checkpoint"][0]
    assert "completed" in told["doctor"][1]
    assert "already complete" in told["submit"][1]
    assert (RUN / "logs" / f"{job}_0.log").is_file()
    assert (tmp_path / "vit_b_student" / "model.safetensors").is_file()
