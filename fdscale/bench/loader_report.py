"""What is told of the loader's rates, on photos or on shards of one's own."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from fdscale.bench.loader import BATCH, SIZE, WARM_UP, WAYS, loader_rates
from fdscale.bench.parts import Row
from fdscale.bench.photos import photo_shards
from fdscale.bench.ratios import Ratio
from fdscale.bench.tables import Table
from fdscale.config.errors import UserError
from fdscale.data.index import load_index

PHOTOS, LEAST = 4000, 2 * WARM_UP * BATCH
MUSTS = {"webdataset": 1.0, "bare": 0.9, "decode": None}
HOW = f"""Views of {SIZE} pixels by so many processes, the ways in turns, medians. The bare loop decodes, crops, resizes
and flips with Pillow what it holds in memory, and hands nothing over; the loader's images arrive in the rank. Decoding
alone is the ceiling."""


def refuse_too_few(workers: int, images: int, repeats: int) -> None:
    """Raises UserError for fewer processes, images or turns than can be timed."""
    if workers < 1 or repeats < 1 or images < LEAST:
        raise UserError(f"bench loader: allowed: --workers and --repeats from 1, --images from {LEAST}")


def loader_row(shards: Path | None, workers: int, images: int, repeats: int, photos: int = PHOTOS) -> Row:
    """Images/s of each way on these shards, else on photos. Raises UserError for shards without an index."""
    if shards is not None:
        return loader_rates(load_index(shards), workers, images, repeats)
    with tempfile.TemporaryDirectory() as folder:
        return loader_rates(photo_shards(Path(folder), photos, 4 * workers), workers, images, repeats)


def loader_tables(rows: Mapping[str, Row]) -> list[Table]:
    """A line for each way of each number of processes."""
    lines = []
    for name, row in rows.items():
        for way, told in WAYS.items():
            ratio = row.get(f"to {way}")
            lines.append([f"{name}, {told}", f"{row[way]:.0f}", "" if ratio is None else f"{ratio:.2f}"])
    size = next(iter(rows.values()))["bytes_per_image"]
    return [Table(f"Views of images of {size / 1000:.0f} kB", HOW, ["", "images/s", "fdscale's to it"], lines)]


def loader_ratios(name: str, row: Row) -> list[Ratio]:
    """fdscale's rate beside each other way's."""
    return [Ratio(f"{name}: to {WAYS[way]}", row[f"to {way}"], must) for way, must in MUSTS.items()]
