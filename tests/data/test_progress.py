"""Rates as they are told."""

from __future__ import annotations

import pytest

from fdscale.data.progress import rate_told


@pytest.mark.parametrize(
    ("rate", "told"), [(2400.4, "2,400 tasks/s"), (1.0, "1 tasks/s"), (0.04, "2.4 tasks/min"), (0.0, "0.0 tasks/min")]
)
def test_what_takes_longer_than_a_second_is_told_per_minute(rate: float, told: str) -> None:
    assert rate_told(rate, "tasks") == told
