"""Five hundred steps hold no more at their end than at their beginning: nothing grows, in tensors, in C or in Python.

`python -m pytest -m prove tests/prove/test_soak.py` writes docs/measurements/soak.json and soak.md.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fdscale.build.networks import prepare_teacher
from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.settings import TeacherSettings
from fdscale.data.batches import Batch
from fdscale.distill.distiller import Distiller, Lesson
from fdscale.distill.layout import TokenLayout
from fdscale.distill.targets import TargetMaker
from fdscale.students.geometry import SwinV2Geometry
from fdscale.students.student import build_student, set_activation_checkpointing
from fdscale.training.engine import Connection, set_learning_rate, start_engine
from fdscale.training.json_lines import JsonLines
from fdscale.training.loop import train_step
from fdscale.training.optim import Schedule, adamw, parameter_groups
from fdscale.training.sharding import place
from fdscale.training.sinks import Sinks
from tests.prove.memory import allocated_by_c, live_storages, python_blocks
from tests.prove.page import Page

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1500)]

STEPS, WARM_UP, EVERY, ROWS = 500, 100, 5, 4  # what is held is counted after every fifth step
BLOCK, STUDENTS_T = 10, 2.447  # for the six degrees of freedom of eight blocks
SERIES = ("live tensors, bytes", "malloc, bytes", "Python blocks")
STUDENT = SwinV2Geometry(32, (2, 2), (2, 4), window_size=4, image_size=32, extra_norm_period=2)
SMALL = {"embed_dim": 64, "depth": 3, "num_heads": 2, "patch_size": 8}
TEACHER = TeacherSettings(name="dino_vit_s16", weights="random", image_size=32, geometry=SMALL)


def soak(connection: Connection, placement: Any, folder: str) -> list[list[int]]:
    """What this rank holds after every fifth step: tensors, malloc, Python, in a table that was allocated before."""
    json = load_deepspeed_json("laptop") | {"train_micro_batch_size_per_gpu": ROWS}
    student = build_student(STUDENT, 0.2, seed=1)
    set_activation_checkpointing(student, "blocks")
    teacher = prepare_teacher(TEACHER, "random", torch.float32)
    targets = TargetMaker(TokenLayout(teacher.grid, 1), TokenLayout(student.grid, 0), prefix_tokens="drop")
    distiller = Distiller(student, student.width, [Lesson("teacher", teacher.width, targets)], beta=2.0)
    teacher = place(teacher, placement, json, connection)
    optimizer = adamw(parameter_groups(distiller, 0.05, set()), 1e-3, (0.9, 0.999), 1e-8)
    engine = start_engine(distiller, optimizer, json, 1, clip=3.0)
    sinks = Sinks([JsonLines(Path(folder) / f"metrics{connection.rank.rank}.jsonl")])
    schedule = Schedule(STEPS, 10, peak=1e-3)
    table = torch.zeros(STEPS // EVERY, len(SERIES), dtype=torch.int64)

    def terms(engine: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        pixels = torch.rand(ROWS, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        draws = torch.rand(student.drop_path_sites, ROWS) if student.drop_path_sites else None
        return engine(pixels, [targets(teacher(pixels))], draws)

    unused = torch.zeros(ROWS)
    batch = Batch(unused, unused, unused, slice(0, ROWS), [])
    for step in range(STEPS):
        set_learning_rate(engine, schedule, step)
        row = train_step(engine, terms, [batch], step)
        values = torch.stack(list(row.values()))
        dist.all_reduce(values)
        sinks.write(step, dict(zip(row, values.tolist(), strict=True)))
        if step % EVERY == EVERY - 1:
            held = table[step // EVERY]
            held[0] = sum(live_storages().values())
            held[1], held[2] = allocated_by_c(), python_blocks()
    sinks.close()
    engine.destroy()
    return table.tolist()


def slope(values: list[float]) -> tuple[float, float]:
    """Growth a step of 80 values that are `EVERY` steps apart, by least squares, and half its 95 % confidence interval.

    Of the means of eight blocks: neighbouring values are no independent ones, and would make the interval too narrow.
    """
    blocks = [statistics.fmean(values[i : i + BLOCK]) for i in range(0, len(values), BLOCK)]
    rise, at_zero = statistics.linear_regression(range(len(blocks)), blocks)
    left = sum((block - at_zero - rise * i) ** 2 for i, block in enumerate(blocks)) / (len(blocks) - 2)
    spread = sum((i - (len(blocks) - 1) / 2) ** 2 for i in range(len(blocks)))
    steps = BLOCK * EVERY
    return rise / steps, STUDENTS_T * math.sqrt(left / spread) / steps


@pytest.fixture(scope="module")
def page() -> Page:
    return Page("soak")


@pytest.mark.parametrize("placement", ["zero3", "replicated"])
def test_nothing_grows(
    placement: str, page: Page, fresh_ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch's flight recorder keeps the last 2000 collectives: it would fill up for some 250 steps, and then no more
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "0")
    # malloc counts what each thread keeps for its next calls as given out: up to 230 kB, filled for hundreds of steps
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
    row = page.row(f"{placement} teacher, zero3 student", lambda: _measured(fresh_ranks(2), placement, tmp_path))
    _write(page)
    for name in SERIES:
        for found in row[name]:
            assert abs(found["slope"]) <= found["half_interval"], f"{name} grows: {found}"


def _measured(ranks: Any, placement: str, folder: Path) -> dict[str, Any]:
    tables = ranks(soak, placement, str(folder), timeout=1200)
    row: dict[str, Any] = {"steps": STEPS, "warm_up": WARM_UP, "every": EVERY, "held": tables}
    for column, name in enumerate(SERIES):
        row[name] = [_found([line[column] for line in table[WARM_UP // EVERY :]]) for table in tables]
    return row


def _found(values: list[float]) -> dict[str, float]:
    growth, half = slope(values)
    return {"slope": round(growth, 3), "half_interval": round(half, 3), "first": values[0], "last": values[-1]}


def _write(page: Page) -> None:
    how = (
        f"Growth a step over steps {WARM_UP} to {STEPS} on each of two ranks, with its 95 % confidence interval: live "
        "tensor storages (after a garbage collection), what malloc has given out (mallinfo2), blocks of Python's "
        "allocator."
    )
    lines = [
        {"case": key, "rank": str(rank), **{name: _told(row[name][rank]) for name in SERIES}}
        for key, row in page.rows.items()
        for rank in range(2)
    ]
    page.write_table("Soak", how, ("case", "rank", *SERIES), lines)


def _told(found: dict[str, float]) -> str:
    return f"{found['slope']:+.1f} ± {found['half_interval']:.1f}"
