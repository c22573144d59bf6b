"""Image folders: class sub-folders give labels, a flat folder none; no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fdscale.config.errors import UserError
from fdscale.data.packing.classes import few
from fdscale.data.packing.listing import Found, Listing, joined, tell_others
from fdscale.data.packing.sources import REENCODED_SUFFIXES, Files, is_image_name, refuse_same_keys, suffix_of
from fdscale.data.processes import in_processes
from fdscale.data.scan import IMAGE_SUFFIXES


def folder_source(source: Path, workers: int = 1) -> Files:
    """The images of a folder, listed by `workers` processes: each class folder by one."""
    source = source.resolve()
    if not source.is_dir():
        raise UserError(f"image folder {source} does not exist; give a folder of images or of class folders")
    folders = _folders_of(source)
    flat = _list_folder((source, None))
    listed = dict(zip(folders, in_processes(_list_folder, [(source, name) for name in folders], workers), strict=True))
    _refuse_none(source, flat, listed)
    classes = _class_names(source, flat, listed)
    # As sorted by whole names, where "cat-big/…" comes before "cat/…"
    found = joined([flat, *(listed[name] for name in sorted(folders, key=lambda name: f"{name}/"))])
    if classes is not None:
        found.rows["label"] = _labels(found.names, classes)
    tell_others(source, found)
    what = "no class folders, so no labels" if classes is None else f"{len(classes):,} class folders"
    about = f"image folder {source}: {len(found.names):,} images, {what}"
    return refuse_same_keys(Files(source, found.names, found.names, found.rows, classes, about, tuple(found.left_out)))


def _labels(names: list[str], classes: tuple[str, ...]) -> np.ndarray:
    numbers = {name: number for number, name in enumerate(classes)}
    return np.fromiter((numbers[name.partition("/")[0]] for name in names), np.int32, len(names))


def _folders_of(source: Path) -> list[str]:
    return [entry.name for entry in _entries(source) if _is_folder(entry, source)]


def _list_folder(job: tuple[Path, str | None]) -> Found:
    """The images anywhere below one folder of the source, or those directly in the source."""
    source, folder = job
    listing = Listing()
    for entry in _entries(source) if folder is None else _walk(source, source / folder):
        _refuse_link_out(entry, source)
        if not entry.is_file():
            continue
        name = entry.path[len(str(source).rstrip("/")) + 1 :]
        if is_image_name(name):
            status = entry.stat()
            listing.add(name, 0, status.st_size, status)
        else:
            listing.others[suffix_of(name)] += 1
    return listing.found()


def _walk(source: Path, folder: Path) -> Iterator[os.DirEntry[str]]:
    for entry in _entries(folder):
        if _is_folder(entry, source):
            yield from _walk(source, Path(entry.path))
        else:
            yield entry


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What is in a folder and not hidden."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read ({error.strerror}); make it readable") from error


def _is_folder(entry: os.DirEntry[str], source: Path) -> bool:
    if entry.is_symlink() and entry.is_dir():
        target = Path(entry.path).resolve()
        raise UserError(f"{entry.path} is a link to {target}; allowed: real folders in {source}")
    return entry.is_dir()


def _refuse_link_out(entry: os.DirEntry[str], source: Path) -> None:
    if not entry.is_symlink():
        return
    target = Path(entry.path).resolve()
    if not target.is_relative_to(source):
        raise UserError(f"{entry.path} leads out of {source} to {target}; copy it, or remove it")
    if not target.exists():
        raise UserError(f"{entry.path} is a link to {target}, which is not there; remove it")


def _refuse_none(source: Path, flat: Found, listed: dict[str, Found]) -> None:
    found = [flat, *listed.values()]
    if not any(part.names for part in found):
        if folders := [name for name, part in listed.items() if part.others["tar"]]:
            raise UserError(
                f"{source} holds no image, but tars in {len(folders)} sub-folders ({few(sorted(folders))}); "
                f"name one that holds tars, such as {source / min(folders)}"
            )
        allowed, others = ", ".join(IMAGE_SUFFIXES + REENCODED_SUFFIXES), sum(part.others.total() for part in found)
        raise UserError(f"image folder {source} holds no image among {others} files; allowed: {allowed}")


def _class_names(source: Path, flat: Found, listed: dict[str, Found]) -> tuple[str, ...] | None:
    inside = sum(len(part.names) for part in listed.values())
    if not inside:
        return None
    if flat.names:
        raise UserError(
            f"{source} holds {len(flat.names)} images itself and {inside} in sub-folders; "
            "allowed: all in class folders (labels), or all directly in it (no labels)"
        )
    return tuple(sorted(name for name, part in listed.items() if part.names))
