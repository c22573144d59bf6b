"""A mean of a few measurements, and the interval that its true value lies in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

CONFIDENCE = 0.95
HALVINGS = 60  # of where the quantile lies: fp64 has no finer


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The mean of independent measurements, and its 95 % Student-t interval; None, None of a single one."""
    mean = fmean(values)
    if len(values) == 1:
        return mean, None, None
    margin = student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean, mean - margin, mean + margin


def student_t(freedom: int) -> float:
    """The t that a Student-t variable of so many degrees of freedom stays within, 95 % of the time."""
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(freedom))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < CONFIDENCE else (low, middle)
    return math.tan((low + high) / 2) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """P(|t| < tan(angle) sqrt(freedom)): Abramowitz and Stegun, equations 26.7.3 and 26.7.4."""
    odd, square = freedom % 2, math.cos(angle) ** 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(2 + odd, freedom + 1, 2):
        total += term
        term *= square * (power - 1) / power
    return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total
