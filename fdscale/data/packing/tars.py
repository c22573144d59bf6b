"""Images inside of tars, read where they lie: a tar of class tars, or a folder of class tars; no torch.

Nothing is unpacked: a member's name never becomes a path on the disk.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fdscale.config.errors import UserError
from fdscale.data.packing.listing import Found, Listing, joined, tell_others
from fdscale.data.packing.sources import Files, is_image_name, refuse_same_keys, suffix_of
from fdscale.data.processes import in_processes
from fdscale.data.scan import DAMAGED, BoundedHeader, check_end, mending, printable

CLASS_TAR = re.compile(r"n\d{8}\.tar")  # as ImageNet names its own: WordNet's number of the class
UNPACK = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bzip2", ".xz": "xz"}


class Inside(NamedTuple):
    """A tar, `size` bytes from `offset` of a file on, and the class that its name says (or "")."""

    path: Path
    offset: int
    size: int
    name: str = ""


def whole(path: Path, name: str = "") -> Inside:
    """All of a file as a tar."""
    return Inside(path, 0, _status(path).st_size, name)


def refuse_compressed(path: Path) -> None:
    """Raise UserError for a compressed tar: no image could be read by itself. It tells the command that unpacks it."""
    if program := UNPACK.get(path.suffix):
        target = path.with_suffix(".tar" if path.suffix == ".tgz" else "")
        raise UserError(
            f"{path} is compressed, so that no image in it can be read by itself; "
            f"unpack it once, then pack {target}: {program} -dc {path} > {target}"
        )


def is_tar(name: str) -> bool:
    """Whether a name says that it is a tar which is not compressed."""
    return name.endswith(".tar")


def tars_in(folder: Path) -> list[Path]:
    """The tars directly in a folder, by name; UserError for one that is a link out of it."""
    paths = sorted(path for path in folder.iterdir() if is_tar(path.name) and not path.name.startswith("."))
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path} leads out of {folder} to {path.resolve()}; name that folder, or copy it")
    return paths


def members(tar: Inside) -> Iterator[tarfile.TarInfo]:
    """The members of a tar that may lie inside of another one, none of them kept; UserError where it is damaged."""
    try:
        with tar.path.open("rb") as file:
            file.seek(tar.offset)
            with tarfile.open(fileobj=file, mode="r:", tarinfo=BoundedHeader) as opened:
                while (member := opened.next()) is not None:
                    opened.members = []  # type: ignore[attr-defined]  # it keeps them otherwise, and there may be millions
                    if member.offset_data + (member.size if member.isreg() else 0) > tar.offset + tar.size:
                        raise tarfile.ReadError(f"{printable(member.name)} reaches beyond its end")
                    yield member
                check_end(tar.path, opened.offset, tar.offset, tar.offset + tar.size)
    except DAMAGED as error:
        again = "download or copy it again" if tar.offset else mending(tar.path)
        raise UserError(f"{described(tar)} is not a whole tar ({error}); {again}") from error
    except OSError as error:
        raise UserError(f"{tar.path} cannot be read ({error.strerror}); make it readable") from error


def described(tar: Inside) -> str:
    """Where a tar lies, for messages."""
    return f"{tar.path}" if not tar.offset else f"{tar.path}:{printable(tar.name)}.tar"


def holds_tars(path: Path) -> bool:
    """Whether a tar's first file is a tar itself, compressed or not."""
    first = next((member.name for member in members(whole(path)) if member.isreg()), "")
    return is_tar(first) or Path(first).suffix in UNPACK


def is_plain(member: tarfile.TarInfo, listing: Listing) -> bool:
    """Whether a member is a file with bytes of its own; what else might be an image is left out by name."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        listing.leave_out(member.name, "its name leads out of the tar's folder")
    elif member.issym() or member.islnk():
        listing.leave_out(member.name, f"a link to {printable(member.linkname)}")
    elif member.isreg() and not member.issparse():
        return True
    elif not member.isdir():
        listing.leave_out(member.name, "a sparse or special file")
    return False


def tar_of_class_tars(path: Path, workers: int) -> Files:
    """A tar of tars, one per class and named after it: ImageNet's training images, or all of ImageNet-22K."""
    tars, listing = [], Listing()
    for member in members(whole(path)):
        if not is_plain(member, listing):
            continue
        base = member.name.rpartition("/")[2]
        if is_tar(base):
            tars.append(Inside(path, member.offset_data, member.size, base.removesuffix(".tar")))
        elif Path(base).suffix in UNPACK:
            raise UserError(f"{path}:{printable(member.name)} is compressed; allowed: tars of classes as they are")
        else:
            listing.others[suffix_of(base)] += 1
    return _of_classes(path, [path.name], tars, listing.found(), workers)


def folder_of_class_tars(folder: Path, workers: int) -> Files:
    """A folder of tars named after their classes, as unpacking ImageNet's archive once leaves them."""
    tars = [whole(path, path.name.removesuffix(".tar")) for path in tars_in(folder)]
    return _of_classes(folder, [tar.path.name for tar in tars], tars, Listing().found(), workers)


def list_class_tar(tar: Inside) -> Found:
    """The images of one class's tar, named as they would be in a folder of class folders."""
    listing, status, prefix = Listing(), _status(tar.path), f"{tar.name}/" if tar.name else ""
    for member in members(tar):
        if not is_plain(member, listing):
            continue
        name = prefix + member.name.removeprefix("./").removeprefix(prefix)
        if is_image_name(name):
            listing.add(name, member.offset_data, member.size, status)
        else:
            listing.others[suffix_of(name)] += 1
    return listing.found()


def _of_classes(source: Path, files: list[str], tars: Sequence[Inside], outer: Found, workers: int) -> Files:
    classes = sorted(tar.name for tar in tars)
    if twice := [name for name, following in pairwise(classes) if name == following]:
        raise UserError(f"{source} holds two tars of class {printable(twice[0])}; remove one")
    by_image = sorted(tars, key=lambda tar: f"{tar.name}/")  # the order of whole names, as in folders of images
    parts = list(in_processes(list_class_tar, by_image, workers))
    numbers = {name: number for number, name in enumerate(files)}
    found = joined([outer, *parts], [0, *(numbers[tar.path.name] for tar in by_image)])
    if not found.names:
        raise UserError(f"{source} holds no image in {len(tars):,} tars of classes")
    labels = {name: number for number, name in enumerate(classes)}
    found.rows["label"] = np.repeat([labels[tar.name] for tar in by_image], [len(part.names) for part in parts])
    tell_others(source, found)
    root = source if source.is_dir() else source.parent
    about = f"tars of {len(classes):,} classes in {source}: {len(found.names):,} images"
    lines = tuple(found.left_out)
    return refuse_same_keys(Files(root, files, found.names, found.rows, tuple(classes), about, lines))


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable") from error
