"""What is wrong with folders and annotations of dense tasks is told before anything starts, with file and id."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fdscale.config.errors import SettingsError
from fdscale.config.recipe import load_recipe
from fdscale.data.dense.scenes import write_ade20k, write_coco
from fdscale.planning.check import Plan, check, load_and_check
from fdscale.students.files import save_student
from fdscale.students.geometry import student_geometry
from fdscale.students.student import build_student

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_ade20k(folder / "ade20k", 20, 5, 32)
    write_coco(folder / "coco", 20, 5, 32)
    return folder


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "data"))


def planned(program: str, data: Path, *overrides: str) -> Plan:
    named = [f"{table}.folder={data}/ade20k" for table in ("data", "eval")]
    if program == "detect":
        named = [
            f"{table}.{word}"
            for table, split in (("data", "train"), ("eval", "val"))
            for word in (
                f"images={data}/coco/{split}2017",
                f"annotations={data}/coco/annotations/instances_{split}2017.json",
            )
        ]
    plan, _ = load_and_check(load_recipe(f"scenes_{program}", [*named, *overrides]), 1)
    return plan


def problems(program: str, data: Path, *overrides: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        planned(program, data, *overrides)
    return caught.value.problems


def spoil(data: Path, change: Change) -> Path:
    path = data / "coco" / "annotations" / "instances_train2017.json"
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))
    return path


@pytest.mark.parametrize("program", ["segment", "detect"])
def test_good_data_are_counted(program: str, made: Path) -> None:
    plan = planned(program, made, "epochs=3")
    assert plan.samples is not None
    assert 16 <= plan.samples <= 20  # without the images that show no object
    assert (plan.steps_per_epoch, plan.steps) == (1, 3)


def test_classes_that_disagree_are_told_of_both_halves(data: Path) -> None:
    found = problems("detect", data, "classes=80")
    assert [text.split(",")[0] for text in found] == ["classes: got 80"] * 2
    assert "eval.annotations=" in found[1]
    assert any("objectInfo150.txt" in text for text in problems("segment", data, "classes=150"))
    assert "embedded scenes have 8" in problems("segment", data, "data.folder=scenes", "classes=9")[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda held: held["annotations"][3].update(image_id=5), r"annotation .*image_id 5"),
        (lambda held: held["annotations"][3].update(category_id=2), r"annotation .*category_id 2"),
        (lambda held: held["images"].append(dict(held["images"][0])), r"twice"),
        (lambda held: held["images"][1].pop("width"), r"width"),
        (lambda held: held["annotations"][0].update(segmentation=[[1, 2, 3]]), r"segmentation|polygon"),
    ],
)
def test_wrong_annotations_name_file_and_id(data: Path, change: Change, told: str) -> None:
    path = spoil(data, change)
    (problem,) = problems("detect", data)
    assert problem.startswith("data.images, data.annotations: ")
    assert str(path) in problem
    assert re.search(told, problem), problem


def test_a_corrupt_json_says_where(data: Path) -> None:
    path = data / "coco" / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text()[:500])
    (problem,) = problems("detect", data)
    assert str(path) in problem


def test_masks_are_looked_at_before_a_start(data: Path) -> None:
    mask = data / "ade20k" / "annotations" / "training" / "ADE_train_00000001.png"
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(mask)
    (problem,) = problems("segment", data)
    assert problem.startswith(f"data.folder: mask {mask} is 7 x 5 pixels, its image ")
    mask.unlink()
    (problem,) = problems("segment", data)
    assert "ADE_train_00000001" in problem


def test_too_few_images_and_an_evaluation_of_nothing(data: Path) -> None:
    assert "allowed: at most the" in problems("detect", data, "data.global_batch=64")[0]
    recipe = load_recipe("scenes_segment", ["eval.every=5"])
    nothing = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"folder": None})})
    with pytest.raises(SettingsError, match=r"eval\.every: got 5 without held-out images"):
        load_and_check(nothing, 1)


def refused(recipe: str, deepspeed_json: dict[str, Any], *overrides: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        check(load_recipe(recipe, overrides), {**deepspeed_json, "train_micro_batch_size_per_gpu": 16}, 1)
    return caught.value.problems


ZERO: dict[str, Any] = {"zero_optimization": {"stage": 1}}


def test_windows_are_swinv2s(made: Path) -> None:
    told = refused("scenes_segment", ZERO, "student.name=vit_b16", "student.geometry={}", "backbone.window_size=8")
    assert told == ["backbone.window_size: got 8, but vit_b16 has no windows; leave it out"]


def test_mask2former_does_not_count_in_sixteen_bits() -> None:
    bf16 = {**ZERO, "bf16": {"enabled": True}}
    (told,) = refused("scenes_segment", bf16, "head.kind=mask2former")
    assert told.startswith("head.kind: mask2former counts positions, too many for bf16.enabled")
    check(load_recipe("scenes_segment"), {**bf16, "train_micro_batch_size_per_gpu": 16}, 1)


def test_an_earlier_detector_is_there_and_is_the_whole_network(tmp_path: Path) -> None:
    (told,) = refused("scenes_detect", ZERO, "head.weights=runs/objects365_swinv2_g/detector.safetensors")
    assert told.startswith("head.weights: no such file: runs/objects365_swinv2_g/detector.safetensors; ")
    assert told.endswith("`fdscale launch detect objects365_swinv2_g` leaves it there")
    student = build_student(student_geometry("swinv2_g", 64, load_recipe("scenes_detect").student.geometry))
    file = save_student(student, student.backbone.state_dict(), tmp_path)
    (told,) = refused("scenes_detect", ZERO, f"head.weights={file}", f"student.weights={file}")
    assert "holds the whole network" in told
