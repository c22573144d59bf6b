"""The class numbers of other shards, so that a held-out split is numbered as its training split; no torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fdscale.config.errors import UserError
from fdscale.data.index import load_index
from fdscale.data.packing.sources import Files
from fdscale.data.scan import NO_LABEL

LOG = logging.getLogger(__name__)


def numbered_as(files: Files, shards: Path, source: str) -> Files:
    """The same images with the numbers of other shards' classes; the log tells those of which there are none.

    Raises UserError where either has no classes, and for a class that the shards do not know.
    """
    known, found = load_index(shards).classes, files.classes
    if known is None or found is None:
        what = f"shards {shards} name no classes" if known is None else f"{source} has no class folders"
        raise UserError(f"{what}; without --classes-of, class folders are numbered by name and flat ones not at all")
    numbers = {name: number for number, name in enumerate(known)}
    if unknown := [name for name in found if name not in numbers]:
        raise UserError(
            f"{source} has class folders that {shards} does not know: {few(unknown)}; remove or rename them"
        )
    if missing := sorted(set(known) - set(found)):
        LOG.warning("%s: no images of %s; the other classes keep their numbers", source, few(missing))
    return _renumbered(files, [numbers[name] for name in found], known)


def _renumbered(files: Files, numbers: Sequence[int], classes: tuple[str, ...]) -> Files:
    rows = files.rows.copy()
    rows["label"] = np.array([*numbers, NO_LABEL], np.int32)[rows["label"]]  # NO_LABEL, -1, stays
    return replace(files, rows=rows, classes=classes)


def few(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
