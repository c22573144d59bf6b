"""Whether an earlier stage's detector is the design that the settings describe; torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fdscale.config.dense_settings import DetectHeadSettings
from fdscale.config.errors import UserError, attempt
from fdscale.students.geometry import Geometry, SwinV2Geometry, file_geometry

CLASSES, MASKS = "boxes.stages.0.classes.weight", "masks."
EARLIER = "the detector.safetensors of an earlier stage, its detector.json beside it"
NUMBERS = ("channels", "box_width", "rpn_convolutions")  # of the head, in the settings as in the file


def detector_file_problems(file: Path, student: Geometry | None, head: DetectHeadSettings) -> Iterator[str]:
    """What of a detector's file does not fit student and head, one sentence each; `student` None: not known.

    The number of classes may be another, and masks may be missing.
    """
    try:
        with safe_open(file, "numpy") as held:
            names = set(held.keys())
        design = json.loads(file.with_suffix(".json").read_text())["design"]
        numbers = {name: design[name] for name in (*NUMBERS, "cascade")}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        yield f"head.weights: {file} cannot be read ({error!r}); allowed: {EARLIER}"
        return
    if CLASSES not in names:
        yield f"head.weights: {file} holds {', '.join(sorted(names)[:3])}; allowed: {EARLIER}"
        return
    yield from _of_another_head(file, numbers, any(name.startswith(MASKS) for name in names), head)
    problems: list[str] = []
    held_geometry = attempt(lambda: file_geometry(file), problems)
    yield from (f"head.weights: {problem}" for problem in problems)
    if held_geometry is not None and student is not None:
        for difference in geometry_differences(held_geometry, student):
            yield f"student: {difference}, in head.weights={file}; set student.* as it was there"


def _of_another_head(file: Path, held: Mapping[str, Any], masks: bool, head: DetectHeadSettings) -> Iterator[str]:
    for name in NUMBERS:
        if held[name] != getattr(head, name):
            yield f"head.{name}: got {getattr(head, name)}, but head.weights={file} has {held[name]}; set that"
    kind = "cascade" if held["cascade"] else "mask_rcnn"
    if kind != head.kind:
        yield f'head.kind: got "{head.kind}", but head.weights={file} is a {kind}; set that'
    if masks and not head.masks:
        yield f"head.masks: got false, but head.weights={file} has a mask head; set it to true"


def geometry_differences(held: Geometry, ours: Geometry) -> list[str]:
    """What decides how a student computes and is not the same in two: `NAME is X here, Y there`.

    A SwinV2's image size decides nothing but its windows and coordinates, which are compared themselves.
    """
    theirs, mine = _deciding(held), _deciding(ours)
    return [
        f"{name} is {mine.get(name, 'unset')} here, {theirs.get(name, 'unset')} there"
        for name in dict.fromkeys((*mine, *theirs))
        if mine.get(name) != theirs.get(name)
    ]


def _deciding(geometry: Geometry) -> dict[str, Any]:
    numbers = {"family": geometry.family, **asdict(geometry)}
    if not isinstance(geometry, SwinV2Geometry):
        return numbers
    del numbers["image_size"], numbers["pretrained_window_sizes"]
    sides = [geometry.stage_side(stage) for stage in range(len(geometry.depths))]
    return {
        **numbers,
        "windows, no larger than their maps,": [min(geometry.window_size, side) for side in sides],
        "pretrained_window_sizes (the coordinates')": list(geometry.coordinate_windows),
    }


def refuse_another_student(file: Path, ours: Geometry | None) -> None:
    """Raises UserError, naming both values, unless a detector's file is of a student that computes as ours does."""
    held = file_geometry(file)
    if ours is not None and (found := geometry_differences(held, ours)):
        raise UserError(f"{file} holds another student: {'; '.join(found)}; set student.* as it was there")
