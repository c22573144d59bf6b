"""`--smoke`: one table that shrinks any recipe to a laptop, the same path with smaller numbers.

Student: channels, heads and windows in proportion, depths 2/2/6/2, extra norms where the original has them.
Teacher: two small blocks with random weights, its grid in the original's proportion to the student's.
Dense tasks: rendered scenes, narrow heads, crops of 128 px; windows and evaluated sizes in proportion to the crop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fdscale.config.dense_settings import SegmentSettings
from fdscale.config.programs import PROGRAMS, DenseSettings
from fdscale.planning.dense_check import SCENE_CLASSES, SCENES
from fdscale.students.geometry import (
    OWN,
    STUDENT_FILE,
    STUDENTS,
    Geometry,
    SwinV2Geometry,
    TimmGeometry,
    ViTGeometry,
    student_geometry,
)
from fdscale.teachers.table import TeacherSpec, teacher_geometry

Tree = dict[str, Any]

SWIN_V2 = {
    "embed_dim": 32,
    "depths": [2, 2, 6, 2],
    "num_heads": [1, 2, 4, 8],
    "window_size": 4,
    "patch_size": 4,
}
SWIN_V2_IMAGE = 64  # patch 4 and three mergings: a 2x2 grid at the end
EXTRA_NORM_PERIOD = 6  # one extra norm in a stage of six blocks
VIT = {"embed_dim": 64, "depth": 3, "num_heads": 4}
VIT_GRID = 4
TIMM_VIT_IMAGE = 64  # a grid of 4 for patches of 16
TEACHER_VIT = {"embed_dim": 64, "depth": 2, "num_heads": 1}
TEACHER_SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}
EPOCHS = 5
# the official rate for 32 images would be 2e-5, too small to learn anything in some 200 steps
OPTIM = {"lr": 1e-3, "warmup_lr": 1e-6, "min_lr": 1e-5, "reference_batch": 0, "warmup_epochs": 0.2}
BATCH: Tree = {"global_batch": 32, "workers": 0}
RUN: Tree = {
    "deepspeed": "laptop",
    "epochs": EPOCHS,
    "data": {"shards": "digits", **BATCH},
    "eval": {"shards": None, "every": 0},
    "checkpoint": {"every": 50},
    "log": {"every": 10},
}
DIGITS_CLASSES = 10
CROP = 128
DENSE_RUN: Tree = {"deepspeed": "laptop", "steps": None, "epochs": EPOCHS, "checkpoint": {"every": 50}}
DENSE_VIT = {**VIT, "depth": 4}  # whose four layers a head may take
PYRAMID = 64  # channels
SEGMENT_HEADS: Tree = {"upernet": {"channels": 64}, "mask2former": {"channels": 64, "queries": 16, "decoder_layers": 2}}
DETECT_HEAD: Tree = {"channels": PYRAMID, "box_width": 128, "proposals": 100, "box_samples": 64, "weights": None}
FROM_SCRATCH: Tree = {"weights": None, "resize": None}


def smoke_patch(recipe: Mapping[str, Any]) -> Tree:
    """What to lay over a recipe's tree (None takes a key out); the command line still wins over it.

    Raises UserError where the recipe names a student or a teacher that does not exist.
    """
    original = _student(recipe["student"])
    keeps_its_size = recipe["student"]["name"] in (STUDENT_FILE, OWN)
    student = {"image_size": None, "geometry": None} if keeps_its_size else _small_student(original)
    if recipe["program"] in SCENE_CLASSES:
        return _dense_patch(_dense_settings(recipe), original, student)
    patch = {**RUN, "optim": OPTIM, "student": student}
    if recipe["program"] == "finetune":
        return {**patch, "classes": DIGITS_CLASSES, "head": {"weights": None, "keep": None}}
    small = _student({**recipe["student"], **student})
    further = {
        name: _small_teacher(table, original, small) for name, table in recipe.get("further_teachers", {}).items()
    }
    return {**patch, "teacher": _small_teacher(recipe["teacher"], original, small), "further_teachers": further}


def _dense_settings(recipe: Mapping[str, Any]) -> DenseSettings:
    settings = PROGRAMS[recipe["program"]].model_validate(recipe)
    assert isinstance(settings, DenseSettings)
    return settings


def _dense_patch(settings: DenseSettings, original: Geometry, student: Tree) -> Tree:
    """What a dense recipe changes, the student's patch included."""
    smaller = CROP / settings.data.crop
    segments = isinstance(settings, SegmentSettings)
    scenes = {"folder": SCENES} if segments else {"images": SCENES, "annotations": SCENES}
    head = SEGMENT_HEADS[settings.head.kind] if segments else DETECT_HEAD
    sizes = ("short_side", "long_side", "stride", "window_size")
    seen = {**_shrunk(settings.eval, (*sizes, "crop"), smaller), **scenes, "every": 0}
    backbone = _shrunk(settings.backbone, ("window_size",), smaller)
    if isinstance(original, ViTGeometry):
        student = {**student, "geometry": DENSE_VIT}
    if isinstance(settings, SegmentSettings) and not isinstance(original, SwinV2Geometry):
        layers = {"indices": list(range(DENSE_VIT["depth"]))} if isinstance(original, ViTGeometry) else {}
        backbone |= {"pyramid_channels": PYRAMID} if settings.backbone.plain == "pyramid" else layers
    return {
        **DENSE_RUN,
        "classes": SCENE_CLASSES[settings.program],
        "student": student,
        "data": {**_shrunk(settings.data, ("short_side", "long_side"), smaller), **scenes, **BATCH, "crop": CROP},
        "backbone": backbone,
        "head": head,
        "optim": {**OPTIM, "warmup_steps": None},
        "eval": seen,
    }


def _shrunk(table: Any, names: Sequence[str], smaller: float) -> Tree:
    """These numbers of a table, as far as it has them, times `smaller`."""
    given = {name: getattr(table, name, None) for name in names}
    return {name: max(round(number * smaller), 2) for name, number in given.items() if number}


def _student(table: Mapping[str, Any]) -> Geometry:
    if table["name"] in (STUDENT_FILE, OWN):  # the size is the network's; what the recipe says of another goes
        return student_geometry(table["name"], None, {}, table.get("weights"))
    return student_geometry(table["name"], table.get("image_size"), table.get("geometry", {}))


def _small_student(original: Geometry) -> Tree:
    if isinstance(original, SwinV2Geometry):
        period = EXTRA_NORM_PERIOD if original.extra_norm_period else 0
        geometry: Tree = {**SWIN_V2, "extra_norm_period": period}
        return {"image_size": SWIN_V2_IMAGE, "geometry": geometry, **FROM_SCRATCH}
    if isinstance(original, ViTGeometry):
        return {"image_size": VIT_GRID * original.patch_size, "geometry": VIT, **FROM_SCRATCH}
    if isinstance(original, TimmGeometry) and original.name.startswith("vit_"):
        return {"image_size": TIMM_VIT_IMAGE, "geometry": VIT, **FROM_SCRATCH}
    return dict(FROM_SCRATCH)  # any other network of timm's is as large as its name says


def _small_teacher(table: Mapping[str, Any], original: Geometry, small: Geometry) -> Tree:
    """The teacher's patch; its grid keeps the proportion to the student's (16x16 over 8x8: twice)."""
    size, overrides = table.get("image_size"), table.get("geometry", {})
    if table["name"] in STUDENTS:
        patch = _small_student(student_geometry(table["name"], size, overrides))
        return {**patch, "weights": "random", "resize": None}
    spec = teacher_geometry(table["name"], table.get("weights"), size, overrides, table.get("layer"))
    if not isinstance(spec, TeacherSpec):  # timm:NAME and student files are as large as they are
        return {}
    swin = spec.family == "swin"
    patch = {"weights": "random", "geometry": TEACHER_SWIN if swin else TEACHER_VIT}
    if spec.layer is not None and not swin:
        patch["layer"] = min(spec.layer, TEACHER_VIT["depth"] - 1)
    if original.grid is None or small.grid is None:
        return patch
    side = max(1, round(small.grid[0] * spec.grid[0] / original.grid[0]))
    return {**patch, "image_size": side * spec.stride}
