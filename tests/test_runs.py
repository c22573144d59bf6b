"""Whole runs, started as people start them: every launcher computes the same, and a killed run goes on bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fdscale.cli import main
from fdscale.training.engine import Connection
from tests.descendants import assert_end, descendants

REPOSITORY = Path(__file__).parent.parent
LAUNCHER = str(REPOSITORY / "launchers" / "fd_swinv2g.sh")
BIN = Path(sys.executable).parent
SHORT = ["--smoke", "max_steps=6", "checkpoint.every=2", "log.every=1"]
# three blocks of ZeRO-3's start-up cost are enough; the extra norm stays
SHORT += ["student.geometry.depths=[1,1,2,1]", "student.geometry.extra_norm_period=2"]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """A machine without GPU, and this interpreter's programs first."""
    unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in unset and "SLURM" not in name}
    return {
        **kept,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FDSCALE_PYTHON": sys.executable,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded sample, packed once for all runs."""
    from fdscale.data.packing.digits import pack_digits

    folder = tmp_path_factory.mktemp("shards") / "digits"
    pack_digits(folder, "test")
    return folder


def curve(run_dir: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of each step of a run."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def command(how: str, run_dir: Path, digits: Path, port: int) -> list[str]:
    settings = [*SHORT, f"run_dir={run_dir}", f"data.shards={digits}"]
    torchrun = ["torchrun", "--nproc_per_node=2", f"--master_port={port}", "-m", "fdscale", "distill", "swinv2_g"]
    return {
        "bash": ["bash", LAUNCHER, *settings],
        "deepspeed": ["deepspeed", "--num_gpus", "2", f"--master_port={port}", LAUNCHER, *settings],
        "torchrun": [*torchrun, *settings],
        "deepspeed, literally": ["deepspeed", f"--master_port={port}", LAUNCHER, *settings],
    }[how]


def shown_in(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """A site where all runs are observable: Prometheus finds them in `folder`/targets."""
    (folder / "targets").mkdir()
    return {**environment, "FDSCALE_SETTINGS": f"log.prometheus_port=0 log.prometheus_targets={folder}/targets"}


def targets(folder: Path) -> list[dict[str, str]]:
    """The labels of what Prometheus finds."""
    return [json.loads(path.read_text())[0]["labels"] for path in (folder / "targets").glob("*.json")]


def run(arguments: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=environment, cwd=folder, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], digits: Path, port: Callable[[], int]
) -> Path:
    """The run directory of `bash launchers/fd_swinv2g.sh --smoke`, two ranks, never disturbed."""
    run_dir = tmp_path_factory.mktemp("bash") / "run"
    done = run(command("bash", run_dir, digits, port()), environment, run_dir.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def test_a_run_leaves_what_ran_and_its_student(undisturbed: Path) -> None:
    left = {path.name for path in undisturbed.iterdir()}
    kept = {
        "recipe.toml",
        "deepspeed.json",
        "versions.json",
        "data.json",
        "weights.json",
        "memory.json",
        "metrics.jsonl",
        "canary.json",
        "attempts",
    }
    assert kept | {"student.safetensors", "student.json", "complete.json"} == left
    assert [step for step, _, _ in curve(undisturbed)] == [1, 2, 3, 4, 5, 6]
    assert len(list((undisturbed / "attempts" / "0001").glob("step_*/manifest.json"))) == 2
    description = json.loads((undisturbed / "student.json").read_text())
    assert description["geometry"]["family"] == "swin_v2"
    startup = json.loads((undisturbed / "attempts" / "0001" / "attempt.json").read_text())["startup"]
    assert {"launchers", "imports", "engine", "first step"} <= set(startup)
    assert startup["imports"] > 0.1


def test_literally_deepspeed_accumulates_to_the_same_global_batch(
    undisturbed: Path, environment: dict[str, str], digits: Path, tmp_path: Path, port: Callable[[], int]
) -> None:
    # one rank per NUMA node, whatever this machine has
    one_rank = {**shown_in(tmp_path, environment), "LOCAL_SIZE": "1"}
    literally = [*command("deepspeed, literally", tmp_path / "run", digits, port()), "max_steps=4"]
    done = run(literally, one_rank, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "metrics: http://127.0.0.1:" in done.stdout
    assert targets(tmp_path) == [], "a run that is complete is missed by nobody"
    for (step, loss, _), (same_step, other, _) in zip(curve(tmp_path / "run"), curve(undisturbed)[:4], strict=True):
        assert step == same_step
        assert abs(loss - other) <= 1e-5


def start(arguments: list[str], environment: dict[str, str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ranks_of(launcher: int) -> dict[int, int]:
    """{rank: pid} of the processes that a launcher started, itself or by a launcher of its own."""
    found: dict[int, int] = {}
    for pid in descendants(launcher):  # a rank before its workers
        with suppress(OSError):  # it has ended meanwhile
            environ = Path(f"/proc/{pid}/environ").read_text()
            variables = dict(v.split("=", 1) for v in environ.split("\0") if "=" in v)
            if "RANK" in variables:
                found.setdefault(int(variables["RANK"]), pid)
    return found


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)  # a save takes several of them


def steps_done(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count('"loss"') if metrics.exists() else 0


def kill_one_rank(same: list[str], environment: dict[str, str], folder: Path, when: Callable[[], bool]) -> str:
    """Start, wait for the moment, kill -9 rank 1; what was printed. The launcher must end with an error."""
    process = start(same, environment, folder)
    wait_for(lambda: 1 in ranks_of(process.pid), process)
    victim = ranks_of(process.pid)[1]  # known beforehand: the moment is short
    wait_for(when, process)
    os.kill(victim, signal.SIGKILL)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    return printed


def test_a_run_killed_in_a_save_and_again_between_saves_is_the_undisturbed_one(
    undisturbed: Path, environment: dict[str, str], digits: Path, tmp_path: Path, port: Callable[[], int]
) -> None:
    """Each life by another launcher: all compute the same bits."""
    run_dir, environment = tmp_path / "run", shown_in(tmp_path, environment)
    first, second, third = (command(how, run_dir, digits, port()) for how in ("deepspeed", "bash", "torchrun"))
    saves = run_dir / "attempts"
    newest = saves / "0001" / "step_00000004"
    told = kill_one_rank(first, environment, tmp_path, newest.exists)
    assert "metrics: http://127.0.0.1:" in told
    assert not (newest / "manifest.json").exists(), "the save was over before the kill"
    assert [labels["run"] for labels in targets(tmp_path)] == ["run"], "what has gone is missed"
    assert curve(run_dir) == curve(undisturbed)[: len(curve(run_dir))]

    told = kill_one_rank(second, environment, tmp_path, lambda: steps_done(run_dir) >= 5)
    assert f"skipped {newest}: it was never committed" in told
    assert f"resumed from step 2 of attempt 1: {saves}/0002/step_00000002" in told

    done = run(third, environment, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from step " in done.stdout
    assert "metrics: http://127.0.0.1:" in done.stdout
    assert targets(tmp_path) == [], "a run that is complete is missed by nobody"
    assert curve(run_dir) == curve(undisturbed)
    assert (run_dir / "student.safetensors").read_bytes() == (undisturbed / "student.safetensors").read_bytes()


def test_sigterm_means_finish_the_step_commit_and_ask_for_a_requeue(
    environment: dict[str, str], digits: Path, tmp_path: Path, port: Callable[[], int]
) -> None:
    run_dir = tmp_path / "run"
    endless = [*command("bash", run_dir, digits, port()), "max_steps=70", "epochs=5", "checkpoint.every=1000"]
    process = start(endless, shown_in(tmp_path, environment), tmp_path)
    wait_for(lambda: steps_done(run_dir) >= 2, process)
    assert "ended" not in targets(tmp_path)[0]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 85
    assert targets(tmp_path) == [], "outside of a queue nobody starts it again"
    committed = list((run_dir / "attempts" / "0001").glob("step_*/manifest.json"))
    assert len(committed) == 1
    assert int(committed[0].parent.name.removeprefix("step_")) == curve(run_dir)[-1][0]


def test_a_deepspeed_runner_that_is_killed_leaves_a_commit_and_nobody_behind(
    environment: dict[str, str], digits: Path, tmp_path: Path, port: Callable[[], int]
) -> None:
    run_dir = tmp_path / "run"
    endless = [*command("deepspeed", run_dir, digits, port()), "max_steps=70", "epochs=5", "checkpoint.every=1000"]
    process = start(endless, environment, tmp_path)
    wait_for(lambda: steps_done(run_dir) >= 2, process)
    family = {process.pid, *descendants(process.pid)}
    assert len(family) >= 4, "the runner, its launcher, two ranks"
    process.kill()
    process.communicate(timeout=60)  # its output ends when the last of them has closed it
    assert_end(list(family))
    committed = list((run_dir / "attempts" / "0001").glob("step_*/manifest.json"))
    assert [int(path.parent.name.removeprefix("step_")) for path in committed] == [curve(run_dir)[-1][0]]


def run_again(connection: Connection, arguments: list[str]) -> int:
    return main(arguments)


def test_a_finished_run_is_not_run_again(undisturbed: Path, digits: Path, tmp_path: Path, two_ranks: Any) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    arguments = ["distill", "swinv2_g", *SHORT, f"run_dir={run_dir}", f"data.shards={digits}"]
    assert two_ranks(run_again, arguments) == [0, 0]
    assert two_ranks(run_again, [*arguments, "optim.lr=5e-4"]) == [2, 2]
    assert curve(run_dir) == curve(undisturbed)
