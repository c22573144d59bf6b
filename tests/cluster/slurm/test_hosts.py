"""Two hosts reached by ssh: `fdscale launch --hostfile` over pdsh."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.lab.ssh import Hosts
from tests.cluster.slurm.runs import curve, environment, settings

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
