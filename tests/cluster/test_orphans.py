"""Ranks whose launcher dies: told by real processes, with stand-ins for DeepSpeed's two programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fdscale.cluster.orphans import NOTED, note_launchers, process_start, watch_launchers
from fdscale.cluster.ranks import StopSignals

REPOSITORY = Path(__file__).parents[2]
RANK = """
import os, sys, time
from pathlib import Path
from fdscale.cluster.orphans import note_launchers, watch_launchers
from fdscale.cluster.ranks import StopSignals
note_launchers(os.environ)
if "LATE" in os.environ:
    Path("noted").touch()
    while os.getppid() == int(os.environ["PARENT"]):
        time.sleep(0.02)
with StopSignals() as stop:
    watch_launchers(stop, os.environ)
    Path("rank").write_text(str(os.getpid()))
    while not stop.requested:
        time.sleep(0.02)
    Path("committed").touch()
sys.exit(85)
"""
# in place of deepspeed.launcher.launch and of torchrun: starts one rank, waits for it, passes nothing on
STARTS = """
import os, subprocess, sys
child = {**os.environ, "RANK": "0", "PARENT": str(os.getpid())}
sys.exit(subprocess.run([sys.executable, *sys.argv[1:]], env=child).returncode)
"""
# in place of DeepSpeed's runner
RUNS = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "-u", "-m", "deepspeed.launcher.launch", *sys.argv[1:]]).returncode)
"""
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts a launcher of one rank in `tmp_path`."""
    package = tmp_path / "path" / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py"):
        file.touch()
    (package / "launch.py").write_text(STARTS)
    (tmp_path / "torchrun").write_text(STARTS)
    (tmp_path / "deepspeed").write_text(RUNS)
    (tmp_path / "rank.py").write_text(RANK)
    path = os.pathsep.join([str(tmp_path / "path"), str(REPOSITORY)])

    def launch(*launcher: str, **variables: str) -> subprocess.Popen[bytes]:
        env = {**{name: value for name, value in os.environ.items() if name != "RANK"}, "PYTHONPATH": path, **variables}
        return subprocess.Popen([*launcher, "rank.py"], cwd=tmp_path, env=env)

    return launch


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended_as_if_told(folder: Path) -> None:
    wait_for((folder / "committed").exists)
    wait_for(lambda: process_start(int((folder / "rank").read_text())) is None)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_launcher_is_noticed(tmp_path: Path, start: Start, signum: signal.Signals) -> None:
    launcher = start(sys.executable, "torchrun")
    wait_for((tmp_path / "rank").exists)
    time.sleep(1.5)
    assert not (tmp_path / "committed").exists(), "stopped, and its launcher lives"
    launcher.send_signal(signum)
    launcher.wait()
    ended_as_if_told(tmp_path)


@pytest.mark.parametrize("shell", [False, True], ids=["by itself", "from a shell that has gone"])
def test_deepspeeds_runner_counts_as_well_but_no_shell(tmp_path: Path, start: Start, shell: bool) -> None:
    if shell:
        background = f"{sys.executable} deepspeed rank.py & echo $! > runner; until [ -e rank ]; do sleep 0.1; done"
        launcher = start("bash", "-c", background)
        launcher.wait()
        runner = int((tmp_path / "runner").read_text())
        time.sleep(1.5)
        assert not (tmp_path / "committed").exists(), "stopped, and its launchers live"
    else:
        launcher = start(sys.executable, "deepspeed")
        wait_for((tmp_path / "rank").exists)
        runner = launcher.pid
    os.kill(runner, signal.SIGKILL)
    launcher.wait()
    ended_as_if_told(tmp_path)


def test_a_launcher_that_died_during_the_imports_is_missed(tmp_path: Path, start: Start) -> None:
    """The rank has noted it before; when it looks again it is init's child."""
    launcher = start(sys.executable, "torchrun", LATE="1")
    wait_for((tmp_path / "noted").exists)
    launcher.kill()
    launcher.wait()
    ended_as_if_told(tmp_path)


def test_whoever_has_no_launcher_is_left_alone() -> None:
    """srun's tasks are ended by srun, and what was started by hand may outlive its shell."""
    env = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", NOTED: "1:1"}
    note_launchers(env)
    assert NOTED not in env
    with StopSignals() as stop:
        watch_launchers(stop, env)
        assert not stop.requested


def test_a_run_that_has_ended_is_watched_no_longer() -> None:
    env = {"RANK": "0"}
    note_launchers(env)
    assert env[NOTED].startswith(f"{os.getppid()}:")
    stop = StopSignals()
    watch_launchers(stop, {NOTED: f"{os.getppid()}:{process_start(os.getppid())}"})
    stop.restore()
    assert not stop.requested
