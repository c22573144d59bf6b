"""Segmentation and detection as programs: on ranks and alone, stopped and gone on, evaluated again, refused."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fdscale.config.errors import UserError
from fdscale.data.dense.batches import DetectImage
from fdscale.data.dense.scenes import write_ade20k, write_coco
from fdscale.downstream.dense import readable
from fdscale.training.engine import Connection
from tests.downstream.dense_runs import engine_json, measure, run, run_as_a_giant, told

RECIPES = ("scenes_segment", "scenes_detect")
NOT_JUDGED = ["eval={short_side=64, long_side=128}"]
JUDGED = {"scenes_segment": "miou", "scenes_detect": "ap/box/all"}
LOSSES = {
    "scenes_segment": ("loss", "pixel_accuracy"),
    "scenes_detect": ("loss", *(f"loss_part/{part}" for part in ("objectness", "rpn_box", "class", "box", "mask"))),
}
Data = dict[str, list[str]]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Twelve scenes to train on and five held out, which two ranks cannot share evenly; by recipe."""
    folder = tmp_path_factory.mktemp("scenes")
    write_ade20k(folder / "ade20k", 12, 5, 64)
    write_coco(folder / "coco", 12, 5, 64)
    coco = {"data": "train", "eval": "val"}
    named = [
        word
        for table, split in coco.items()
        for word in (
            f"{table}.images={folder}/coco/{split}2017",
            f"{table}.annotations={folder}/coco/annotations/instances_{split}2017.json",
        )
    ]
    ade20k = [f"{table}.folder={folder}/ade20k" for table in coco]
    return {"scenes_segment": ade20k, "scenes_detect": named}


def lean(recipe: str, scenes: Data, folder: Path) -> list[str]:
    """The settings of two ranks under ZeRO-3, blocks recomputed."""
    words = ["optim.ema_decay=0.5", "student.activation_checkpointing=blocks"]
    return [*scenes[recipe], engine_json(folder, "lean", 3), *words]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, scenes: Data, two_ranks: Any) -> Callable[[str], Path]:
    """The folder of a recipe's run on two lean ranks."""

    def make(recipe: str) -> Path:
        folder = tmp_path_factory.mktemp(recipe)
        assert two_ranks(run, recipe, str(folder / "run"), *lean(recipe, scenes, folder)) == [True, True]
        return folder / "run"

    return functools.cache(make)


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_lean_ranks_learn_stop_go_on_and_judge_as_one_process(
    recipe: str, scenes: Data, finished: Callable[[str], Path], tmp_path: Path, two_ranks: Any, one_rank: Any
) -> None:
    """ZeRO-3 with blocks recomputed against ZeRO-0.

    A run that stops after two steps goes on as if it had not, to the bit, and on one rank within rounding. Its student
    is divided before heads stand on it, as a giant's.
    """
    plain = [*scenes[recipe], engine_json(tmp_path, "plain", 0), "optim.ema_decay=0.5"]
    given, together = [*lean(recipe, scenes, tmp_path), *NOT_JUDGED], finished(recipe)
    alone, stopped, moved = (tmp_path / name for name in ("alone", "stopped", "moved"))
    assert one_rank(run, recipe, str(alone), *plain) == [True]
    assert two_ranks(run_as_a_giant, recipe, str(stopped), *given, "max_steps=2") == [True, True]
    shutil.copytree(stopped, moved)
    assert two_ranks(run, recipe, str(stopped), *given) == [True, True]
    assert one_rank(run, recipe, str(moved), *given) == [True]
    for name in LOSSES[recipe]:
        rounding = 2e-4 if name == "pixel_accuracy" else 2e-5  # three pixels of 16,384 whose classes are as likely
        assert told(together, name) == pytest.approx(told(alone, name), abs=rounding), name
        assert told(stopped, name) == told(together, name), name
        assert told(moved, name) == pytest.approx(told(together, name), abs=rounding), name
    judged = JUDGED[recipe]
    for whose in ("eval", "eval_ema"):
        assert told(together, f"{whose}_{judged}")[-1] == pytest.approx(told(alone, f"{whose}_{judged}")[-1], abs=0.02)
    (again,) = one_rank(measure, str(together))
    assert again[judged] == pytest.approx(told(together, f"eval_{judged}")[-1], abs=1e-6)
    assert list((together / "overlays").glob("*.png"))


@pytest.mark.parametrize(
    ("recipe", "seen"),
    [
        ("scenes_segment", ["eval.scales=[0.75,1.0]", "eval.flip=true", "eval.window_size=8"]),
        ("scenes_segment", ["eval.crop=0"]),
        ("scenes_detect", ["eval.scales=[1.0,1.5]", "eval.flip=true", "eval.nms=gaussian", "eval.window_size=8"]),
    ],
)
def test_a_finished_run_is_looked_at_in_other_ways(
    recipe: str, seen: list[str], finished: Callable[[str], Path], two_ranks: Any
) -> None:
    one, other = two_ranks(measure, str(finished(recipe)), *seen)
    assert one == other
    assert 0 <= one[JUDGED[recipe]] <= 1


def test_boxes_of_another_data_set_come_first(scenes: Data, tmp_path: Path, two_ranks: Any) -> None:
    """Objects365's stage: boxes alone, other classes; all but the predictors, and masks, starts from it."""
    engine, coco = engine_json(tmp_path, "lean", 3), scenes["scenes_detect"]
    boxes = tmp_path / "boxes.json"
    held = json.loads((Path(coco[1].partition("=")[2])).read_text())
    held["categories"] = held["categories"][:3]
    known = {category["id"] for category in held["categories"]}
    held["annotations"] = [
        {key: value for key, value in each.items() if key != "segmentation"}
        for each in held["annotations"]
        if each["category_id"] in known
    ]
    boxes.write_text(json.dumps(held))
    first = [coco[0], f"data.annotations={boxes}", "classes=3", "head.masks=false", *NOT_JUDGED, engine]
    two_ranks(run, "scenes_detect", str(tmp_path / "first"), *first, "data.global_batch=4")
    file = tmp_path / "first" / "detector.safetensors"
    second = [
        *coco[:2],
        *NOT_JUDGED,
        f"head.weights={file}",
        engine,
        "optim.lr=1e-9",
        "optim.warmup_lr=0",
        "optim.min_lr=0",
        "optim.weight_decay=0",
        "max_steps=1",
    ]
    two_ranks(run, "scenes_detect", str(tmp_path / "second"), *second)
    before, after = load_file(file), load_file(tmp_path / "second" / "detector.safetensors")
    new = {name for name in after if before.get(name, torch.empty(0)).shape != after[name].shape}
    assert {name.split(".")[0] for name in new} == {"boxes", "masks"}  # the predictors of each class
    assert {name for name in new if name.startswith("masks.")} == {name for name in after if name.startswith("masks.")}
    for name in after.keys() - new:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6, msg=name)


def test_a_mask_with_an_unknown_id_ends_the_run_with_its_name(scenes: Data, tmp_path: Path, one_rank: Any) -> None:
    write_ade20k(tmp_path / "ade20k", 12, 1, 64)
    wrong = tmp_path / "ade20k" / "annotations" / "training" / "ADE_train_00000002.png"
    mask = np.asarray(Image.open(wrong)).copy()
    mask[0, 0] = 9
    Image.fromarray(mask).save(wrong)
    with pytest.raises(AssertionError, match=r"ADE_train_00000002\.png has ids 9; allowed: 0 .* to 8"):
        one_rank(run, "scenes_segment", str(tmp_path / "run"), f"data.folder={tmp_path}/ade20k", "eval.folder=scenes")


def test_what_is_no_finished_dense_run_is_not_evaluated(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(UserError, match="not a finished run"):
        measure(None, str(tmp_path))
    (tmp_path / "complete.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(UserError, match=r"classes=3: .* allowed here: eval\., data\.workers="):
        measure(None, str(tmp_path), "classes=3")


def left_out(connection: Connection, max_ratio: float) -> str:
    """What reading says where the first of two ranks has one image of three that cannot be read, the other padding."""
    blank = torch.zeros(3, 8, 8, dtype=torch.uint8)
    images = [DetectImage(blank, number, number) for number in range(2)]
    images.append(DetectImage(blank, -1, -1, [] if connection.rank.rank else ["broken.jpg (truncated)"]))
    try:
        assert len(list(readable(iter(images), max_ratio, connection))) == 3
    except UserError as error:
        return str(error)
    return ""


def test_too_many_images_that_cannot_be_read_end_an_evaluation_on_every_rank(two_ranks: Any) -> None:
    assert two_ranks(left_out, 0.2) == ["", ""]
    told_by_ranks = two_ranks(left_out, 0.19)
    assert told_by_ranks[0] == told_by_ranks[1]
    assert told_by_ranks[0].startswith("1 of 5 samples cannot be decoded (20.00%); allowed: 19.00%")
    assert told_by_ranks[0].endswith("broken.jpg (truncated)")
