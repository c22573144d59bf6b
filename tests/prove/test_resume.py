"""Going on at 90 % of an epoch of ten million samples: how long until the first batch, what is read, what it takes.

`python -m pytest -m prove tests/prove/test_resume.py` writes docs/measurements/resume.json and resume.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fdscale.data.index import VERSION
from fdscale.data.scan import SAMPLE
from tests.prove.page import REPOSITORY, Page

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1800)]

SHARDS, IN_EACH = 10_000, 1000
BATCH, MICRO = 2048, 16
REPEATS = 5
CASES = {  # workers, and whether the files are out of the page cache
    "0 workers, files cached": (0, False),
    "2 workers, files cached": (2, False),
    "0 workers, nothing cached": (0, True),
}
COLUMNS = ["what", "index (s)", "first batch (s)", "both (s)", "read", "memory of its own", "mapped"]

READER = Path(__file__).with_name("resume_reader.py")


@pytest.fixture(scope="module")
def ten_million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of as many samples; its shards are sparse files, whose every image is a hole until it is asked for."""
    folder = tmp_path_factory.mktemp("ten-million")
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (192, 256, 3), dtype=np.uint8)).save(stream, "jpeg")
    photo = stream.getvalue()
    stride = 512 + -(-len(photo) // 512) * 512
    rows = np.zeros(SHARDS * IN_EACH, SAMPLE)
    rows["shard"] = np.repeat(np.arange(SHARDS), IN_EACH)
    rows["offset"] = 512 + np.tile(np.arange(IN_EACH) * stride, SHARDS)
    rows["size"], rows["crc"], rows["label"] = len(photo), zlib.crc32(photo), -1
    rows["key"] = np.arange(len(rows))
    size = IN_EACH * stride + 1024
    write_images(folder, rows, photo, size)
    write_index(folder, rows, size)
    return folder


def write_images(folder: Path, rows: np.ndarray, photo: bytes, size: int) -> None:
    """The shards, with the images of the step at 90 % in their places."""
    from fdscale.data.order import WindowedOrder

    order = WindowedOrder(np.arange(0, SHARDS * IN_EACH + 1, IN_EACH), BATCH, 0, 2**18)
    wanted = order.batch(order.steps_per_epoch * 90 // 100)[:MICRO]
    for shard in range(SHARDS):
        with (folder / f"shard-{shard:05}.tar").open("wb") as file:
            for sample in wanted[wanted // IN_EACH == shard]:
                file.seek(int(rows["offset"][sample]))
                file.write(photo)
            file.truncate(size)


def write_index(folder: Path, rows: np.ndarray, size: int) -> None:
    """As `fdscale shards index` writes it."""
    with (folder / "samples.npy").open("wb") as file:
        np.save(file, rows)
    content = (folder / "samples.npy").read_bytes()
    shards = [
        {"name": f"shard-{n:05}.tar", "samples": IN_EACH, "bytes": size, "sha256": "0" * 64} for n in range(SHARDS)
    ]
    described = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"version": VERSION, "samples": len(rows), "classes": None, "samples_file": described, "shards": shards}
    (folder / "index.json").write_text(json.dumps(manifest))


def resumed(folder: Path, workers: int, cold: bool) -> dict[str, Any]:
    """Medians of a few processes of their own, without what importing takes."""
    found = []
    for _ in range(REPEATS):
        if cold:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("1")
        command = [sys.executable, str(READER), str(folder), str(MICRO), str(BATCH), "90", str(workers)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY, timeout=300)
        found.append(json.loads(run.stdout))
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def test_a_run_goes_on_deep_in_an_epoch_of_ten_million_samples(ten_million: Path) -> None:
    page = Page("resume", ("fdscale/data", "tests/prove/test_resume.py"))
    cases = {
        "0 workers, files cached": (0, False),
        "2 workers, files cached": (2, False),
        "0 workers, nothing cached": (0, True),
    }
    rows = {name: page.row(name, lambda case=case: resumed(ten_million, *case)) for name, case in cases.items()}  # type: ignore[misc]
    page.write_table(
        "Going on at 90 % of an epoch of ten million samples",
        f"{SHARDS * IN_EACH:,} samples in {SHARDS:,} shards (sparse files), global batch {BATCH:,}, a rank with micro "
        f"batches of {MICRO}: from opening the index to the first micro batch, in a process that has imported what it "
        f"needs; medians of {REPEATS}. The index is 320 MB, mapped: its pages are shared by the processes of a node.",
        COLUMNS,
        [line(name, row) for name, row in rows.items()],
    )
    for row in rows.values():
        assert row["images"] == MICRO
        assert row["index_seconds"] + row["first_batch_seconds"] < 2
    assert rows["0 workers, files cached"]["bytes_read"] < 5e6  # the list of shards, and sixteen images


def line(name: str, row: dict[str, Any]) -> dict[str, str]:
    both = row["index_seconds"] + row["first_batch_seconds"]
    sizes = [f"{row[key] / 1e6:.1f} MB" for key in ("bytes_read", "own_bytes", "mapped_bytes")]
    told = [name, f"{row['index_seconds']:.2f}", f"{row['first_batch_seconds']:.2f}", f"{both:.2f}", *sizes]
    return dict(zip(COLUMNS, told, strict=True))
