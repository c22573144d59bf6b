"""Bytes of a rank against the ZeRO arithmetic, on 1, 2 and 4 ranks, for a divided student and its divided teacher.

`python -m pytest -m prove tests/prove/test_memory.py` writes docs/measurements/memory.json, memory.md and memory.png.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fdscale.build.networks import prepare_teacher
from fdscale.config.settings import TeacherSettings
from fdscale.training.engine import Connection
from fdscale.training.sharding import place
from tests.prove.memory import live_storages
from tests.prove.networks import (
    PERSISTENT,
    distiller_of,
    engine_of,
    one_step,
    parameter_sizes,
    shipped_zero,
    some_batch,
)
from tests.prove.page import Page

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1500)]

FP32 = 4
# weight, gradient, DeepSpeed's second fp32 copy, two Adam moments: all of them divided
STUDENT_BYTES = 5 * FP32
PAIRS = {"vit_b16": "dino_vit_b16", "swinv2_t": "swinv2_t"}  # student <- teacher, each of 25 M parameters or more


def measure(connection: Connection, student_name: str, threshold: int) -> dict[str, Any]:
    """Bytes that the student's engine adds to this rank after two steps, then those that its teacher adds."""
    zero = shipped_zero("laptop") | {"stage3_param_persistence_threshold": threshold}
    before = live_storages()
    distiller, student = distiller_of(student_name)
    engine = engine_of(distiller, zero)
    for step in range(2):
        one_step(engine, *some_batch(student, 1, seed=step))
    trained = _new_bytes(before)
    expected = student_arithmetic(distiller, connection.rank.world_size, threshold, zero["reduce_bucket_size"])
    before = live_storages()
    settings = TeacherSettings(name=PAIRS[student_name], weights="random", image_size=64)
    teacher = prepare_teacher(settings, "random", torch.float32)
    elements = sum(parameter.numel() for parameter in teacher.parameters())
    frozen_expected = teacher_arithmetic(teacher, connection.rank.world_size, threshold)
    json = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    teacher = place(teacher, "zero3", json, connection)
    for _ in range(2):
        teacher(torch.rand(1, 3, 64, 64))
    frozen = _new_bytes(before)
    engine.destroy()
    return {
        "parameters": sum(parameter_sizes(distiller)),
        "student_bytes": trained,
        "student_arithmetic": expected,
        "teacher_parameters": elements,
        "teacher_bytes": frozen,
        "teacher_arithmetic": frozen_expected,
    }


def _new_bytes(before: dict[int, int]) -> int:
    return sum(size for address, size in live_storages().items() if address not in before)


def student_arithmetic(module: nn.Module, ranks: int, threshold: int, bucket: int) -> int:
    """Each tensor's share, rounded up, in five fp32 copies; persistent tensors whole beside it; buckets and buffers.

    `reduce_bucket_size` elements are allocated once, for gradients on their way (`contiguous_gradients`).
    """
    sizes = parameter_sizes(module)
    shares = sum(math.ceil(size / ranks) for size in sizes)
    return shares * STUDENT_BYTES + _persistent(sizes, ranks, threshold) * FP32 + bucket * FP32 + _buffers(module)


def _persistent(sizes: list[int], ranks: int, threshold: int) -> int:
    """Elements that stay whole beside their shares; on one rank the share is the whole."""
    return sum(math.ceil(size / ranks) * ranks for size in sizes if size <= threshold) if ranks > 1 else 0


def teacher_arithmetic(teacher: nn.Module, ranks: int, threshold: int) -> int:
    """Each of the backbone's tensors' share, rounded up, once; what is persistent, the final norm and buffers whole."""
    backbone = [parameter.numel() for parameter in teacher.backbone.parameters()]  # type: ignore[union-attr, operator]
    whole = sum(parameter.numel() for parameter in teacher.parameters()) - sum(backbone)
    shares = sum(math.ceil(size / ranks) for size in backbone)
    return (shares + _persistent(backbone, ranks, threshold) + whole) * FP32 + _buffers(teacher)


def _buffers(module: nn.Module) -> int:
    return sum({b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in module.buffers()}.values())


@pytest.fixture(scope="module")
def page() -> Page:
    return Page("memory")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("threshold", [0, PERSISTENT])
@pytest.mark.parametrize("student", PAIRS)
def test_a_rank_holds_its_share(student: str, threshold: int, ranks: int, page: Page, fresh_ranks: Any) -> None:
    found = page.row(
        f"{student}, persistence threshold {threshold}, {ranks} ranks",
        lambda: {"ranks": ranks, "per_rank": fresh_ranks(ranks)(measure, student, threshold, timeout=400)},
    )["per_rank"]
    write_page(page)
    for row in found:
        assert row["parameters"] >= 25e6
        assert row["teacher_parameters"] >= 25e6
        assert row["student_bytes"] == pytest.approx(row["student_arithmetic"], rel=0.05)
        assert row["teacher_bytes"] == pytest.approx(row["teacher_arithmetic"], rel=0.05)


COLUMNS = ("case", "student MB", "arithmetic", "off by", "teacher MB", "arithmetic ", "off by ")


def write_page(page: Page) -> None:
    """The table and the plot, of the rank that is furthest from the arithmetic."""
    how = (
        "Bytes of distinct live tensor storages on a rank after two steps in fp32, of the rank that is furthest off; "
        "the arithmetic stands in tests/prove/test_memory.py."
    )
    page.write_table("Memory of a rank", how, COLUMNS, [_line(key, row["per_rank"]) for key, row in page.rows.items()])
    plot(page)


def _line(key: str, ranks: list[dict[str, Any]]) -> dict[str, str]:
    line = {"case": key}
    for who, space in (("student", ""), ("teacher", " ")):
        row = max(ranks, key=lambda row: abs(row[f"{who}_bytes"] - row[f"{who}_arithmetic"]))
        held, expected = row[f"{who}_bytes"], row[f"{who}_arithmetic"]
        line |= {f"{who} MB": f"{held / 1e6:.2f}", f"arithmetic{space}": f"{expected / 1e6:.2f}"}
        line[f"off by{space}"] = f"{held - expected:+,} B ({held / expected - 1:+.3%})"
    return line


def plot(page: Page) -> None:
    """Measured bytes as points over the arithmetic's lines, one panel for each pair."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    for panel, name in zip(panels, PAIRS, strict=True):
        rows = {
            r["ranks"]: r["per_rank"][0] for key, r in page.rows.items() if key.startswith(f"{name}, ") and " 0," in key
        }
        ranks = sorted(rows)
        for who, colour in (("student", "tab:blue"), ("teacher", "tab:orange")):
            panel.plot(
                ranks, [rows[n][f"{who}_arithmetic"] / 1e6 for n in ranks], color=colour, label=f"{who}, arithmetic"
            )
            panel.plot(
                ranks, [rows[n][f"{who}_bytes"] / 1e6 for n in ranks], "o", color=colour, label=f"{who}, measured"
            )
        panel.set(title=f"{name} taught by {PAIRS[name]}", xlabel="ranks", ylabel="MB on each rank", ylim=0)
        panel.set_xticks([1, 2, 4])
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(page.path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)
