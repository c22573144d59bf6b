"""Rendered scenes written as ADE20K and as COCO are published: data to try and test dense training with, made here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fdscale.data.dense.ade20k import TABLE
from fdscale.data.dense.outlines import run_lengths, segmentation
from fdscale.data.dense.rendering import STUFF, THINGS, Scene, render

SCENE_CLASSES = (*STUFF, *THINGS)  # of the layout of ADE20K
CATEGORY_IDS = dict(zip(THINGS, (1, 3, 7, 44, 90), strict=True))  # with gaps, as COCO's
CROWD_IDS = 900_100_000_000  # COCO's crowds are numbered from here on
QUALITY = 92


def write_ade20k(folder: str | Path, train: int, validation: int, size: int = 128, seed: int = 0) -> None:
    """Write scenes with 8 classes in ADE20K's layout: 3 of stuff, 5 of things; longer sides have `size` pixels.

    In each fourth mask a strip at one edge is unlabelled. The same numbers give the same files.
    """
    folder = Path(folder)
    lines = []
    found = {}
    for split, short, start, count in (("training", "train", 0, train), ("validation", "val", train, validation)):
        images, masks = (_made(folder / name / split) for name in ("images", "annotations"))
        pixels = np.zeros((count, len(SCENE_CLASSES) + 1), np.int64)
        for number in range(count):
            scene, stem = render(start + number, size, seed), f"ADE_{short}_{number + 1:08d}"
            ids = _class_ids(scene, start + number)
            Image.fromarray(scene.image).save(images / f"{stem}.jpg", quality=QUALITY)
            Image.fromarray(ids).save(masks / f"{stem}.png")
            pixels[number] = np.bincount(ids.ravel(), minlength=len(SCENE_CLASSES) + 1)
            lines.append(f"{stem} {'pond' if 3 in ids else 'meadow'}\n")
        found[split] = pixels[:, 1:]
    (folder / TABLE).write_text(_table(found["training"], found["validation"]))
    (folder / "sceneCategories.txt").write_text("".join(lines))


def write_coco(folder: str | Path, train: int, validation: int, size: int = 128, seed: int = 0) -> None:
    """Write scenes with 5 categories in COCO's layout; longer sides have `size` pixels.

    Crowds, scenes without annotations and gaps between ids are among them. The same numbers give the same files.
    """
    folder = Path(folder)
    for split, start, count in (("train2017", 0, train), ("val2017", train, validation)):
        images, annotations = [], []
        for number in range(start, start + count):
            scene, image_id = render(number, size, seed), 9 + 7 * number
            name = f"{image_id:012d}.jpg"
            Image.fromarray(scene.image).save(_made(folder / split) / name, quality=QUALITY)
            height, width = scene.stuff.shape
            images.append({"license": 1, "file_name": name, "height": height, "width": width, "id": image_id})
            annotations += list(_annotations(scene, image_id))
        _write_json(folder / "annotations" / f"instances_{split}.json", images, annotations)


def _class_ids(scene: Scene, number: int) -> NDArray[np.uint8]:
    """Ids from 1 in the order of SCENE_CLASSES, 0 unlabelled."""
    ids: NDArray[np.uint8] = scene.stuff + np.uint8(1)
    for thing in scene.things:
        ids[thing.mask] = SCENE_CLASSES.index(thing.kind) + 1
    if number % 4 == 3:
        ids[:, : max(1, ids.shape[1] // 16)] = 0
    return ids


def _table(training: NDArray[np.int64], validation: NDArray[np.int64]) -> str:
    """objectInfo150.txt: of each class the share of pixels, and in how many images it is."""
    shares = training.sum(axis=0) / max(1, training.sum())
    rows = zip(SCENE_CLASSES, shares, (training > 0).sum(axis=0), (validation > 0).sum(axis=0), strict=True)
    lines = [
        f"{label + 1}\t{share:.4f}\t{train}\t{val}\t{int(name in STUFF)}\t{name}\n"
        for label, (name, share, train, val) in enumerate(rows)
    ]
    return "".join(["Idx\tRatio\tTrain\tVal\tStuff\tName\n", *lines])


def _annotations(scene: Scene, image_id: int) -> Iterator[dict[str, Any]]:
    for place, thing in enumerate(scene.things):
        rows, columns = (np.flatnonzero(thing.mask.any(axis=axis)) for axis in (1, 0))
        x, y = float(columns[0]), float(rows[0])
        yield {
            "segmentation": run_lengths(thing.mask) if thing.crowd else segmentation(thing.mask),
            "area": float(thing.mask.sum()),
            "iscrowd": int(thing.crowd),
            "image_id": image_id,
            "bbox": [x, y, float(columns[-1]) + 1 - x, float(rows[-1]) + 1 - y],
            "category_id": CATEGORY_IDS[thing.kind],
            "id": CROWD_IDS + image_id if thing.crowd else 100 * image_id + place,
        }


def _write_json(path: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> None:
    content = {
        "info": {"description": "Rendered scenes", "version": "1.0", "year": 2017},
        "licenses": [{"url": "https://opensource.org/license/mit", "id": 1, "name": "MIT"}],
        "images": images,
        "annotations": annotations,
        "categories": [{"supercategory": "shape", "id": number, "name": name} for name, number in CATEGORY_IDS.items()],
    }
    _made(path.parent)
    path.write_text(json.dumps(content))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
