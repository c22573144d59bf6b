"""Every shipped recipe of a dense task: its numbers, its scale, its whole network, its miniature."""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.programs import DenseSettings
from fdscale.config.recipe import load_recipe, recipe_names
from fdscale.data.dense.coco import load_coco
from fdscale.data.dense.scenes import SCENE_CLASSES as SCENE_NAMES
from fdscale.data.dense.scenes import write_ade20k, write_coco
from fdscale.downstream.detect import outline as detect_outline
from fdscale.downstream.segment import outline as segment_outline
from fdscale.planning.check import check
from fdscale.planning.dense_check import SCENE_CLASSES
from fdscale.planning.dense_sizes import trained_parameters
from fdscale.planning.memory import memory_per_rank
from fdscale.planning.smoke import CROP, smoke_patch
from fdscale.students.geometry import SwinV2Geometry, geometry_to_json, student_geometry

OUTLINES: dict[str, Any] = {"segment": segment_outline, "detect": detect_outline}

# recipe -> ranks it is written for, parameters of the whole network
SIZES: dict[str, tuple[int, int]] = {
    "ade20k_vit_b": (8, 163_080_812),
    "ade20k_vit_l": (8, 440_214_316),
    "ade20k_swinv2_b": (8, 121_430_308),
    "ade20k_swinv2_l": (8, 233_967_392),
    "ade20k_swinv2_g": (32, 3_057_747_980),
    "ade20k_mask2former_swinv2_g": (16, 3_019_367_223),
    "coco_vit_b": (8, 143_250_014),
    "coco_vit_l": (8, 366_649_950),
    "coco_swinv2_b": (8, 139_462_486),
    "coco_swinv2_l": (8, 248_018_258),
    "coco_swinv2_g": (32, 3_051_892_286),
    "objects365_swinv2_g": (32, 3_050_124_357),
    "scenes_segment": (1, 3_820_126),
    "scenes_detect": (1, 3_913_340),
}
# What was published: crop, batch, steps, warm-up, peak rate, weight decay, clip, drop path, layer decay, windows.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "ade20k_vit_b": (512, 16, 160_000, 1500, 3e-5, 0.05, 0, 0.1, 0.9, None),
    "ade20k_vit_l": (512, 16, 160_000, 1500, 2e-5, 0.05, 0, 0.2, 0.95, None),
    "ade20k_swinv2_b": (512, 16, 160_000, 1500, 6e-5, 0.01, 0, 0.3, 1, 16),
    "ade20k_swinv2_l": (512, 16, 160_000, 1500, 6e-5, 0.01, 0, 0.3, 1, 16),
    "ade20k_swinv2_g": (640, 32, 80_000, 1500, 4e-5, 0.05, 0, 0.4, 0.95, 40),
    "ade20k_mask2former_swinv2_g": (640, 16, 160_000, 0, 1e-4, 0.05, 0.01, 0.4, 0.95, 40),
    "coco_vit_b": (1024, 64, 184_375, 250, 1e-4, 0.1, 0, 0.1, 0.7, None),
    "coco_vit_l": (1024, 64, 184_375, 250, 1e-4, 0.1, 0, 0.4, 0.8, None),
    "coco_swinv2_b": (1024, 64, 92_187, 125, 4e-5, 0.05, 0, 0.4, 1, 16),
    "coco_swinv2_l": (1024, 64, 92_187, 125, 4e-5, 0.05, 0, 0.4, 1, 16),
    "coco_swinv2_g": (1536, 96, 45_000, 1000, 6e-4, 0.05, 100, 0.3, 0.87, 32),
    "objects365_swinv2_g": (1024, 96, 67_500, 1000, 1.2e-3, 0.05, 100, 0.3, 0.87, 32),
}
# steps -> those from which the rate is a tenth; the first two are the official ones
DROPPED = {
    184_375: [163_889, 177_546],
    92_187: [81_944, 88_773],
    45_000: [40_000, 43_334],
    67_500: [60_000, 65_000],
}


def dense(name: str, *overrides: str) -> DenseSettings:
    settings = load_recipe(name, overrides)
    assert isinstance(settings, DenseSettings)
    return settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny scenes in the layouts of ADE20K, of COCO and of Objects365, with as many classes as these have."""
    folder = tmp_path_factory.mktemp("data")
    write_ade20k(folder / "segment", 40, 2, 32)
    (folder / "segment" / "objectInfo150.txt").unlink()  # which tells of eight classes
    write_coco(folder / "detect", 130, 2, 32)
    for file in (folder / "detect" / "annotations").iterdir():
        held = json.loads(file.read_text())
        for classes in (80, 365):
            more = [{"id": 1000 + number, "name": str(number)} for number in range(classes - len(held["categories"]))]
            named = {**held, "categories": held["categories"] + more}
            file.with_name(f"{classes}_{file.name}").write_text(json.dumps(named))
    return folder


def of_its_user(name: str, data: Path, folder: Path) -> list[str]:
    """What a recipe leaves to its user: images, and the files that it starts from, made in `folder`."""
    settings = dense(name)
    table, given = settings.student, []
    for half, split in (("data", "train"), ("eval", "val")):
        if settings.program == "segment":
            given.append(f"{half}.folder={data / 'segment'}")
        else:
            notes = data / "detect" / "annotations" / f"{settings.classes}_instances_{split}2017.json"
            given += [f"{half}.images={data / 'detect' / f'{split}2017'}", f"{half}.annotations={notes}"]
    if table.weights is not None:
        distilled = {"vit_b16": 224, "vit_l14": 224}.get(table.name, table.image_size)
        geometry = geometry_to_json(student_geometry(table.name, distilled, table.geometry))
        file = folder / "student.safetensors"
        file.touch()
        described = {"geometry": geometry, "mean": [0.5] * 3, "std": [0.5] * 3}
        file.with_suffix(".json").write_text(json.dumps(described))
        given.append(f"student.weights={file}")
    if getattr(settings.head, "weights", None) is not None:
        write_earlier_stage(folder / "detector.safetensors")
        given.append(f"head.weights={folder / 'detector.safetensors'}")
    return given


def write_earlier_stage(file: Path) -> None:
    """What says that a detector is the one of objects365_swinv2_g, without its weights."""
    first: Any = dense("objects365_swinv2_g")
    head, student = first.head, first.student
    save_file({"boxes.stages.0.classes.weight": np.zeros(1, np.float32)}, file)
    design = {"cascade": head.kind == "cascade", "channels": head.channels, "box_width": head.box_width}
    geometry = geometry_to_json(student_geometry(student.name, student.image_size, student.geometry))
    described = {"geometry": geometry, "mean": [0.5] * 3, "std": [0.5] * 3}
    file.with_suffix(".json").write_text(
        json.dumps({**described, "design": {**design, "rpn_convolutions": head.rpn_convolutions}})
    )


def test_each_dense_recipe_is_here() -> None:
    assert set(SIZES) == {name for name in recipe_names() if load_recipe(name).program in SCENE_CLASSES}
    assert set(PUBLISHED) == {name for name in SIZES if not name.startswith("scenes_")}


@pytest.mark.parametrize("name", SIZES)
def test_it_passes_the_check_at_its_own_scale_and_builds_whole(name: str, data: Path, tmp_path: Path) -> None:
    given = [] if name.startswith("scenes_") else of_its_user(name, data, tmp_path)
    settings, (ranks, parameters) = dense(name, *given), SIZES[name]
    plan = check(settings, load_deepspeed_json(settings.deepspeed), ranks)
    assert plan.ranks * plan.micro_batch * plan.accumulation == plan.global_batch
    assert plan.memory is not None
    student = settings.student.model_copy(update={"weights": None, "resize": False})
    outlined = OUTLINES[settings.program](settings.model_copy(update={"student": student}))
    assert sum(weight.numel() for weight in outlined.module.parameters()) == parameters
    assert outlined.image_size == settings.data.crop
    assert trained_parameters(settings, plan.student) == parameters  # by a formula, as the planner counts them
    ema = settings.optim.ema_decay > 0
    assert plan.memory == memory_per_rank(parameters, 0, ranks, load_deepspeed_json(settings.deepspeed), ema)


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_numbers_are_the_published_ones(name: str) -> None:
    settings = dense(name)
    optim, data = settings.optim, settings.data
    found = (data.crop, data.global_batch, settings.steps, optim.warmup_steps, optim.lr, optim.weight_decay)
    found = (*found, optim.clip, settings.student.drop_path, optim.layer_decay, settings.backbone.window_size)
    assert found == PUBLISHED[name]
    assert (optim.betas, optim.eps, optim.min_lr, optim.reference_batch) == ((0.9, 0.999), 1e-8, 0.0, None)
    assert data.flip == 0.5
    if settings.program == "segment":
        assert (optim.decay, data.scale, data.long_side) == ("linear", (0.5, 2.0), 4 * data.short_side)
    else:
        assert (optim.decay, data.scale) == ("milestones", (0.1, 2.0))
        dropped = [ceil(share * (settings.steps or 0)) for share in optim.milestones]
        assert dropped == DROPPED[settings.steps or 0]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "swinv2" in name])
def test_windows_divide_the_maps_of_a_crop_but_for_the_last(name: str) -> None:
    """A window shrinks to a map that is smaller; what it does not divide would be padded."""
    settings = dense(name)
    window = settings.backbone.window_size
    sides = [settings.data.crop // stride for stride in (4, 8, 16, 32)]
    assert all(side % min(window, side) == 0 for side in sides[:3])
    assert sides[3] % min(window, sides[3]) == (16 if name == "coco_swinv2_g" else 0)
    if name == "ade20k_swinv2_g":
        tested, wide = settings.eval.window_size, settings.eval.short_side
        assert tested is not None
        assert all(side % min(tested, side) == 0 for side in (wide // stride for stride in (4, 8, 16, 32)))


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "_vit_" in name])
def test_a_vits_tables_are_of_the_grid_of_a_crop(name: str) -> None:
    """What the backbone shows a patch of 14 or 16 pixels are 16 of the crop's."""
    student = dense(name).student
    geometry = student_geometry(student.name, student.image_size, student.geometry)
    assert geometry.grid == (dense(name).data.crop // 16,) * 2
    assert student.resize


def test_the_coco_stage_goes_on_with_the_network_of_the_objects365_stage() -> None:
    first, second = dense("objects365_swinv2_g"), dense("coco_swinv2_g")
    assert second.head.weights == "runs/objects365_swinv2_g/detector.safetensors"
    assert second.student.weights is None
    assert (first.student.geometry, first.student.image_size) == (second.student.geometry, second.student.image_size)
    assert first.backbone == second.backbone
    kept = ("kind", "channels", "box_width", "box_convolutions", "norms", "rpn_convolutions", "anchor_scale")
    assert [getattr(first.head, key) for key in kept] == [getattr(second.head, key) for key in kept]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_shrinks_to_a_laptop(name: str, ranks: int) -> None:
    settings = load_recipe(name, [], smoke_patch)
    assert isinstance(settings, DenseSettings)
    plan = check(settings, load_deepspeed_json(settings.deepspeed), ranks)
    assert (plan.global_batch, settings.deepspeed, settings.data.crop) == (32, "laptop", CROP)
    assert (settings.steps, settings.classes) == (None, SCENE_CLASSES[settings.program])
    assert plan.memory is not None
    assert plan.memory.resident < 500 * 2**20
    if ranks == 1:
        outlined = OUTLINES[settings.program](settings)
        assert sum(weight.numel() for weight in outlined.module.parameters()) < 6_000_000
        assert isinstance(plan.student, SwinV2Geometry) == ("swinv2" in name or name.startswith("scenes_"))


def test_a_miniature_keeps_proportions() -> None:
    settings: Any = load_recipe("ade20k_swinv2_g", [], smoke_patch)
    assert (settings.backbone.window_size, settings.data.short_side, settings.data.long_side) == (8, 128, 512)
    seen = settings.eval
    assert (seen.folder, seen.crop, seen.short_side, seen.window_size) == ("scenes", 179, 179, 11)
    assert settings.head.kind == "upernet"
    chosen: Any = load_recipe("coco_vit_b", ["data.crop=96", "head.channels=32"], smoke_patch)
    assert (chosen.data.crop, chosen.head.channels, chosen.eval.annotations) == (96, 32, "scenes")
    objects: Any = load_recipe("objects365_swinv2_g", [], smoke_patch)
    assert not objects.head.masks
    assert (objects.head.weights, objects.student.weights) == (None, None)


def test_the_scenes_have_so_many_classes(tmp_path: Path) -> None:
    assert SCENE_CLASSES["segment"] == len(SCENE_NAMES)
    write_coco(tmp_path, 4, 0)
    scenes = load_coco(tmp_path / "train2017", tmp_path / "annotations" / "instances_train2017.json")
    assert SCENE_CLASSES["detect"] == len(scenes.class_names)


def test_a_miniature_of_another_head_has_that_heads_numbers() -> None:
    chosen: Any = load_recipe("ade20k_vit_b", ["head.kind=mask2former", "head.auxiliary_weight=0.4"], smoke_patch)
    assert (chosen.head.queries, chosen.head.decoder_layers, chosen.backbone.indices) == (16, 2, (0, 1, 2, 3))
    plan = check(chosen, load_deepspeed_json("laptop"), 1)
    built = sum(weight.numel() for weight in segment_outline(chosen).module.parameters())
    assert trained_parameters(chosen, plan.student) == built
    pyramid: Any = load_recipe("ade20k_vit_b", ["backbone.plain=pyramid", "head.channels=32"], smoke_patch)
    assert (pyramid.backbone.pyramid_channels, pyramid.head.channels) == (64, 32)
