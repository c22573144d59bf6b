"""Images/s of the loader beside plain webdataset with torchvision, and beside decode, crop and flip alone.

`python -m pytest -m prove tests/prove/test_loader_rate.py` writes docs/measurements/loader.json and loader.md.
"""

from __future__ import annotations

from typing import Any

import pytest

from fdscale.bench.loader import WAYS, loader_rates
from fdscale.bench.photos import photo_shards
from fdscale.data.index import Index
from tests.prove.page import Page

pytestmark = [pytest.mark.prove, pytest.mark.timeout(3000)]

PHOTOS, IMAGES, REPEATS = 4000, 2560, 7
COLUMNS = ["processes", *WAYS.values(), "to webdataset", "to the bare loop", "to decoding"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return photo_shards(tmp_path_factory.mktemp("photos"), PHOTOS, 8)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_loader_costs_little_beside_decoding(photos: Index, workers: int) -> None:
    page = Page("loader", ("fdscale/data", "fdscale/bench/loader.py", "fdscale/bench/photos.py"))
    page.row(f"{workers} workers", lambda: loader_rates(photos, workers, IMAGES, REPEATS))
    page.write_table(
        "The loader",
        f"Images/s of so many processes that make views of 224 pixels of {PHOTOS} photos, 500 x 375, JPEG quality 95, "
        f"on a machine of 2 cores; medians of {REPEATS} turns of {IMAGES} images, the ways in turns, each ratio the "
        "median over the turns. The bare loop decodes, crops, resizes and flips with Pillow what it holds in memory, "
        "and hands nothing over; the loader's images arrive in the rank. `python -m fdscale.bench loader --shards "
        "FOLDER` measures on others.",
        COLUMNS,
        [line(row) for row in page.rows.values()],
    )
    row = page.rows[f"{workers} workers"]
    assert row["to webdataset"] >= 1.0
    assert row["to bare"] >= 0.9


def line(row: dict[str, Any]) -> dict[str, str]:
    told = [str(row["workers"]), *(f"{row[name]:.0f}" for name in WAYS)]
    told += [f"{row[f'to {name}']:.2f}" for name in ("webdataset", "bare", "decode")]
    return dict(zip(COLUMNS, told, strict=True))
