"""ImageNet as it is published, unmodified: the official archives, and the layout of the Kaggle download; no torch.

Images of the validation split get the names that they have in class folders, which give their keys.
"""

from __future__ import annotations

import csv
import io
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fdscale.config.errors import UserError
from fdscale.data.packing.classes import few
from fdscale.data.packing.folder import folder_source
from fdscale.data.packing.listing import Found, tell_others
from fdscale.data.packing.sources import Files
from fdscale.data.packing.tars import list_class_tar, tar_of_class_tars, whole

Split = Literal["train", "val"]

ARCHIVES: dict[Split, str] = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"
KAGGLE_FOLDER = Path("ILSVRC/Data/CLS-LOC")
KAGGLE_CLASSES = "LOC_synset_mapping.txt"
KAGGLE_LABELS = "LOC_val_solution.csv"
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


def official(folder: Path, split: Split, workers: int) -> Files:
    """The official archives of ILSVRC 2012: 1,000 class tars in one, or the validation images with their devkit."""
    path = folder / ARCHIVES[split]
    if not path.is_file():
        raise UserError(f"{path} does not exist; put it there, or name the other split with --split")
    if split == "val":
        return _official_val(folder)
    files = tar_of_class_tars(path, workers)
    return replace(files, about=_about("official archives", "train", files.names, files.classes, path))


def kaggle(folder: Path, split: Split, workers: int) -> Files:
    """The Kaggle download, `folder` being the one that holds ILSVRC/."""
    images, classes = folder / KAGGLE_FOLDER / split, _kaggle_classes(folder)
    if not images.is_dir():
        raise UserError(f"{images} does not exist; unpack it, or name the other split with --split")
    files = folder_source(images, workers)
    if split == "val":
        wnids = _kaggle_labels(folder / KAGGLE_LABELS)
        files = replace(_placed(files, [_of(wnids, name, folder) for name in files.names], classes), files=files.names)
    elif unknown := sorted(set(files.classes or ()) - set(classes)):
        raise UserError(f"{images} has class folders that {KAGGLE_CLASSES} does not know: {few(unknown)}; remove them")
    else:
        numbers = [classes.index(name) for name in files.classes or ()]
        files.rows["label"] = np.array(numbers)[files.rows["label"]]
    return replace(files, classes=classes, about=_about("Kaggle layout", split, files.names, classes, images))


def _about(layout: str, split: str, names: Sequence[str], classes: tuple[str, ...] | None, path: Path) -> str:
    return f"ImageNet, {layout}, {split}: {len(names):,} images of {len(classes or ()):,} classes in {path}"


def _placed(files: Files, wnids: Sequence[str], classes: tuple[str, ...]) -> Files:
    """Flat images named and labelled as they would be in folders of their classes, and sorted so."""
    numbers = {wnid: number for number, wnid in enumerate(classes)}
    names = [f"{wnid}/{name}" for wnid, name in zip(wnids, files.names, strict=True)]
    rows = files.rows.copy()
    rows["label"] = [numbers[wnid] for wnid in wnids]
    order = sorted(range(len(names)), key=names.__getitem__)
    return replace(files, names=[names[i] for i in order], rows=rows[order], classes=classes)


def _official_val(folder: Path) -> Files:
    path, devkit = folder / ARCHIVES["val"], folder / DEVKIT
    ids, meta = _devkit(devkit)
    wnid_of, classes = _synsets(meta, devkit)
    found = list_class_tar(whole(path))
    wnids = [wnid_of[_ground_truth(name, ids, path)] for name in found.names]
    tell_others(path, found)
    about = _about("official archives", "val", found.names, classes, path)
    return _placed(_flat(path, found, about), wnids, classes)


def _flat(path: Path, found: Found, about: str) -> Files:
    return Files(path.parent, [path.name], found.names, found.rows, None, about, tuple(found.left_out))


def _ground_truth(name: str, ids: Sequence[int], path: Path) -> int:
    match = VAL_NAME.fullmatch(name)
    if match is None or not 1 <= int(match[1]) <= len(ids):
        raise UserError(
            f"{path}:{name} has no label among the {len(ids):,} of {GROUND_TRUTH}; "
            "allowed: ILSVRC2012_val_00000001.JPEG and so on, as published"
        )
    return ids[int(match[1]) - 1]


def _devkit(path: Path) -> tuple[list[int], bytes]:
    """The ILSVRC2012_ID of each validation image, and meta.mat, which says what these numbers mean."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; it holds the labels of {ARCHIVES['val']}: put it beside, as published")
    try:
        with tarfile.open(path, "r:gz") as tar:
            ids, meta = (_member_bytes(tar, ending) for ending in (GROUND_TRUTH, META))
        return [int(line) for line in ids.split()], meta
    except (tarfile.TarError, EOFError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not the development kit as published ({error}); download it again") from error


def _member_bytes(tar: tarfile.TarFile, ending: str) -> bytes:
    for member in tar:
        if member.isreg() and member.name.endswith(f"/{ending}") and (stream := tar.extractfile(member)):
            return stream.read()
    raise KeyError(ending)


def _synsets(meta: bytes, devkit: Path) -> tuple[dict[int, str], tuple[str, ...]]:
    """The WNID of each ILSVRC2012_ID, and the WNIDs of the leaf classes, sorted: not the order of meta.mat."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(f"{META} in {devkit} is read with scipy: pip install scipy") from error
    try:
        rows: Any = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        of_id = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
        leaves = [str(row["WNID"]) for row in rows if int(row["num_children"]) == 0]
    except Exception as error:  # whatever scipy raises on garbage
        raise UserError(f"{devkit}: {META} is not as published ({error}); download it again") from error
    return of_id, tuple(sorted(leaves))


def _kaggle_classes(folder: Path) -> tuple[str, ...]:
    path = folder / KAGGLE_CLASSES
    lines = _text(path, "the classes").splitlines()
    return tuple(sorted(line.split(maxsplit=1)[0] for line in lines if line.strip()))


def _kaggle_labels(path: Path) -> dict[str, str]:
    """The WNID of each validation image: the first word of its PredictionString."""
    rows = csv.DictReader(io.StringIO(_text(path, "the labels of val")))
    try:
        return {row["ImageId"]: row["PredictionString"].split(maxsplit=1)[0] for row in rows}
    except (KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f"{path}, line {rows.line_num}: expected ImageId,PredictionString; download it again"
        ) from error


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); it holds {what}: put it there, as published") from error


def _of(wnids: Mapping[str, str], name: str, folder: Path) -> str:
    wnid = wnids.get(Path(name).stem)
    if wnid is None:
        raise UserError(f"{KAGGLE_FOLDER / 'val' / name} has no label in {folder / KAGGLE_LABELS}; remove it")
    return wnid
