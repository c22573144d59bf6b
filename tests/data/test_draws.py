"""Draws depend on what is drawn alone, and leave the global generators as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdscale.data.draws import Purpose, generator, global_generators


@given(st.integers(0, 2**63), st.integers(0, 2**64 - 1), st.integers(0, 10**7), st.sampled_from(Purpose))
def test_a_draw_is_a_pure_function_of_what_it_is_for(seed, item, time, purpose):
    first, again = (generator(seed, item, time, purpose).random(3).tolist() for _ in range(2))
    assert first == again


def test_seed_item_time_and_purpose_each_change_it():
    numbers = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 0, 3)]
    assert len({generator(*given[:3], Purpose(given[3])).random() for given in numbers}) == len(numbers)


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
