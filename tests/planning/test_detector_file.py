"""An earlier stage's detector is held against the recipe before anything starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fdscale.config.dense_settings import DetectHeadSettings
from fdscale.config.recipe import load_recipe
from fdscale.planning.dense_check import network_problems
from fdscale.planning.detector_file import CLASSES, detector_file_problems
from fdscale.students.geometry import STUDENTS, geometry_to_json

OURS: Any = STUDENTS["swinv2_b"]
DESIGN = {"classes": 365, "channels": 256, "box_width": 1024, "rpn_convolutions": 1, "cascade": False, "masks": False}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The header of a detector of 365 classes without masks, and what stands beside it."""
    path = tmp_path / "detector.safetensors"
    save_file({CLASSES: np.zeros((366, 1), np.float32)}, path)
    describe(path, DESIGN)
    return path


def describe(file: Path, design: Any, geometry: Any = OURS) -> None:
    described = {"geometry": geometry_to_json(geometry), "mean": [0.5] * 3, "std": [0.5] * 3, "design": design}
    file.with_suffix(".json").write_text(json.dumps(described))


def problems(file: Path, **head: Any) -> list[str]:
    return list(detector_file_problems(file, OURS, DetectHeadSettings(weights=str(file), **head)))


def test_other_classes_and_no_masks_are_no_problem(file: Path) -> None:
    assert problems(file) == []


def test_the_check_of_a_recipe_tells_it(file: Path) -> None:
    settings: Any = load_recipe("coco_swinv2_b", [f"head.weights={file}"])
    settings = settings.model_copy(update={"student": settings.student.model_copy(update={"weights": None})})
    _, told = network_problems(settings, OURS, {})  # the first: of its rpn_convolutions
    assert told.startswith('head.kind: got "cascade"')


@pytest.mark.parametrize(
    ("head", "told"),
    [
        ({"channels": 128}, "head.channels: got 128, but head.weights={} has 256; set that"),
        ({"box_width": 512}, "head.box_width: got 512, but head.weights={} has 1024; set that"),
        ({"rpn_convolutions": 2}, "head.rpn_convolutions: got 2, but head.weights={} has 1; set that"),
        ({"kind": "cascade"}, 'head.kind: got "cascade", but head.weights={} is a mask_rcnn; set that'),
    ],
)
def test_another_design_is_told(file: Path, head: dict[str, Any], told: str) -> None:
    assert problems(file, **head) == [told.format(file)]


def test_a_mask_head_is_not_dropped(file: Path) -> None:
    save_file({CLASSES: np.zeros((366, 1), np.float32), "masks.predictor.weight": np.zeros(1)}, file)
    assert problems(file) == []
    (told,) = problems(file, masks=False)
    assert told.startswith("head.masks: got false, but head.weights=")


def test_another_student_is_told(file: Path) -> None:
    describe(file, DESIGN, replace(OURS, pretrained_window_sizes=(8, 8, 8, 8)))
    (told,) = problems(file)
    assert "(the coordinates') is [14, 14, 14, 7] here, [8, 8, 8, 8] there" in told
    describe(file, DESIGN, STUDENTS["vit_b16"])
    assert any("family is swin_v2 here, vit there" in told for told in problems(file))


def test_what_is_no_detector_is_told(file: Path) -> None:
    save_file({"head.weight": np.zeros(1)}, file)
    assert "holds head.weight; allowed: the detector.safetensors" in problems(file)[0]
    for spoil in (lambda: describe(file, None), lambda: file.write_text("{}"), file.unlink):
        spoil()
        (told,) = problems(file)
        assert "cannot be read" in told
