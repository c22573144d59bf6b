from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from fdscale.config.errors import UserError
from fdscale.data.dense.coco import CocoScenes, load_coco
from fdscale.data.dense.masks import draw_masks
from fdscale.data.images import BadImage

Change = Callable[[dict[str, Any]], None]


def json_of(folder: Path) -> Path:
    return folder / "annotations" / "instances_train2017.json"


def load(folder: Path, masks: bool = True, **arguments: float) -> CocoScenes:
    return load_coco(folder / "train2017", json_of(folder), masks, **arguments)


def changed(folder: Path, change: Change) -> Path:
    content = json.loads(json_of(folder).read_text())
    change(content)
    json_of(folder).write_text(json.dumps(content))
    return folder


def test_what_is_read_is_what_pycocotools_reads(coco):
    theirs, ours = COCO(json_of(coco)), load(coco)
    assert len(ours) == len(theirs.imgs)
    assert ours.category_ids == (1, 3, 7, 44, 90)
    assert ours.class_names == ("disc", "square", "triangle", "ring", "star")
    for scene in range(len(ours)):
        wanted = theirs.loadAnns(theirs.getAnnIds(imgIds=[ours.image_id(scene)], iscrowd=False))
        boxes, labels = ours.boxes_and_labels(scene)
        image = ours.image(scene)
        assert image.mode == "RGB"
        assert [ours.category_ids[label] for label in labels] == [item["category_id"] for item in wanted]
        corners = [(x, y, x + w, y + h) for x, y, w, h in (item["bbox"] for item in wanted)]
        assert np.array_equal(boxes, np.array(corners, np.float32).reshape(-1, 4))
        masks = draw_masks(ours.segmentations_of(scene), image.height, image.width, "here")
        assert len(masks) == len(wanted)
        for mask, item in zip(masks, wanted, strict=True):
            assert np.array_equal(mask, theirs.annToMask(item))


def test_crowds_are_not_learnt_and_images_without_objects_only_evaluated(coco):
    scenes = load(coco)
    content = json.loads(json_of(coco).read_text())
    crowds = [item for item in content["annotations"] if item["iscrowd"]]
    assert crowds
    assert len(scenes.objects) == len(content["annotations"]) - len(crowds)
    some = scenes.trainable()
    assert 0 < len(some) < len(scenes)
    with_objects = {item["image_id"] for item in content["annotations"] if not item["iscrowd"]}
    assert [some.image_id(scene) for scene in range(len(some))] == [
        item["id"] for item in content["images"] if item["id"] in with_objects
    ]
    assert all(len(some.boxes_and_labels(scene)[0]) for scene in range(len(some)))
    assert some.image(len(some) - 1).size == Image.open(some.path(len(some) - 1)).size
    none = replace(scenes, scenes=scenes.scenes[~np.isin(scenes.scenes["id"], some.scenes["id"])])
    with pytest.raises(UserError, match="no image has an object to learn"):
        none.trainable()


def test_keys_and_fingerprint(own_coco):
    scenes = load(own_coco)
    assert scenes.key(2) == scenes.image_id(2)
    before = scenes.fingerprint()
    json_of(own_coco).write_text(json_of(own_coco).read_text() + " ")
    assert load(own_coco).fingerprint() != before


def test_any_order_of_lists_and_entries_reads_the_same(own_coco):
    def rows(scenes: CocoScenes) -> dict[int, list[list[float]]]:
        found = {}
        for scene in range(len(scenes)):
            boxes, labels = scenes.boxes_and_labels(scene)
            parts = [str(segmentation) for segmentation in scenes.segmentations_of(scene)]
            found[scenes.image_id(scene)] = sorted(zip(boxes.tolist(), labels.tolist(), parts, strict=True))
        return found

    def change(content: dict[str, Any]) -> None:
        lists = {key: content.pop(key) for key in ("categories", "annotations", "images")}
        content.update({key: items[1::2] + items[::2] for key, items in lists.items()})

    before = load(own_coco)
    after = load(changed(own_coco, change))
    assert after.class_names == before.class_names
    assert [after.image_id(scene) for scene in (0, 1)] == [before.image_id(scene) for scene in (1, 3)]
    assert rows(after) == rows(before)


def test_boxes_alone_need_no_segmentation(own_coco):
    def change(content: dict[str, Any]) -> None:
        for item in content["annotations"]:
            del item["segmentation"]

    changed(own_coco, change)
    scenes = load(own_coco, masks=False)
    assert scenes.segmentations is None
    assert len(scenes.objects) > 10
    with pytest.raises(UserError, match=r"annotation \d+: no 'segmentation'; allowed without masks only\n.*\.\.\. and"):
        load(own_coco)


def first(items: list[dict[str, Any]], **values: Any) -> None:
    items[0].update(values)


PROBLEMS = {
    "bbox short": (lambda c: first(c["annotations"], bbox=[1, 2, 3]), r"annotation 900: bbox is \[1, 2, 3\], allowed"),
    "bbox infinite": (lambda c: first(c["annotations"], bbox=[1, 2, 3, float("inf")]), "900: bbox is .*inf.*finite"),
    "bbox negative": (lambda c: first(c["annotations"], bbox=[1, 2, -3, 4]), "900: bbox is .*above 0"),
    "bbox words": (lambda c: first(c["annotations"], bbox="1234"), "900: bbox is '1234'"),
    "no bbox": (lambda c: c["annotations"][0].pop("bbox"), "900: no 'bbox'"),
    "no area": (lambda c: c["annotations"][0].pop("area"), "900: no 'area'"),
    "area below 0": (lambda c: first(c["annotations"], area=-1.5), "900: area is -1.5, allowed: .* not below 0"),
    "box far away": (lambda c: first(c["annotations"], bbox=[1, 2, 700, 4]), "900: a coordinate .* is 700 .*: 640"),
    "polygon far away": (
        lambda c: first(c["annotations"], segmentation=[[1, 2, 30, 40, -1e9, 6], [1, 2, 3, 4, 5, 6]]),
        r"900: a coordinate .* is 1e\+09 pixels",
    ),
    "area": (lambda c: first(c["annotations"], area="big"), "900: area is 'big'"),
    "image_id": (lambda c: first(c["annotations"], image_id=5), "900: image_id 5 is not among 'images'"),
    "image_id word": (lambda c: first(c["annotations"], image_id="5"), "900: image_id is '5', allowed: a whole number"),
    "image_id broken": (lambda c: first(c["annotations"], image_id=9.5), "900: image_id is 9.5"),
    "category_id": (lambda c: first(c["annotations"], category_id=2), "900: category_id 2 is not among 'categories'"),
    "twice": (lambda c: first(c["annotations"], id=c["annotations"][1]["id"]), r"annotation \d+ is there twice"),
    "crowd": (lambda c: first(c["annotations"], iscrowd=0.0), "900: iscrowd is 0.0, allowed: 0 or 1"),
    "odd": (lambda c: first(c["annotations"], segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "900: segmentation is .*polygons"),
    "flat": (lambda c: first(c["annotations"], segmentation=[1, 2, 3, 4, 5, 6]), "900: segmentation is .*polygons"),
    "empty": (lambda c: first(c["annotations"], segmentation=[]), r"900: segmentation is \[\], allowed: polygons"),
    "nan": (lambda c: first(c["annotations"], segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "900: segmentation is"),
    "rle size": (
        lambda c: first(c["annotations"], segmentation={"size": [8, 9], "counts": [72]}),
        r"900: segmentation has size \[8, 9\], its image \[\d+, \d+\]",
    ),
    "rle counts": (
        lambda c: first(c["annotations"], segmentation={"size": [8, 9], "counts": [71]}),
        "900: segmentation counts 71 pixels, allowed: 72",
    ),
    "rle text": (
        lambda c: first(c["annotations"], segmentation={"size": [8, 9], "counts": "abc"}),
        "900: segmentation has counts 'abc', allowed: run lengths",
    ),
    "rle text counts": (
        lambda c: first(c["annotations"], segmentation={"size": [4, 4], "counts": "00?"}),
        "900: segmentation counts 15 pixels, allowed: 16",
    ),
    "rle garbage": (
        lambda c: first(c["annotations"], segmentation={"size": [8, 9], "counts": None}),
        "900: segmentation has counts None",
    ),
    "no annotation": (lambda c: c["annotations"].insert(0, 7), "annotation 7: allowed: an object"),
    "image twice": (lambda c: c["images"].append(c["images"][0]), "image 9 is there twice"),
    "no height": (lambda c: c["images"][0].pop("height"), "image 9: no 'height'"),
    "width": (lambda c: first(c["images"], width=0), "image 9: width is 0, allowed: a whole number of pixels"),
    "file_name": (lambda c: first(c["images"], file_name=3), "image 9: file_name is 3"),
    "category twice": (lambda c: c["categories"].append({"id": 3, "name": "x"}), "category 3 is there twice"),
    "category": (lambda c: c["categories"].append({"id": "3", "name": "x"}), "category .*'3'.* whole number 'id'"),
    "no list": (lambda c: c.pop("annotations"), "no list 'annotations'"),
    "no images": (lambda c: c["images"].clear(), "lists no images"),
    "no categories": (lambda c: c["categories"].clear(), "lists no categories"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_are_told_with_file_and_id(own_coco, name):
    change, message = PROBLEMS[name]
    with pytest.raises(UserError, match=rf"(?s)instances_train2017\.json .*{message}"):
        load(changed(own_coco, change))


def test_many_problems_are_told_together(own_coco):
    def change(content: dict[str, Any]) -> None:
        for item in content["annotations"]:
            item["bbox"] = []
        content["images"][1]["height"] = None

    count = len(json.loads(json_of(own_coco).read_text())["annotations"])
    with pytest.raises(
        UserError, match=rf"image 16: height is None.*(\n  annotation .*){{4}}\n  \.\.\. and {count - 4} more"
    ):
        load(changed(own_coco, change))


def test_objects_without_area_are_left_out_and_told(own_coco, caplog):
    """As the two boxes of height 0 in train2017 (ids 918 and 2206849)."""
    before = len(load(own_coco).objects)

    def change(content: dict[str, Any]) -> None:
        first(content["annotations"], bbox=[29.65, 8.33, 1.03, 0.0], area=0.0)
        content["annotations"][1]["segmentation"] = [[1, 1, 2, 2]]

    with caplog.at_level(logging.WARNING):
        scenes = load(changed(own_coco, change))
    assert len(scenes.objects) == before - 2
    assert "2 object(s) without area are not learnt: annotation 900, 901" in caplog.text


def test_missing_images_are_refused_or_left_out_up_to_a_share(own_coco, caplog):
    names = sorted(path.name for path in (own_coco / "train2017").iterdir())
    (own_coco / "train2017" / names[4]).unlink()
    with pytest.raises(
        UserError, match=rf"1 of 12 images that .*train2017\.json lists are not in .*: {names[4]}; allowed: 0"
    ):
        load(own_coco)
    with caplog.at_level(logging.WARNING):
        scenes = load(own_coco, max_missing=0.1)
    assert [scenes.path(scene).name for scene in range(len(scenes))] == names[:4] + names[5:]
    assert "left out" in caplog.text
    boxes, _ = scenes.boxes_and_labels(len(scenes) - 1)
    whole = json.loads(json_of(own_coco).read_text())["annotations"]
    assert len(boxes) == sum(item["image_id"] == scenes.image_id(len(scenes) - 1) for item in whole)


def test_images_may_lie_in_folders_as_those_of_objects365(own_coco):
    folder = own_coco / "train2017"
    for number, path in enumerate(sorted(folder.iterdir())):
        (folder / f"patch{number % 2}").mkdir(exist_ok=True)
        path.rename(folder / f"patch{number % 2}" / path.name)

    def change(content: dict[str, Any]) -> None:
        for number, item in enumerate(content["images"]):
            item["file_name"] = f"patch{number % 2}/{item['file_name']}"

    assert load(changed(own_coco, change)).image(3).mode == "RGB"


def test_objects365s_published_names_are_found_where_its_archives_unpack_to(own_coco):
    """There the folder is patch8; other images lie as their names say."""
    folder = own_coco / "train2017"
    (folder / "patch8").mkdir()
    (folder / "000000000009.jpg").rename(folder / "patch8" / "objects365_v1_00420917.jpg")
    (folder / "000000000016.jpg").rename(folder / "patch8" / "000000000016.jpg")

    def change(content: dict[str, Any]) -> None:
        content["images"][0]["file_name"] = "images/v1/patch8/objects365_v1_00420917.jpg"
        content["images"][1]["file_name"] = "patch8/000000000016.jpg"

    scenes = load(changed(own_coco, change))
    assert len(scenes) == 12
    assert scenes.path(0) == folder / "patch8" / "objects365_v1_00420917.jpg"
    assert scenes.image(0).mode == scenes.image(1).mode == scenes.image(2).mode == "RGB"


def test_an_image_of_another_size_and_one_that_is_none(own_coco):
    scenes = load(own_coco)
    Image.new("RGB", (48, 64)).save(scenes.path(0))
    with pytest.raises(
        UserError, match=r"000000000009\.jpg is stored with 48 x 64 pixels, .*says 64 x 64 \(image id 9\)"
    ):
        scenes.image(0)
    scenes.path(1).write_bytes(b"no image")
    with pytest.raises(BadImage, match=r"000000000016\.jpg \(UnidentifiedImageError"):
        scenes.image(1)


def test_folders_that_are_not_there(coco, tmp_path):
    with pytest.raises(UserError, match=r"image folder .*none does not exist"):
        load_coco(tmp_path / "none", json_of(coco))
    with pytest.raises(UserError, match=r"cannot read .*none\.json"):
        load_coco(coco / "train2017", tmp_path / "none.json")


def test_an_exif_orientation_is_not_applied(own_coco):
    scenes = load(own_coco)
    number = next(
        scene for scene in range(len(scenes)) if scenes.scenes["height"][scene] != scenes.scenes["width"][scene]
    )
    image = scenes.image(number)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(scenes.path(number), exif=exif)
    assert scenes.image(number).size == image.size
