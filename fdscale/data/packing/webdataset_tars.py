"""Existing WebDataset tars, packed again and shuffled over all of them; no torch."""

from __future__ import annotations

import logging
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

from fdscale.config.errors import UserError
from fdscale.data.index import read_classes
from fdscale.data.packing.classes import few
from fdscale.data.packing.listing import Found, Listing, joined, tell_others
from fdscale.data.packing.sources import Files, is_image_name, refuse_same_keys
from fdscale.data.packing.tars import Inside, is_plain, members, tars_in, whole
from fdscale.data.processes import in_processes
from fdscale.data.scan import (
    FIRST_DOT,
    LABEL_BYTES,
    NO_LABEL,
    is_dotted_image,
    key_of,
    label_of,
    printable,
    stray_images,
)

LOG = logging.getLogger(__name__)


def webdataset_tars(source: Path, workers: int) -> Files:
    """The images KEY.jpg|jpeg|png|webp of a folder of tars or of one tar, with the labels KEY.cls.

    Other members are counted and left out. Class names come from `classes.json` where it lies beside. Raises
    UserError for tars without images, a label that is no class number, and a key that is in two of them.
    """
    paths = tars_in(source) if source.is_dir() else [source]
    folder = source if source.is_dir() else source.parent
    classes = read_classes(folder)
    known = None if classes is None else len(classes)
    found = joined(
        list(in_processes(_list_shard, [(whole(path), known) for path in paths], workers)), range(len(paths))
    )
    if not found.names:
        why = f"; {found.left_out[0]}" if found.left_out else ""
        raise UserError(
            f"{source} holds no image in {len(paths):,} tars; expected members KEY.jpg, KEY.png, KEY.webp{why}"
        )
    tell_others(source, found)
    labelled = int((found.rows["label"] != NO_LABEL).sum())
    if not labelled:
        _tell_classes_lost(source, paths, found.names)
    about = (
        f"WebDataset tars in {source}: {len(found.names):,} images, {labelled:,} with labels, in {len(paths):,} tars"
    )
    files = [path.name for path in paths]
    return refuse_same_keys(Files(folder, files, found.names, found.rows, classes, about, tuple(found.left_out)))


def _tell_classes_lost(source: Path, paths: Sequence[Path], names: Sequence[str]) -> None:
    """Log how labels would be found, where folders or tars are named as classes are."""
    folders = sorted({name.rpartition("/")[0] for name in names})
    without_number = {re.sub(r"\d", "", path.name) for path in paths}
    if len(folders) > 1:
        what, how = f"folders ({few(folders)})", "unpack the tars, and pack the folder of class folders"
    elif len(paths) > 1 and len(without_number) == len(paths):
        what = f"tars ({few([path.name for path in paths])})"
        how = "put them into one (tar cf classes.tar *.tar), and pack that"
    else:
        return
    LOG.warning("%s: no image has a label KEY.cls; if its %s are classes, %s", source, what, how)


def _list_shard(job: tuple[Inside, int | None]) -> Found:
    tar, classes = job
    listing, labels = Listing(), dict[str, int]()
    images: list[tuple[str, int, int]] = []
    dotted: list[str] = []
    for member in members(tar):
        name = member.name.removeprefix("./")
        suffix = name.rpartition("/")[2].partition(".")[2].lower()
        if not is_plain(member, listing):
            continue
        if suffix == "cls":
            where = f"{tar.path}:{printable(member.name)}"
            labels[key_of(name)] = label_of(_start_of(tar.path, member), where, classes)
        elif "." not in suffix and is_image_name(name):
            images.append((name, member.offset_data, member.size))
        elif is_dotted_image(name):
            dotted.append(name)
        else:
            listing.others[suffix] += 1
    strays = set(stray_images(dotted, (name for name, _, _ in images)))
    for name in dotted:
        if name in strays:
            listing.leave_out(name, FIRST_DOT)
        else:
            listing.others[name.rpartition("/")[2].partition(".")[2].lower()] += 1
    status = tar.path.stat()
    for name, offset, size in images:
        listing.add(name, offset, size, status, labels.get(key_of(name), NO_LABEL))
    return listing.found()


def _start_of(path: Path, member: tarfile.TarInfo) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), min(member.size, LABEL_BYTES), member.offset_data)
