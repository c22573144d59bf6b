"""The figures of the study; the one file of this room that knows matplotlib. Style and colours are the diagnostics'."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fdscale.diagnostics.intervals import mean_interval
from fdscale.diagnostics.plots import COLOURS, DASHES, DPI, MARKERS, STYLE, WIDTH

Array = NDArray[np.float64]
Lines = Mapping[str, tuple[Array, Array]]
"""Of each network the places (X,) and a line for each seed (S, X), NaN where it has no value."""

Points = Mapping[str, tuple[Array, Array]]
"""Of each network the blocks (P,) and values (P,) of all heads."""

GREY, SHADE = "#777777", "#ececec"


@contextmanager
def _figure(file: Path, height: float) -> Iterator[Figure]:
    """A figure that is saved as `file`.png and .svg."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure
        figure.savefig(file.with_suffix(".png"), dpi=DPI)
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})


def plot_accuracies(
    apart: Mapping[str, Mapping[int, float]],
    groups: Sequence[Mapping[str, Mapping[int, float]]],
    label: str,
    file: Path,
) -> None:
    """Networks side by side, by name: a dot a seed, those of a group joined, mean and 95 % interval beside.

    Those `apart` have a panel and a scale of their own.
    """
    with _figure(file, 3.0) as figure:
        first, second = figure.subplots(1, 2, width_ratios=(1, 4))
        _side_by_side(first, [apart])
        _side_by_side(second, groups)
        first.set_xlim(-0.5, 0.6)
        first.set_ylabel(label)


def _side_by_side(axes: Any, groups: Sequence[Mapping[str, Mapping[int, float]]]) -> None:
    place, names = 0.0, {}
    for group in groups:
        for seed in sorted({seed for values in group.values() for seed in values}):
            line = [(place + number, values[seed]) for number, values in enumerate(group.values()) if seed in values]
            axes.plot(*zip(*line, strict=True), color=GREY, lw=0.6, alpha=0.7, zorder=1)
        for number, (name, values) in enumerate(group.items()):
            _seeds_and_mean(axes, place, list(values.values()), number)
            names[place] = name
            place += 1
        place += 0.5
    axes.set_xticks(list(names), list(names.values()))
    axes.grid(axis="x", visible=False)


def _seeds_and_mean(axes: Any, place: float, values: list[float], number: int) -> None:
    colour = COLOURS[number % len(COLOURS)]
    axes.plot([place] * len(values), values, MARKERS[number], color=colour, ms=3, alpha=0.6, mew=0)
    if values:
        mean, low, high = mean_interval(values)
        ends = None if low is None or high is None else [[mean - low], [high - mean]]
        axes.errorbar([place + 0.14], [mean], ends, fmt=MARKERS[number], color=colour, ms=5.5, capsize=2.5, lw=1.2)


@dataclass(frozen=True)
class Paired:
    """A line of `plot_differences`: its name, its colour's number, differences by seed, and the sign expected."""

    name: str
    number: int
    values: Sequence[float]
    sign: int


def plot_differences(found: Sequence[Paired], label: str, file: Path) -> None:
    """A line each: dots, mean and 95 % interval, where zero is, and in grey its side that is expected."""
    with _figure(file, 0.6 + 0.27 * len(found)) as figure:
        axes = figure.subplots()
        axes.axvline(0, color="black", lw=0.8)
        for place, line in enumerate(found):
            _paired(axes, place, line)
        _expected(axes, found)
        axes.set_yticks(range(len(found)), [line.name for line in found])
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)


def _expected(axes: Any, found: Sequence[Paired]) -> None:
    """Shade the side of zero that each line is expected on."""
    left, right = axes.get_xlim()
    for place, line in enumerate(found):
        side = right if line.sign > 0 else left
        axes.fill_betweenx([place - 0.42, place + 0.42], 0, side, color=SHADE, lw=0, zorder=0)
    axes.set_xlim(left, right)


def _paired(axes: Any, place: int, line: Paired) -> None:
    colour, marker, values = COLOURS[line.number], MARKERS[line.number], line.values
    mean, low, high = mean_interval(values)
    axes.plot(values, [place + 0.22] * len(values), marker, color=colour, ms=2.6, alpha=0.55, mew=0)
    ends = None if low is None or high is None else [[mean - low], [high - mean]]
    axes.errorbar([mean], [place], None, ends, fmt=marker, color=colour, ms=5, capsize=2.5, lw=1.2)


def plot_heads(panels: Mapping[str, Points], label: str, file: Path) -> None:
    """A panel for each entry and network: a dot for each head of each seed against its block, and the mean."""
    with _figure(file, 2.4) as figure:
        columns = [(title, *each) for title, points in panels.items() for each in enumerate(points.items())]
        row = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axes, (title, number, (name, (blocks, values))) in zip(row, columns, strict=True):
            axes.plot(blocks, values, MARKERS[number], color=COLOURS[number], ms=2.6, alpha=0.5, mew=0)
            each = np.unique(blocks)
            axes.plot(each, [values[blocks == block].mean() for block in each], color="black", lw=1.1)
            axes.set_title(f"{title}:\n{name}")
            _blocks(axes)
        row[0].set_ylabel(label)


def plot_lines(
    panels: Mapping[str, Mapping[str, Lines]], across: str, file: Path, bounded: Collection[str] = ()
) -> None:
    """Rows of panels: for each measure (its label) a line a network, the mean over seeds in its 95 % band.

    Bands of those measures that are `bounded` end at 0 and 1.
    """
    rows = len(panels)
    columns = max(map(len, panels.values()))
    with _figure(file, 2.1 * rows + 0.3) as figure:
        every = figure.subplots(rows, columns, squeeze=False, sharey="col")
        for line, (title, measures) in zip(every, panels.items(), strict=True):
            for axes, (measure, networks) in zip(line, measures.items(), strict=True):
                for number, (name, (where, values)) in enumerate(networks.items()):
                    _band(axes, where, values, number, name, (0.0, 1.0) if measure in bounded else (-np.inf, np.inf))
                axes.set_title(f"{title}: {measure}" if columns < 3 else measure)
                axes.set_xlabel(across)
                if across == "block":
                    _blocks(axes)
            if columns > 2:
                line[0].set_ylabel(title)
        handles, labels = every[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), handlelength=3)


def _band(axes: Any, where: Array, values: Array, number: int, name: str, bounds: tuple[float, float]) -> None:
    colour = COLOURS[number]
    found = [mean_interval(column[np.isfinite(column)].tolist() or [np.nan]) for column in values.T]
    middle, low, high = np.array(found, np.float64).reshape(-1, 3).T  # NaN where there is no interval
    axes.fill_between(where, np.clip(low, *bounds), np.clip(high, *bounds), color=colour, alpha=0.18, lw=0)
    style = {"color": colour, "linestyle": DASHES[number], "marker": MARKERS[number], "ms": 3}
    axes.plot(where, middle, label=name, **style)


def _blocks(axes: Any) -> None:
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
