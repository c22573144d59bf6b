"""COCO and its kind (Objects365, LVIS-like) as they are published: a folder of images and one JSON; no torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fdscale.config.errors import UserError
from fdscale.data.dense.coco_rows import AnnotationRows, ImageRows, segmentation_of
from fdscale.data.dense.json_lists import JsonLists
from fdscale.data.images import BadImage, decode_rgb
from fdscale.data.order import GlobalOrder, Order

logger = logging.getLogger(__name__)

SCENE = np.dtype([("id", "<i8"), ("height", "<i4"), ("width", "<i4"), ("first", "<i8"), ("last", "<i8")])
OBJECT = np.dtype([("box", "<f4", 4), ("label", "<i4"), ("bytes", "<i4"), ("start", "<i8")])
FAR = 10  # sides of an image, beyond which nothing of its objects may lie
TOLD = 5  # problems that are written out
ENOUGH = 1000  # problems that end the reading


@dataclass(frozen=True)
class CocoScenes:
    """Images in the order of the JSON, and their objects, which are no crowds and have an area.

    `scenes` (M,) are `SCENE` rows, `first`..`last` their `objects`; `names` (M,) file names in UTF-8; `objects` are
    `OBJECT` rows: box x1, y1, x2, y2 in pixels of the image, label from 0 in rising order of `category_ids`, and
    where in `segmentations` its polygons or RLE lie (None: boxes alone are learnt).
    """

    images_folder: Path
    annotations: Path
    scenes: NDArray[np.void]
    names: NDArray[np.bytes_]
    objects: NDArray[np.void]
    segmentations: bytes | None
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.scenes)

    def trainable(self) -> CocoScenes:
        """Those with an object. Raises UserError where there is none."""
        some = self.scenes["last"] > self.scenes["first"]
        if not some.any():
            raise UserError(f"{self.annotations}: no image has an object to learn; give the JSON of a training set")
        return replace(self, scenes=self.scenes[some], names=self.names[some])

    def image_id(self, scene: int) -> int:
        """The image's id in the JSON."""
        return int(self.scenes["id"][scene])

    def key(self, scene: int) -> int:
        """The uint64 sample key, which all randomness starts from: the bits of the image's id."""
        return self.image_id(scene) % 2**64

    def path(self, scene: int) -> Path:
        """Path of a scene's image."""
        return self.images_folder / self.names[scene].decode()

    def fingerprint(self) -> str:
        """SHA-256 of the JSON: what this run learns from."""
        return self.sha256

    def fingerprints(self, table: str) -> dict[str, str]:
        """The same by the setting that says where the data lie."""
        return {f"{table}.annotations": self.fingerprint()}

    def order(self, global_batch: int, seed: int) -> Order:
        """All scenes, shuffled as one in each epoch."""
        return GlobalOrder(len(self), global_batch, seed)

    def image(self, scene: int) -> Image.Image:
        """A scene's RGB image; raises BadImage where it cannot be decoded, and UserError for another size.

        An EXIF orientation is not applied, as with pycocotools and torchvision: boxes and polygons are on the pixels
        as they are stored, and so are `width` and `height`. (detectron2 applies one, and then refuses the size.)
        """
        path = self.path(scene)
        try:
            with path.open("rb") as file:
                image = decode_rgb(file, str(path))
        except OSError as error:
            raise BadImage(f"{path} ({type(error).__name__}: {error})") from error
        expected = int(self.scenes["width"][scene]), int(self.scenes["height"][scene])
        if image.size != expected:
            raise UserError(
                f"image {path} is stored with {image.width} x {image.height} pixels, {self.annotations} says "
                f"{expected[0]} x {expected[1]} (image id {self.image_id(scene)}); allowed: the same, without EXIF "
                "orientation; put the original image there, or correct the JSON"
            )
        return image

    def boxes_and_labels(self, scene: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Boxes fp32 (n, 4) as x1, y1, x2, y2 in pixels of the image, and labels int64 (n,) from 0."""
        rows = self._objects(scene)
        return rows["box"].copy(), rows["label"].astype(np.int64)

    def segmentations_of(self, scene: int) -> list[Any]:
        """Polygons or RLE of a scene's n objects, as the JSON has them; not without masks."""
        assert self.segmentations is not None
        rows = self._objects(scene)[["start", "bytes"]].tolist()
        return [segmentation_of(self.segmentations[start : start + size]) for start, size in rows]

    def _objects(self, scene: int) -> NDArray[np.void]:
        row = self.scenes[scene]
        found: NDArray[np.void] = self.objects[row["first"] : row["last"]]
        return found


def load_coco(
    images_folder: str | Path, annotations: str | Path, masks: bool = True, max_missing: float = 0.0
) -> CocoScenes:
    """The images and objects of a COCO JSON, checked as a whole; nothing is decoded, the folder is listed once.

    Left out are crowds, and with a warning objects without area (train2017 has two boxes of height 0) and images that
    are listed but not there, up to the share `max_missing` (Objects365's training set lists three). `masks=False`
    reads boxes alone, as Objects365 has.

    Measured on one core: 100,000 images with 700,000 polygons of 27 points (417 MB of JSON) took 19 s, 374 MB that stay
    and 0.9 GB at most (json.load alone: 14 s and 2.6 GB); 1.5 million boxes without segmentation 8 s and 53 MB. What
    stays lies in a few arrays, which forked workers share. A file that has not changed is read once in a process: it is
    checked first, then used.

    Raises UserError, with the ids, for a damaged JSON, missing or wrong entries, ids that are unknown or there twice,
    RLE of another size than the image, objects far beyond it, and more missing images.
    """
    folder, path = Path(images_folder), Path(annotations)
    if not folder.is_dir():
        raise UserError(f"image folder {folder} does not exist; give the folder that the file_names of {path} lie in")
    stamp = (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None
    return _loaded(folder, path, masks, max_missing, stamp)


@lru_cache(maxsize=2)  # one to train on, one held out
def _loaded(folder: Path, path: Path, masks: bool, max_missing: float, _: tuple[int, int] | None) -> CocoScenes:
    images, boxes, categories, sha256 = _read(path, masks)
    rows, notes = np.concatenate(images.rows), np.concatenate(boxes.rows)
    images.rows, boxes.rows = [], []
    ids, names = _categories(path, categories)
    order = np.argsort(rows["id"], kind="stable")
    owners = _check_ids(path, rows, notes, ids, order)
    _check_rle_sizes(path, rows, notes, owners)
    _check_reach(path, rows, notes, owners)
    objects, owners = _objects(path, notes, owners, ids, masks)
    scenes = _scenes(rows, owners)
    there = _present(folder, path, images.names, max_missing)
    return CocoScenes(
        images_folder=folder,
        annotations=path,
        scenes=scenes[there],
        names=np.array([name.encode() for name in images.names])[there],
        objects=objects,
        segmentations=bytes(boxes.segmentations) if masks else None,
        category_ids=tuple(ids.tolist()),
        class_names=names,
        sha256=sha256,
    )


def _read(path: Path, masks: bool) -> tuple[ImageRows, AnnotationRows, list[Any], str]:
    images, boxes, problems = ImageRows(), AnnotationRows(masks), []
    categories: list[Any] = []
    seen = set()
    with JsonLists(path) as lists:
        for key, items in lists.read(("images", "annotations", "categories")):
            seen.add(key)
            if key == "images":
                problems += images.add(items)
            elif key == "annotations":
                problems += boxes.add(items)
            else:
                categories += items
            if len(problems) > ENOUGH:
                _refuse(path, problems, " in the part that was read")
    _refuse(path, [f"no list '{key}'" for key in ("images", "annotations", "categories") if key not in seen])
    _refuse(path, problems)
    if not images.names:
        raise UserError(f"{path} lists no images; give the JSON of a data set in COCO's layout")
    return images, boxes, categories, lists.sha256


def _categories(path: Path, items: list[Any]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Ids in rising order, and their names; label k is the k-th of them."""
    _refuse(
        path,
        [
            f"category {str(item)[:60]}: allowed: an object with a whole number 'id' and a 'name'"
            for item in items
            if not (isinstance(item, dict) and type(item.get("id")) is int and isinstance(item.get("name"), str))
        ],
    )
    if not items:
        raise UserError(f"{path} lists no categories; give the JSON of a data set in COCO's layout")
    items = sorted(items, key=lambda item: int(item["id"]))
    ids = np.array([item["id"] for item in items], np.int64)
    _refuse(path, [f"category {number} is there twice" for number in _twice(ids)])
    return ids, tuple(item["name"] for item in items)


def _check_ids(
    path: Path, rows: NDArray[np.void], notes: NDArray[np.void], categories: NDArray[np.int64], order: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The row of each annotation's image; UserError for ids that are unknown or there twice."""
    _refuse(path, [f"image {number} is there twice" for number in _twice(rows["id"])])
    _refuse(path, [f"annotation {number} is there twice" for number in _twice(notes["id"])])
    places = np.searchsorted(rows["id"], notes["image"], sorter=order).clip(max=len(rows) - 1)
    owners: NDArray[np.int64] = order[places]
    strangers = notes[rows["id"][owners] != notes["image"]]
    _refuse(path, (f"annotation {row['id']}: image_id {row['image']} is not among 'images'" for row in strangers))
    strangers = notes[~np.isin(notes["category"], categories)]
    unknown = "is not among 'categories'"
    _refuse(path, (f"annotation {row['id']}: category_id {row['category']} {unknown}" for row in strangers))
    return owners


def _check_rle_sizes(path: Path, rows: NDArray[np.void], notes: NDArray[np.void], owners: NDArray[np.int64]) -> None:
    encoded = np.flatnonzero(notes["rle_size"][:, 0])
    sizes = np.stack([rows["height"][owners[encoded]], rows["width"][owners[encoded]]], axis=1)
    wrong = np.flatnonzero((notes["rle_size"][encoded] != sizes).any(axis=1))
    _refuse(
        path,
        (
            f"annotation {notes['id'][encoded[place]]}: segmentation has size "
            f"{notes['rle_size'][encoded[place]].tolist()}, its image {sizes[place].tolist()} (height, width)"
            for place in wrong
        ),
    )


def _check_reach(path: Path, rows: NDArray[np.void], notes: NDArray[np.void], owners: NDArray[np.int64]) -> None:
    """Objects may leave their image; those far beyond it are damaged, and to draw them takes all memory."""
    limits = FAR * np.maximum(rows["height"], rows["width"]).astype(np.float64)[owners]
    _refuse(
        path,
        (
            f"annotation {notes['id'][place]}: a coordinate of its bbox or segmentation is {notes['reach'][place]:g} "
            f"pixels from the image's corner, allowed: {limits[place]:g}, {FAR} times its longer side"
            for place in np.flatnonzero(notes["reach"] > limits)
        ),
    )


def _objects(
    path: Path, notes: NDArray[np.void], owners: NDArray[np.int64], categories: NDArray[np.int64], masks: bool
) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """What is learnt, in the order of the images' rows, and those rows."""
    crowds, flat = notes["crowd"], (notes["box"][:, 2:] == 0).any(axis=1)
    if masks:
        flat |= ~crowds & (notes["bytes"] == 0)
    if flat.any():
        ids = _few(str(number) for number in notes["id"][flat])
        logger.warning("%s: %d object(s) without area are not learnt: annotation %s", path, flat.sum(), ids)
    kept = np.flatnonzero(~crowds & ~flat)
    kept = kept[np.argsort(owners[kept], kind="stable")]
    objects = np.zeros(len(kept), OBJECT)
    corner = notes["box"][kept, :2]
    objects["box"] = np.concatenate([corner, corner + notes["box"][kept, 2:]], axis=1)
    objects["label"] = np.searchsorted(categories, notes["category"][kept])
    if masks:
        objects["start"], objects["bytes"] = notes["start"][kept], notes["bytes"][kept]
    return objects, owners[kept]


def _scenes(rows: NDArray[np.void], owners: NDArray[np.int64]) -> NDArray[np.void]:
    scenes = np.zeros(len(rows), SCENE)
    for name in ("id", "height", "width"):
        scenes[name] = rows[name]
    numbers = np.arange(len(rows))
    scenes["first"], scenes["last"] = np.searchsorted(owners, numbers), np.searchsorted(owners, numbers, side="right")
    return scenes


def _present(folder: Path, path: Path, names: list[str], max_missing: float) -> NDArray[np.bool_]:
    """Bool (M,): the image is there. Each folder is listed once; file names may have folders in them.

    Where a name as it stands is not there, but its last two parts are, these take its place: Objects365 is published
    with names like images/v1/patch8/objects365_v1_00420917.jpg, and its archives unpack to patch8.
    """
    listed: dict[str, frozenset[str]] = {}
    there = np.ones(len(names), bool)
    for number, name in enumerate(names):
        short = "/".join(name.split("/")[-2:])
        if not _is_listed(folder, name, listed) and _is_listed(folder, short, listed):
            names[number] = name = short
        there[number] = _is_listed(folder, name, listed)
    missing = len(names) - int(there.sum())
    if missing:
        shown = _few(names[number] for number in np.flatnonzero(~there))
        said = f"{missing} of {len(names)} images that {path} lists are not in {folder}: {shown}"
        if missing > max_missing * len(names):
            raise UserError(f"{said}; allowed: {max_missing:.2%}; unpack the images there, or give the right folder")
        logger.warning("%s; they are left out", said)
    return there


def _is_listed(folder: Path, name: str, listed: dict[str, frozenset[str]]) -> bool:
    parent, _, file = name.rpartition("/")
    if parent not in listed:
        own = folder / parent
        listed[parent] = frozenset(os.listdir(own)) if own.is_dir() else frozenset()
    return file in listed[parent]


def _twice(ids: NDArray[np.int64]) -> list[int]:
    ordered = np.sort(ids)
    found: list[int] = np.unique(ordered[1:][ordered[1:] == ordered[:-1]]).tolist()
    return found


def _refuse(path: Path, problems: Iterable[str], read: str = "") -> None:
    """Raise UserError with the first few problems and how many more there are in what was `read`."""
    rest = iter(problems)
    if found := list(islice(rest, TOLD)):
        left = sum(1 for _ in rest)
        more = f"\n  ... and {left} more{read}" if left else ""
        told = "".join(f"\n  {problem}" for problem in found)
        raise UserError(f"{path} is no annotation file in COCO's layout; correct it:{told}{more}")


def _few(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:3]) + (f", ... ({len(found) - 3} more)" if len(found) > 3 else "")
