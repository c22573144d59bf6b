"""The command line as a person meets it: exit codes, messages, and how little `check` imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SHARDS = ("vit_b_clip_b", "--smoke", "data.shards=shards")
NO_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_")


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python in an empty folder, outside every launcher and without a GPU, as on a login node."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(NO_LAUNCHER)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def fdscale(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return python("-m", "fdscale", *arguments, folder=folder)


def told(*arguments: str, folder: Path) -> str:
    """The message of a command that must refuse: exit code 2, on standard error alone, nothing left behind."""
    before = sorted(folder.rglob("*"))
    ended = fdscale(*arguments, folder=folder)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    assert sorted(folder.rglob("*")) == before
    assert ended.stderr.startswith("error: ")
    return ended.stderr.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    "arguments",
    [["check", "swinv2_g", "--smoke"], ["check", "digits_teacher", "--smoke", "--ranks", "2"]],
    ids=["distill", "finetune"],
)
def test_check_leaves_torch_unimported(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from fdscale.cli import main; assert main(sys.argv[1:]) == 0; "
        "heavy = {'torch', 'timm', 'deepspeed', 'sklearn', 'webdataset'} & set(sys.modules); assert not heavy, heavy"
    )
    ended = python("-c", code, *arguments, folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_check_prints_the_plan(tmp_path: Path) -> None:
    ended = fdscale("check", "swinv2_g", "data.shards=digits", "--ranks", "128", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("valid")
    for part in (
        "swinv2_g: 2,997.8 M parameters, 4096 wide, 8x8 tokens at 256 px",
        "1024 wide, 16x16 + 1 tokens at 224 px",
        "2048 = 128 ranks x micro batch 16 x 1 accumulation",
    ):
        assert part in ended.stdout


def test_help_names_every_command(tmp_path: Path) -> None:
    ended = fdscale("--help", folder=tmp_path)
    assert ended.returncode == 0
    for command in ("check", "distill", "finetune", "launch", "export", "summary", "shards"):
        assert re.search(rf"\b{command}\b", ended.stdout)


def test_an_unknown_command_is_a_mistake(tmp_path: Path) -> None:
    ended = fdscale("distil", "swinv2_g", folder=tmp_path)
    assert ended.returncode == 2
    assert "No such command 'distil'" in ended.stderr


def test_an_unknown_recipe_names_the_known_ones(tmp_path: Path) -> None:
    message = told("check", "swin_v2_g", folder=tmp_path)
    assert message.startswith("unknown recipe 'swin_v2_g'; did you mean 'swinv2_g'?")
    assert "vit_b_clip_b" in message


def test_two_mistakes_are_told_at_once(tmp_path: Path) -> None:
    lines = told("check", "swinv2_g", "--smoke", "optim.lrr=1", "epochs=-1", folder=tmp_path).splitlines()
    assert len(lines) == 2
    assert any("unknown setting 'optim.lrr'; did you mean 'optim.lr'?" in line for line in lines)
    assert any("epochs: got -1" in line for line in lines)


def test_mistakes_across_settings_are_told_at_once(tmp_path: Path) -> None:
    overrides = ["data.shards=digits", "target.grid=exact", "target.prefix_tokens=keep", "data.global_batch=2047"]
    message = told("check", "swinv2_g", *overrides, "--ranks", "128", folder=tmp_path)
    for part in ("2047", "target.grid=pool", "target.prefix_tokens=drop"):
        assert part in message


def test_a_missing_folder_of_shards_is_named(tmp_path: Path) -> None:
    assert "nowhere" in told("check", "vit_b_clip_b", "data.shards=nowhere", "--ranks", "8", folder=tmp_path)


@pytest.mark.parametrize(
    ("program", "recipe", "other"), [("distill", "digits_finetune", "finetune"), ("finetune", "swinv2_g", "distill")]
)
def test_a_recipe_of_another_program_is_refused_with_the_right_one(
    program: str, recipe: str, other: str, tmp_path: Path
) -> None:
    expected = f"{recipe} is a recipe of `fdscale {other}`, not of `fdscale {program}`; run it with that"
    assert told(program, recipe, folder=tmp_path) == expected


def test_a_model_too_big_for_this_machine_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    """Sixteen times as wide as SwinV2-G: 767 billion parameters are too many for any machine."""
    too_big = ["data.shards=digits", "teacher.weights=random", "student.geometry.embed_dim=8192"]
    message = told("launch", "distill", "swinv2_g", "--ranks", "2", *too_big, folder=tmp_path)
    sentence = re.match(
        r"needs (\d+) GiB on each of 2 ranks, (\d+) GiB on this machine, which has (\d+): "
        r"add nodes, offload, or --smoke \(a rank holds weights ",
        message,
    )
    assert sentence is not None, message
    per_rank, together, has = map(int, sentence.groups())
    assert together == pytest.approx(2 * per_rank, abs=1)
    assert together > has > 0


def test_smoke_makes_the_same_model_fit(tmp_path: Path) -> None:
    ended = fdscale("check", "swinv2_g", "--smoke", "--ranks", "2", folder=tmp_path)
    assert ended.returncode == 0
    assert "32 = 2 ranks x micro batch" in ended.stdout


def test_a_folder_that_is_no_run_has_no_summary(tmp_path: Path) -> None:
    message = told("summary", str(tmp_path), folder=tmp_path)
    assert message == f"{tmp_path}: not a run directory: it has no recipe.toml and no metrics.jsonl"


def test_a_split_that_the_digits_lack_is_refused(tmp_path: Path) -> None:
    assert "allowed: train, test" in told("shards", "pack", "digits", "out", "--split", "val", folder=tmp_path)


def test_an_image_folder_becomes_shards_that_check_counts(tmp_path: Path) -> None:
    for number in range(40):
        folder = tmp_path / "images" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (number, 2 * number, 3 * number)).save(folder / f"{number}.png")
    packed = fdscale("shards", "pack", "images", "shards", "--samples-per-shard", "15", folder=tmp_path)
    assert packed.returncode == 0, packed.stderr
    assert "images: 40 images, 2 class folders\n" in packed.stdout
    assert packed.stdout.endswith("\n40 samples in 3 shards: shards\n")

    (tmp_path / "shards" / "index.json").unlink()
    assert "fdscale shards index shards" in told("check", *SHARDS, folder=tmp_path)
    indexed = fdscale("shards", "index", "shards", folder=tmp_path)
    assert (indexed.returncode, indexed.stdout) == (0, "40 samples in 3 shards: shards\n"), indexed.stderr

    checked = fdscale("check", *SHARDS, folder=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "5 (1 an epoch, 40 samples)" in checked.stdout
