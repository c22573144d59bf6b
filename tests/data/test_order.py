from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdscale.config.errors import UserError
from fdscale.data.order import GlobalOrder, accumulation_steps


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 5))
def test_an_epoch_holds_each_sample_at_most_once(samples, batch, seed, epoch):
    batch = min(samples, batch)
    order = GlobalOrder(samples, batch, seed)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    seen = np.concatenate([order.batch(step) for step in steps])
    assert {order.epoch(step) for step in steps} == {epoch}
    assert len(seen) == samples // batch * batch
    assert len(set(seen.tolist())) == len(seen)
    assert set(seen.tolist()) <= set(range(samples))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=20))
def test_a_batch_depends_on_the_step_alone(steps):
    order = GlobalOrder(50, 7, seed=3)
    for step in steps:
        assert np.array_equal(order.batch(step), GlobalOrder(50, 7, seed=3).batch(step))


def test_epochs_and_seeds_differ_and_numpy_still_draws_the_recorded_order():
    order = GlobalOrder(10, 10, seed=0)
    assert order.batch(0).dtype == np.int64
    assert order.batch(0).tolist() == [8, 0, 3, 7, 6, 4, 1, 5, 2, 9]
    assert order.batch(1).tolist() == [1, 5, 6, 4, 8, 7, 9, 3, 2, 0]
    assert GlobalOrder(10, 10, seed=1).batch(0).tolist() == [6, 2, 1, 0, 8, 4, 3, 9, 7, 5]


def test_nobody_can_write_into_the_order():
    with pytest.raises(ValueError, match="read-only"):
        GlobalOrder(10, 5, seed=0).batch(0)[0] = 3


def test_fewer_samples_than_a_global_batch():
    with pytest.raises(UserError, match=r"data\.global_batch is 8, but the training data holds 7.*1 to 7"):
        GlobalOrder(7, 8, seed=0)


def test_accumulation_steps():
    assert accumulation_steps(2048, 16, 32) == 4
    assert accumulation_steps(6, 2, 3) == 1


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            (100, 4, 8),
            r"4 ranks x micro batch 8 = 32, and 100 / 32 = 3 rest 4; allowed: .*96 or 128.*1, 5, 25$",
        ),
        ((8, 4, 4), r"8 / 16 = 0 rest 8; allowed: multiples of 16 \(nearest: 16\).* from 1, 2$"),
        ((7, 2, 1), r"7 / 2 = 3 rest 1; .*6 or 8\), or another train_micro_batch_size_per_gpu$"),
        ((8, 9, 1), r"^data.global_batch 8: 9 ranks are more than the images of one step; start at most 8 ranks, or"),
    ],
)
def test_an_uneven_global_batch_shows_the_arithmetic(numbers, message):
    with pytest.raises(UserError, match=message):
        accumulation_steps(*numbers)
