"""Distillation of any pair on warm ranks: one's own networks, timm's, a student file that teaches, bf16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fdscale.train
from fdscale.config.recipe import load_recipe
from fdscale.config.settings import DistillSettings
from fdscale.planning.smoke import smoke_patch
from fdscale.students.student import Student
from fdscale.teachers.teacher import Teacher
from fdscale.train import distill
from fdscale.training.engine import Connection

SWIN = ["student.geometry.depths=[1,1,2,1]", "student.geometry.extra_norm_period=2"]


@pytest.fixture(scope="module")
def digits(few_digits: Path) -> Path:
    """Learned from and held out: every run is judged at its end."""
    return few_digits


class Patches(nn.Module):
    """The smallest network that gives tokens: one convolution, maps (B, C, h, w) row by row."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(images)


def settings_of(run_dir: str, digits: str, *overrides: str) -> DistillSettings:
    given = [f"run_dir={run_dir}", f"data.shards={digits}", "max_steps=3", "log.every=1", "eval.knn=5"]
    settings = load_recipe("swinv2_g", [*given, f"eval.shards={digits}", *overrides], smoke_patch)
    assert isinstance(settings, DistillSettings)
    return settings


def distilled(connection: Connection, run_dir: str, digits: str, *overrides: str) -> bool:
    return distill(settings_of(run_dir, digits, *overrides))


def own_pair(connection: Connection, run_dir: str, digits: str) -> bool:
    torch.manual_seed(connection.rank.rank)  # the engine broadcasts rank 0's weights
    student = Student(Patches(16, 16), width=16, grid=(2, 2), prefix_tokens=0, image_size=32)
    torch.manual_seed(0)
    statistics = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    teacher = Teacher(Patches(24, 8), width=24, grid=(4, 4), prefix_tokens=0, image_size=32, **statistics)
    own = ["student.name=own", "teacher.name=own", "student.activation_checkpointing=none"]
    settings = settings_of(run_dir, digits, *own, "epochs=6", "max_steps=12")
    return distill(settings, student, teacher)


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses_of(run_dir: Path) -> list[float]:
    return [row["loss"] for row in rows_of(run_dir) if "loss" in row]


def test_two_networks_of_ones_own_are_distilled_by_a_python_call(tmp_path: Path, digits: Path, two_ranks: Any) -> None:
    run_dir = tmp_path / "run"
    assert two_ranks(own_pair, str(run_dir), str(digits)) == [True, True]
    losses = losses_of(run_dir)
    assert losses[-1] < losses[0]
    assert (run_dir / "student.safetensors").exists()
    memory = json.loads((run_dir / "memory.json").read_text())
    assert (memory["step"], memory["planned_bytes"]) == (12, None)  # shapes of one's own are not known beforehand
    assert memory["measured_bytes"] > 0


def untraceable(connection: Connection, run_dir: str, digits: str) -> bool:
    """A run whose networks cannot be traced: torch raises what it raises for operations that need values."""

    def outline(settings: DistillSettings) -> Any:
        raise RuntimeError("data-dependent operation")

    original, fdscale.train.outline = fdscale.train.outline, outline
    try:
        return distill(settings_of(run_dir, digits, *SWIN, "max_steps=5"))
    finally:
        fdscale.train.outline = original


def test_a_network_that_cannot_be_traced_is_trained_all_the_same(tmp_path: Path, digits: Path, two_ranks: Any) -> None:
    run_dir = tmp_path / "run"
    assert two_ranks(untraceable, str(run_dir), str(digits)) == [True, True]
    memory = json.loads((run_dir / "memory.json").read_text())
    assert memory["planned_bytes"] is None
    assert memory["measured_bytes"] > 0


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, digits: Path, two_ranks: Any) -> Path:
    """The folder of a run of five steps, which is judged on the way."""
    run_dir = tmp_path_factory.mktemp("judged") / "run"
    assert two_ranks(distilled, str(run_dir), str(digits), "eval.every=2", "max_steps=5", *SWIN) == [True, True]
    return run_dir


def test_held_out_loss_and_knn_are_measured(judged: Path) -> None:
    held_out = [row for row in rows_of(judged) if "eval_loss" in row]
    assert [row["step"] for row in held_out] == [2, 4, 5]
    assert all(0 < row["eval_loss"] < 1 and 0.1 < row["eval_knn_accuracy"] <= 1 for row in held_out)


def test_a_step_holds_the_memory_that_was_planned(judged: Path) -> None:
    memory = json.loads((judged / "memory.json").read_text())
    assert memory["step"] == 5
    assert memory["measured_bytes"] == pytest.approx(memory["planned_bytes"], rel=0.1)
    assert memory["planned"]["optimizer"] > 0


def test_a_timm_pair_and_a_student_file_that_teaches(tmp_path: Path, digits: Path, two_ranks: Any) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    names = ["student.name=timm:test_vit", "teacher.name=timm:test_vit2", "teacher.weights=random"]
    sizes = ["student.image_size=64", "teacher.image_size=64", "target.grid=exact", "target.prefix_tokens=keep"]
    no_geometry = ["student.geometry={}", "teacher.geometry={}"]
    assert two_ranks(distilled, str(first), str(digits), *names, *sizes, *no_geometry) == [True, True]
    taught = ["teacher.name=student_file", f"teacher.weights={first / 'student.safetensors'}"]
    assert two_ranks(distilled, str(second), str(digits), *taught, *SWIN) == [True, True]
    assert len(losses_of(second)) == 3


def own_teachers(connection: Connection, run_dir: str, digits: str) -> str:
    """A run whose second teacher is given in Python, and one where the name in Python is another."""
    from fdscale.config.errors import UserError

    settings = settings_of(run_dir, digits, "further_teachers.mine.name=own", "further_teachers.mine.target.grid=pool")
    torch.manual_seed(0)
    statistics = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    mine = Teacher(Patches(24, 8), width=24, grid=(4, 4), prefix_tokens=0, image_size=32, **statistics)
    try:
        distill(settings, further_teachers={"yours": mine})
    except UserError as error:
        told = str(error)
    distill(settings, further_teachers={"mine": mine})
    return told


def test_several_teachers_teach_at_once_and_the_projectors_resume(tmp_path: Path, digits: Path, two_ranks: Any) -> None:
    dino = "further_teachers.dino"
    two = [f"{dino}.name=dino_vit_b16", f"{dino}.weight=0.5", f"{dino}.target.grid=pool"]
    both = [*two, f"{dino}.target.prefix_tokens=drop", *SWIN]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    two_ranks(distilled, str(whole), str(digits), *both, "max_steps=2")
    for steps in (1, 2):
        two_ranks(distilled, str(parts), str(digits), *both, f"max_steps={steps}")
    assert losses_of(parts) == losses_of(whole)
    for row in (row for row in rows_of(whole) if "loss" in row):
        assert row["loss"] == pytest.approx(row["teacher_loss/teacher"] + 0.5 * row["teacher_loss/dino"], rel=1e-6)
    assert json.loads((whole / "weights.json").read_text()).keys() == {"student", "teacher", dino}


def test_a_further_teacher_of_ones_own_is_given_by_its_name(tmp_path: Path, digits: Path, two_ranks: Any) -> None:
    told = two_ranks(own_teachers, str(tmp_path / "run"), str(digits))
    assert all("further_teachers.mine.name=own" in text for text in told)
    assert (tmp_path / "run" / "student.safetensors").exists()


def test_bf16_with_fp32_masters_stays_close_to_fp32(judged: Path, tmp_path: Path, digits: Path, two_ranks: Any) -> None:
    rounded = tmp_path / "bf16.json"
    zero = {"stage": 3, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    common = {"train_micro_batch_size_per_gpu": 16, "zero_optimization": zero}
    rounded.write_text(json.dumps({**common, "bf16": {"enabled": True}}))
    two_ranks(distilled, str(tmp_path / "bf16"), str(digits), f"deepspeed={rounded}", *SWIN)
    pairs = zip(losses_of(judged)[:3], losses_of(tmp_path / "bf16"), strict=True)
    assert all(abs(exact - rounded) < 5e-3 for exact, rounded in pairs)


def refused(connection: Connection, run_dir: str, digits: str, *overrides: str) -> str:
    from fdscale.config.errors import UserError

    try:
        distilled(connection, run_dir, digits, *overrides)
    except UserError as error:
        return str(error)
    return "accepted"


def test_undecodable_images_are_counted_named_and_limited(tmp_path: Path, digits: Path, two_ranks: Any) -> None:
    import numpy as np

    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    for file in digits.iterdir():
        (spoilt / file.name).write_bytes(file.read_bytes())
    rows = np.load(spoilt / "samples.npy")
    first = sorted(spoilt.glob("*.tar"))[0]
    with first.open("r+b") as tar:
        for row in rows[rows["shard"] == 0]:
            tar.seek(int(row["offset"]))
            tar.write(b"no image")
    few, many = (
        two_ranks(refused, str(tmp_path / f"run{r}"), str(spoilt), f"data.max_bad_ratio={r}", *SWIN) for r in (1, 0.01)
    )
    assert few == ["accepted", "accepted"]
    last = [row for row in rows_of(tmp_path / "run1") if "bad_samples" in row][-1]
    assert last["bad_samples"] > 0
    assert all("cannot be decoded" in message and first.name in message for message in many)
