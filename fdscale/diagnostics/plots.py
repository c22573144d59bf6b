"""Figures of measurements, drawn from rows and maps alone; the one file of this room that knows matplotlib.

Colours are Okabe and Ito's (2008), which colour-blind readers tell apart; markers and dashes tell them apart in grey.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fdscale.diagnostics.intervals import mean_interval
from fdscale.diagnostics.rows import Measurement
from fdscale.diagnostics.selection import (
    Array,
    by_layer,
    compared,
    curves,
    layer_means,
    of,
    pairs_in,
    surface,
)

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS, DASHES = ("o", "^", "s", "D", "v", "P"), ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
WIDTH, PANEL, DPI = 7.2, 2.3, 300  # inches of a figure, of a panel's height, dots to the inch
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "svg.hashsalt": "fdscale",
}
BLOCK = "block"
TOO_FAR_APART = 10.0
FAINTEST = 0.1  # times uniform attention: what is less is drawn as dark
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@contextmanager
def _figure(file: Path, rows: int, height: float = PANEL) -> Iterator[Figure]:
    """A figure that is saved as `file`.png and .svg."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height * rows + 0.35), layout="constrained")
        yield figure
        figure.savefig(file.with_suffix(".png"), dpi=DPI)
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})


def plot_heads(rows: Sequence[Measurement], models: Sequence[str], measures: Mapping[str, str], file: Path) -> None:
    """A panel for each model and each of `measures` (with the label of its axis): a dot a head, the mean as a line."""
    with _figure(file, len(measures)) as figure:
        panels = figure.subplots(len(measures), len(models), sharex="col", sharey="row", squeeze=False)
        for line, (measure, label) in zip(panels, measures.items(), strict=True):
            for place, (axes, model) in enumerate(zip(line, models, strict=True)):
                layers, values = by_layer(rows, model, measure)
                axes.plot(layers, values, MARKERS[place % 6], ms=2.8, mew=0, alpha=0.5, color=_colour(place))
                axes.plot(*layer_means(rows, model, measure), color="black", lw=1.2)
                if not len(values):
                    _say_nothing(axes)
            line[0].set_ylabel(label)
            _from_zero(line[0])
        for axes, model in zip(panels[0], models, strict=True):
            axes.set_title(_folded(model, len(models)))
        _number_blocks(panels[-1])


def plot_layers(rows: Sequence[Measurement], models: Sequence[str], measures: Mapping[str, str], file: Path) -> None:
    """A panel for each of `measures` (with the label of its axis): a line for each model over its layers."""
    columns, lines = min(len(measures), 2), -(-len(measures) // 2)
    with _figure(file, lines) as figure:
        panels = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axes, (measure, label) in zip(panels, measures.items(), strict=False):
            for place, model in enumerate(models):
                axes.plot(*layer_means(rows, model, measure), **_line(place), label=model)
            axes.set_ylabel(label)
            _from_zero(axes)
        for axes in panels[len(measures) :]:
            axes.set_visible(False)
        _number_blocks(panels[: len(measures)])
        _name_models(figure, panels[0])


def plot_maps(
    rows: Sequence[Measurement], models: Sequence[str], maps: Mapping[str, Mapping[int, Array]], file: Path
) -> None:
    """The averaged attention maps of each model's first, middle and last block, times their size: uniform is 1."""
    shown = {model: _first_middle_last(maps[model]) for model in models if maps.get(model)}
    low, high = _around_uniform([value * len(value) for found in shown.values() for value in found.values()])
    with _figure(file, len(shown), 2.0) as figure:
        panels = figure.subplots(len(shown), 3, squeeze=False)
        for line, (model, found) in zip(panels, shown.items(), strict=True):
            for axes, (layer, value) in zip(line, found.items(), strict=False):
                drawn = axes.imshow(
                    np.maximum(value * len(value), FAINTEST / 10),
                    norm=LogNorm(low, high),
                    cmap="cividis",
                    interpolation="nearest",
                )
                axes.set_title(f"block {layer}: {_scores(rows, model, layer)}", fontsize=7)
                axes.set_xticks([0, len(value) - 1])
                axes.set_yticks([0, len(value) - 1])
                axes.grid(False)
            for axes in line[len(found) :]:
                axes.set_visible(False)
            line[0].set_ylabel(f"{_folded(model, 4)}\nquery patch")
        for axes in panels[-1]:
            axes.set_xlabel("key patch")
        ticks = [tick for tick in TICKS if low <= tick <= high]
        bar = figure.colorbar(drawn, ax=panels, aspect=30, extend="both", ticks=ticks, format="%g")
        bar.minorticks_off()
        bar.set_label("times uniform attention")


def _around_uniform(maps: Sequence[Array]) -> tuple[float, float]:
    """From where to where colours go, for all maps: at least a factor of three around uniform attention, which is 1."""
    every = np.concatenate([values.ravel() for values in maps])
    low, high = np.quantile(every, [0.002, 0.998]).tolist()
    return min(max(low, FAINTEST), 1 / 3), max(high, 3.0)


def plot_curves(rows: Sequence[Measurement], models: Sequence[str], measures: Mapping[str, str], file: Path) -> None:
    """A panel for each of `measures`: each direction thin, their mean thick, in the band of its 95 % interval."""
    with _figure(file, 1, 2.8) as figure:
        panels = figure.subplots(1, len(measures), squeeze=False)[0]
        for axes, (measure, label) in zip(panels, measures.items(), strict=True):
            highest = []
            for place, model in enumerate(models):
                where, values = curves(rows, model, measure)
                if len(where):
                    _plot_directions(axes, where, values, place, model)
                    highest.append(values.mean(axis=0).max())
            axes.set(xlabel="distance along a filter-normalised direction", ylabel=label)
            _fit(axes, highest, np.concatenate([line.get_ydata() for line in axes.lines]))
        _name_models(figure, panels[0])


def _plot_directions(axes: Any, where: Array, values: Array, place: int, model: str) -> None:
    """Values (K, S) along K directions."""
    axes.plot(where, values.T, color=_colour(place), lw=0.5, alpha=0.45)
    if len(values) > 1:
        intervals = np.array([mean_interval(column) for column in values.T.tolist()], np.float64)
        axes.fill_between(where, *intervals.T[1:], color=_colour(place), alpha=0.15, lw=0)
    axes.plot(where, values.mean(axis=0), **_line(place), lw=2.0, label=model)


def _fit(axes: Any, highest: Sequence[float], values: Array) -> None:
    """The values fill the panel, not their intervals; models that differ by more than ten times share a log scale."""
    top = values.max()
    if max(highest) > TOO_FAR_APART * min(highest) and values.min() > 0:
        axes.set(yscale="log", ylim=(0.8 * values.min(), 1.25 * top), ylabel=f"{axes.get_ylabel()}, log scale")
    else:
        axes.set_ylim(0, 1.05 * top)


def plot_surfaces(rows: Sequence[Measurement], models: Sequence[str], measure: str, label: str, file: Path) -> None:
    """A panel for each model that has a surface: contours of a measure in a plane, on one scale."""
    found = {model: surface(rows, model, measure) for model in models}
    shown = {model: parts for model, parts in found.items() if parts[2].size}
    every = np.concatenate([parts[2].ravel() for parts in shown.values()])
    levels = MaxNLocator(10, steps=[1, 2, 5, 10]).tick_values(np.nanmin(every), np.nanmax(every))
    norm = Normalize(levels[0], levels[-1])
    with _figure(file, -(-len(shown) // 3), 2.7 if len(shown) < 3 else 2.0) as figure:
        panels = figure.subplots(-(-len(shown) // 3), min(len(shown), 3), squeeze=False)
        for axes, (model, (across, along, values)) in zip(panels.flat, shown.items(), strict=False):
            drawn = axes.contourf(across, along, values, levels, norm=norm, cmap="cividis")
            axes.contour(across, along, values, levels, norm=norm, colors="white", linewidths=0.5)
            for colour, width in (("black", 2.6), ("white", 1.2)):  # seen on dark and on bright
                axes.plot(0, 0, "+", color=colour, ms=6 + width, mew=width)
            axes.set(title=_folded(model, min(len(shown), 3)), aspect="equal", xlabel="first direction")
            axes.locator_params(nbins=5)
            axes.grid(False)
        for axes in panels.flat[len(shown) :]:
            axes.set_visible(False)
        for line in panels:
            line[0].set_ylabel("second direction")
        figure.colorbar(drawn, ax=panels, shrink=0.8, aspect=30).set_label(label)


def plot_alignment(rows: Sequence[Measurement], measure: str, file: Path) -> None:
    """A heat map for each pair of models: how alike each layer of the one is to each layer of the other."""
    pairs = pairs_in(rows, measure)
    columns = min(len(pairs), 3)
    with _figure(file, -(-len(pairs) // columns), 2.6) as figure:
        panels = figure.subplots(-(-len(pairs) // columns), columns, squeeze=False)
        for axes, (model, other) in zip(panels.flat, pairs, strict=False):
            values = compared(rows, model, other, measure)
            drawn = axes.imshow(
                values, vmin=0, vmax=1, cmap="viridis", origin="lower", interpolation="nearest", aspect="auto"
            )
            axes.set(
                title=f"with {_folded(other, columns)}", xlabel="its block", ylabel=f"block of {_folded(model, 3)}"
            )
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            axes.grid(False)
        for axes in panels.flat[len(pairs) :]:
            axes.set_visible(False)
        figure.colorbar(drawn, ax=panels, shrink=0.8, aspect=30).set_label("CKA")


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _folded(model: str, panels: int) -> str:
    """A name in as many lines as it takes beside so many panels."""
    return fill(model, max(12, 96 // panels))


def _line(place: int) -> dict[str, Any]:
    return {
        "color": _colour(place),
        "linestyle": DASHES[place % len(DASHES)],
        "marker": MARKERS[place % len(MARKERS)],
        "ms": 3.2,
    }


def _number_blocks(panels: Sequence[Any]) -> None:
    for axes in panels:
        axes.set_xlabel(BLOCK)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))


def _from_zero(axes: Any) -> None:
    """A small difference is not drawn as a large one."""
    low, high = axes.get_ylim()
    axes.set_ylim(low if low < -0.05 * high else 0, 1.05 * high)


def _name_models(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(3, len(labels))
    order = [place for column in range(columns) for place in range(column, len(labels), columns)]  # read line by line
    ordered = [handles[place] for place in order], [labels[place] for place in order]
    figure.legend(*ordered, loc="outside upper left", ncols=columns, handlelength=3)


def _say_nothing(axes: Any) -> None:
    """An empty panel is not read as zero."""
    axes.set_xlim(0, 1)
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="#666666")


def _first_middle_last(maps: Mapping[int, Array]) -> dict[int, Array]:
    """Three blocks' maps (n, n), each the mean over its windows, of which some may be padded."""
    layers = sorted(maps)
    chosen = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    windows = {layer: np.asarray(maps[layer], np.float64) for layer in chosen}
    counts = {layer: np.maximum(np.isfinite(values).sum(axis=0), 1) for layer, values in windows.items()}
    return {layer: np.nansum(values, axis=0) / counts[layer] for layer, values in windows.items()}


def _scores(rows: Sequence[Measurement], model: str, layer: int) -> str:
    """`diagonal 0.31, column 0.05`."""
    told = {"attention_diagonality": "diagonal", "attention_column_share": "column"}
    values = {
        word: row.value for measure, word in told.items() for row in of(rows, model, measure) if row.layer == layer
    }
    return ", ".join(f"{word} {value:z.2f}" for word, value in values.items())
