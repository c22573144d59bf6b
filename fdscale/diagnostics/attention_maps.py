"""Scores of one averaged attention map: how diagonal it is, and what explains it, the key or the offset."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FLAT = 1e-6  # of the mean: a map that varies less is uniform but for rounding


def diagonality(average: Array) -> float:
    """How much of an averaged map (m, m), rows summing to 1, is on its diagonal: (tr/m - 1/m) / (1 - 1/m).

    1 where every token sees itself alone, 0 where all are seen alike, negative below that; m is 2 or more.
    """
    return (float(np.trace(average)) - 1) / (len(average) - 1)


def column_share(average: Array) -> float:
    """The share of a map's variance around 1/m that the key alone explains: 1 where every query sees the same."""
    deviations = average - 1 / len(average)
    return _share(len(average) * float((deviations.mean(axis=0) ** 2).sum()), deviations)


def offset_share(average: Array, positions: Array) -> float:
    """The share of a map's variance around 1/m that the offset (dy, dx) from query to key alone explains.

    `positions` (m, 2) in pixels. 1 where attention is the same pattern around every token, edges included.
    """
    deviations = average - 1 / len(average)
    offsets = np.round(positions[None] - positions[:, None], 3).reshape(-1, 2)  # pixels; equal ones must stay equal
    _, group = np.unique(offsets, axis=0, return_inverse=True)
    sums = np.bincount(group.ravel(), weights=deviations.ravel())
    return _share(float((sums**2 / np.bincount(group.ravel())).sum()), deviations)


def _share(explained: float, deviations: Array) -> float:
    """Of the squares around 1/m, which are 0 for a uniform map."""
    total = float((deviations**2).sum())
    return 0.0 if total <= FLAT**2 else explained / total
