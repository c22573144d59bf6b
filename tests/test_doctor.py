"""`fdscale doctor RECIPE` examines real ranks, and its last line is the one thing to fix."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fdscale.config.recipe import load_recipe
from fdscale.doctor import examine_ranks
from fdscale.planning.smoke import smoke_patch
from fdscale.terminal import terminal
from fdscale.training.engine import Connection


def test_the_command_examines_two_ranks_and_ends_with_what_to_fix(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fdscale", "doctor", "swinv2_g", "--smoke", "--ranks", "2"]
    unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in unset and "SLURM" not in name}
    on_cpus = {**environment, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    huge = [*command, "checkpoint.keep=10000000"]
    done = subprocess.run(huge, cwd=tmp_path, env=on_cpus, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line]
    assert told[0].strip() == "2 ranks"
    fix = next(line for line in told if line.startswith("fix first: disk: runs/swinv2_g-smoke: "))
    assert "make room for" in fix
    assert told.index(fix) >= len(told) - 2  # the launcher says that a rank failed
    assert list(tmp_path.iterdir()) == []


def examined(connection: Connection, run: str) -> bool:
    return examine_ranks(load_recipe("swinv2_g", [f"run_dir={run}"], smoke_patch))


def test_sound_ranks_are_found_sound_by_all(tmp_path: Path, two_ranks: Any) -> None:
    assert two_ranks(examined, str(tmp_path / "run")) == [True, True]
    assert list(tmp_path.iterdir()) == []


def examined_without_weights(connection: Connection, folder: str) -> tuple[bool, str]:
    """What this rank says of a recipe whose teacher nobody has fetched, and what it prints."""
    before, os.environ["FDSCALE_WEIGHTS"] = os.environ.get("FDSCALE_WEIGHTS"), folder
    settings = ["data.shards=digits", "data.global_batch=64", "deepspeed=laptop", f"run_dir={folder}/run"]
    try:
        with terminal().capture() as printed:
            sound = examine_ranks(load_recipe("vit_b_clip_b", settings))
        return sound, printed.get()
    finally:
        del os.environ["FDSCALE_WEIGHTS"]
        os.environ.update({} if before is None else {"FDSCALE_WEIGHTS": before})


def test_weights_that_are_missing_are_told_by_one_rank(tmp_path: Path, two_ranks: Any) -> None:
    (first, table), (second, nothing) = two_ranks(examined_without_weights, str(tmp_path))
    assert (first, second, nothing) == (False, True, "")
    assert table.strip().splitlines()[-1].startswith(f"fix first: weights: teacher.weights: {tmp_path} has no weights")
    assert "fdscale fetch" in table


def test_what_is_wrong_with_the_settings_is_told_before_a_rank_starts(capsys: pytest.CaptureFixture[str]) -> None:
    from fdscale.cli import main

    assert main(["doctor", "swinv2_g", "--smoke", "optim.lrr=1"]) == 2
    assert "did you mean 'optim.lr'?" in capsys.readouterr().err
