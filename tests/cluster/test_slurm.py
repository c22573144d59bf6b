"""Lives of a batch job, told by stand-ins for SLURM's programs: what srun gets, where the log goes, who is requeued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LIFE = """
import logging, sys
from pathlib import Path
from fdscale.cluster.launch import launch
logging.basicConfig(level=logging.INFO)
sys.exit(launch(["distill", "x"], Path("run")))
"""
CLAIM = "mkdir -p run/attempts/0001"
WORDS = "rank 1 on n2, pid 7, 2026-11-27 10:00:00 +0000 (1795000000.000)"
MISTAKE = f"mkdir -p run/attempts/0001/failures; printf '{WORDS}\\n\\nUserError: a full disk\\n'"
SHOW = """#!/bin/sh
if [ "$1" = show ]; then
  printf 'JobId=7 JobName=a JobState=FAILED\\n   JobState={state} Reason=None\\n'
  echo '   Requeue=1 Restarts={restarts} BatchFlag=1'
else
  echo "$@" >> requeued
  exit {answer}
fi
"""
Stage = Callable[..., dict[str, str]]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """The environment of a batch script in `tmp_path`, with stand-ins: a step that does `step`, a job in that state."""

    def write(step: str, state: str = "RUNNING", restarts: int = 0, answer: int = 0) -> dict[str, str]:
        tool(tmp_path, "srun", f"#!/bin/sh\n{step}\n")
        tool(tmp_path, "scontrol", SHOW.format(state=state, restarts=restarts, answer=answer))
        kept = {name: value for name, value in os.environ.items() if "SLURM" not in name and name != "RANK"}
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        own = {"PATH": f"{tmp_path / 'tools'}:{os.environ['PATH']}", "PYTHONPATH": path}
        return {**kept, **own, "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}

    return write


def tool(folder: Path, name: str, text: str) -> None:
    path = folder / "tools" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def live(folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIFE]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def log(folder: Path, restart: int = 0) -> str:
    return (folder / "run" / "logs" / f"7_{restart}.log").read_text()


def test_whoever_ends_it_last_a_mistake_is_one(tmp_path: Path, stage: Stage) -> None:
    """srun tells the highest code of its tasks: 137 of the peers, whom it killed after the one with the mistake."""
    done = live(tmp_path, stage(f"{MISTAKE} > run/attempts/0001/failures/rank_1.txt; exit 137"))
    assert done.returncode == 2, done.stderr
    assert not (tmp_path / "requeued").exists()


def test_what_is_no_run_leaves_nothing(tmp_path: Path, stage: Stage) -> None:
    command = [sys.executable, "-c", LIFE.replace('Path("run")', "None")]
    done = subprocess.run(command, cwd=tmp_path, env=stage("exit 1"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tools"]


@pytest.mark.parametrize(
    ("step", "state", "requeued"),
    [
        (f"{CLAIM}; exit 85", "RUNNING", True),
        (f"{CLAIM}; exit 137", "RUNNING", True),
        (f"{CLAIM}; exit 0", "RUNNING", False),
        (f"{CLAIM}; exit 2", "RUNNING", False),
        (f"{CLAIM}; exit 85", "COMPLETING", False),
        ("exit 1", "RUNNING", False),
    ],
    ids=["asked", "failed", "complete", "a mistake", "cancelled or preempted", "never began"],
)
def test_who_is_requeued(tmp_path: Path, stage: Stage, step: str, state: str, requeued: bool) -> None:
    done = live(tmp_path, stage(step, state))
    assert done.returncode == int(step.split()[-1]), done.stderr
    assert (tmp_path / "requeued").exists() == requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "requeue 7\n"
    if CLAIM in step:
        kept = json.loads((tmp_path / "run" / "attempts" / "0001" / "launcher.json").read_text())
        assert kept == {"codes": {"srun": done.returncode}}
    else:
        assert "before an attempt began: the start itself fails" in log(tmp_path)


def test_an_attempt_of_an_earlier_life_is_not_this_ones(tmp_path: Path, stage: Stage) -> None:
    (tmp_path / "run" / "attempts" / "0001").mkdir(parents=True)
    assert live(tmp_path, stage("exit 1")).returncode == 1
    assert not (tmp_path / "requeued").exists()
    assert not list((tmp_path / "run" / "attempts" / "0001").iterdir())


def test_a_former_life_leaves_the_one_that_runs_alone(tmp_path: Path, stage: Stage) -> None:
    """On a node that was cut off it ends while the job runs elsewhere: requeueing would end that."""
    env = stage(f"{CLAIM}; exit 1", restarts=1)
    assert live(tmp_path, env).returncode == 1
    assert not (tmp_path / "requeued").exists()
    (tmp_path / "run" / "attempts" / "0001").rename(tmp_path / "old")
    live(tmp_path, {**env, "SLURM_RESTART_COUNT": "1"})
    assert (tmp_path / "requeued").exists()


def test_each_life_has_a_log_of_its_own(tmp_path: Path, stage: Stage) -> None:
    env = stage("echo this is restart $SLURM_RESTART_COUNT; echo and an error >&2; exit 2")
    for restart in "1", "4":
        done = live(tmp_path, {**env, "SLURM_RESTART_COUNT": restart})
        assert done.stdout == f"job 7, restart {restart}: {tmp_path}/run/logs/7_{restart}.log\n"
        assert done.stderr == ""
    assert log(tmp_path, 4) == "this is restart 4\nand an error\n"


def test_a_run_directory_that_cannot_be_made_leaves_the_log_where_it_was(tmp_path: Path, stage: Stage) -> None:
    (tmp_path / "run").write_text("a file")
    done = live(tmp_path, stage("echo the rest; exit 2"))
    assert "no log of this life's own" in done.stderr
    assert done.stdout == "the rest\n"


def test_an_salloc_shell_is_not_requeued_and_keeps_its_terminal(tmp_path: Path, stage: Stage) -> None:
    env = stage(f"{CLAIM}; echo here; exit 85")
    del env["SLURM_PROCID"]
    done = live(tmp_path, env)
    assert (done.returncode, done.stdout) == (85, "here\n")
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("broken", ["refused", "missing"])
def test_a_requeueing_that_fails_is_told(tmp_path: Path, stage: Stage, broken: str) -> None:
    env = stage(f"/bin/{CLAIM}; exit 85", answer=1)
    if broken == "missing":
        (tmp_path / "tools" / "scontrol").unlink()
        env["PATH"] = str(tmp_path / "tools")
    assert live(tmp_path, env).returncode == 85
    assert "job 7 is not requeued, submit it again" in log(tmp_path)


def test_a_container_stands_before_the_interpreter_and_no_shell_reads_it(tmp_path: Path, stage: Stage) -> None:
    env = stage(f'{CLAIM}; for word in "$@"; do echo "<$word>"; done')
    live(tmp_path, {**env, "FDSCALE_CONTAINER": "run 'my image.sif' $(id) ;"})
    words = log(tmp_path).splitlines()
    first = words.index("<run>")
    assert words[first : first + 5] == ["<run>", "<my image.sif>", "<$(id)>", "<;>", f"<{sys.executable}>"]


def test_a_garbled_container_is_refused(tmp_path: Path, stage: Stage) -> None:
    done = live(tmp_path, {**stage("exit 0"), "FDSCALE_CONTAINER": "run 'half"})
    assert 'UserError: FDSCALE_CONTAINER="run \'half"' in done.stderr


def test_srun_would_kill_its_tasks_at_term_so_it_gets_usr1(tmp_path: Path, stage: Stage) -> None:
    env = stage("exit 0")
    answer = "sys.exit({signal.SIGUSR1: 85}.get(signal.sigwait({signal.SIGUSR1, signal.SIGTERM}), 1))"
    block = "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})"
    tool(
        tmp_path,
        "srun",
        f"#!{sys.executable}\nimport signal, sys\n{block}\nopen('ready', 'w').close()\n{answer}\n",
    )
    launcher = subprocess.Popen([sys.executable, "-c", LIFE], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    while not (tmp_path / "ready").exists():
        assert launcher.poll() is None
        time.sleep(0.02)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(30) == 85
