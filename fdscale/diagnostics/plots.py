"""Figures of measurements, drawn from rows and maps alone; the one file of this room that knows matplotlib.

Colours are Okabe and Ito's (2008), which colour-blind readers tell apart; markers and dashes tell them apart in grey.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from fdscale.diagnostics.intervals import mean_interval
from fdscale.diagnostics.rows import Measurement
from fdscale.diagnostics.selection import (
    BOUNDED,
    FAINTEST,
    Array,
    around_uniform,
    by_layer,
    compared,
    curves,
    first_middle_last,
    layer_means,
    of,
    output_layer,
    pairs_in,
    surface,
    under_a_head,
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
    "text.parse_math": False,  # names are shown as they are
}
BLOCK = "block"
TOO_FAR_APART = 10.0
LEAST = 0.05  # a smaller difference fills no panel: it would be read as a large one
ENOUGH = 5  # directions, of which an interval is drawn
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@contextmanager
def _figure(file: Path, rows: int, height: float = PANEL, width: float = WIDTH) -> Iterator[Figure]:
    """A figure that is saved as `file`.png and .svg."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height * rows + 0.35), layout="constrained")
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
            _from_zero(line[0], measure)
        for axes, model in zip(panels[0], models, strict=True):
            axes.set_title(_folded(model, len(models)))
        for axes in panels[-1]:
            axes.set_xticks([])
        _number_blocks([panels[-1][place] for place in _measured(rows, models, measures)])


def plot_layers(rows: Sequence[Measurement], models: Sequence[str], measures: Mapping[str, str], file: Path) -> None:
    """A panel for each of `measures` (with the label of its axis): a line for each model over its layers."""
    columns, lines = min(len(measures), 2), -(-len(measures) // 2)
    with _figure(file, lines) as figure:
        panels = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axes, (measure, label) in zip(panels, measures.items(), strict=False):
            for place, model in enumerate(models):
                axes.plot(*layer_means(rows, model, measure), **_line(place))
            axes.set_ylabel(label)
            _from_zero(axes, measure)
        for axes in panels[len(measures) :]:
            axes.set_visible(False)
        _number_blocks(panels[: len(measures)])
        _name_models(figure, _measured(rows, models, measures))


def plot_features(rows: Sequence[Measurement], models: Sequence[str], measures: Mapping[str, str], file: Path) -> None:
    """The same of layers of which the last is the network's output, drawn apart behind the blocks of all models."""
    with _figure(file, 1) as figure:
        panels = figure.subplots(1, len(measures), squeeze=False)[0]
        for axes, (measure, label) in zip(panels, measures.items(), strict=True):
            last = [output_layer(rows, model, measure) for model in models]
            behind = max((layer for layer in last if layer is not None), default=0)
            for place, (model, output) in enumerate(zip(models, last, strict=True)):
                layers, values = layer_means(rows, model, measure)
                inside = layers != output
                axes.plot(layers[inside], values[inside], **_line(place))
                axes.plot(np.full((~inside).sum(), behind), values[~inside], **_line(place) | {"ms": 5})
            axes.set(ylabel=label, xlabel=BLOCK, xlim=(-0.05 * behind - 0.3, 1.05 * behind + 0.3))
            axes.set_xticks(*_block_ticks(behind))
            _from_zero(axes, measure)
        _name_models(figure, _measured(rows, models, measures))


def plot_maps(
    rows: Sequence[Measurement], models: Sequence[str], maps: Mapping[str, Mapping[int, Array]], file: Path
) -> None:
    """The averaged attention maps of each model's first, middle and last block, times their size: uniform is 1."""
    shown = {model: first_middle_last(maps[model]) for model in models if maps.get(model)}
    low, high = around_uniform([value * len(value) for found in shown.values() for value in found.values()])
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


def plot_curves(rows: Sequence[Measurement], models: Sequence[str], measures: Mapping[str, str], file: Path) -> None:
    """A panel for each of `measures`: each direction thin, their mean thick, in the band of its 95 % interval."""
    places = [place for place, model in enumerate(models) if _has_lines(rows, model, measures)]
    shown = {place: under_a_head(rows, models[place]) for place in places}
    with _figure(file, 1, 2.8) as figure:
        panels = figure.subplots(1, len(measures), squeeze=False)[0]
        for axes, (measure, label) in zip(panels, measures.items(), strict=True):
            highest = []
            for place, model in enumerate(models):
                where, values = curves(rows, model, measure)
                if len(where):
                    _plot_directions(axes, where, values, place, measure in BOUNDED)
                    highest.append(values.mean(axis=0).max())
            axes.set(xlabel="distance along a filter-normalised direction", ylabel=label)
            _fit(axes, measure, highest, np.concatenate([line.get_ydata() for line in axes.lines]))
        _name_models(figure, shown)


def _has_lines(rows: Sequence[Measurement], model: str, measures: Iterable[str]) -> bool:
    return any(len(curves(rows, model, measure)[0]) for measure in measures)


def _plot_directions(axes: Any, where: Array, values: Array, place: int, bounded: bool) -> None:
    """Values (K, S) along K directions; the band of a few of them would tell of their number, not of the network."""
    axes.plot(where, values.T, color=_colour(place), lw=0.5, alpha=0.45)
    if len(values) >= ENOUGH:
        intervals = np.array([mean_interval(column) for column in values.T.tolist()], np.float64)
        low, high = np.clip(intervals.T[1:], 0, 1 if bounded else None)
        axes.fill_between(where, low, high, color=_colour(place), alpha=0.15, lw=0)
    axes.plot(where, values.mean(axis=0), **_line(place), lw=2.0)


def _fit(axes: Any, measure: str, highest: Sequence[float], values: Array) -> None:
    """The values fill the panel, not their intervals; losses more than ten times apart share a log scale."""
    top = max(values.max(), LEAST)
    if measure not in BOUNDED and max(highest) > TOO_FAR_APART * min(highest) and values.min() > 0:
        axes.set(yscale="log", ylim=(0.8 * values.min(), 1.25 * top), ylabel=f"{axes.get_ylabel()}, log scale")
        axes.yaxis.set_major_formatter("{x:g}")  # powers of ten would be mathematics
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}" if top < 100 * values.min() else "")
    else:
        axes.set_ylim(0, 1.05 * top)


def plot_surfaces(rows: Sequence[Measurement], models: Sequence[str], measure: str, label: str, file: Path) -> None:
    """A panel for each model that has a surface: contours of a measure in a plane, on one scale."""
    found = {model: surface(rows, model, measure) for model in models}
    shown = {model: parts for model, parts in found.items() if np.isfinite(parts[2]).any()}
    levels = _levels(np.concatenate([parts[2].ravel() for parts in shown.values()]))
    norm = Normalize(levels[0], levels[-1])
    columns = min(len(shown), 3)
    with _figure(file, -(-len(shown) // 3), 2.7 if columns < 3 else 2.0, _width(columns)) as figure:
        panels = figure.subplots(-(-len(shown) // 3), columns, squeeze=False)
        for axes, (model, (across, along, values)) in zip(panels.flat, shown.items(), strict=False):
            drawn = axes.contourf(across, along, values, levels, norm=norm, cmap="cividis")
            if ((np.nanmin(values) < levels) & (levels < np.nanmax(values))).any():  # else there is none to draw
                axes.contour(across, along, values, levels, norm=norm, colors="white", linewidths=0.5)
            axes.set(xlim=(across[0], across[-1]), ylim=(along[0], along[-1]), facecolor="#dddddd")
            for colour, width in (("black", 2.6), ("white", 1.2)):  # seen on dark and on bright
                axes.plot(0, 0, "+", color=colour, ms=6 + width, mew=width)
            title = _folded(under_a_head(rows, model), columns)
            axes.set(title=title, aspect="equal", xlabel="first direction")
            axes.locator_params(nbins=5)
            axes.grid(False)
        for axes in panels.flat[len(shown) :]:
            axes.set_visible(False)
        for line in panels:
            line[0].set_ylabel("second direction")
        figure.colorbar(drawn, ax=panels, shrink=0.8, aspect=30).set_label(label)


def _levels(values: Array) -> Array:
    """Some ten levels of all values, NaN left out; where they are all but one, those a little below it too."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    low = low if high - low >= LEAST else max(0.0, high - LEAST)
    return np.asarray(MaxNLocator(10, steps=[1, 2, 5, 10]).tick_values(low, max(high, low + LEAST)))


def plot_alignment(rows: Sequence[Measurement], measure: str, file: Path) -> None:
    """A heat map for each pair of models: how alike each layer of the one is to each layer of the other."""
    pairs = pairs_in(rows, measure)
    columns = min(len(pairs), 3)
    with _figure(file, -(-len(pairs) // columns), 2.6, _width(columns)) as figure:
        panels = figure.subplots(-(-len(pairs) // columns), columns, squeeze=False)
        for axes, (model, other) in zip(panels.flat, pairs, strict=False):
            axes.set(
                title=f"with {_folded(other, columns)}", xlabel="its block", ylabel=f"block of {_folded(model, 3)}"
            )
            axes.grid(False)
            _plot_pair(axes, compared(rows, model, other, measure))
        for axes in panels.flat[len(pairs) :]:
            axes.set_visible(False)
        colours = ScalarMappable(Normalize(0, 1), "viridis")
        figure.colorbar(colours, ax=panels, shrink=0.8, aspect=30).set_label("CKA")


def _plot_pair(axes: Any, values: Array) -> None:
    """Values (L, M) of the layers of two networks, their outputs last; grey where there is none."""
    if not np.isfinite(values).any():
        axes.set(xticks=[], yticks=[])
        _say_nothing(axes)
        return
    axes.imshow(values, vmin=0, vmax=1, cmap="viridis", origin="lower", interpolation="nearest", aspect="auto")
    axes.set_facecolor("#dddddd")
    ours, theirs = values.shape
    axes.set_yticks(*_block_ticks(ours - 1))
    axes.set_xticks(*_block_ticks(theirs - 1, apart=0.3))


def _width(columns: int) -> float:
    """A figure of one panel is half as wide."""
    return WIDTH if columns > 1 else WIDTH / 2


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


def _block_ticks(output: int, apart: float = 1 / 8) -> tuple[list[int], list[str]]:
    """Numbers of some blocks, and the output, the layer behind them; its word stands `apart` from the next number."""
    numbered = MaxNLocator(6, integer=True, min_n_ticks=1).tick_values(0, max(output - 1, 0))
    blocks = [int(block) for block in numbered if 0 <= block < output and block + output * apart <= output]
    return [*blocks, output], [*map(str, blocks), "output"]


def _from_zero(axes: Any, measure: str) -> None:
    """A small difference is not drawn as a large one."""
    low, high = axes.get_ylim()
    top = max(1.05 * high, LEAST if measure in BOUNDED else 0)
    axes.set_ylim(low if low < -0.05 * top else 0, top)


def _measured(rows: Sequence[Measurement], models: Sequence[str], measures: Iterable[str]) -> dict[int, str]:
    """Of models by their places those that have a value."""
    return {n: model for n, model in enumerate(models) if any(of(rows, model, measure) for measure in measures)}


def _name_models(figure: Figure, models: Mapping[int, str]) -> None:
    """A legend of models by their places; an artist whose label begins with _ would be left out of one."""
    columns = min(3 if max(map(len, models.values())) < 34 else 2, len(models))
    places = list(models)
    order = [place for column in range(columns) for place in places[column::columns]]  # read line by line
    lines = [Line2D([], [], **_line(place)) for place in order]
    legend = figure.legend(lines, [""] * len(order), loc="outside upper left", ncols=columns, handlelength=3)
    for text, place in zip(legend.get_texts(), order, strict=True):
        text.set_text(models[place])


def _say_nothing(axes: Any) -> None:
    """An empty panel is not read as zero."""
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="#666666")


def _scores(rows: Sequence[Measurement], model: str, layer: int) -> str:
    """`diagonal 0.31, column 0.05`."""
    told = {"attention_diagonality": "diagonal", "attention_column_share": "column"}
    values = {
        word: row.value for measure, word in told.items() for row in of(rows, model, measure) if row.layer == layer
    }
    return ", ".join(f"{word} {value:z.2f}" for word, value in values.items())
