"""Parts of many measurements, as arrays that figures and tables are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fdscale.diagnostics.rows import Measurement

Array = NDArray[np.float64]
LAYER = re.compile(r"^(layer|block) \d+: ")


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
    at = {row.at: row.value for row in of(rows, model, measure) if row.at is not None and len(row.at) == 2}
    across, along = sorted({place[0] for place in at}), sorted({place[1] for place in at})
    values = np.array([[at.get((x, y), np.nan) for x in across] for y in along], np.float64)
    return np.array(across), np.array(along), values.reshape(len(along), len(across))


def pairs_in(rows: Iterable[Measurement], measure: str) -> list[tuple[str, str]]:
    """The pairs of models that were compared, in the order in which they come."""
    return list(dict.fromkeys((row.model, str(row.other)) for row in rows if row.measure == measure and row.other))


def compared(rows: Iterable[Measurement], model: str, other: str, measure: str) -> Array:
    """The values (layers of the model, layers of the other), NaN where there is none."""
    found = [row for row in of(rows, model, measure) if row.other == other]
    ours, theirs = (
        sorted(set(layers)) for layers in ((r.layer or 0 for r in found), (r.other_layer or 0 for r in found))
    )
    values = np.full((len(ours), len(theirs)), np.nan)
    for row in found:
        values[ours.index(row.layer or 0), theirs.index(row.other_layer or 0)] = row.value
    return values


def reasons(rows: Iterable[Measurement]) -> Iterator[tuple[str, str, list[str]]]:
    """What could not be measured: each model and reason once, whatever the layer, with the measures that lack it."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.value is None and row.reason:
            reason = LAYER.sub("", row.reason.removeprefix(f"{row.model}: "))
            measures = found.setdefault((row.model, reason), [])
            measures += [row.measure] if row.measure not in measures else []
    return ((model, reason, measures) for (model, reason), measures in found.items())


def few(measures: Sequence[str]) -> str:
    """Names of measures in a sentence: no more than three."""
    shown = ", ".join(measures[:3])
    return shown if len(measures) <= 3 else f"{shown} and {len(measures) - 3} more"
