"""Student's t without scipy, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fdscale.diagnostics.intervals import mean_interval, student_t


@given(freedom=st.integers(1, 2000))
def test_the_quantile_is_scipys(freedom: int) -> None:
    assert student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


@given(values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
def test_the_interval_is_scipys(values: list[float]) -> None:
    mean, low, high = mean_interval(values)
    error = np.std(values, ddof=1) / len(values) ** 0.5
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    margin = stats.t.ppf(0.975, len(values) - 1) * error
    assert (low, high) == pytest.approx((np.mean(values) - margin, np.mean(values) + margin), abs=1e-6)


def test_a_single_value_has_no_interval() -> None:
    assert mean_interval([3.0]) == (3.0, None, None)
