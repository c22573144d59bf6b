"""Every shipped recipe says where its numbers come from, passes the check at its own scale, and shrinks."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fdscale.build.networks import prepare_teacher
from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.recipe import load_recipe, recipe_names
from fdscale.config.settings import DistillSettings
from fdscale.config.shipped import shipped
from fdscale.data.pack import pack_digits
from fdscale.downstream.classify import finetune
from fdscale.planning.check import Plan, check
from fdscale.planning.networks import teacher_parameters
from fdscale.planning.smoke import smoke_patch
from fdscale.students.files import save_student
from fdscale.students.geometry import STUDENTS, Geometry, ViTGeometry, geometry_to_json, student_geometry
from fdscale.students.student import build_student
from fdscale.train import distill
from fdscale.training.engine import Connection

NUMBER = re.compile(r"^[\w.]+\s*=\s*(\[\s*)?[-+]?\d")
MARK = re.compile(r"#\s(official|paper|ours): \w.{2,}$")

# recipe -> ranks it is written for, parameters of the student and of the teacher
VIT_B, VIT_B_UNTIED, VIT_L14, VIT_L14_UNTIED, VIT_L16 = 85_665_360, 85_761_984, 302_955_584, 303_310_336, 303_139_904
SWIN_B, SWIN_G = 86_893_816, 2_997_843_680
CLIP_B, CLIP_L, TIMM_B, ESVIT_B = 85_799_424, 303_179_776, 85_798_656, 86_917_944
DINOV3_L, DINOV3_7B = 303_128_576, 6_716_030_976
SIZES: dict[str, tuple[int, int, int | None]] = {
    "vit_b_clip_b": (8, VIT_B, CLIP_B),
    "vit_b_clip_b_100ep": (8, VIT_B, CLIP_B),
    "vit_l_clip_l": (8, VIT_L14, CLIP_L),
    "vit_b_deit": (8, VIT_B, TIMM_B),
    "vit_b_dino": (8, VIT_B, TIMM_B),
    "vit_b_mae": (8, VIT_B, TIMM_B),
    "swinv2_b_esvit": (8, SWIN_B, ESVIT_B),
    "vit_l_dinov3": (8, VIT_L16, DINOV3_L),
    "swinv2_g": (128, SWIN_G, CLIP_L),
    "swinv2_g_dinov3_7b": (128, SWIN_G, DINOV3_7B),
    "swinv2_g_self": (128, SWIN_G, SWIN_G),
    "finetune_vit_b_clip_b": (8, VIT_B_UNTIED, None),
    "finetune_vit_b_clip_b_100ep": (8, VIT_B_UNTIED, None),
    "finetune_vit_l_clip_l": (8, VIT_L14_UNTIED, None),
    "finetune_vit_b_deit": (8, VIT_B_UNTIED, None),
    "finetune_vit_b_dino": (8, VIT_B_UNTIED, None),
    "finetune_swinv2_b_esvit": (8, SWIN_B, None),
    "digits_teacher": (2, 743_076, None),
}
OF_ITS_USER = "digits_finetune"  # its network is the file that the user names


def student_file(folder: Path, geometry: Geometry) -> Path:
    folder.mkdir(parents=True)
    path = folder / "student.safetensors"
    path.touch()
    description = {"geometry": geometry_to_json(geometry), "mean": [0.5] * 3, "std": [0.5] * 3}
    path.with_suffix(".json").write_text(json.dumps(description))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, list[str]]:
    """The files that a recipe leaves to its user, empty: EsViT's weights, a SwinV2-G, students to fine-tune."""
    esvit = tmp_path / "esvit.pth"
    esvit.touch()
    given = {"swinv2_b_esvit": [f"teacher.weights={esvit}"]}
    giant = dataclasses.replace(STUDENTS["swinv2_g"], image_size=256)
    given["swinv2_g_self"] = [f"teacher.weights={student_file(tmp_path / 'g', giant)}"]
    for name in recipe_names():
        if name.startswith("finetune_"):
            table = load_recipe(name).student
            geometry = student_geometry(table.name, table.image_size, table.geometry)
            given[name] = [f"student.weights={student_file(tmp_path / name, geometry)}", "eval.shards=digits"]
    own = build_student(ViTGeometry(64, 3, 4, patch_size=16, image_size=64))
    given[OF_ITS_USER] = [f"student.weights={save_student(own, own.backbone.state_dict(), tmp_path / 'own')}"]
    return given


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "digits"
    pack_digits(folder, "test")
    return folder


def plan_of(name: str, overrides: list[str]) -> Plan:
    settings = load_recipe(name, ["data.shards=digits", *overrides])
    ranks = SIZES[name][0] if name in SIZES else 2
    return check(settings, load_deepspeed_json(settings.deepspeed), ranks)


@pytest.mark.parametrize("name", recipe_names())
def test_each_number_says_where_it_comes_from(name: str) -> None:
    lines = (shipped("recipes") / f"{name}.toml").read_text().splitlines()
    unmarked = [line for line in lines if NUMBER.match(line) and not MARK.search(line)]
    assert unmarked == []


def test_the_mark_is_demanded() -> None:
    assert NUMBER.match("lr = 3e-4")
    assert NUMBER.match("depths = [2, 2]")
    assert not MARK.search("lr = 3e-4   # a good rate")


def two_steps(connection: Connection, name: str, run_dir: str, overrides: list[str]) -> bool:
    given = [f"run_dir={run_dir}", "max_steps=2", "log.every=1", *overrides]
    settings = load_recipe(name, given, smoke_patch)
    return distill(settings) if isinstance(settings, DistillSettings) else finetune(settings)


@pytest.mark.parametrize("name", recipe_names())
def test_it_checks_builds_at_full_size_and_takes_two_steps_in_miniature(
    name: str, files: dict[str, list[str]], digits: Path, tmp_path: Path, two_ranks: Any
) -> None:
    plan = plan_of(name, files.get(name, []))
    assert plan.ranks * plan.micro_batch * plan.accumulation == plan.global_batch
    assert plan.memory is not None
    _, student, teacher = SIZES.get(name, (2, plan.student.parameters(), None))
    assert (plan.student.parameters(), plan.teacher and teacher_parameters(plan.teacher)) == (student, teacher)
    assert parameters_of(build_student(plan.student, device="meta").backbone) == student
    settings = load_recipe(name, files.get(name, []))
    if isinstance(settings, DistillSettings):
        assert parameters_of(prepare_teacher(settings.teacher, "random", torch.bfloat16, "meta")) == teacher
    own = files[OF_ITS_USER][:1] if name == OF_ITS_USER else []
    overrides = [f"data.shards={digits}", *own]
    assert two_ranks(two_steps, name, str(tmp_path / "run"), overrides) == [True, True]
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and 0 < loss < 5 for loss in losses)


def parameters_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_shrinks_to_a_laptop(name: str, ranks: int, files: dict[str, list[str]]) -> None:
    settings = load_recipe(name, files[name][:1] if name == OF_ITS_USER else [], smoke=smoke_patch)
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
