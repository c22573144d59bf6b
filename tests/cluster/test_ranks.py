"""Ranks from every launcher's environment, and signals that only set a flag."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdscale.cluster.ranks import (
    STOP_SIGNALS,
    Rank,
    StopSignals,
    export_rank,
    free_port,
    hold_stop_signals,
    rank_from_environment,
)
from fdscale.config.errors import UserError

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_TASKS_PER_NODE": "2,1",
    "SLURM_JOB_NODELIST": "n[7-8]",
}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for SLURM's own tool that knows one node list."""
    tool = tmp_path / "scontrol"
    tool.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[7-8]" ] && printf "n7\\nn8\\n" || exit 1\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tool


def without(env: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in env.items() if key != name}


def test_torchruns_variables() -> None:
    assert rank_from_environment(TORCHRUN) == Rank(3, 1, 4, 2, "node1", 29500)


def test_deepspeeds_variables_say_local_size() -> None:
    env = {**without(TORCHRUN, "LOCAL_WORLD_SIZE"), "LOCAL_SIZE": "2"}
    assert rank_from_environment(env) == Rank(3, 1, 4, 2, "node1", 29500)


def test_no_launcher_is_one_process_on_a_free_port() -> None:
    rank = rank_from_environment({})
    assert (rank.rank, rank.world_size, rank.local_world_size, rank.is_main) == (0, 1, 1, True)
    assert rank.master_port > 1023


@pytest.mark.usefixtures("scontrol")
def test_srun_step() -> None:
    assert rank_from_environment(SRUN) == Rank(2, 0, 3, 1, "n7", 20000 + 1234 * 7 % 10000)


@pytest.mark.usefixtures("scontrol")
def test_a_requeued_job_takes_another_port() -> None:
    ports = {rank_from_environment({**SRUN, "SLURM_RESTART_COUNT": n}).master_port for n in ("0", "1", "2")}
    assert len(ports) == 3


@pytest.mark.parametrize(
    ("node", "tasks"), [("0", 2), ("2", 2), ("3", 1)], ids=["first", "last of the run", "after the run"]
)
@pytest.mark.usefixtures("scontrol")
def test_tasks_per_node_is_run_length_coded(node: str, tasks: int) -> None:
    layout = {"SLURM_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": node, "SLURM_NTASKS": "7"}
    assert rank_from_environment({**SRUN, **layout}).local_world_size == tasks


def test_an_exported_master_needs_no_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert rank_from_environment({**SRUN, "MASTER_ADDR": "n7.fabric"}).master_addr == "n7.fabric"
    with pytest.raises(UserError, match="MASTER_ADDR"):
        rank_from_environment(SRUN)


@pytest.mark.usefixtures("scontrol")
def test_a_node_list_that_scontrol_refuses() -> None:
    with pytest.raises(UserError, match="SLURM_JOB_NODELIST='n\\[9'"):
        rank_from_environment({**SRUN, "SLURM_JOB_NODELIST": "n[9"})


def test_a_batch_script_is_not_a_rank() -> None:
    batch = without(SRUN, "SLURM_STEP_ID")
    assert rank_from_environment(batch).world_size == 1


def test_another_launcher_inside_srun_wins() -> None:
    assert rank_from_environment({**SRUN, **TORCHRUN}).rank == 3


@pytest.mark.parametrize("name", sorted(set(TORCHRUN) - {"RANK"}))
def test_a_missing_variable_is_named(name: str) -> None:
    told = "LOCAL_SIZE" if name == "LOCAL_WORLD_SIZE" else name
    with pytest.raises(UserError, match=told):
        rank_from_environment(without(TORCHRUN, name))


@pytest.mark.parametrize("name", ["LOCAL_RANK", "WORLD_SIZE"])
def test_ranks_left_over_without_rank(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}='1' but not RANK"):
        rank_from_environment({name: "1"})


@pytest.mark.parametrize("name", ["SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NODEID", "SLURM_JOB_ID"])
@pytest.mark.usefixtures("scontrol")
def test_a_missing_slurm_variable_is_named(name: str) -> None:
    with pytest.raises(UserError, match=name):
        rank_from_environment(without(SRUN, name))


@pytest.mark.parametrize("layout", ["2", "2,x", "", "2(x1"])
@pytest.mark.usefixtures("scontrol")
def test_a_garbled_task_layout_is_named(layout: str) -> None:
    with pytest.raises(UserError, match="SLURM_TASKS_PER_NODE"):
        rank_from_environment({**SRUN, "SLURM_TASKS_PER_NODE": layout})


@given(
    name=st.sampled_from(["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"]),
    text=st.text(max_size=8).filter(lambda text: not text.isascii() or not text.isdigit()),
)
def test_what_is_no_number_is_named(name: str, text: str) -> None:
    with pytest.raises(UserError, match=name):
        rank_from_environment({**TORCHRUN, name: text})


@pytest.mark.parametrize(
    "change", [{"RANK": "4"}, {"LOCAL_RANK": "2"}, {"LOCAL_WORLD_SIZE": "5"}, {"MASTER_PORT": "65536"}]
)
def test_contradictions_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(UserError, match=next(iter(change.values()))):
        rank_from_environment({**TORCHRUN, **change})


def test_an_exported_rank_reads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.setenv(name, "to be replaced")
    rank = Rank(3, 1, 4, 2, "node1", free_port())
    export_rank(rank)
    assert rank_from_environment(os.environ) == rank


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts back what a stop leaves ignored, for the tests that come after."""
    former = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    yield
    for signum, handler in former.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("handlers")
def test_stop_signals_only_set_a_flag() -> None:
    with StopSignals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert stop.received is signal.SIGUSR1


def test_former_handlers_come_back_however_often_installed() -> None:
    former = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    stop = StopSignals()
    stop.install()
    stop.install()
    stop.restore()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == former


STOPPED = """
import signal, sys
from fdscale.cluster.ranks import StopSignals, hold_stop_signals
hold_stop_signals({"RANK": "0"})
print("held", flush=True)
sys.stdin.readline()
stop = StopSignals()
stop.install()
print("installed", flush=True)
while not stop.requested:
    pass
stop.restore()
sys.exit(85)
"""


def rank_process() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STOPPED]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_storm_of_signals_does_not_change_the_code() -> None:
    """From the moment a rank is told until it has ended."""
    for _ in range(3):
        process = rank_process()
        assert process.stdin
        assert process.stdout
        print(file=process.stdin, flush=True)
        while process.stdout.readline() != "installed\n":
            pass
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGUSR1)
        assert process.returncode == 85
        process.stdout.close()
        process.stdin.close()


def test_a_signal_that_comes_too_early_is_heeded_later() -> None:
    process = rank_process()
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGUSR1)
    process.communicate("\n", timeout=30)
    assert process.returncode == 85


def test_a_program_that_no_launcher_started_can_be_ended_at_once() -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    hold_stop_signals({"SLURM_PROCID": "0"})
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


def test_the_room_leaves_torch_alone() -> None:
    program = "import sys, fdscale.cluster.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0
