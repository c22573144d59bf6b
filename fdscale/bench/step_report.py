"""What is told of steps: seconds, rates beside the ceiling, factors, memory; and what they were to reach."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from fdscale.bench.parts import Row
from fdscale.bench.ratios import Ratio
from fdscale.bench.step import COMPILED, OURS, PLAIN
from fdscale.bench.tables import Table
from fdscale.bench.turns import ceiling, paired

MIB = 2**20
BF16_GAIN = 2.0  # where bf16 products are not so many times as fast as fp32's, only the part of the ceiling tells much
Bounds = tuple[float | None, float | None]  # must, aim
MUSTS: dict[str, dict[str, Bounds]] = {
    "vit_b16": {PLAIN: (1.1, 1.25), "ceiling": (None, 0.85)},
    "swinv2_t": {PLAIN: (1.35, 1.9), COMPILED: (1.1, None), "ceiling": (None, 0.6)},
    "swinv2_b": {PLAIN: (1.35, 1.9), COMPILED: (1.1, None), "ceiling": (None, 0.6), "peak": (0.7, 0.5)},
}
COLUMNS = ("pair, way", "s a step", "images/s", "TFLOP/s", "of the ceiling", "fdscale is faster by", "peak, MiB")
HOW = """Whole steps (teacher, student, backward, clipping, AdamW) of the same pixels, each way in a process of its
own that takes two steps in its turn, of which the second is timed; medians; the factor is the median over the turns.
"Compiled as a rank" has the large pages, and the floats of 1e-38 and less made 0, that our ranks set. Operations are
counted from the networks' shapes (two a multiply-accumulate of matrix products; teacher + 3 x student), as if no
branch were dropped, recomputation left out. Peak: the most bytes that the CPU allocator gave out in two steps beyond
what is held between them."""
CEILING = "The best square matrix product, timed in the same turns."


def step_tables(rows: Mapping[str, Row]) -> list[Table]:
    """A line for each way of each pair, and the ceilings."""
    lines = [line for name, row in rows.items() for line in _lines(name, row)]
    ceilings = [[name, *_ceilings(row)] for name, row in rows.items()]
    columns = ("pair", "bf16 TFLOP/s", "fp32 TFLOP/s", "bf16 to fp32")
    return [Table("Steps", HOW, COLUMNS, lines), Table("The ceiling", CEILING, columns, ceilings)]


def _lines(name: str, row: Row) -> list[list[str]]:
    seconds, memory = row["seconds"], row["peak_activation_bytes"]
    top, lines = ceiling(seconds, row["precision"]), []
    for way in row["losses"]:
        median, rate = statistics.median(seconds[way]), rate_of(row, way)
        factor = f"{paired(seconds[way], seconds[OURS]):.2f}" if OURS in seconds else ""
        told = [f"{median:.3f}", f"{row['images'] / median:.2f}", f"{rate:.2f}", f"{rate / top:.2f}", factor]
        lines.append([f"{name}, {way}", *told, f"{memory[way] / MIB:,.0f}" if way in memory else ""])
    return lines


def _ceilings(row: Row) -> list[str]:
    bf16, fp32 = (ceiling(row["seconds"], name) for name in ("bf16", "fp32"))
    enough = "" if bf16 >= BF16_GAIN * fp32 else ": below 2, this CPU gains little by bf16; the factors are its own"
    return [f"{bf16:.2f}", f"{fp32:.2f}", f"{bf16 / fp32:.1f}{enough}"]


def step_ratios(name: str, row: Row) -> list[Ratio]:
    """fdscale's step beside each other way's, its part of the ceiling, and its peak beside plain timm's."""
    seconds, memory, bounds = row["seconds"], row["peak_activation_bytes"], MUSTS.get(name, {})
    if OURS not in seconds:
        return []
    speeds = {way: paired(seconds[way], seconds[OURS]) for way in row["losses"] if way != OURS}
    ratios = [Ratio(f"{name}: speed to {way}", speed, *bounds.get(way, (None, None))) for way, speed in speeds.items()]
    part = rate_of(row, OURS) / ceiling(seconds, row["precision"])
    ratios.append(Ratio(f"{name}: part of the ceiling", part, *bounds.get("ceiling", (None, None))))
    if {OURS, PLAIN} <= memory.keys():
        part, (must, aim) = memory[OURS] / memory[PLAIN], bounds.get("peak", (None, None))
        ratios.append(Ratio(f"{name}: peak to plain", part, must, aim, better="lower"))
    return ratios


def rate_of(row: Row, way: str) -> float:
    """TFLOP/s of the networks' counted operations."""
    return float(row["images"] * row["flops_per_image"] / statistics.median(row["seconds"][way]) / 1e12)
