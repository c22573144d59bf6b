"""Several nodes without SLURM: over ssh and pdsh, or with one command on each node."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.lab.ssh import Hosts
from tests.cluster.slurm.runs import LAUNCHER, curve, environment, settings

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture
def hosts(port: Callable[[], int]) -> Iterator[Hosts]:
    """Two addresses of this machine that answer to ssh."""
    both = Hosts(port())
    try:
        both.up()
        yield both
    finally:
        both.down()


def test_a_hostfile_computes_what_one_machine_computes(
    hosts: Hosts, undisturbed: Path, digits: Path, tmp_path: Path
) -> None:
    run_dir, env = tmp_path / "a run", environment()
    # DeepSpeed hands on PYTHON… and what this file names
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    env |= hosts.variables | {"PATH": f"{hosts.folder}/bin:{env['PATH']}"}
    launch = [sys.executable, "-m", "fdscale", "launch", "distill", "swinv2_g", f"--hostfile={hosts.hostfile}"]
    command = [*launch, *settings(run_dir, digits, steps=6)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert curve(run_dir) == curve(undisturbed)[:6]


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_one_command_on_each_node_computes_what_one_machine_computes(
    launcher: str, undisturbed: Path, digits: Path, tmp_path: Path, port: Callable[[], int]
) -> None:
    run_dir, meeting = tmp_path / "run", port()
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    nodes = [
        subprocess.Popen(
            [*on_node(launcher, node, meeting), *settings(run_dir, digits, steps=6)],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    told = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(told)
    assert curve(run_dir) == curve(undisturbed)[:6]


def on_node(launcher: str, node: int, port: int) -> list[str]:
    """As docs/multi-node.md has it, both nodes being this machine."""
    where = ["--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", str(port)]
    return {
        "deepspeed": ["deepspeed", "--hostfile", "hosts", "--no_ssh", *where, str(LAUNCHER)],
        "torchrun": ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", *where, str(LAUNCHER)],
    }[launcher]
