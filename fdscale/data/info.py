"""What a shard folder holds, as a person or a script reads it, without decoding it; no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fdscale.data.images import BadImage, ImageReader
from fdscale.data.index import Index
from fdscale.data.scan import NO_LABEL

LOOKED_AT = 256  # images whose headers are read
LOOKED_INTO = 16  # shards that they are read from


@dataclass(frozen=True)
class Info:
    """A shard folder in figures.

    `class_sizes`: images by class name, or number; `neighbours`: share of images whose next one has their label, and
    `shuffled`, what it would be in random order. `formats`, and `sides` (median width, median height, smallest and
    largest side, in pixels), are of the `looked_at` images whose headers were read.
    """

    samples: int
    shards: int
    bytes: int
    image_bytes: float
    unlabelled: int
    class_names: int | None
    class_sizes: dict[str, int]
    neighbours: float
    shuffled: float
    formats: dict[str, int]
    sides: tuple[int, int, int, int] | None
    looked_at: int
    unreadable: tuple[str, ...]
    index_bytes: int

    @property
    def sorted_by_class(self) -> bool:
        """Whether neighbours are of one class more than halfway from chance to always."""
        return len(self.class_sizes) > 1 and self.neighbours > (1 + self.shuffled) / 2


def info(index: Index, shards: int = LOOKED_INTO) -> Info:
    """The figures of an index, with the headers of a few images out of at most so many shards."""
    rows, labels = index.samples, np.asarray(index.samples["label"])
    numbers, counts = np.unique(labels[labels != NO_LABEL], return_counts=True)
    same = (labels[1:] == labels[:-1]) & (labels[1:] != NO_LABEL)
    formats, sizes, unreadable = _headers(index, shards)
    return Info(
        samples=len(index),
        shards=len(index.shards),
        bytes=sum(shard.bytes for shard in index.shards),
        image_bytes=float(rows["size"].mean()),
        unlabelled=int((labels == NO_LABEL).sum()),
        class_names=None if index.classes is None else len(index.classes),
        class_sizes=dict(zip(_class_names(index, numbers.tolist()), counts.tolist(), strict=True)),
        neighbours=float(same.mean()) if len(same) else 0.0,
        shuffled=float(((counts / max(1, counts.sum())) ** 2).sum()),
        formats=formats,
        sides=_sides(sizes),
        looked_at=len(sizes) + len(unreadable),
        unreadable=tuple(unreadable),
        index_bytes=rows.nbytes,
    )


def info_table(found: Info, title: str) -> Table:
    """The figures as two columns."""
    table = Table(title=Text(title), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _lines(found):
        table.add_row(name, Text(text))
    return table


def as_json(found: Info) -> dict[str, Any]:
    """The figures for a script, and whether the shards are sorted by class."""
    return {**vars(found), "sorted_by_class": found.sorted_by_class}


def _headers(index: Index, shards: int) -> tuple[dict[str, int], list[tuple[int, int]], list[str]]:
    """Formats, (width, height) and what cannot be opened of a few images, evenly out of a few shards."""
    chosen = np.unique(np.linspace(0, len(index.shards) - 1, min(shards, len(index.shards))).astype(int))
    each = -(-LOOKED_AT // len(chosen))
    formats: Counter[str] = Counter()
    sizes, unreadable, reader = [], [], ImageReader(index)
    for shard in chosen:
        first, last = index.starts[shard : shard + 2].tolist()
        for sample in np.unique(np.linspace(first, last - 1, min(each, last - first)).astype(int)).tolist():
            try:
                kind, size = reader.seen(sample, lambda image: (image.format or "", image.size))
                formats[kind] += 1
                sizes.append(size)
            except BadImage as error:
                unreadable.append(str(error))
    reader.close()
    return dict(formats.most_common()), sizes, unreadable


def _class_names(index: Index, numbers: list[int]) -> list[str]:
    return [str(number) if index.classes is None else index.classes[number] for number in numbers]


def _sides(sizes: list[tuple[int, int]]) -> tuple[int, int, int, int] | None:
    if not sizes:
        return None
    both = np.array(sizes)
    width, height = np.median(both, axis=0).astype(int).tolist()
    return width, height, int(both.min()), int(both.max())


def _lines(found: Info) -> list[tuple[str, str]]:
    lines = [
        ("samples", f"{found.samples:,} in {found.shards:,} shard{'s' * (found.shards != 1)}, {decimal(found.bytes)}"),
        ("an image", f"{decimal(round(found.image_bytes))} on average{_pixels(found)}"),
        ("labels", _labels(found)),
        ("order", _order(found)),
        ("index", f"{decimal(found.index_bytes)}, mapped: the processes of a node share it"),
    ]
    if found.unreadable:
        few = "; ".join(found.unreadable[:3])
        lines.append(("bad", f"{len(found.unreadable)} of {found.looked_at} looked at: {few}; `fdscale shards verify`"))
    return lines


def _pixels(found: Info) -> str:
    if found.sides is None:
        return ""
    width, height, smallest, largest = found.sides
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.formats.items())
    return f"; of {found.looked_at}: {kinds}, median {width} x {height}, sides of {smallest} to {largest} pixels"


def _labels(found: Info) -> str:
    if not found.class_sizes:
        return "none"
    sizes = sorted((count, name) for name, count in found.class_sizes.items())
    (least, rarest), (most, commonest) = sizes[0], sizes[-1]
    named = "" if found.class_names is None else f" of {found.class_names} named"
    without = f"; {found.unlabelled:,} images without a label" if found.unlabelled else ""
    extremes = f"{least:,} ({rarest}) to {most:,} ({commonest}) images each"
    return f"{len(sizes):,} classes{named}, {extremes}{without}"


def _order(found: Info) -> str:
    if len(found.class_sizes) < 2:
        return "no classes to tell by"
    shares = f"{found.neighbours:.1%} of neighbours are of one class, {found.shuffled:.1%} if shuffled"
    if not found.sorted_by_class:
        return f"mixed: {shares}"
    return (
        f"SORTED BY CLASS: {shares}; a run mixes `data.shuffle` images at a time, and would see few classes in each "
        "batch: pack them again, which shuffles them once (`fdscale shards pack FOLDER OUTPUT`)"
    )
