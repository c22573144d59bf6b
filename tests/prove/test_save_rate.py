"""A checkpoint is committed at nearly the rate at which the same bytes go to the same disk without any ado.

`python -m pytest -m prove tests/prove/test_save_rate.py -s` writes docs/measurements/save_rate.json and save_rate.md.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fdscale.training.checkpoint import Checkpoints
from fdscale.training.engine import Connection, start_engine
from fdscale.training.manifest import files_of, writer_of
from fdscale.training.optim import adamw, parameter_groups
from tests.prove.page import Page
from tests.prove.reliability import write_reliability
from tests.training.first_attempt import first_attempt

pytestmark = [pytest.mark.prove, pytest.mark.timeout(900)]

WIDTH, LAYERS, PAIRS = 4096, 5, 7  # 84 M weights, 12 bytes each under ZeRO-3: 1.0 GB
GOAL = 0.7
JSON = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def trained_engine() -> Any:
    """An engine after one step: the optimizer has its moments."""
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    engine = start_engine(module, adamw(parameter_groups(module, 0.05, ()), 1e-3, (0.9, 0.999), 1e-8), JSON, 1, 1.0)
    engine.backward(engine(torch.randn(1, WIDTH)).square().mean())
    engine.step()
    return engine


def pairs(connection: Connection, folder: str, count: int) -> dict[str, Any]:
    """Seconds of `count` saves and of as many plain writes of the same bytes, in turn, after one of each unmeasured."""
    engine, checkpoints = trained_engine(), Checkpoints(first_attempt(folder), connection, keep=1)
    checkpoints.save(engine, 1, {"step": 1})
    saved = next(Path(folder).rglob("manifest.json")).parent
    size = sum((saved / file).stat().st_size for file in files_of(saved))
    mine = [file for file in files_of(saved) if writer_of(file, connection.rank.world_size) == connection.rank.rank]
    contents = [(saved / file).read_bytes() for file in mine]
    raw = partial(write_plainly, Path(folder) / f"raw_{connection.rank.rank}", contents)
    raw()
    seconds: dict[str, list[float]] = {"save": [], "raw": []}
    for step in range(2, count + 2):
        seconds["save"].append(timed(connection, partial(checkpoints.save, engine, step, {"step": step})))
        seconds["raw"].append(timed(connection, raw))
    engine.destroy()
    return {"bytes": size, **seconds}


def timed(connection: Connection, action: Callable[[], object]) -> float:
    """Seconds until the last rank is done, on a disk that has nothing else to write."""
    os.sync()
    connection.barrier()
    began = time.perf_counter()
    action()
    connection.barrier()
    return time.perf_counter() - began


def write_plainly(folder: Path, contents: list[bytes]) -> None:
    """Into new files, as a save does; what was there before is removed first, as a save of one that is kept does."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, content in enumerate(contents):
        with (folder / str(number)).open("wb", buffering=0) as handle:
            handle.write(content)
            os.fsync(handle.fileno())


def measured(ranks: Any, folder: Path) -> dict[str, Any]:
    found = ranks(pairs, str(folder), PAIRS, timeout=800)[0]
    rates = {name: found["bytes"] / statistics.median(found[name]) / 1e6 for name in ("save", "raw")}
    ratios = [raw / save for save, raw in zip(found["save"], found["raw"], strict=True)]
    return {**found, "rates": rates, "ratios": ratios, "ratio": statistics.median(ratios)}


def test_a_save_costs_little_more_than_its_bytes(fresh_ranks: Any, tmp_path: Path) -> None:
    page = Page("save_rate")
    row = page.row("2 ranks, zero3", lambda: measured(fresh_ranks(2), tmp_path))
    how = (
        "Save, hash, fsync and manifest of one checkpoint by two ranks, against write and fsync of the same bytes in "
        f"as many files by the same ranks: medians of {PAIRS} pairs, taken in turn on the same disk."
    )
    line = {
        "case": "2 ranks, zero3",
        "size": f"{row['bytes'] / 1e9:.2f} GB",
        "committed": f"{row['rates']['save']:,.0f} MB/s",
        "raw": f"{row['rates']['raw']:,.0f} MB/s",
        "ratio": f"{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})",
    }
    page.write_table("Rate of a save", how, tuple(line), [line])
    write_reliability()
    print(line)
    assert row["ratio"] >= GOAL
