"""The entries of a COCO JSON as rows of numbers, each checked by itself; no torch."""

from __future__ import annotations

import marshal
import math
from array import array
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

IMAGE = np.dtype([("id", "<i8"), ("height", "<i4"), ("width", "<i4")])
ANNOTATION = np.dtype(
    [
        ("id", "<i8"),
        ("image", "<i8"),
        ("category", "<i8"),
        ("box", "<f4", 4),  # x, y, width, height
        ("crowd", "?"),
        ("reach", "<f8"),  # the largest of its coordinates, without their signs
        ("rle_size", "<i4", 2),  # height, width; 0 for polygons
        ("start", "<i8"),  # of its segmentation among all
        ("bytes", "<i4"),  # 0: there is none
    ]
)


class ImageRows:
    """`add` entries of "images", then take `rows` (`IMAGE`) and `names`, their file names."""

    def __init__(self) -> None:
        self.rows: list[NDArray[np.void]] = [np.empty(0, IMAGE)]
        self.names: list[str] = []

    def add(self, items: list[Any]) -> list[str]:
        """Take entries; returns what is wrong with them, one sentence each, and then keeps none."""
        if problems := _problems("image", items, _image_problem):
            return problems
        rows = np.empty(len(items), IMAGE)
        for name in ("id", "height", "width"):
            rows[name] = [item[name] for item in items]
        self.rows.append(rows)
        self.names.extend(item["file_name"] for item in items)
        return []


class AnnotationRows:
    """`add` entries of "annotations", then take `rows` (`ANNOTATION`) and `segmentations`, their bytes in a row.

    Segmentations are kept with `masks` alone, and of what is trained on: no crowds, and no parts of fewer than three
    points, which have no area.
    """

    def __init__(self, masks: bool) -> None:
        self.rows: list[NDArray[np.void]] = [np.empty(0, ANNOTATION)]
        self.segmentations = bytearray()
        self._masks = masks

    def add(self, items: list[Any]) -> list[str]:
        """Take entries; returns what is wrong with them, one sentence each, and then keeps none."""
        try:
            rows = self._numbers(items)
            segmented = not self._masks or all(_segmentation_problem(item) is None for item in items)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            segmented = False
        if not segmented or not _sensible(rows).all():
            problems = _problems("annotation", items, self._problem)
            assert problems, "what the quick look refuses, the thorough one must name"
            return problems
        if self._masks:
            self._keep_segmentations(items, rows)
        self.rows.append(rows)
        return []

    def _problem(self, item: Mapping[str, Any]) -> str | None:
        return _annotation_problem(item) or (_segmentation_problem(item) if self._masks else None)

    def _numbers(self, items: list[Any]) -> NDArray[np.void]:
        """Columns of numbers, which `array` takes as they are or not at all (NumPy would cut off and convert)."""
        rows = np.zeros(len(items), ANNOTATION)
        for column, key in (("id", "id"), ("image", "image_id"), ("category", "category_id")):
            rows[column] = array("q", [item[key] for item in items])
        rows["crowd"] = array("b", [item.get("iscrowd", 0) for item in items])
        # An area is not used here; but a missing one stops the evaluation, hours later.
        areas = np.asarray(array("d", [item["area"] for item in items]))
        if not (np.isfinite(areas) & (areas >= 0)).all():
            raise ValueError
        if any(len(item["bbox"]) != 4 for item in items):
            raise ValueError
        boxes = array("d", [number for item in items for number in item["bbox"]])
        rows["box"] = np.asarray(boxes).reshape(-1, 4)
        rows["reach"] = np.abs(np.asarray(boxes)).reshape(-1, 4).max(axis=1, initial=0)
        return rows

    def _keep_segmentations(self, items: list[Any], rows: NDArray[np.void]) -> None:
        rows["reach"] = np.maximum(rows["reach"], [_reach(item["segmentation"]) for item in items])
        for row, item in enumerate(items):
            segmentation = item["segmentation"]
            if isinstance(segmentation, dict):
                rows[row]["rle_size"] = segmentation["size"]
            else:
                segmentation = [part for part in segmentation if len(part) >= 6]
            if segmentation and not rows[row]["crowd"]:
                data = marshal.dumps(segmentation)
                rows[row]["start"], rows[row]["bytes"] = len(self.segmentations), len(data)
                self.segmentations += data


def _reach(segmentation: Any) -> float:
    if isinstance(segmentation, dict):
        return 0.0
    return max((max(max(part), -min(part)) for part in segmentation if part), default=0.0)


def segmentation_of(data: bytes) -> Any:
    """Polygons or RLE as the JSON has them, out of the bytes that `AnnotationRows` kept in this process."""
    return marshal.loads(data)


def _sensible(rows: NDArray[np.void]) -> NDArray[np.bool_]:
    box = rows["box"]
    sensible: NDArray[np.bool_] = np.isfinite(box).all(axis=1) & (box[:, 2:] >= 0).all(axis=1)
    return sensible


def _problems(what: str, items: list[Any], problem: Callable[[Mapping[str, Any]], str | None]) -> list[str]:
    found = []
    for item in items:
        if not isinstance(item, dict):
            found.append(f"{what} {_short(item)}: allowed: an object with entries")
        elif why := problem(item):
            found.append(f"{what} {_short(item.get('id', 'without id'))}: {why}")
    return found


def _image_problem(item: Mapping[str, Any]) -> str | None:
    if why := _lacking(item, ("id", "file_name", "height", "width")) or _no_whole(item, ("id",)):
        return why
    for name in ("height", "width"):
        if type(item[name]) is not int or not 0 < item[name] < 2**31:
            return f"{name} is {_short(item[name])}, allowed: a whole number of pixels, at least 1"
    if not isinstance(item["file_name"], str) or not item["file_name"]:
        return f"file_name is {_short(item['file_name'])}, allowed: a path below the folder of the images"
    return None


def _annotation_problem(item: Mapping[str, Any]) -> str | None:
    needed = ("id", "image_id", "category_id", "bbox", "area")
    if why := _lacking(item, needed) or _no_whole(item, ("id", "image_id", "category_id")):
        return why
    if type(item.get("iscrowd", 0)) is not int or item.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd is {_short(item['iscrowd'])}, allowed: 0 or 1"
    if not _is_number(item["area"]) or item["area"] < 0:
        return f"area is {_short(item['area'])}, allowed: a finite number, not below 0"
    box = item["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) >= 0):
        return f"bbox is {_short(box)}, allowed: [x, y, width, height], finite, width and height above 0"
    return None


def _segmentation_problem(item: Mapping[str, Any]) -> str | None:
    if "segmentation" not in item:
        return "no 'segmentation'; allowed without masks only"
    segmentation = item["segmentation"]
    if isinstance(segmentation, dict):
        return _rle_problem(segmentation)
    with suppress(TypeError, OverflowError):  # no numbers, or none that fit: told below
        # One sum says whether all are finite numbers.
        if segmentation and all(len(part) % 2 == 0 and math.isfinite(sum(part)) for part in segmentation):
            return None
    return f"segmentation is {_short(segmentation)}, allowed: polygons [[x1, y1, x2, y2, x3, y3, ...], ...] or RLE"


def _rle_problem(rle: Mapping[str, Any]) -> str | None:
    from fdscale.data.dense.masks import pixels_told  # of a library that boxes alone do not need

    size, counts = rle.get("size"), rle.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        return f"segmentation has size {_short(size)}, allowed: [height, width] of the image"
    told, pixels = None, size[0] * size[1]
    if isinstance(counts, str) and counts:
        with suppress(ValueError, RuntimeError):
            told = pixels_told(rle)
    elif isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts):
        told = sum(counts)
    if told is not None:
        return None if told == pixels else f"segmentation counts {told} pixels, allowed: {pixels}"
    return f"segmentation has counts {_short(counts)}, allowed: run lengths, as a list or as COCO's string"


def _lacking(item: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    lacking = [name for name in names if name not in item]
    return f"no {', '.join(map(repr, lacking))}" if lacking else None


def _no_whole(item: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    for name in names:
        if type(item[name]) is not int or abs(item[name]) >= 2**63:
            return f"{name} is {_short(item[name])}, allowed: a whole number"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e30  # as fp32 still


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
