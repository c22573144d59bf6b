from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools.coco import COCO

from fdscale.data.dense.masks import draw_masks
from fdscale.data.dense.outlines import segmentation
from fdscale.data.dense.rendering import STUFF, THINGS, render
from fdscale.data.dense.scenes import CATEGORY_IDS, SCENE_CLASSES, write_ade20k, write_coco


@settings(max_examples=200)
@given(arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_any_mask_comes_back_from_its_outlines(mask):
    found = segmentation(mask)
    if found:
        assert np.array_equal(draw_masks([found], *mask.shape, "here")[0], mask)
    else:
        assert not mask.any()


def test_parts_are_polygons_and_holes_run_lengths():
    mask = np.zeros((6, 8), bool)
    mask[1:3, 1:3] = mask[3:5, 3:6] = True  # they touch at a corner
    assert segmentation(mask) == [[1, 1, 3, 1, 3, 3, 1, 3], [3, 3, 6, 3, 6, 5, 3, 5]]
    mask[0:5, 0:3] = True
    mask[2, 1] = False
    assert segmentation(mask)["size"] == [6, 8]
    assert sum(segmentation(mask)["counts"]) == 48


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("write", [write_ade20k, write_coco])
def test_the_same_numbers_give_the_same_files(write, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(tmp_path / name, 4, 2, 48, seed)
    first = files(tmp_path / "a")
    assert first == files(tmp_path / "b")
    other = files(tmp_path / "c")
    assert first.keys() == other.keys()
    assert not any(first[name] == other[name] for name in first if name.endswith("jpg"))


def test_ade20k_is_written_as_it_is_published(ade20k):
    assert {path.name for path in ade20k.iterdir()} == {
        "annotations",
        "images",
        "objectInfo150.txt",
        "sceneCategories.txt",
    }
    lines = (ade20k / "objectInfo150.txt").read_text().splitlines()
    assert lines[0].split("\t") == ["Idx", "Ratio", "Train", "Val", "Stuff", "Name"]
    assert [line.split("\t")[5] for line in lines[1:]] == list(SCENE_CLASSES)
    assert sum(float(line.split("\t")[1]) for line in lines[1:]) == pytest.approx(1, abs=1e-3)
    unlabelled = 0
    for number in range(12):
        scene, stem = render(number, 64, 3), f"ADE_train_{number + 1:08d}"
        mask = Image.open(ade20k / "annotations" / "training" / f"{stem}.png")
        ids = np.asarray(mask)
        assert mask.mode == "L"
        assert Image.open(ade20k / "images" / "training" / f"{stem}.jpg").size == mask.size
        expected = scene.stuff + 1
        for thing in scene.things:
            expected[thing.mask] = 1 + len(STUFF) + list(THINGS).index(thing.kind)
        assert np.array_equal(ids[ids > 0], expected[ids > 0])
        unlabelled += bool((ids == 0).any())
    assert unlabelled == 3


def test_coco_is_written_as_it_is_published_and_pycocotools_draws_what_was_rendered(coco):
    kinds = set()
    for split, start, count in (("train2017", 0, 12), ("val2017", 12, 5)):
        path = coco / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        assert list(content) == ["info", "licenses", "images", "annotations", "categories"]
        assert content["categories"][3] == {"supercategory": "shape", "id": 44, "name": "ring"}
        theirs = COCO(path)
        for entry, number in zip(content["images"], range(start, start + count), strict=True):
            scene = render(number, 64, 3)
            assert Image.open(coco / split / entry["file_name"]).size == (entry["width"], entry["height"])
            wanted = theirs.loadAnns(theirs.getAnnIds(imgIds=[entry["id"]]))
            assert len(wanted) == len(scene.things)
            for item, thing in zip(wanted, scene.things, strict=True):
                assert np.array_equal(theirs.annToMask(item), thing.mask)
                assert item["category_id"] == CATEGORY_IDS[thing.kind]
                assert item["area"] == thing.mask.sum()
                x, y, width, height = map(int, item["bbox"])
                rows, columns = np.nonzero(thing.mask)
                assert (x, y) == (columns.min(), rows.min())
                assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())
                kind = type(item["segmentation"]).__name__
                kinds.add((kind, item["iscrowd"], kind == "list" and len(item["segmentation"]) > 1))
    assert kinds == {("list", 0, False), ("list", 0, True), ("dict", 0, False), ("dict", 1, False)}


def test_scenes_differ_in_shape_and_content():
    scenes = [render(number, 128, 0) for number in range(20)]
    assert {scene.stuff.shape for scene in scenes} == {(128, 128), (96, 128), (128, 96)}
    assert {thing.kind for scene in scenes for thing in scene.things} == set(THINGS)
    assert [number for number, scene in enumerate(scenes) if not scene.things] == [1, 11]
    assert [number for number, scene in enumerate(scenes) if any(thing.crowd for thing in scene.things)] == [4, 14]
    for scene in scenes:
        together = sum((thing.mask.astype(int) for thing in scene.things), np.zeros(scene.stuff.shape, int))
        assert together.max(initial=0) <= 1  # a pixel shows one thing
        for thing in scene.things:
            rows, columns = np.nonzero(thing.mask)
            assert len(rows) > 20
            assert thing.crowd or max(np.ptp(rows), np.ptp(columns)) <= 66
