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

from fdscale.config.dense_settings import DetectSettings, SegmentSettings
from fdscale.config.errors import SettingsError
from fdscale.config.recipe import load_recipe
from fdscale.data.dense.scenes import write_ade20k, write_coco
from fdscale.planning.check import Plan, check, load_and_check
from fdscale.planning.dense_check import network_problems
from fdscale.planning.networks import planned_student
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


def renumbered(held: dict[str, Any]) -> None:
    """The last category with another id, in its annotations, too."""
    last = max(category["id"] for category in held["categories"])
    for table, key in (("categories", "id"), ("annotations", "category_id")):
        for row in held[table]:
            row[key] += 1000 if row[key] == last else 0


@pytest.mark.parametrize(
    ("change", "label", "there"),
    [
        (lambda held: held["categories"][1].update(name="another"), 1, "another with id "),
        (renumbered, 4, " with id 10"),
    ],
)
def test_both_halves_mean_the_same_by_a_label(data: Path, change: Change, label: int, there: str) -> None:
    spoil(data, change)
    (problem,) = problems("detect", data)
    assert problem.startswith(f"eval.annotations: its classes are not those of data.annotations (label {label} is ")
    assert there in problem[problem.index(", there ") :]


def test_both_folders_name_the_same_classes(data: Path) -> None:
    other = Path(shutil.copytree(data / "ade20k", data / "other"))
    table = (other / "objectInfo150.txt").read_text().splitlines()
    cells = [line.rsplit("\t", 1) for line in table]
    cells[1][1], cells[2][1] = cells[2][1], cells[1][1]
    (other / "objectInfo150.txt").write_text("\n".join("\t".join(line) for line in cells))
    (problem,) = problems("segment", data, f"eval.folder={other}")
    told = f"(label 0 is {cells[1][1]}, there {cells[2][1]})"
    assert problem.startswith(f"eval.folder: its classes are not those of data.folder {told}")
    (other / "objectInfo150.txt").unlink()
    assert planned("segment", data, f"eval.folder={other}").samples == 20


@pytest.mark.parametrize("table", ["data", "eval"])
@pytest.mark.parametrize("half", ["images", "annotations"])
def test_the_embedded_scenes_are_both_halves_or_neither(data: Path, table: str, half: str) -> None:
    assert any(
        text.startswith(f"{table}.images, {table}.annotations: got ") and text.endswith("both scenes, or neither")
        for text in problems("detect", data, f"{table}.{half}=scenes")
    )


def refused(recipe: str, deepspeed_json: dict[str, Any], *overrides: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        check(load_recipe(recipe, overrides), {**deepspeed_json, "train_micro_batch_size_per_gpu": 16}, 1)
    return caught.value.problems


ZERO: dict[str, Any] = {"zero_optimization": {"stage": 1}}


def test_windows_are_swinv2s(made: Path) -> None:
    told = refused("scenes_segment", ZERO, "student.name=vit_b16", "student.geometry={}", "backbone.window_size=8")
    assert told == ["backbone.window_size: got 8, but vit_b16 has no windows; leave it out"]


ONE_SIZE = ("student.name=timm:vit_tiny_patch16_224", "student.geometry={}")
ANY_SIZE = "student.geometry={dynamic_img_size=true}"


def of_one_size(recipe: str, *overrides: str) -> list[str]:
    """What is refused, beside what only the built network could tell."""
    settings = load_recipe(recipe, [*ONE_SIZE, *overrides])
    student = planned_student(settings.student)
    assert isinstance(settings, SegmentSettings | DetectSettings)
    return list(network_problems(settings, student, ZERO))


def test_a_student_of_one_size_sees_no_other() -> None:
    (told,) = of_one_size("scenes_detect", "student.image_size=128")
    assert told.startswith("student.name: timm:vit_tiny_patch16_224 takes images of one size, but detection sees")
    assert not of_one_size("scenes_detect", ANY_SIZE)
    crops = ("data.crop=224", "eval.crop=224")
    assert not of_one_size("scenes_segment", "student.image_size=224", *crops)
    named = ("student.image_size=224", *crops)
    assert [text.split(",")[0] for text in of_one_size("scenes_segment", *named, "data.crop=128")] == [
        "data.crop: got 128"
    ]
    (told,) = of_one_size("scenes_segment", *named, "eval.crop=0")
    assert told.startswith("eval.crop: got 0, whole images, but timm:vit_tiny_patch16_224 takes images of 224 px alone")
    assert not of_one_size("scenes_segment", ANY_SIZE, "eval.crop=0")


def test_what_a_name_says_of_sizes() -> None:
    """A patch of 14 px is made of 16 of the crop's; without a number only the built network tells its size."""
    crops = ("data.crop=256", "eval.crop=256")
    clip = "student.name=timm:vit_large_patch14_clip_224.openai"
    assert not of_one_size("scenes_segment", clip, "student.image_size=224", *crops)
    assert len(of_one_size("scenes_segment", clip, "student.image_size=336", *crops)) == 2
    for free in ("vit_small_patch16_dinov3", "vit_intern300m_patch14_448", "resnet50", "swinv2_tiny_window8_256"):
        assert not of_one_size("scenes_segment", f"student.name=timm:{free}")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["backbone.plain=layers"],
            'backbone.plain: got "layers", but swinv2_g has maps of four strides; leave it out',
        ),
        (["backbone.indices=[0,1,2,3]"], "backbone.indices: got [0, 1, 2, 3], but swinv2_g has maps of four strides"),
        (["head.queries=9"], "head.queries: got 9, but head.kind is upernet; leave it out"),
        (
            ["head.kind=mask2former", "head.channels=48"],
            "head.channels: got 48, allowed beside mask2former: multiples of 32",
        ),
        (["head.decoder_layers=2"], "head.decoder_layers: got 2, but head.kind is upernet"),
        (
            ["head.kind=mask2former", "head.auxiliary_weight=0.3"],
            "head.auxiliary_weight: got 0.3, but head.kind is mask",
        ),
        (
            [*ONE_SIZE, ANY_SIZE, "backbone.indices=[0,1,2,3]"],
            "backbone.indices: got [0, 1, 2, 3], but backbone.plain is",
        ),
        (
            [*ONE_SIZE, ANY_SIZE, "backbone.plain=layers", "backbone.pyramid_channels=8"],
            'backbone.pyramid_channels: got 8, but backbone.plain is "layers"; leave it out',
        ),
    ],
)
def test_no_setting_is_ignored(overrides: list[str], told: str) -> None:
    (problem,) = refused("scenes_segment", ZERO, *overrides)
    assert problem.startswith(told)


def test_detection_has_no_other_neck() -> None:
    with pytest.raises(SettingsError, match=r"backbone\.plain"):
        load_recipe("scenes_detect", ["backbone.plain=layers"])


@pytest.mark.parametrize(
    ("recipe", "override", "told"),
    [
        ("scenes_segment", "eval.scales=[]", "eval.scales: got [], allowed: a list, at least 1 of them"),
        ("coco_vit_b", "optim.milestones=[]", "optim.milestones: got [], allowed: at least one share of the run"),
    ],
)
def test_an_empty_list_is_told_what_it_lacks(recipe: str, override: str, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_recipe(recipe, [override])
    assert caught.value.problems[0].startswith(f"{recipe}.toml: {told}")


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
