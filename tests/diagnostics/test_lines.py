"""The loss along directions: a quadratic one has its exact curvature, rise and surface; and nothing is left moved."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from scipy import stats
from torch import nn

from fdscale.config.errors import UserError
from fdscale.diagnostics.directions import numbered_direction
from fdscale.diagnostics.lines import LandscapePlan, Point, landscape_of
from fdscale.diagnostics.rows import Measurement


class Quadratic(nn.Module):
    """A loss of 2 + g w + w A w / 2 in a matrix (6, 5) of weights, A diagonal and positive."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        self.weights = nn.Parameter(torch.randn(6, 5, generator=drawn).to(dtype))
        self.curvature = torch.rand(6, 5, generator=drawn).double() + 0.5
        self.slope = torch.randn(6, 5, generator=drawn).double()
        self.centre = self.weights.detach().double().clone()

    def loss(self, away: torch.Tensor) -> float:
        return float(2 + (self.slope * away + self.curvature * away**2 / 2).sum())

    def forward(self) -> Point:
        return Point(self.loss(self.weights.detach().double() - self.centre), 0.5)


def rows_of(network: nn.Module, plan: LandscapePlan, advance: list[int] | None = None) -> list[Measurement]:
    return landscape_of("own", network, network, 7, plan, lambda: (advance or []).append(1))


def chosen(rows: list[Measurement], measure: str) -> list[Measurement]:
    return [row for row in rows if row.measure == measure]


@pytest.mark.parametrize(("dtype", "step"), [(torch.float64, 0.1), (torch.float64, 0.03), (torch.float32, 0.1)])
def test_a_quadratic_loss_has_its_curvature_and_its_rise(dtype: torch.dtype, step: float) -> None:
    network = Quadratic(dtype)
    rows = rows_of(network, LandscapePlan(directions=4, points=5, reach=0.5, step=step, seed=3))
    moves = [numbered_direction(network, 3, number)["weights"].double() for number in range(4)]
    exact = [float((network.curvature * move**2).sum()) for move in moves]
    *each, mean = chosen(rows, "sharpness")
    assert [row.direction for row in each] == [0, 1, 2, 3]
    assert [row.value for row in each] == pytest.approx(exact, rel=1e-5)
    assert mean.value == pytest.approx(sum(exact) / 4, rel=1e-5)
    interval = stats.t.interval(0.95, 3, loc=mean.value, scale=stats.sem(exact))
    assert (mean.low, mean.high) == pytest.approx(interval, rel=1e-4)
    assert (mean.direction, mean.at, mean.images) == (None, (step,), 7)
    *each, mean = chosen(rows, "loss_rise")
    assert [row.value for row in each] == pytest.approx([value * 0.5**2 / 2 for value in exact], rel=1e-5)
    assert mean.at == (0.5,)
    lines = [row for row in chosen(rows, "landscape_loss") if row.direction is not None]
    assert len(lines) == 4 * (5 + 2)
    for row in lines:
        assert row.at is not None
        assert row.value == pytest.approx(network.loss(row.at[0] * moves[row.direction or 0]), rel=1e-5)


def test_the_surface_lies_along_the_first_two_directions() -> None:
    network = Quadratic(torch.float64)
    rows = rows_of(network, LandscapePlan(directions=3, points=3, surface=5))
    x, y = (numbered_direction(network, 0, number)["weights"].double() for number in (0, 1))
    places = {row.at: row.value for row in chosen(rows, "landscape_loss") if row.direction is None}
    side = [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert list(places) == [(a, b) for a in side for b in side]
    for (a, b), value in places.items():
        assert value == pytest.approx(network.loss(a * x + b * y), rel=1e-6)


def test_a_direction_is_the_same_however_many_are_asked_for() -> None:
    network = Quadratic(torch.float64)
    few = rows_of(network, LandscapePlan(directions=1, points=3))
    many = rows_of(network, LandscapePlan(directions=4, points=3, surface=3))
    assert few[:10] == many[:10]  # five distances, loss and accuracy
    assert chosen(few, "sharpness")[0] == chosen(many, "sharpness")[0]


def test_one_direction_has_no_interval() -> None:
    _, mean = chosen(rows_of(Quadratic(torch.float64), LandscapePlan(directions=1, points=3)), "sharpness")
    assert (mean.low, mean.high) == (None, None)
    assert mean.value is not None


@pytest.mark.parametrize("plan", [LandscapePlan(2, 5), LandscapePlan(3, 21, 1.0, 0.1, 5), LandscapePlan(1, 3, 0.1)])
def test_every_point_is_computed_once_and_counted(plan: LandscapePlan) -> None:
    asked, counted = Counter[bytes](), list[int]()
    network = Quadratic(torch.float64)

    def evaluated() -> Point:
        asked[network.weights.detach().numpy().tobytes()] += 1
        return network()

    rows = landscape_of("own", network, evaluated, 1, plan, lambda: counted.append(1))
    assert plan.evaluations == len(counted) == sum(asked.values())
    on_the_axes = 4 * (plan.surface // 2)  # of the surface: they are on lines too
    assert len(asked) >= plan.evaluations - on_the_axes
    shown_again = plan.directions - 1 + bool(plan.surface)  # the centre
    assert len(chosen(rows, "landscape_loss")) == plan.evaluations + shown_again


def test_distances_are_told_as_they_are_meant() -> None:
    assert LandscapePlan(points=11, reach=1.0, step=0.1).line() == [
        *(-1.0, -0.8, -0.6, -0.4, -0.2, -0.1, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    assert len(LandscapePlan(points=21).line()) == 20  # the step is one of them
    assert 0.3 in LandscapePlan(points=21).line()


def test_weights_are_as_before_also_when_a_loss_fails() -> None:
    network, plan = Quadratic(torch.float32), LandscapePlan(2, 3, surface=3)
    before = network.weights.detach().numpy().tobytes()
    rows_of(network, plan)
    assert network.weights.detach().numpy().tobytes() == before
    for last in (4, plan.evaluations - 1):  # on a line, and on the surface
        done: list[int] = []

        def advance(last: int = last, done: list[int] = done) -> None:
            done.append(1)
            if len(done) == last:
                raise RuntimeError("no memory")

        with pytest.raises(RuntimeError, match="no memory"):
            landscape_of("own", network, network, 7, plan, advance)
        assert network.weights.detach().numpy().tobytes() == before


def test_what_is_not_finite_away_from_the_centre_is_told_there() -> None:
    """Beyond a distance, on one side of the first direction, the loss has no number."""
    network = Quadratic(torch.float64)
    first = numbered_direction(network, 0, 0)["weights"].double()

    def evaluated() -> Point:
        away = network.weights.detach() - network.centre
        return Point(math.nan if torch.allclose(away, first) else network.loss(away), 0.5)

    rows = landscape_of("own", network, evaluated, 7, LandscapePlan(2, 3, surface=3), lambda: None)
    silent = [row for row in rows if row.value is None]
    assert [(row.measure, row.direction, row.at) for row in silent] == [
        ("landscape_loss", 0, (1.0,)),
        ("landscape_accuracy", 0, (1.0,)),
        ("loss_rise", 0, (1.0,)),
        ("loss_rise", None, (1.0,)),
        ("landscape_loss", None, (1.0, 0.0)),
        ("landscape_accuracy", None, (1.0, 0.0)),
    ]
    assert all("finite" in (row.reason or "") or "direction" in (row.reason or "") for row in silent)


def test_a_centre_that_is_not_finite_is_refused() -> None:
    network = Quadratic(torch.float32)
    with pytest.raises(UserError, match=r"own: its loss is nan: there is no landscape around it"):
        landscape_of("own", network, lambda: Point(math.nan, 0.0), 7, LandscapePlan(), lambda: None)
