"""Rates at which a run's checkpoint is saved and loaded, beside the plain writing and reading of the same bytes."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fdscale.bench.pairs import Pair
from fdscale.bench.parts import Row
from fdscale.bench.planned import own_geometry_of
from fdscale.bench.product import started
from fdscale.bench.ratios import Ratio
from fdscale.bench.tables import Table
from fdscale.training.attempts import Attempt
from fdscale.training.checkpoint import Checkpoints
from fdscale.training.engine import Connection
from fdscale.training.manifest import drop_from_memory, files_of

WAYS = {
    "save": "save: written, hashed, fsynced, committed",
    "write": "write and fsync of the same files",
    "load": "load: hashes checked, engine filled",
    "read": "read of the same files",
}
HOW = """MB/s of the bytes on the disk, medians of turns; before loading and reading the files are dropped from the page
cache, where the file system heeds that. One rank, one process, the same disk."""


def checkpoint_row(pair: Pair, folder: Path, repeats: int, connection: Connection) -> Row:
    """Seconds of saving, plain writing, loading and plain reading in turns, in `folder`, which has to exist."""
    settings = pair.settings(1)
    side = own_geometry_of(settings.student).image_size
    engine, step = started(settings, 1, bf16=True, device=connection.device)
    step(torch.rand(1, 3, side, side))  # the optimizer has its moments
    (folder / "0001").mkdir()
    checkpoints = Checkpoints(Attempt(folder / "0001"), connection, keep=1)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(1, repeats + 1):
        seconds["save"].append(_seconds(lambda at=turn: checkpoints.save(engine, at, {"step": at})))  # type: ignore[misc]
        saved = next((folder / "0001").rglob("manifest.json")).parent
        files = [saved / file for file in files_of(saved)]
        contents = [file.read_bytes() for file in files]
        seconds["write"].append(_seconds(lambda of=contents: _write(folder / "plain", of)))  # type: ignore[misc]
        del contents
        seconds["load"].append(_cold(files, lambda: checkpoints.load(engine)))
        seconds["read"].append(_cold(files, lambda of=files: _read(of)))  # type: ignore[misc]
    return {"bytes": sum(file.stat().st_size for file in files), "deepspeed": settings.deepspeed, "seconds": seconds}


def _seconds(action: Callable[[], object]) -> float:
    """Of an action on a disk that has nothing else to write."""
    os.sync()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _cold(files: list[Path], action: Callable[[], object]) -> float:
    os.sync()
    for file in files:
        drop_from_memory(file)
    return _seconds(action)


def _write(folder: Path, contents: list[bytes]) -> None:
    """Into new files, as a save does; what was there before is removed first, as a save of one that is kept does."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, content in enumerate(contents):
        with (folder / str(number)).open("wb", buffering=0) as handle:
            handle.write(content)
            os.fsync(handle.fileno())


def _read(files: list[Path]) -> None:
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.read(2**24):
                pass


def checkpoint_tables(rows: Mapping[str, Row]) -> list[Table]:
    """A line for each way."""
    lines = []
    for name, row in rows.items():
        for way, told in WAYS.items():
            rate = row["bytes"] / statistics.median(row["seconds"][way]) / 1e6
            lines.append([f"{name}, {told}", f"{row['bytes'] / 1e9:.2f}", f"{rate:,.0f}"])
    return [Table("A checkpoint", HOW, ["", "GB", "MB/s"], lines)]


def checkpoint_ratios(name: str, row: Row) -> list[Ratio]:
    """What saving and loading reach of the disk's own rate."""
    seconds = {way: statistics.median(times) for way, times in row["seconds"].items()}
    return [
        Ratio(f"{name}: save to write", seconds["write"] / seconds["save"], must=0.7),
        Ratio(f"{name}: load to read", seconds["read"] / seconds["load"]),
    ]
