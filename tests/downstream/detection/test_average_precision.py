"""AP beside pycocotools', on drawn data sets with all that COCO has."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fdscale.config.errors import UserError
from fdscale.downstream.detection.average_precision import NAMES, coco_metrics

SIDE = 160
Rng = np.random.Generator


def shape(box: list[float]) -> dict[str, Any]:
    """The run lengths of a box with one corner cut off."""
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    left, top, width, height = (round(value) for value in box)
    mask[top : top + height, left : left + width] = 1
    mask[top : top + height // 3, left : left + width // 2] = 0
    encoded = coco_mask.encode(mask)
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def drawn_box(draw: Rng) -> list[float]:
    width, height = draw.choice([8, 20, 33, 60, 110], 2) + draw.integers(0, 6, 2)
    return [float(v) for v in (draw.integers(0, SIDE - width), draw.integers(0, SIDE - height), width, height)]


def dataset(draw: Rng) -> dict[str, Any]:
    """One to four images, some without objects; crowds, ignored ones, areas that are not the box's, ids with gaps."""
    images = [
        {"id": int(number), "height": SIDE, "width": SIDE} for number in draw.choice(50, draw.integers(1, 5), False)
    ]
    annotations = []
    for image in images:
        for _ in range(draw.choice([0, 1, 3, 6])):
            box = drawn_box(draw)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": int(draw.choice([2, 5, 9])),
                    "bbox": box,
                    "area": float(coco_mask.area(shape(box))),
                    "iscrowd": int(draw.random() < 0.15),
                    "segmentation": shape(box),
                    **({"ignore": 1} if draw.random() < 0.1 else {}),
                }
            )
    categories = [{"id": number, "name": str(number)} for number in (2, 5, 9)]
    return {"images": images, "annotations": annotations, "categories": categories}


def detections(draw: Rng, data: dict[str, Any]) -> list[dict[str, Any]]:
    """Shifted objects, now and then of another class, several on one, and strangers; scores with many ties."""
    found = []
    if draw.random() < 0.1:
        return []
    for truth in data["annotations"]:
        for _ in range(draw.choice([0, 1, 1, 2])):
            box = np.array(truth["bbox"]) + draw.integers(-4, 5, 4)
            low = np.clip(box[:2], 0, SIDE - 4)
            size = np.clip(box[2:], 3, SIDE - low)
            found.append((truth["image_id"], int(draw.choice([truth["category_id"]] * 5 + [2])), [*low, *size]))
    found += [(image["id"], int(draw.choice([2, 5, 9])), drawn_box(draw)) for image in data["images"]]
    return [
        {
            "image_id": image,
            "category_id": category,
            "bbox": [float(value) for value in box],
            "score": float(draw.integers(1, 8)) / 8,
            "segmentation": shape(box),
        }
        for image, category, box in found
    ]


def official(data: dict[str, Any], found: list[dict[str, Any]], image_ids: list[int]) -> dict[str, float]:
    """pycocotools' numbers; it has none for no detections at all, which are 0 of everything that there is."""
    numbers = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(data)
        truth.createIndex()
        for kind, by, own in (("box", "bbox", "bbox"), ("mask", "segm", "segmentation")):
            keys = ("image_id", "category_id", "score", own)
            results = truth.loadRes([{key: each[key] for key in keys} for each in found]) if found else _none(truth)
            judge = COCOeval(truth, results, by)
            judge.params.imgIds = sorted(image_ids)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            numbers |= {f"{kind}_{name}": value for name, value in zip(NAMES, judge.stats, strict=False) if value > -1}
    return numbers


def _none(truth: COCO) -> COCO:
    results = COCO()
    results.dataset = {**truth.dataset, "annotations": []}
    results.createIndex()
    return results


def agree(cases: range) -> set[str]:
    """Compares each case; returns the names that were compared."""
    names: set[str] = set()
    for case in cases:
        draw = np.random.default_rng(case)
        data = dataset(draw)
        found = detections(draw, data)
        image_ids = [image["id"] for image in data["images"]]
        image_ids = image_ids[: max(1, len(image_ids) - 1)] if draw.random() < 0.2 else image_ids
        found = [each for each in found if each["image_id"] in image_ids]
        expected = official(data, found, image_ids)
        before = copy.deepcopy((data, found))
        assert coco_metrics(data, found, image_ids, masks=True) == pytest.approx(expected, abs=1e-6), case
        assert (data, found) == before, case
        names |= expected.keys()
    return names


def test_numbers_are_pycocotools() -> None:
    names = agree(range(100))
    assert names == {f"{kind}_{name}" for kind in ("box", "mask") for name in NAMES}


@pytest.mark.prove
def test_numbers_are_pycocotools_in_a_thousand_cases() -> None:
    agree(range(100, 1100))


def test_what_has_no_objects_is_left_out_and_nothing_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = dataset(np.random.default_rng(3))
    box = [10.0, 10.0, 20.0, 20.0]
    image = data["images"][0]["id"]
    one = {"id": 1, "image_id": image, "category_id": 5, "bbox": box, "area": 400.0, "iscrowd": 0}
    data["annotations"] = [{**one, "segmentation": shape(box)}]
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(data))
    assert coco_metrics(file, [], [image], masks=False) == dict.fromkeys(
        ["box_ap", "box_ap50", "box_ap75", "box_ap_small"], 0.0
    )
    perfect = {"image_id": image, "category_id": 5, "bbox": box, "score": 0.5, "segmentation": shape(box)}
    found = coco_metrics(file, [perfect], [image], masks=True)
    assert found.keys() == {f"{kind}_{name}" for kind in ("box", "mask") for name in NAMES[:4]}
    assert list(found.values()) == pytest.approx([1.0] * 8)
    data["annotations"] = []
    assert coco_metrics(data, [perfect], [image], masks=True) == {}
    assert capsys.readouterr() == ("", "")


def test_what_is_no_coco_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "instances.json"
    with pytest.raises(UserError, match=r"instances\.json: not annotations as COCO has them"):
        coco_metrics(file, [], [1], masks=False)
    file.write_text("{")
    with pytest.raises(UserError, match="not annotations"):
        coco_metrics(file, [], [1], masks=False)
