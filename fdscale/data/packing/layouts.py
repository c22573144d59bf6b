"""Which layout a source has, told by what lies there; no torch."""

from __future__ import annotations

import os
from pathlib import Path

from fdscale.config.errors import UserError
from fdscale.data.packing import imagenet
from fdscale.data.packing.folder import folder_source
from fdscale.data.packing.imagenet import Split
from fdscale.data.packing.sources import Files
from fdscale.data.packing.tars import (
    CLASS_TAR,
    folder_of_class_tars,
    holds_tars,
    is_tar,
    refuse_compressed,
    tar_of_class_tars,
    tars_in,
)
from fdscale.data.packing.webdataset_tars import webdataset_tars


def open_source(source: Path, split: Split | None, workers: int) -> Files:
    """List the images of a folder or a tar, by `workers` processes; of two splits the training one, or `split`.

    Raises UserError for what holds no images, for a split where there is one only, and as each layout does.
    """
    source = Path(os.path.abspath(source))
    if not source.exists():
        raise UserError(f"image folder {source} does not exist; give a folder of images or of tars, or a tar")
    if (files := _of_two_splits(source, split, workers)) is not None:
        return files
    if split is not None:
        raise UserError(f"--split {split}: {source} has no splits; leave it out")
    return _folder(source, workers) if source.is_dir() else _tar(source, workers)


def _of_two_splits(source: Path, split: Split | None, workers: int) -> Files | None:
    if source.name in imagenet.ARCHIVES.values():
        named: Split = "train" if source.name == imagenet.ARCHIVES["train"] else "val"
        return imagenet.official(source.parent, _same(split, named, source), workers)
    if any((source / name).is_file() for name in imagenet.ARCHIVES.values()):
        return imagenet.official(source, split or "train", workers)
    for root in (source, *source.parents):
        images = root / imagenet.KAGGLE_FOLDER
        inside = source.parent == images and source.name in ("train", "val")
        if (inside or images.is_relative_to(source)) and images.is_dir():
            chosen = _same(split, "val" if source.name == "val" else "train", source) if inside else split or "train"
            return imagenet.kaggle(root, chosen, workers)
    if (source / "train").is_dir() and (source / "val").is_dir():
        return _folder(source / (split or "train"), workers)
    return None


def _same(split: Split | None, named: Split, source: Path) -> Split:
    if split not in (None, named):
        raise UserError(f"--split {split}: {source} is the split {named}; leave it out, or name the other one's")
    return named


def _folder(source: Path, workers: int) -> Files:
    tars, others = tars_in(source), [path for path in source.iterdir() if not path.name.startswith(".")]
    if not tars:
        for path in sorted(others):
            if ".tar" in path.suffixes or path.suffix == ".tgz":
                refuse_compressed(path)
        return folder_source(source, workers)
    if folders := [path for path in others if path.is_dir()]:
        raise UserError(f"{source} holds {len(tars)} tars and the folder {folders[0].name}; allowed: either, alone")
    if all(CLASS_TAR.fullmatch(path.name) for path in tars):
        return folder_of_class_tars(source, workers)
    if len(tars) == 1 and holds_tars(tars[0]):
        return tar_of_class_tars(tars[0], workers)
    return webdataset_tars(source, workers)


def _tar(source: Path, workers: int) -> Files:
    refuse_compressed(source)
    if not is_tar(source.name):
        raise UserError(f"{source} is neither a folder nor a .tar; give a folder of images or of tars, or a tar")
    return tar_of_class_tars(source, workers) if holds_tars(source) else webdataset_tars(source, workers)
