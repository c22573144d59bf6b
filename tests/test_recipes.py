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
from safetensors.torch import save_file
from torch import nn

from fdscale.build.networks import prepare_teacher
from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.recipe import load_recipe, recipe_names
from fdscale.config.settings import DistillSettings, FinetuneSettings
from fdscale.config.shipped import shipped
from fdscale.data.packing.digits import pack_digits
from fdscale.downstream.classify import finetune
from fdscale.planning.check import Plan, check
from fdscale.planning.dense_check import SCENE_CLASSES
from fdscale.planning.networks import teacher_parameters
from fdscale.planning.smoke import smoke_patch
from fdscale.students.files import save_student
from fdscale.students.geometry import STUDENTS, Geometry, ViTGeometry, geometry_to_json, student_geometry
from fdscale.students.student import build_student
from fdscale.train import distill
from fdscale.training.engine import Connection

NUMBER = re.compile(r"^[\w.]+\s*=\s*(\[\s*)?[-+]?\d")
MARK = re.compile(r"#\s(official|paper|ours): \w.{2,}$")

# recipe -> ranks it is written for, parameters of the student and of its teachers together
VIT_B, VIT_B_UNTIED, VIT_L14, VIT_L14_UNTIED, VIT_L16 = 85_665_360, 85_761_984, 302_955_584, 303_310_336, 303_139_904
SWIN_B, SWIN_G = 86_893_816, 2_997_843_680
VIT_L14_UNTIED_336 = VIT_L14_UNTIED + 24 * 16 * (47**2 - 31**2)  # tables of 24x24 positions
CLIP_B, CLIP_L, TIMM_B, ESVIT_B = 85_799_424, 303_179_776, 85_798_656, 86_917_944
DINOV2_L, DINOV3_L, DINOV3_7B = 303_227_904, 303_128_576, 6_716_030_976
SIZES: dict[str, tuple[int, int, int | None]] = {
    "vit_b_clip_b": (8, VIT_B, CLIP_B),
    "vit_b_clip_b_100ep": (8, VIT_B, CLIP_B),
    "vit_l_clip_l": (8, VIT_L14, CLIP_L),
    "vit_b_deit": (8, VIT_B, TIMM_B),
    "vit_b_dino": (8, VIT_B, TIMM_B),
    "vit_b_mae": (8, VIT_B, TIMM_B),
    "swinv2_b_esvit": (8, SWIN_B, ESVIT_B),
    "vit_l_dinov3": (8, VIT_L16, DINOV3_L),
    "vit_l_clip_dinov2": (8, VIT_L14, CLIP_L + DINOV2_L),
    "swinv2_g": (128, SWIN_G, CLIP_L),
    "swinv2_g_dinov3_7b": (128, SWIN_G, DINOV3_7B),
    "swinv2_g_self": (128, SWIN_G, SWIN_G),
    "finetune_vit_b_clip_b": (8, VIT_B_UNTIED, None),
    "finetune_vit_b_clip_b_100ep": (8, VIT_B_UNTIED, None),
    "finetune_vit_l_clip_l": (8, VIT_L14_UNTIED, None),
    "finetune_vit_b_deit": (8, VIT_B_UNTIED, None),
    "finetune_vit_b_dino": (8, VIT_B_UNTIED, None),
    "finetune_swinv2_b_esvit": (8, SWIN_B, None),
    "finetune_vit_l_clip_l_in22k": (8, VIT_L14_UNTIED, None),
    "finetune_vit_l_clip_l_in1k_336": (8, VIT_L14_UNTIED_336, None),
    "finetune_ftclip_vit_b16": (8, CLIP_B, None),
    "digits_teacher": (2, 743_076, None),
}
OF_ITS_USER = "digits_finetune"  # its network is the file that the user names
PROGRAM_OF = {name: load_recipe(name).program for name in recipe_names()}
ON_SHARDS = [name for name, program in PROGRAM_OF.items() if program not in SCENE_CLASSES]


def student_file(folder: Path, geometry: Geometry) -> Path:
    folder.mkdir(parents=True)
    path = folder / "student.safetensors"
    path.touch()
    description = {"geometry": geometry_to_json(geometry), "mean": [0.5] * 3, "std": [0.5] * 3}
    path.with_suffix(".json").write_text(json.dumps(description))
    return path


def classifier_file(folder: Path, width: int) -> Path:
    """With a norm after pooling, of two classes."""
    path = folder / "classifier.safetensors"
    norm = {"fc_norm.weight": torch.ones(width), "fc_norm.bias": torch.zeros(width)}
    save_file({**norm, "head.weight": torch.zeros(2, width), "head.bias": torch.zeros(2)}, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The files that a recipe leaves to its user, empty: EsViT's weights, a SwinV2-G, students to fine-tune."""
    tmp_path = tmp_path_factory.mktemp("files")
    esvit = tmp_path / "esvit.pth"
    esvit.touch()
    given = {"swinv2_b_esvit": [f"teacher.weights={esvit}"]}
    giant = dataclasses.replace(STUDENTS["swinv2_g"], image_size=256)
    given["swinv2_g_self"] = [f"teacher.weights={student_file(tmp_path / 'g', giant)}"]
    for name in recipe_names():
        if name.startswith("finetune_"):
            table, head = load_recipe(name).student, load_recipe(name).head
            size = 224 if table.resize else table.image_size
            geometry = student_geometry(table.name, size, table.geometry)
            given[name] = [f"student.weights={student_file(tmp_path / name, geometry)}", "eval.shards=digits"]
            if head.weights is not None:
                given[name].append(f"head.weights={classifier_file(tmp_path / name, geometry.width)}")
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


@pytest.mark.parametrize("name", ON_SHARDS)
def test_it_checks_builds_at_full_size_and_takes_two_steps_in_miniature(
    name: str, files: dict[str, list[str]], digits: Path, tmp_path: Path, two_ranks: Any
) -> None:
    plan = plan_of(name, files.get(name, []))
    assert plan.ranks * plan.micro_batch * plan.accumulation == plan.global_batch
    _, student, teacher = SIZES.get(name, (2, plan.student.parameters(), None))
    known = student if plan.student.family != "timm" else None  # timm's networks tell once they are built
    assert (plan.memory is None) == (known is None)
    assert (plan.student.parameters(), sum(map(teacher_parameters, plan.teachers.values())) or None) == (
        known,
        teacher,
    )
    assert parameters_of(build_student(plan.student, device="meta").backbone) == student
    settings = load_recipe(name, files.get(name, []))
    if isinstance(settings, DistillSettings):
        built = [prepare_teacher(table, "random", torch.bfloat16, "meta") for table, _ in settings.teachers.values()]
        assert sum(map(parameters_of, built)) == teacher
    own = files[OF_ITS_USER][:1] if name == OF_ITS_USER else []
    overrides = [
        f"data.shards={digits}",
        "data.global_batch=8",
        f"deepspeed={in_miniature(settings.deepspeed, tmp_path)}",
        *own,
    ]
    assert two_ranks(two_steps, name, str(tmp_path / "run"), overrides) == [True, True]
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and 0 < loss < 5 for loss in losses)


def in_miniature(deepspeed: str, folder: Path) -> Path:
    """The recipe's own JSON, its ZeRO stage and precision included, for micro batches of the smoke table."""
    path = folder / "deepspeed.json"
    path.write_text(json.dumps({**load_deepspeed_json(deepspeed), "train_micro_batch_size_per_gpu": 4}))
    return path


def parameters_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", ON_SHARDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_shrinks_to_a_laptop(name: str, ranks: int, files: dict[str, list[str]]) -> None:
    settings = load_recipe(name, files[name][:1] if name == OF_ITS_USER else [], smoke=smoke_patch)
    plan = check(settings, load_deepspeed_json(settings.deepspeed), ranks)
    assert (plan.global_batch, settings.deepspeed, settings.data.shards) == (32, "laptop", "digits")
    if plan.student.family == "timm":
        assert parameters_of(build_student(plan.student, device="meta").backbone) < 10**6
    else:
        assert plan.memory is not None
        assert plan.memory.resident < 500 * 2**20
    if isinstance(settings, DistillSettings):
        assert settings.teacher.weights == "random"


# The released configurations: student, teacher, batch, epochs, warm-up; lr, warm-up and minimum rate at that batch;
# drop path, smallest crop, clip, layer decay.
OFFICIAL: dict[str, tuple[Any, ...]] = {
    "vit_b_clip_b_100ep": ("vit_b16", "clip_vit_b16", 2048, 100, 10, 1.2e-3, 2e-6, 2e-5, 0.1, 0.67, 3.0, 1.0),
    "vit_b_clip_b": ("vit_b16", "clip_vit_b16", 2048, 300, 10, 1.2e-3, 2e-6, 2e-5, 0.2, 0.08, 3.0, 1.0),
    "vit_l_clip_l": ("vit_l14", "clip_vit_l14", 2048, 300, 10, 1.2e-3, 2e-6, 2e-5, 0.3, 0.08, 3.0, 1.0),
    "vit_b_deit": ("vit_b16", "deit_b16", 2048, 300, 10, 1.2e-3, 2e-6, 2e-5, 0.3, 0.08, 3.0, 1.0),
    "vit_b_dino": ("vit_b16", "dino_vit_b16", 2048, 300, 10, 1.2e-3, 2e-6, 2e-5, 0.3, 0.08, 3.0, 1.0),
    "swinv2_b_esvit": ("swinv2_b", "esvit_swin_b", 2048, 300, 10, 8e-4, 4e-6, 4e-5, 0.3, 0.08, 3.0, 1.0),
    "finetune_vit_b_clip_b_100ep": ("vit_b16", None, 2048, 100, 20, 5e-3, 1e-6, 1e-6, 0.1, 0.08, 5.0, 0.65),
    "finetune_vit_b_clip_b": ("vit_b16", None, 2048, 100, 20, 5e-3, 1e-6, 1e-6, 0.3, 0.08, 5.0, 0.6),
    "finetune_vit_l_clip_l": ("vit_l14", None, 2048, 50, 5, 1e-3, 2e-6, 2e-6, 0.4, 0.08, 5.0, 0.75),
    "finetune_vit_b_deit": ("vit_b16", None, 2048, 100, 20, 5e-3, 1e-6, 1e-6, 0.3, 0.08, 5.0, 0.65),
    "finetune_vit_b_dino": ("vit_b16", None, 2048, 100, 20, 6e-3, 1e-6, 1e-6, 0.2, 0.08, 5.0, 0.6),
    "finetune_swinv2_b_esvit": ("swinv2_b", None, 1024, 100, 20, 2.5e-3, 5e-7, 5e-7, 0.4, 0.08, 5.0, 0.8),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_released_configuration_is_exact(name: str) -> None:
    settings = load_recipe(name)
    optim, data = settings.optim, settings.data
    teacher = settings.teacher.name if isinstance(settings, DistillSettings) else None
    assert optim.reference_batch
    rates = [rate * data.global_batch / optim.reference_batch for rate in (optim.lr, optim.warmup_lr, optim.min_lr)]
    found = (settings.student.name, teacher, data.global_batch, settings.epochs, optim.warmup_epochs, *rates)
    found = (*found, settings.student.drop_path, data.crop_scale[0], optim.clip, optim.layer_decay)
    assert found[:2] == OFFICIAL[name][:2]
    assert found[2:] == pytest.approx(OFFICIAL[name][2:])
    assert (optim.weight_decay, optim.betas, optim.eps) == (0.05, (0.9, 0.999), 1e-8)
    assert (data.flip, data.crop_scale[1], data.crop_ratio) == (0.5, 1.0, (3 / 4, 4 / 3))
    assert (settings.student.image_size, settings.seed) == (224, 0)


@pytest.mark.parametrize("name", [name for name in OFFICIAL if not name.startswith("finetune_")])
def test_a_released_distillation_has_the_papers_target_and_loss(name: str) -> None:
    settings = load_recipe(name)
    assert isinstance(settings, DistillSettings)
    assert (settings.target.grid, settings.target.prefix_tokens, settings.target.whiten) == ("exact", "keep", True)
    assert (settings.loss.beta, settings.teacher.after_norm, settings.data.interpolation) == (2.0, True, "bilinear")


@pytest.mark.parametrize("name", [name for name in OFFICIAL if name.startswith("finetune_")])
def test_a_released_fine_tuning_has_the_official_head_and_augmentation(name: str) -> None:
    settings, swin = load_recipe(name), "swinv2" in name
    assert isinstance(settings, FinetuneSettings)
    augment = settings.augment
    assert (augment.randaugment, augment.erasing, augment.mixup, augment.cutmix) == (
        "rand-m9-mstd0.5-inc1",
        0.25,
        0.8,
        1,
    )
    assert (augment.mix_probability, augment.switch_probability) == (1.0, 0.5)
    assert augment.images_per_draw == settings.data.global_batch // 16  # one of sixteen GPUs
    assert (settings.label_smoothing, settings.classes, settings.data.interpolation) == (0.1, 1000, "bicubic")
    head = ("student", 1.0) if swin else ("after_pooling", 0.001)
    assert (settings.head.norm, settings.head.init_scale) == head
    assert settings.student.position_bias == (None if swin else "per_block")
    assert settings.student.weights == f"runs/{name.removeprefix('finetune_')}/student.safetensors"
    assert (settings.optim.layer_decay_scales, settings.optim.decay_position_bias) == ("peak", True)


def test_swinv2_g_is_the_published_model() -> None:
    plan = plan_of("swinv2_g", [])
    parameters = plan.student.parameters()
    assert parameters is not None
    assert round(parameters / 1e6, 1) == 2997.8
    assert plan.student.grid == (8, 8)
