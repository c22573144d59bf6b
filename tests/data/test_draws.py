"""Draws depend on what is drawn alone, and leave the global generators as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from fdscale.data.draws import Draws, Purpose, generator, global_generators


@given(st.integers(0, 2**63), st.integers(0, 2**64 - 1), st.integers(0, 10**7), st.sampled_from(Purpose))
def test_a_draw_is_a_pure_function_of_what_it_is_for(seed, item, time, purpose):
    for kind in (generator, Draws):
        first, again = (draws_of(kind(seed, item, time, purpose), 20) for _ in range(2))
        assert first == again


def draws_of(draw: np.random.Generator | Draws, number: int) -> list[float]:
    return [draw.random() for _ in range(number)]


@pytest.mark.parametrize("kind", [generator, Draws])
def test_seed_item_time_and_purpose_each_change_it(kind):
    numbers = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 0, 3)]
    assert len({kind(*given[:3], Purpose(given[3])).random() for given in numbers}) == len(numbers)


def test_draws_are_even_and_independent_of_their_neighbours():
    drawn = np.array([draws_of(Draws(7, item, 0, Purpose.VIEW), 20) for item in range(5000)])
    assert kstest(drawn.ravel(), "uniform").pvalue > 1e-3
    correlated = np.corrcoef(np.concatenate([drawn[:-1], drawn[1:]], axis=1), rowvar=False) - np.eye(40)
    assert np.abs(correlated).max() < 5 / 5000**0.5


@given(st.integers(1, 10**6), st.integers(0, 2**64 - 1))
def test_whole_numbers_stay_below_their_end(end, item):
    assert 0 <= Draws(0, item, 0, Purpose.VIEW).below(end) < end


def test_uniform_numbers_lie_between_their_bounds():
    draw = Draws(0, 0, 0, Purpose.VIEW)
    drawn = [draw.uniform(0.08, 1.0) for _ in range(2000)]
    assert 0.08 <= min(drawn) < 0.09 < 0.99 < max(drawn) < 1.0


def global_draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())]


def test_global_generators_draw_what_they_are_told_and_get_their_state_back():
    random.seed(1)
    np.random.seed(1)
    undisturbed = [global_draws(), global_draws()]
    random.seed(1)
    np.random.seed(1)
    first = global_draws()
    inside = []
    for item in (5, 5, 6):
        with global_generators(generator(0, item, 0, Purpose.RANDAUGMENT)):
            inside.append(global_draws())
    assert inside[0] == inside[1] != inside[2]
    assert [first, global_draws()] == undisturbed


def test_their_state_comes_back_after_a_failure_too():
    before = random.getstate()
    with pytest.raises(ValueError, match="mistake"), global_generators(generator(0, 0, 0, Purpose.VIEW)):
        raise ValueError("a mistake inside")
    assert random.getstate() == before
