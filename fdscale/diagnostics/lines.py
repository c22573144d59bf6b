"""The loss of any network along random directions of its weights: lines, a surface, and how sharply it curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from torch import nn

from fdscale.config.errors import UserError
from fdscale.diagnostics.directions import moving, numbered_direction
from fdscale.diagnostics.intervals import mean_interval
from fdscale.diagnostics.rows import Measurement

NOT_FINITE = "the loss is not finite here"
UNITS = {"sharpness": "nats per squared distance", "loss_rise": "nats"}


class Point(NamedTuple):
    """The mean loss in nats, and the share that is classified correctly, with the weights where they are."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class LandscapePlan:
    """How many random directions, and where on them the loss is taken; a distance of 1 is each filter's own norm.

    On each line at `points`, an odd number, from -`reach` to `reach`, and at -`step` and `step`, for the curvature: at
    a tenth the 1e-6 that fp32 rounds off a loss is 1e-4 of curvature. On the surface at `surface` points a side, odd or
    0, along the first two directions; in so many dimensions random ones are all but orthogonal.
    """

    directions: int = 5
    points: int = 21
    reach: float = 1.0
    step: float = 0.1
    surface: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.directions > 0
        assert self.points % 2 == 1 < self.points, "the centre and both ends are among the points"
        assert self.surface == 0 or self.surface % 2 == 1 < self.surface
        assert 0 < self.step <= self.reach

    def line(self) -> list[float]:
        """Distances on each line in their order, without the centre."""
        return sorted({*_spread(self.points, self.reach), -self.step, self.step} - {0.0})

    def grid(self) -> list[tuple[float, float]]:
        """Places on the surface, row by row, without the centre."""
        side = _spread(self.surface, self.reach)
        return [place for place in product(side, side) if place != (0.0, 0.0)]

    @property
    def evaluations(self) -> int:
        """How often the loss is computed, and `advance` called."""
        return 1 + self.directions * len(self.line()) + len(self.grid())


def _spread(points: int, reach: float) -> list[float]:
    """So many distances from -reach to reach, the decimal that is meant: 0.3, not 0.30000000000000004."""
    return [round(reach * (2 * place - points + 1) / (points - 1), 9) for place in range(points)]


def landscape_of(
    model: str,
    network: nn.Module,
    evaluated: Callable[[], Point],
    images: int,
    plan: LandscapePlan,
    advance: Callable[[], object],
) -> list[Measurement]:
    """Loss and accuracy around a network's weights, along filter-normalised directions (Li et al. 2018, 1712.09913).

    `evaluated()` gives both for the weights as they are; `advance()` is called after each time. Rows: `landscape_loss`
    and `landscape_accuracy`, `at` a distance on a numbered direction, or at two on the surface; `sharpness`, the second
    central difference of the loss at the centre, and `loss_rise`, its mean rise at the two ends of a line, of each
    direction, and their mean with a 95 % Student-t interval over directions. Raises UserError where the loss is not
    finite at the centre.
    """
    walk = _Walk(network, evaluated, advance, plan.seed)
    centre = walk.step()
    if not math.isfinite(centre.loss):
        raise UserError(
            f"{model}: its loss is {centre.loss}: there is no landscape around it; are its weights trained?"
        )
    lines = [{0.0: centre, **walk.line(number, plan.line())} for number in range(plan.directions)]
    rows = [
        row
        for number, line in enumerate(lines)
        for distance in sorted(line)
        for row in _rows(model, line[distance], images, number, (distance,))
    ]
    rows += _over_directions(model, "sharpness", [_curvature(line, plan.step) for line in lines], images, plan.step)
    rows += _over_directions(model, "loss_rise", [_rise(line) for line in lines], images, plan.reach)
    if plan.surface:
        surface = {(0.0, 0.0): centre, **walk.surface(plan.grid())}
        rows += [row for place in sorted(surface) for row in _rows(model, surface[place], images, None, place)]
    return rows


@dataclass(frozen=True)
class _Walk:
    """A network's weights moved along numbered directions, and its loss taken on the way."""

    network: nn.Module
    evaluated: Callable[[], Point]
    advance: Callable[[], object]
    seed: int

    def step(self) -> Point:
        point = self.evaluated()
        self.advance()
        return point

    def line(self, number: int, distances: list[float]) -> dict[float, Point]:
        with moving(self.network, [numbered_direction(self.network, self.seed, number)]) as move:
            return {distance: self._at(move, distance) for distance in distances}

    def surface(self, places: list[tuple[float, float]]) -> dict[tuple[float, float], Point]:
        with moving(self.network, [numbered_direction(self.network, self.seed, number) for number in (0, 1)]) as move:
            return {place: self._at(move, *place) for place in places}

    def _at(self, move: Callable[..., None], *distances: float) -> Point:
        move(*distances)
        return self.step()


def _rows(
    model: str, point: Point, images: int, direction: int | None, at: tuple[float, ...]
) -> tuple[Measurement, Measurement]:
    finite = math.isfinite(point.loss)  # with NaN weights accuracy means nothing either
    loss, accuracy = (value if finite else None for value in point)
    reason = None if finite else NOT_FINITE
    return (
        Measurement(model, "landscape_loss", loss, "nats", images, direction=direction, at=at, reason=reason),
        Measurement(model, "landscape_accuracy", accuracy, "share", images, direction=direction, at=at, reason=reason),
    )


def _curvature(line: Mapping[float, Point], step: float) -> float:
    return (line[step].loss + line[-step].loss - 2 * line[0.0].loss) / step**2


def _rise(line: Mapping[float, Point]) -> float:
    return (line[min(line)].loss + line[max(line)].loss) / 2 - line[0.0].loss


def _over_directions(model: str, measure: str, values: list[float], images: int, distance: float) -> list[Measurement]:
    """A row per direction, then their mean, which there is none of where a direction has no value."""
    unit, at = UNITS[measure], (distance,)
    rows = [
        Measurement(model, measure, value, unit, images, direction=number, at=at)
        if math.isfinite(value)
        else Measurement(model, measure, None, unit, images, direction=number, at=at, reason=NOT_FINITE)
        for number, value in enumerate(values)
    ]
    if not all(map(math.isfinite, values)):
        return [*rows, Measurement(model, measure, None, unit, images, at=at, reason="of a direction it has no value")]
    mean, low, high = mean_interval(values)
    return [*rows, Measurement(model, measure, mean, unit, images, at=at, low=low, high=high)]
