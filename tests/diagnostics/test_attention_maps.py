"""Scores of averaged maps: their known answers, and the same numbers whatever order the patches come in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdscale.diagnostics.attention_maps import Array, column_share, diagonality, offset_share

PLACES = np.array([(y, x) for y in range(3) for x in range(4)], float) * 8 + 4
UNIFORM, IDENTITY = np.full((12, 12), 1 / 12), np.eye(12)
RANDOM = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).dirichlet(np.full(12, 0.5), size=12))


def column(key: int) -> Array:
    return np.tile(np.eye(12)[key], (12, 1))


def test_of_a_map_that_sees_itself_alone() -> None:
    assert diagonality(IDENTITY) == 1
    assert column_share(IDENTITY) == pytest.approx(0, abs=1e-12)
    assert offset_share(IDENTITY, PLACES) == pytest.approx(1)


def test_of_a_uniform_map() -> None:
    assert diagonality(UNIFORM) == pytest.approx(0, abs=1e-12)
    assert column_share(UNIFORM) == offset_share(UNIFORM, PLACES) == 0
    rounded = UNIFORM * (1 + 1e-7 * np.random.default_rng(0).standard_normal((12, 12)))  # as fp32 leaves it
    assert column_share(rounded) == offset_share(rounded, PLACES) == 0


def test_of_a_map_whose_queries_all_see_one_key() -> None:
    assert column_share(column(5)) == pytest.approx(1)
    assert diagonality(column(5)) == pytest.approx(0, abs=1e-12)
    assert 0 < offset_share(column(5), PLACES) < 0.5


def test_of_a_map_that_is_half_diagonal() -> None:
    half = (IDENTITY + UNIFORM) / 2
    assert diagonality(half) == pytest.approx(0.5)
    assert offset_share(half, PLACES) == pytest.approx(1)


@given(average=RANDOM, seed=st.integers(0, 1000))
def test_the_order_of_patches_does_not_matter(average: Array, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(12)
    shuffled, places = average[np.ix_(order, order)], PLACES[order]
    assert diagonality(shuffled) == pytest.approx(diagonality(average), abs=1e-12)
    assert column_share(shuffled) == pytest.approx(column_share(average))
    assert offset_share(shuffled, places) == pytest.approx(offset_share(average, PLACES))


@given(average=RANDOM)
def test_shares_are_of_one_whole(average: Array) -> None:
    assert 0 <= column_share(average) <= 1
    assert 0 <= offset_share(average, PLACES) <= 1
    assert -1 / 11 <= diagonality(average) <= 1


def test_offsets_that_rounding_tells_apart_are_one() -> None:
    stride = 224 / 9
    places = np.array([(y, x) for y in range(3) for x in range(4)], np.float32) * np.float32(stride)
    assert offset_share(IDENTITY, places.astype(float)) == pytest.approx(1)
    shifted = np.roll(IDENTITY, 1, axis=1)
    same = offset_share(shifted, PLACES)
    assert offset_share(shifted, places.astype(float)) == pytest.approx(same)
