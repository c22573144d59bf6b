"""Real child processes: exit codes, signals, failures, and nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fdscale.cluster.supervise import Ended, supervise

REPOSITORY = Path(__file__).parents[2]
SUPERVISOR = """
import os, signal, sys
from fdscale.cluster.supervise import Ended, supervise
ranks = [{**os.environ, "RANK": str(r)} for r in range(2)]
sys.exit(supervise([sys.executable, "-c", sys.argv[1]], ranks, commit=float(sys.argv[2])).code)
"""
CHILD = """
import os, signal, sys, time
from pathlib import Path
rank = os.environ["RANK"]
def say(word): Path(rank + "." + word).touch()
"""
UNTIL_ASKED = (
    CHILD
    + """
asked = []
for wanted in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(wanted, lambda got, _: asked.append(got))
Path(rank + ".pid").write_text(str(os.getpid()))
say("ready")
while not asked:
    time.sleep(0.02)
say(signal.Signals(asked[0]).name)
for wanted in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(wanted, signal.SIG_IGN)  # Python's own exit would hand a second one to the default, which kills
sys.exit(85)
"""
)


DEAF = (
    CHILD
    + """
for wanted in (signal.SIGTERM, signal.SIGINT):
    signal.signal(wanted, lambda got, _: say(signal.Signals(got).name))
Path(rank + ".pid").write_text(str(os.getpid()))
say("ready")
while True:
    time.sleep(0.02)
"""
)
Start = Callable[..., subprocess.Popen[bytes]]


def run(program: str, ranks: int = 2, grace: float = 30.0) -> int:
    environments = [{**os.environ, "RANK": str(rank)} for rank in range(ranks)]
    return supervise([sys.executable, "-c", CHILD + program], environments, grace=grace).code


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come about within 30 s"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether no such process runs; a zombie, which waits for its new parent, is gone."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.fixture
def supervisor(tmp_path: Path) -> Start:
    """Starts a supervisor over two children in `tmp_path`; answers once both are ready."""

    def start(program: str, commit: float = 600.0) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", SUPERVISOR, program, str(commit)]
        process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
        wait_for(lambda: (tmp_path / "0.ready").exists() and (tmp_path / "1.ready").exists())
        return process

    return start


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), 0), ((0, 3), 3), ((85, 85), 85), ((0, 85), 85), ((85, 0), 85)],
)
def test_exit_codes(codes: tuple[int, int], expected: int) -> None:
    assert run(f"sys.exit({codes}[int(rank)])") == expected


def test_a_death_by_signal_is_128_and_the_signal() -> None:
    assert run("os.kill(os.getpid(), signal.SIGKILL)", ranks=1) == 128 + signal.SIGKILL


def test_a_failure_asks_the_others_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = """
signal.signal(signal.SIGTERM, lambda *_: (say("asked"), sys.exit(85)))
say("ready")
while rank == "0":
    time.sleep(0.02)
while not Path("0.ready").exists():
    time.sleep(0.02)
sys.exit(7)
"""
    assert run(program) == 7
    assert (tmp_path / "0.asked").exists()


def test_whoever_will_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = """
signal.signal(signal.SIGTERM, lambda *_: say("deaf"))
say("ready")
while rank == "0":
    time.sleep(0.02)
while not Path("0.ready").exists():
    time.sleep(0.02)
sys.exit(7)
"""
    assert run(program, grace=0.5) == 7
    assert (tmp_path / "0.deaf").exists()


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_stop_signals_reach_every_rank_even_twice(supervisor: Start, tmp_path: Path, signum: signal.Signals) -> None:
    process = supervisor(UNTIL_ASKED)
    process.send_signal(signum)
    process.send_signal(signum)
    assert process.wait(30) == 85
    assert {path.name for path in tmp_path.glob(f"*.{signum.name}")} == {
        f"0.{signum.name}",
        f"1.{signum.name}",
    }


def test_an_interrupt_reaches_every_rank(supervisor: Start, tmp_path: Path) -> None:
    program = CHILD + "signal.signal(signal.SIGINT, lambda *_: sys.exit(9)); say('ready'); time.sleep(60)"
    process = supervisor(program)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 9


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ranks_that_hang_are_killed_some_time_after_the_first_signal(
    supervisor: Start, tmp_path: Path, signum: signal.Signals
) -> None:
    process = supervisor(DEAF, commit=0.3)
    process.send_signal(signum)
    assert process.wait(30) == 128 + signal.SIGKILL
    assert {f"0.{signum.name}", f"1.{signum.name}"} <= {path.name for path in tmp_path.iterdir()}


def test_a_second_interrupt_kills_at_once(supervisor: Start, tmp_path: Path) -> None:
    process = supervisor(DEAF)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: (tmp_path / "0.SIGINT").exists())
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 128 + signal.SIGKILL


def test_a_second_term_waits_for_the_commit(supervisor: Start, tmp_path: Path) -> None:
    commits = UNTIL_ASKED.replace("say(signal", "time.sleep(3); say(signal")
    process = supervisor(commits)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert process.wait(30) == 85
    assert (tmp_path / "0.SIGTERM").exists()


def test_whoever_is_killed_hears_a_last_term(supervisor: Start, tmp_path: Path) -> None:
    """As srun and deepspeed need it, whose ranks live elsewhere."""
    process = supervisor(DEAF, commit=0.3)
    process.send_signal(signal.SIGINT)
    process.wait(30)
    assert (tmp_path / "1.SIGTERM").exists()


def test_a_killed_supervisor_leaves_nobody_behind(supervisor: Start, tmp_path: Path) -> None:
    process = supervisor(UNTIL_ASKED)
    pids = [int((tmp_path / f"{rank}.pid").read_text()) for rank in range(2)]
    assert not any(gone(pid) for pid in pids)
    process.kill()
    process.wait()
    wait_for(lambda: all(gone(pid) for pid in pids))


def test_a_dead_rank_takes_its_own_children_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = """
import subprocess
worker = subprocess.Popen(["sleep", "60"])
Path("worker").write_text(str(worker.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run(program, ranks=1) == 137
    wait_for(lambda: gone(int((tmp_path / "worker").read_text())))


def test_a_command_that_cannot_start_restores_the_handlers() -> None:
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FileNotFoundError):
        supervise(["/no/such/program"], [os.environ])
    assert signal.getsignal(signal.SIGTERM) is former


def test_a_wish_to_start_again_does_not_wait_for_a_frozen_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = """
if rank == "1":
    say("frozen")
    os.kill(os.getpid(), signal.SIGSTOP)
while not Path("1.frozen").exists():
    time.sleep(0.02)
sys.exit(85)
"""
    environments = [{**os.environ, "RANK": str(rank)} for rank in range(2)]
    ended = supervise([sys.executable, "-c", CHILD + program], environments, grace=0.5)
    assert ended == Ended(85, (85, -signal.SIGKILL))


@pytest.mark.parametrize(("first", "then"), [(85, 1), (2, 1), (1, 85), (1, 2), (9, 85)])
def test_the_first_to_end_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, then: int) -> None:
    monkeypatch.chdir(tmp_path)
    program = f"""
signal.signal(signal.SIGTERM, lambda *_: None)
while rank == "1" and not Path("0.ends").exists():
    time.sleep(0.02)
time.sleep(int(rank))
say("ends")
sys.exit({(first, then)}[int(rank)])
"""
    assert run(program) == first


def test_a_storm_of_signals_does_not_change_the_code(supervisor: Start, tmp_path: Path) -> None:
    """From the moment a launcher is told until it has ended: Python's own exit is no better place to be hit."""
    for _ in range(3):
        for ready in tmp_path.glob("*.ready"):
            ready.unlink()
        process = supervisor(UNTIL_ASKED)
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.0005)
        assert process.returncode == 85
