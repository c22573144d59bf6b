"""The shipped launchers: one file for bash, sbatch, deepspeed and torchrun; arguments arrive as typed."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.recipe import load_recipe, site_words

LAUNCHERS = Path(__file__).parents[1] / "launchers"
DUAL = sorted(path for path in LAUNCHERS.glob("*.sh") if "#SBATCH" in path.read_text())
RECIPES = {
    "fd_swinv2g.sh": "swinv2_g",
    "fd_swinv2b.sh": "swinv2_b_esvit",
    "fd_vit_b.sh": "vit_b_clip_b",
    "fd_vit_l.sh": "vit_l_clip_l",
    "finetune_imagenet.sh": "finetune_vit_b_clip_b",
    "finetune_ade20k.sh": "ade20k_vit_b",
    "finetune_coco.sh": "coco_vit_b",
}
PROGRAMS = {name: load_recipe(recipe).program for name, recipe in RECIPES.items()}
OTHERS = {
    "finetune_imagenet.sh": "finetune_vit_l_clip_l_in1k_336",
    "finetune_ade20k.sh": "ade20k_swinv2_g",
    "finetune_coco.sh": "objects365_swinv2_g",
}
AWKWARD = ["x=$(id)", "a b", 'it\'s "so"', "list=[2,2,6,2]", "*", "back\\slash", "", "`id`"]
PRINT_ARGV = f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.getcwd(), *sys.argv[1:]]))\n"


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    """An interpreter that prints its folder and its arguments instead of running them."""
    path = tmp_path / "fake" / ".venv" / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.write_text(PRINT_ARGV)
    path.chmod(0o755)
    return path


def started(launcher: Path, folder: Path, **environment: str) -> list[str]:
    """The folder and the arguments that `bash LAUNCHER` hands to its interpreter."""
    names = ("FDSCALE_PYTHON", "FDSCALE_ROOT", "FDSCALE_SITE", "SLURM_SUBMIT_DIR")
    env = {key: value for key, value in os.environ.items() if key not in names} | environment
    command = ["bash", str(launcher), *AWKWARD]
    answer = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    told: list[str] = json.loads(answer.stdout)
    return told


@pytest.mark.parametrize("launcher", DUAL, ids=lambda path: path.name)
def test_it_is_python_and_bash_at_once(launcher: Path) -> None:
    ast.parse(launcher.read_text())
    subprocess.run(["bash", "-n", launcher], check=True)
    assert os.access(launcher, os.X_OK)


@pytest.mark.parametrize("launcher", DUAL, ids=lambda path: path.name)
def test_sbatch_reads_its_lines_before_the_first_command(launcher: Path) -> None:
    lines = launcher.read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(number < first_command for number, line in enumerate(lines) if line.startswith("#SBATCH"))


@pytest.mark.parametrize("launcher", DUAL, ids=lambda path: path.name)
def test_a_task_gets_more_than_one_cpu(launcher: Path) -> None:
    """SLURM's own default is one: data workers and the rank would share it."""
    asked = re.search(r"^#SBATCH --cpus-per-task=(\d+)$", launcher.read_text(), re.MULTILINE)
    assert asked is not None
    assert int(asked[1]) > 1


def test_the_demo_runs_on_the_cpu_wherever_it_runs(tmp_path: Path) -> None:
    tell = '#!/bin/sh\necho "$DS_ACCELERATOR, ${CUDA_VISIBLE_DEVICES-unset}, $*" >> told\n'
    for name in ("fdscale", "deepspeed"):
        (tmp_path / name).write_text(tell)
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    env.pop("DS_ACCELERATOR", None)
    subprocess.run(["bash", LAUNCHERS / "demo.sh", "out"], cwd=tmp_path, env=env, check=True, capture_output=True)
    commands = (tmp_path / "told").read_text().splitlines()
    assert any("--num_gpus 2" in command for command in commands)
    assert all(command.startswith("cpu, , ") for command in commands)


def test_smoke_fits_a_machine_with_many_gpus(tmp_path: Path) -> None:
    """Told by the arithmetic of a batch that does not divide: two ranks, not eight."""
    rows = "\n".join(f"143771, GPU-{number}, Disabled" for number in range(8))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<END\n{rows}\nEND\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "SLURM_", "CUDA_VISIBLE_DEVICES")
    env = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    env["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    for smoke, ranks in (["--smoke"], 2), (["deepspeed=laptop", "data.shards=digits"], 8):
        command = [sys.executable, "-m", "fdscale", "launch", "distill", "swinv2_g", *smoke, "data.global_batch=33"]
        answer = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert answer.returncode == 2
        assert f"33 does not divide: {ranks} ranks" in answer.stderr


@pytest.mark.parametrize("launcher", DUAL, ids=lambda path: path.name)
def test_arguments_and_folder_reach_the_program_as_typed(launcher: Path, tmp_path: Path, fake_python: Path) -> None:
    told = started(launcher, tmp_path, FDSCALE_PYTHON=str(fake_python))
    assert told == [str(tmp_path), "-m", "fdscale", "launch", PROGRAMS[launcher.name], RECIPES[launcher.name], *AWKWARD]


@pytest.mark.parametrize("launcher", DUAL, ids=lambda path: path.name)
def test_a_job_asks_for_what_its_deepspeed_json_is_made_for(launcher: Path) -> None:
    """As many tasks as GPUs, a global batch that divides, a warning before the end, and a log for all lives."""
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", launcher.read_text(), re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert asked["signal"] == "B:USR1@120"
    assert (asked["requeue"], asked["open-mode"], asked["output"]) == ("", "append", "%x-%j.out")
    assert asked["job-name"] == launcher.stem
    ranks = int(asked["nodes"]) * int(asked["gpus-per-node"])
    settings = load_recipe(RECIPES[launcher.name], [], None)
    micro = load_deepspeed_json(settings.deepspeed)["train_micro_batch_size_per_gpu"]
    assert settings.data.global_batch % (ranks * micro) == 0


@pytest.mark.parametrize("launcher", DUAL, ids=lambda path: path.name)
def test_a_site_is_sourced_before_the_interpreter_is_chosen(launcher: Path, tmp_path: Path, fake_python: Path) -> None:
    site = tmp_path / "a site.env"
    last = "[ -f /no/such/file ] && . /no/such/file"  # a site's last word may be no
    site.write_text(f'echo "unset: $NOT_SET" >&2\nexport FDSCALE_PYTHON={fake_python}\n{last}\n')
    assert started(launcher, tmp_path, FDSCALE_SITE=str(site))[1:3] == ["-m", "fdscale"]
    copied = tmp_path / "root" / "launchers" / launcher.name
    copied.parent.mkdir(parents=True)
    shutil.copy(launcher, copied)
    shutil.copy(site, copied.parent / "site.env")
    assert started(copied, tmp_path)[1:3] == ["-m", "fdscale"]
    spooled = shutil.copy(launcher, tmp_path / "slurm_script")
    assert started(Path(spooled), tmp_path, SLURM_SUBMIT_DIR=str(tmp_path / "root"))[1:3] == ["-m", "fdscale"]


def test_the_example_of_a_site_changes_nothing_and_names_what_is_read() -> None:
    example = LAUNCHERS / "site.example.env"
    told = subprocess.run(["bash", "-euc", f". '{example}'; echo \"${{SBATCH_ACCOUNT-unset}}\""], capture_output=True)
    assert told.stdout == b"unset\n", told.stderr
    for variable in (
        "FDSCALE_SETTINGS",
        "SBATCH_PARTITION",
        "FDSCALE_CONTAINER",
        "FDSCALE_PYTHON",
        "NCCL_SOCKET_IFNAME",
    ):
        assert f"export {variable}=" in example.read_text()


def test_the_settings_in_the_example_of_a_site_are_settings(tmp_path: Path) -> None:
    """What is commented out there works once it is not, and the user's environment wins."""
    lines = (LAUNCHERS / "site.example.env").read_text().splitlines()
    (line,) = [line.removeprefix("#") for line in lines if line.startswith("#export FDSCALE_SETTINGS")]
    for before, words in (("", None), ("FDSCALE_SETTINGS=", []), ("FDSCALE_SETTINGS=log.every=3", ["log.every=3"])):
        script = f'{before}\n{line}\nprintf %s "$FDSCALE_SETTINGS"'
        env = {"PATH": os.environ["PATH"]}
        answer = subprocess.run(["bash", "-euc", script], env=env, capture_output=True, text=True, check=True)
        found = site_words({"FDSCALE_SETTINGS": answer.stdout})
        assert found == (words if words is not None else found)
        log = load_recipe("swinv2_g", [], None, found).log
        assert (log.prometheus_port, log.prometheus_targets is None) == ((0, False) if words is None else (None, True))


@pytest.mark.parametrize("variable", ["FDSCALE_ROOT", "SLURM_SUBMIT_DIR"])
def test_a_copy_in_a_spool_folder_finds_the_repository(tmp_path: Path, fake_python: Path, variable: str) -> None:
    spooled = tmp_path / "spool" / "job00001" / "slurm_script"
    spooled.parent.mkdir(parents=True)
    shutil.copy(LAUNCHERS / "fd_swinv2g.sh", spooled)
    root = str(fake_python.parents[2])
    assert started(spooled, tmp_path, **{variable: root})[1:4] == ["-m", "fdscale", "launch"]


def test_without_an_environment_of_its_own_it_takes_the_path(tmp_path: Path, fake_python: Path) -> None:
    copied = tmp_path / "launchers" / "fd_swinv2g.sh"
    copied.parent.mkdir()
    shutil.copy(LAUNCHERS / "fd_swinv2g.sh", copied)
    (fake_python.parent / "python3").symlink_to(fake_python)
    path = f"{fake_python.parent}:{os.environ['PATH']}"
    assert started(copied, tmp_path, PATH=path)[1:4] == ["-m", "fdscale", "launch"]


@pytest.mark.parametrize("launcher", DUAL, ids=lambda path: path.name)
def test_the_python_half_hands_everything_to_the_cli(launcher: Path, tmp_path: Path) -> None:
    """As deepspeed and torchrun start it: under Python, with --local_rank in front."""
    package = tmp_path / "fdscale"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text("import json\ndef main(argv):\n    print(json.dumps(argv))\n    return 85\n")
    command = [sys.executable, str(launcher), "--local_rank=1", *AWKWARD]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    answer = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert answer.returncode == 85, answer.stderr
    program = PROGRAMS[launcher.name]
    assert json.loads(answer.stdout) == [program, RECIPES[launcher.name], "--local_rank=1", *AWKWARD]


@pytest.mark.parametrize("name", OTHERS)
def test_a_fine_tuning_launcher_takes_another_recipe_first(name: str, tmp_path: Path, fake_python: Path) -> None:
    """Under bash and under Python; what is no recipe's name is left where it stands."""
    launcher, other, program, default = LAUNCHERS / name, OTHERS[name], PROGRAMS[name], RECIPES[name]
    (tmp_path / "fdscale").mkdir()
    (tmp_path / "fdscale" / "__init__.py").touch()
    (tmp_path / "fdscale" / "cli.py").write_text("import json\ndef main(argv):\n    print(json.dumps(argv))\n")
    env = {**os.environ, "FDSCALE_PYTHON": str(fake_python), "PYTHONPATH": str(tmp_path)}
    for words, recipe in (([other, "x=1"], other), (["x=1", other], default), ([], default)):
        rest = words[1:] if words[:1] == [other] else words
        for start in ["bash", str(launcher)], [sys.executable, str(launcher), "--local_rank=1"]:
            answer = subprocess.run([*start, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
            told = json.loads(answer.stdout)
            assert told[told.index(program) + 1 :] == [recipe, *start[2:], *rest]
