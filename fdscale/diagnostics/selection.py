"""Parts of many measurements, as arrays that figures and tables are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fdscale.diagnostics.rows import Measurement

Array = NDArray[np.float64]
LAYER = re.compile(r"^(layer|block) \d+: ")
FAINTEST = 0.1  # times uniform attention: what is less is drawn as dark
RUN, FITTED = "run", "fitted"
HEADS = {RUN: "its own head", FITTED: "head fitted to these images"}
LANDSCAPE = {"landscape", "landscape_loss", "landscape_accuracy", "sharpness", "loss_rise"}
BOUNDED = {
    "attention_information",
    "attention_diagonality",
    "attention_offset_share",
    "attention_column_share",
    "attention_on_prefix",
    "head_similarity",
    "token_similarity",
    "landscape_accuracy",
}
"""Measures that are 1 at most: what differs by less than a twentieth is drawn as alike."""


def models_in(rows: Iterable[Measurement]) -> list[str]:
    """The models, in the order in which they come."""
    return list(dict.fromkeys(row.model for row in rows))


def of(rows: Iterable[Measurement], model: str, measure: str) -> list[Measurement]:
    """The rows of one measure of a model that have a value."""
    return [row for row in rows if row.model == model and row.measure == measure and row.value is not None]


def by_layer(rows: Iterable[Measurement], model: str, measure: str) -> tuple[Array, Array]:
    """Layers (R,) and values (R,) of all rows, heads and all, in the order of layers."""
    found = [(row.layer, row.value) for row in of(rows, model, measure) if row.layer is not None]
    pairs = np.array(sorted(found), np.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def layer_means(rows: Iterable[Measurement], model: str, measure: str) -> tuple[Array, Array]:
    """Layers (L,), each once, and the mean over its heads (L,)."""
    layers, values = by_layer(rows, model, measure)
    each = np.unique(layers)
    return each, np.array([values[layers == layer].mean() for layer in each])


def last_third(rows: Sequence[Measurement], model: str, measure: str) -> list[tuple[int, Array]]:
    """The last third of a model's measured layers, rounded up: each with the values (heads,) of its rows."""
    layers, values = by_layer(rows, model, measure)
    each = np.unique(layers)
    return [(int(layer), values[layers == layer]) for layer in each[len(each) - -(-len(each) // 3) :]]


def curves(rows: Iterable[Measurement], model: str, measure: str) -> tuple[Array, Array]:
    """Distances (S,) and the values along each direction (K, S), of what was measured along lines."""
    along: dict[int, dict[float, float]] = {}
    for row in of(rows, model, measure):
        if row.direction is not None and row.at is not None and len(row.at) == 1 and row.value is not None:
            along.setdefault(row.direction, {})[row.at[0]] = row.value
    where = sorted(set.intersection(*map(set, along.values()))) if along else []
    return np.array(where), np.array([[line[at] for at in where] for line in along.values()])


def surface(rows: Iterable[Measurement], model: str, measure: str) -> tuple[Array, Array, Array]:
    """Places x (X,), y (Y,) and the values there (Y, X), NaN where there is none, of what was measured on a plane."""
    here = [row for row in rows if (row.model, row.measure) == (model, measure)]
    at = {row.at: row.value for row in here if row.at is not None and len(row.at) == 2}
    across, along = sorted({place[0] for place in at}), sorted({place[1] for place in at})
    values = np.array([[at.get((x, y)) for x in across] for y in along], np.float64)  # None becomes NaN
    return np.array(across), np.array(along), values.reshape(len(along), len(across))


def pairs_in(rows: Iterable[Measurement], measure: str) -> list[tuple[str, str]]:
    """The pairs of models that were compared, in the order in which they come."""
    return list(dict.fromkeys((row.model, str(row.other)) for row in rows if row.measure == measure and row.other))


def compared(rows: Iterable[Measurement], model: str, other: str, measure: str) -> Array:
    """The values (layers of the model, layers of the other), NaN where there is none; (0, 0) without layers."""
    found = {
        (row.layer, row.other_layer): row.value
        for row in rows
        if (row.model, row.other, row.measure) == (model, other, measure)
        if row.layer is not None and row.other_layer is not None
    }
    shape = np.max([*found, (-1, -1)], axis=0) + 1
    values = np.full(shape, np.nan)
    for place, value in found.items():
        values[place] = np.nan if value is None else value
    return values


def output_layer(rows: Iterable[Measurement], model: str, measure: str) -> int | None:
    """The network's output, the layer after its last block, measured or not; None without any layer."""
    layers = [row.layer for row in rows if (row.model, row.measure) == (model, measure) and row.layer is not None]
    return max(layers, default=None)


def classifier_of(rows: Iterable[Measurement], model: str) -> str | None:
    """Under which classifier a model's loss was taken, RUN or FITTED; None where it is not told."""
    return next((row.classifier for row in rows if row.model == model and row.classifier is not None), None)


def under_a_head(rows: Iterable[Measurement], model: str) -> str:
    """`MODEL (its own head)`."""
    head = HEADS.get(classifier_of(rows, model) or "")
    return f"{model} ({head})" if head else model


def around_uniform(maps: Sequence[Array]) -> tuple[float, float]:
    """From where to where colours go, for all maps: at least a factor of three around uniform attention, which is 1."""
    every = np.concatenate([values.ravel() for values in maps])
    low, high = np.quantile(every, [0.002, 0.998]).tolist()
    return min(max(low, FAINTEST), 1 / 3), max(high, 3.0)


def images_in(rows: Iterable[Measurement], model: str | None = None) -> tuple[int, int]:
    """How many images passed, and how many the landscape was taken on; of one model, or of the one with most."""
    passed, held = 0, 0
    for row in rows:
        if model in (None, row.model):
            held = max(held, row.images if row.measure in LANDSCAPE else 0)
            passed = max(passed, row.images if row.measure not in LANDSCAPE else 0)
    return passed, held


def first_middle_last(maps: Mapping[int, Array]) -> dict[int, Array]:
    """Three blocks' maps (n, n), each the mean over its windows, of which some may be padded."""
    layers = sorted(maps)
    chosen = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    windows = {layer: np.asarray(maps[layer], np.float64) for layer in chosen}
    counts = {layer: np.maximum(np.isfinite(values).sum(axis=0), 1) for layer, values in windows.items()}
    return {layer: np.nansum(values, axis=0) / counts[layer] for layer, values in windows.items()}


def reasons(rows: Iterable[Measurement]) -> Iterator[tuple[str, str, list[str]]]:
    """What could not be measured: each model and reason once, whatever the layer, with the measures that lack it.

    A comparison is told with the other model: `cka with OTHER`.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.value is None and row.reason:
            reason = LAYER.sub("", row.reason.removeprefix(f"{row.model}: "))
            measures = found.setdefault((row.model, reason), [])
            measure = f"{row.measure} with {row.other}" if row.other else row.measure
            measures += [measure] if measure not in measures else []
    return ((model, reason, measures) for (model, reason), measures in found.items())


def few(measures: Sequence[str]) -> str:
    """Names of measures in a sentence: no more than three."""
    shown = ", ".join(measures[:3])
    return shown if len(measures) <= 3 else f"{shown} and {len(measures) - 3} more"
