"""Every shipped recipe says where its numbers come from, passes the check at its own scale, and shrinks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.recipe import load_recipe, recipe_names
from fdscale.config.settings import DistillSettings
from fdscale.config.shipped import shipped
from fdscale.planning.check import Plan, check
from fdscale.planning.smoke import smoke_patch
from fdscale.students.geometry import STUDENTS, geometry_to_json

RANKS = {"swinv2_g": 128, "vit_b_clip_b": 8, "vit_b_dino": 8, "swinv2_b_esvit": 8}  # two for the others
NUMBER = re.compile(r"^[\w.]+\s*=\s*(\[\s*)?[-+]?\d")
MARK = re.compile(r"#\s(official|paper|ours): \w.{2,}$")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, list[str]]:
    """The files that a recipe leaves to its user: EsViT's weights are on no hub, fine-tuning starts from a student."""
    teacher, student = tmp_path / "teacher.pth", tmp_path / "student.safetensors"
    teacher.touch()
    student.touch()
    description = {"geometry": geometry_to_json(STUDENTS["vit_s16"]), "mean": [0.5] * 3, "std": [0.5] * 3}
    student.with_suffix(".json").write_text(json.dumps(description))
    return {"swinv2_b_esvit": [f"teacher.weights={teacher}"], "digits_finetune": [f"student.weights={student}"]}


def plan_of(name: str, overrides: list[str]) -> Plan:
    settings = load_recipe(name, ["data.shards=digits", *overrides])
    return check(settings, load_deepspeed_json(settings.deepspeed), RANKS.get(name, 2))


@pytest.mark.parametrize("name", recipe_names())
def test_each_number_says_where_it_comes_from(name: str) -> None:
    lines = (shipped("recipes") / f"{name}.toml").read_text().splitlines()
    unmarked = [line for line in lines if NUMBER.match(line) and not MARK.search(line)]
    assert unmarked == []


def test_the_mark_is_demanded() -> None:
    assert NUMBER.match("lr = 3e-4")
    assert NUMBER.match("depths = [2, 2]")
    assert not MARK.search("lr = 3e-4   # a good rate")


@pytest.mark.parametrize("name", recipe_names())
def test_it_passes_the_check_at_its_own_scale(name: str, files: dict[str, list[str]]) -> None:
    plan = plan_of(name, files.get(name, []))
    assert plan.ranks * plan.micro_batch * plan.accumulation == plan.global_batch
    assert plan.memory is not None


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_shrinks_to_a_laptop(name: str, ranks: int, files: dict[str, list[str]]) -> None:
    own_size = [] if name == "swinv2_b_esvit" else files.get(name, [])  # a shrunk teacher has random weights
    settings = load_recipe(name, own_size, smoke=smoke_patch)
    plan = check(settings, load_deepspeed_json(settings.deepspeed), ranks)
    assert (plan.global_batch, settings.deepspeed, settings.data.shards) == (32, "laptop", "digits")
    assert plan.memory is not None
    assert plan.memory.resident < 500 * 2**20
    if isinstance(settings, DistillSettings):
        assert settings.teacher.weights == "random"


def test_the_official_rates_at_the_official_batch() -> None:
    optim = load_recipe("vit_b_clip_b").optim
    scale = 2048 / (optim.reference_batch or 2048)
    rates = [optim.lr * scale, optim.warmup_lr * scale, optim.min_lr * scale]
    assert rates == pytest.approx([1.2e-3, 2e-6, 2e-5])


def test_swinv2_g_is_the_published_model() -> None:
    plan = plan_of("swinv2_g", [])
    parameters = plan.student.parameters()
    assert parameters is not None
    assert round(parameters / 1e6, 1) == 2997.8
    assert plan.student.grid == (8, 8)
