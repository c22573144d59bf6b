"""Where the ranks run: this machine, a SLURM allocation, a hostfile; told by what the children receive."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdscale.cluster.launch import _quoted_for_pdsh, gpu_count, launch, ranks_here, start_ranks
from fdscale.config.errors import UserError

REPOSITORY = Path(__file__).parents[2]
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "SLURM_JOB_ID",
    "CUDA_VISIBLE_DEVICES",
)
TELL = """
import json, os, sys
with open("told." + os.environ.get("RANK", "srun"), "w") as file:
    json.dump({"argv": sys.argv[1:], **os.environ}, file)
"""
Tool = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with no launcher's variables and a folder for tools first on the PATH."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tool(folder: Path) -> Tool:
    """Puts an executable of that name and text on the PATH."""

    def write(name: str, text: str) -> None:
        path = folder / "tools" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    return write


def told(folder: Path) -> list[dict[str, str]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("told.*"))]


def test_each_rank_gets_its_own_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert start_ranks([sys.executable, "-c", TELL, "x=$(id)", "a b", 'it\'s "so"'], 2) == 0
    first, second = told(folder)
    assert (first["RANK"], first["LOCAL_RANK"], second["RANK"], second["LOCAL_RANK"]) == ("0", "0", "1", "1")
    assert first["WORLD_SIZE"] == first["LOCAL_WORLD_SIZE"] == second["WORLD_SIZE"] == "2"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert int(first["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)
    assert first["argv"] == second["argv"] == ["x=$(id)", "a b", 'it\'s "so"']


def test_what_the_user_exports_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    start_ranks([sys.executable, "-c", TELL], 1)
    assert told(folder)[0]["OMP_NUM_THREADS"] == "3"


def test_the_cpu_accelerator_is_chosen_without_a_gpu_only(
    folder: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    tool("nvidia-smi", "#!/bin/sh\nexit 9\n")
    start_ranks([sys.executable, "-c", TELL], 1)
    assert told(folder)[0]["DS_ACCELERATOR"] == "cpu"
    tool("nvidia-smi", "#!/bin/sh\necho 'GPU 0: H200 (UUID: GPU-1)'\n")
    start_ranks([sys.executable, "-c", TELL], 1)
    assert "DS_ACCELERATOR" not in told(folder)[0]


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 2), ("0,1", 2), ("1", 1), ("", 0), ("-1", 0), ("0,-1,1", 1), ("1,2", 1), ("GPU-a,GPU-b", 2)],
)
def test_gpus_are_counted_as_cuda_counts_them(tool: Tool, visible: str | None, count: int) -> None:
    listing = "GPU 0: H200 (UUID: GPU-a)\n  MIG 1g.18gb Device 0: (UUID: MIG-c)\nGPU 1: H200 (UUID: GPU-b)"
    tool("nvidia-smi", f"#!/bin/sh\nprintf '{listing}\\n'\n")
    assert gpu_count({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count


@pytest.mark.parametrize("ranks", [0, -1])
def test_a_run_has_a_rank(ranks: int) -> None:
    for start in (lambda: launch(["distill", "x"], ranks=ranks), lambda: ranks_here(ranks, None)):
        with pytest.raises(UserError, match=f"--ranks {ranks}"):
            start()


def test_this_machine_gets_the_ranks_stated_or_one_per_gpu_or_two(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    tool("nvidia-smi", "#!/bin/sh\nexit 9\n")
    assert (ranks_here(None, None), ranks_here(5, None), ranks_here(None, "hosts")) == (2, 5, None)
    monkeypatch.setenv("LOCAL_SIZE", "3")
    assert ranks_here(None, None) == 3
    tool("nvidia-smi", "#!/bin/sh\nprintf 'GPU 0: a\\nGPU 1: b\\nGPU 2: c\\nGPU 3: d\\n'\n")
    assert ranks_here(None, None) == 4
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert ranks_here(None, None) is None


def test_a_garbled_local_size_is_named(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    tool("nvidia-smi", "#!/bin/sh\nexit 9\n")
    monkeypatch.setenv("LOCAL_SIZE", "two")
    with pytest.raises(UserError, match="LOCAL_SIZE two"):
        launch(["distill", "x"])


@pytest.mark.parametrize(("ranks", "tasks"), [(None, []), (6, ["--ntasks=6"])])
def test_an_allocation_is_given_to_srun(
    folder: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch, ranks: int | None, tasks: list[str]
) -> None:
    tool("srun", f"#!{sys.executable}\n{TELL}\nsys.exit(85)\n")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert launch(["distill", "swinv2_g", "x=$(id)"], ranks=ranks) == 85
    program = [sys.executable, "-u", "-m", "fdscale", "distill", "swinv2_g", "x=$(id)"]
    assert told(folder)[0]["argv"] == ["--kill-on-bad-exit=0", *tasks, *program]


def test_srun_would_kill_its_tasks_at_term_so_it_gets_usr1(folder: Path, tool: Tool) -> None:
    answer = "sys.exit({signal.SIGUSR1: 85}.get(signal.sigwait({signal.SIGUSR1, signal.SIGTERM}), 1))"
    block = "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})"
    tool("srun", f"#!{sys.executable}\nimport signal, sys\n{block}\nopen('ready', 'w').close()\n{answer}\n")
    program = "import sys; from fdscale.cluster.launch import launch; sys.exit(launch(['distill', 'x']))"
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "SLURM_JOB_ID": "7", "PYTHONPATH": path}
    launcher = subprocess.Popen([sys.executable, "-c", program], env=env)
    while not (folder / "ready").exists():
        assert launcher.poll() is None
        time.sleep(0.02)
    launcher.terminate()
    assert launcher.wait(30) == 85


def test_an_allocation_without_srun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="SLURM_JOB_ID=7"):
        launch(["distill", "x"])


def test_a_rank_cannot_launch_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="as rank 1"):
        launch(["distill", "x"])


def test_one_place_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--ranks 2 cannot be used"):
        launch(["distill", "x"], ranks=2, hostfile="hosts")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(UserError, match="--hostfile hosts cannot be used"):
        launch(["distill", "x"], hostfile="hosts")


@pytest.mark.parametrize("text", ["", "# nobody\n", "node1\n", "node1 slots=8\nnode2 slots=eight\n"])
def test_a_hostfile_that_names_no_slots_is_refused(folder: Path, text: str) -> None:
    (folder / "hosts").write_text(text)
    with pytest.raises(UserError, match="node1 slots=8"):
        launch(["distill", "x"], hostfile="hosts")


def test_a_missing_hostfile_is_refused() -> None:
    with pytest.raises(UserError, match="hosts does not exist"):
        launch(["distill", "x"], hostfile="hosts")


def test_a_hostfile_goes_to_pdsh_by_way_of_deepspeed(folder: Path, tool: Tool) -> None:
    tool("ssh", "#!/bin/sh\n")
    tool("pdsh", f"#!{sys.executable}\n{TELL}\n")
    (folder / "hosts").write_text("node1 slots=8 # the first\nnode2 slots=8\n")
    assert launch(["distill", "swinv2_g", "x=$(id)", "a $b"], hostfile="hosts") == 0
    sent = told(folder)[0]["argv"]
    assert sent[sent.index("-w") + 1] == "node1,node2"
    assert "--master_addr=node1" in sent
    assert {"--module", "--no_local_rank"} < set(sent[: sent.index("fdscale")])
    assert after_a_remote_shell(sent[sent.index("fdscale") + 1 :]) == [
        "distill",
        "swinv2_g",
        "x=$(id)",
        "a $b",
    ]


def after_a_remote_shell(words: list[str]) -> list[str]:
    """What a program on the other machine would get of a command line that pdsh joins with blanks."""
    program = "import sys, json; print(json.dumps(sys.argv[1:]))"
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} {' '.join(words)}"
    result: list[str] = json.loads(subprocess.run(["sh", "-c", line], capture_output=True, check=True).stdout)
    return result


@given(st.text(st.sampled_from(" a$`\"'\\;*(){}=~#&|<>\t"), min_size=1, max_size=12))
def test_any_argument_survives_the_remote_shell(argument: str) -> None:
    quoted = _quoted_for_pdsh(argument)
    if " " in quoted:  # as DeepSpeed's PDSHRunner does
        quoted = '"{}"'.format(quoted.replace('"', '\\"'))
    line = f"printf %s {quoted}"
    assert subprocess.run(["sh", "-c", line], capture_output=True, check=True, text=True).stdout == argument
