"""Images as they are found, in little memory: names in one list, numbers in arrays."""

from __future__ import annotations

import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fdscale.data.packing.sources import ROW, mark_of
from fdscale.data.scan import LARGEST_IMAGE, NO_LABEL, printable

TOLD = 5  # kinds of files left out

LOG = logging.getLogger(__name__)


class Found(NamedTuple):
    """Images found in one place: names, `ROW`s, those left out (`NAME: why`), and the suffixes of other files."""

    names: list[str]
    rows: NDArray[np.void]
    left_out: list[str]
    others: Counter[str]


class Listing:
    """Takes down images one by one."""

    def __init__(self) -> None:
        self.others: Counter[str] = Counter()
        self._names: list[str] = []
        self._columns = {"label": array("i"), "offset": array("q"), "size": array("q"), "mark": array("Q")}
        self._left_out: list[str] = []

    def add(self, name: str, offset: int, size: int, file: os.stat_result, label: int = NO_LABEL) -> None:
        """Take down an image of `size` bytes from `offset` of a file on."""
        if size > LARGEST_IMAGE:
            self.leave_out(name, f"{size:,} bytes; allowed: {LARGEST_IMAGE:,}")
            return
        self._names.append(name)
        columns = self._columns
        columns["label"].append(label)
        columns["offset"].append(offset)
        columns["size"].append(size)
        columns["mark"].append(mark_of(name, size, file))

    def leave_out(self, name: str, why: str) -> None:
        """Take down an image that is not packed, and why."""
        self._left_out.append(f"{printable(name)}: {why}")

    def found(self) -> Found:
        """What was taken down, sorted by name."""
        rows = np.zeros(len(self._names), ROW)
        for column, values in self._columns.items():
            rows[column] = values
        order = sorted(range(len(rows)), key=self._names.__getitem__)
        return Found([self._names[i] for i in order], rows[order], self._left_out, self.others)


def joined(found: Sequence[Found], files: Iterable[int] | None = None) -> Found:
    """All of it in that order; the `file` of each is given, or every image is a file of its own."""
    names = [name for part in found for name in part.names]
    rows = np.concatenate([part.rows for part in found]) if found else np.zeros(0, ROW)
    counts = [len(part.names) for part in found]
    rows["file"] = np.arange(len(rows)) if files is None else np.repeat(list(files), counts)
    left_out = [line for part in found for line in part.left_out]
    return Found(names, rows, left_out, sum((part.others for part in found), Counter()))


def tell_others(source: Path, found: Found) -> None:
    """Log how many files of the source are no images, and of what kinds."""
    if found.others:
        told = [
            f"{count:,} {printable(suffix) or 'without suffix'}" for suffix, count in found.others.most_common(TOLD)
        ]
        kinds = ", ".join(told) + (", …" if len(found.others) > TOLD else "")
        LOG.warning("%s: files that are not images are left out: %d (%s)", source, found.others.total(), kinds)
