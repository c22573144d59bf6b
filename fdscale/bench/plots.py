"""The figure of the steps; the one file of this room that knows matplotlib.

Colours are Okabe and Ito's (2008), which colour-blind readers tell apart; every bar has its name beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fdscale.bench.parts import Row
from fdscale.bench.step import AS_RANK, COMPILED, NO_ENGINE, OURS, PLAIN
from fdscale.bench.turns import paired

COLOURS = {OURS: "#0072B2", PLAIN: "#D55E00", COMPILED: "#E69F00", AS_RANK: "#F0E442", NO_ENGINE: "#009E73"}
OTHER = "#56B4E9"  # fdscale with other settings
NAMES = {
    OURS: "fdscale",
    PLAIN: "plain timm",
    COMPILED: "plain timm, compiled",
    AS_RANK: "the same, set as our ranks",
    NO_ENGINE: "fdscale, no engine",
}
WIDTH, PANEL, DPI, MIB = 7.2, 1.5, 300, 2**20
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "text.parse_math": False,  # names are shown as they are
}


def plot_steps(rows: Mapping[str, Row], file: Path) -> None:
    """For each pair its ways' images/s, a dot a turn and a bar to the median, and their peaks of memory beside."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, PANEL * len(rows) + 0.3), layout="constrained")
        panels = figure.subplots(len(rows), 2, squeeze=False, width_ratios=(3, 2))
        for (speed, memory), (name, row) in zip(panels, rows.items(), strict=True):
            ways = list(row["losses"])[::-1]
            _plot_speed(speed, ways, row)
            _plot_memory(memory, ways, row)
            speed.set_title(name, loc="left", fontweight="bold")
        panels[-1][0].set_xlabel("images/s (dots: turns), and how many times as fast fdscale is")
        panels[-1][1].set_xlabel("peak of a step beyond its states, MiB")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=DPI)


def _plot_speed(axes: Any, ways: list[str], row: Row) -> None:
    for place, way in enumerate(ways):
        rates = [row["images"] / seconds for seconds in row["seconds"][way]]
        axes.barh(place, statistics.median(rates), color=COLOURS.get(way, OTHER), height=0.65)
        axes.plot(rates, [place] * len(rates), "o", ms=2, mew=0, color="black", alpha=0.6)
        if OURS in row["seconds"] and way != OURS:
            factor = paired(row["seconds"][way], row["seconds"][OURS])
            axes.annotate(f"{factor:.2f}", (max(rates), place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(ways)), [NAMES.get(way, way) for way in ways])
    axes.margins(x=0.1)


def _plot_memory(axes: Any, ways: list[str], row: Row) -> None:
    peaks = row["peak_activation_bytes"]
    for place, way in enumerate(ways):
        axes.barh(place, peaks.get(way, 0) / MIB, color=COLOURS.get(way, OTHER), height=0.65)
    axes.set_yticks(range(len(ways)), [""] * len(ways))
