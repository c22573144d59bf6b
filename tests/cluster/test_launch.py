"""Where the ranks run: this machine, a SLURM allocation, a hostfile; told by what the children receive."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdscale.cluster.launch import _quoted_for_pdsh, launch, ranks_here, start_ranks
from fdscale.config.errors import UserError

REPOSITORY = Path(__file__).parents[2]
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "SLURM_JOB_ID",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_CPUS_PER_TASK",
    "SRUN_CPUS_PER_TASK",
    "CUDA_VISIBLE_DEVICES",
)
RUN = Path("run")
TELL = """
import json, os, sys
with open("told." + os.environ.get("RANK", "srun"), "w") as file:
    json.dump({"argv": sys.argv[1:], **os.environ}, file)
"""
Tool = Callable[[str, str], None]


def gpus(count: int) -> str:
    """The text of an nvidia-smi that lists so many GPUs."""
    rows = "".join(f"143771, GPU-{number}, Disabled\n" for number in range(count))
    return f"#!/bin/sh\ncat <<END\n{rows}END\n"


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
    assert start_ranks([sys.executable, "-c", TELL, "x=$(id)", "a b", 'it\'s "so"'], 2, RUN) == 0
    first, second = told(folder)
    assert (first["RANK"], first["LOCAL_RANK"], second["RANK"], second["LOCAL_RANK"]) == ("0", "0", "1", "1")
    assert first["WORLD_SIZE"] == first["LOCAL_WORLD_SIZE"] == second["WORLD_SIZE"] == "2"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert int(first["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)
    assert first["argv"] == second["argv"] == ["x=$(id)", "a b", 'it\'s "so"']


def test_what_the_user_exports_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    start_ranks([sys.executable, "-c", TELL], 1, RUN)
    assert told(folder)[0]["OMP_NUM_THREADS"] == "3"


def test_the_cpu_accelerator_is_chosen_without_a_gpu_only(
    folder: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    tool("nvidia-smi", gpus(0))
    start_ranks([sys.executable, "-c", TELL], 1, RUN)
    assert told(folder)[0]["DS_ACCELERATOR"] == "cpu"
    tool("nvidia-smi", gpus(1))
    start_ranks([sys.executable, "-c", TELL], 1, RUN)
    assert "DS_ACCELERATOR" not in told(folder)[0]


def test_the_codes_are_kept_beside_the_attempt_that_this_launch_began(folder: Path) -> None:
    claims = "import os, sys; os.makedirs('run/attempts/0010', exist_ok=True); sys.exit(7 * int(os.environ['RANK']))"
    (RUN / "attempts" / "0009").mkdir(parents=True)
    assert start_ranks([sys.executable, "-c", claims], 2, RUN) == 7
    codes = json.loads((RUN / "attempts" / "0010" / "launcher.json").read_text())["codes"]
    assert codes["1"] == 7
    assert not list((RUN / "attempts" / "0009").iterdir())
    assert start_ranks([sys.executable, "-c", "pass"], 1, RUN) == 0  # it began none: the former one's stay
    assert json.loads((RUN / "attempts" / "0010" / "launcher.json").read_text())["codes"] == codes


@pytest.mark.parametrize("ranks", [0, -1])
def test_a_run_has_a_rank(ranks: int) -> None:
    for start in (lambda: launch(["distill", "x"], RUN, ranks=ranks), lambda: ranks_here(ranks, None)):
        with pytest.raises(UserError, match=f"--ranks {ranks}"):
            start()


def test_this_machine_gets_the_ranks_stated_or_one_per_gpu_or_two(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    tool("nvidia-smi", gpus(0))
    assert (ranks_here(None, None), ranks_here(5, None), ranks_here(None, "hosts")) == (2, 5, None)
    monkeypatch.setenv("LOCAL_SIZE", "3")
    assert ranks_here(None, None) == 3
    tool("nvidia-smi", gpus(4))
    assert ranks_here(None, None) == 4
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert ranks_here(None, None) is None


@pytest.mark.parametrize(("present", "ranks", "expected"), [(1, None, 1), (8, None, 2), (0, None, 2), (8, 4, 4)])
def test_a_small_run_takes_no_more_ranks_than_it_has_work_for(
    tool: Tool, present: int, ranks: int | None, expected: int
) -> None:
    tool("nvidia-smi", gpus(present))
    assert ranks_here(ranks, None, at_most=2) == expected


def test_the_command_line_starts_as_many_ranks_as_it_has_checked(folder: Path, tool: Tool) -> None:
    tool("nvidia-smi", gpus(4))
    tool("rank", f"#!{sys.executable}\n{TELL}")
    program = "import sys; from fdscale.cli import main; sys.executable = 'tools/rank'; sys.exit(main(sys.argv[1:]))"
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", program, "launch", "distill", "swinv2_g", "--smoke"]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)
    assert [env["WORLD_SIZE"] for env in told(folder)] == ["2", "2"]


def test_what_a_site_sets_reaches_the_ranks_before_the_users_own_words(folder: Path, tool: Tool) -> None:
    """As words: over ssh no environment would."""
    tool("rank", f"#!{sys.executable}\n{TELL}")
    program = "import sys; from fdscale.cli import main; sys.executable = 'tools/rank'; sys.exit(main(sys.argv[1:]))"
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", program, "launch", "distill", "swinv2_g", "--smoke", "log.every=5"]
    env = {**os.environ, "PYTHONPATH": path, "FDSCALE_SETTINGS": "log.prometheus_port=9101 log.every=7"}
    subprocess.run(command, env=env, check=True)
    words = ["distill", "swinv2_g", "--smoke", "log.prometheus_port=9101", "log.every=7", "log.every=5"]
    assert [rank["argv"][-6:] for rank in told(folder)] == [words, words]
    wrong = subprocess.run(command, env={**env, "FDSCALE_SETTINGS": "log.evry=7"}, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr == "error: FDSCALE_SETTINGS: unknown setting 'log.evry'; did you mean 'log.every'?\n"


def test_a_garbled_local_size_is_named(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    tool("nvidia-smi", gpus(0))
    monkeypatch.setenv("LOCAL_SIZE", "two")
    with pytest.raises(UserError, match="LOCAL_SIZE two"):
        launch(["distill", "x"], RUN)


@pytest.mark.parametrize(("ranks", "tasks"), [(None, []), (6, ["--ntasks=6"])])
def test_an_allocation_is_given_to_srun(
    folder: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch, ranks: int | None, tasks: list[str]
) -> None:
    tool("srun", f"#!{sys.executable}\n{TELL}\nsys.exit(85)\n")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert launch(["distill", "swinv2_g", "x=$(id)"], RUN, ranks=ranks) == 85
    program = [sys.executable, "-u", "-m", "fdscale", "distill", "swinv2_g", "x=$(id)"]
    assert told(folder)[0]["argv"] == ["--kill-on-bad-exit=0", "--wait=60", *tasks, *program]


def test_srun_is_told_the_cpus_per_task(folder: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    tool("srun", f"#!{sys.executable}\n{TELL}\n")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    launch(["distill", "x"], RUN)
    assert "SRUN_CPUS_PER_TASK" not in told(folder)[0]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    launch(["distill", "x"], RUN)
    assert told(folder)[0]["SRUN_CPUS_PER_TASK"] == "8"
    monkeypatch.setenv("SRUN_CPUS_PER_TASK", "4")
    launch(["distill", "x"], RUN)
    assert told(folder)[0]["SRUN_CPUS_PER_TASK"] == "4"


@pytest.mark.parametrize(
    ("ranks", "tasks", "warned"), [(None, "32", True), (4, "32", True), (2, "32", False), (None, "2", False)]
)
def test_a_small_run_on_a_big_allocation_is_told_what_to_say(
    tool: Tool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ranks: int | None,
    tasks: str,
    warned: bool,
) -> None:
    tool("srun", "#!/bin/sh\n")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    assert launch(["distill", "x", "--smoke"], RUN, ranks=ranks, at_most=2) == 0
    assert ("add --ranks 2" in caplog.text) == warned


def test_an_allocation_without_srun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="SLURM_JOB_ID=7"):
        launch(["distill", "x"], RUN)


def test_a_rank_cannot_launch_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="as rank 1"):
        launch(["distill", "x"], RUN)


def test_one_place_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--ranks 2 cannot be used"):
        launch(["distill", "x"], RUN, ranks=2, hostfile="hosts")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(UserError, match="--hostfile hosts cannot be used"):
        launch(["distill", "x"], RUN, hostfile="hosts")


@pytest.mark.parametrize("text", ["", "# nobody\n", "node1\n", "node1 slots=8\nnode2 slots=eight\n"])
def test_a_hostfile_that_names_no_slots_is_refused(folder: Path, text: str) -> None:
    (folder / "hosts").write_text(text)
    with pytest.raises(UserError, match="node1 slots=8"):
        launch(["distill", "x"], RUN, hostfile="hosts")


def test_a_missing_hostfile_is_refused() -> None:
    with pytest.raises(UserError, match="hosts does not exist"):
        launch(["distill", "x"], RUN, hostfile="hosts")


def test_a_hostfile_goes_to_pdsh_by_way_of_deepspeed(folder: Path, tool: Tool) -> None:
    tool("ssh", "#!/bin/sh\n")
    tool("pdsh", f"#!{sys.executable}\n{TELL}\n")
    (folder / "hosts").write_text("node1 slots=8 # the first\nnode2 slots=8\n")
    assert launch(["distill", "swinv2_g", "x=$(id)", "a $b"], RUN, hostfile="hosts") == 0
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
