"""What a figure says beyond its dots: bands within the bounds of their measure, and which side is expected."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from fdscale.study.plots import Paired, _band, _expected


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-np.inf, np.inf)])
def test_a_band_ends_where_its_measure_does(bounds: tuple[float, float]) -> None:
    axes = Figure().subplots()
    _band(axes, np.arange(3.0), np.array([[0.1, 0.9, np.nan], [0.02, 0.99, 0.5]]), 0, "a network", bounds)
    (band,) = axes.collections
    places = band.get_paths()[0].vertices[:, 1]
    assert (places.min() < 0, places.max() > 1) == (bounds[0] < 0, bounds[1] > 1)  # intervals of two seeds are wide
    assert axes.lines[0].get_ydata()[2] == 0.5  # where a seed has no value


def test_the_expected_side_is_shaded() -> None:
    axes = Figure().subplots()
    axes.set_xlim(-3, 2)
    _expected(axes, [Paired("gains", 0, [1.0], +1), Paired("loses", 1, [1.0], -1)])
    sides = [shade.get_paths()[0].get_extents() for shade in axes.collections]
    assert [(side.x0, side.x1) for side in sides] == [(0, 2), (-3, 0)]
    assert axes.get_xlim() == (-3, 2)
