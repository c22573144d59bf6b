from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdscale.config.errors import UserError
from fdscale.data.index import build_index
from fdscale.data.mixture import Mixture
from fdscale.data.order import (
    LANES,
    GlobalOrder,
    MixedOrder,
    WindowedOrder,
    accumulation_steps,
    lanes_of,
    rows_by_share,
)


@settings(max_examples=50)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 5))
def test_an_epoch_holds_each_sample_at_most_once(samples, batch, seed, epoch):
    batch = min(samples, batch)
    order = GlobalOrder(samples, batch, seed)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    seen = np.concatenate([order.batch(step) for step in steps])
    assert {view for step in steps for view in order.views(step).tolist()} == {epoch}
    assert len(seen) == samples // batch * batch
    assert len(set(seen.tolist())) == len(seen)
    assert set(seen.tolist()) <= set(range(samples))


@settings(max_examples=50)
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


shards = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda sizes: sum(sizes) >= 1)


def starts_of(sizes: list[int]) -> np.ndarray:
    return np.cumsum([0, *sizes])


def epoch_of(order: WindowedOrder, epoch: int) -> np.ndarray:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return np.stack([order.batch(step) for step in steps])


@settings(max_examples=100)
@given(shards, st.integers(1, 200), st.integers(1, 200), st.integers(0, 3), st.integers(0, 2))
def test_a_windowed_epoch_holds_each_sample_at_most_once(sizes, batch, shuffle, seed, epoch):
    batch = min(batch, sum(sizes))
    order = WindowedOrder(starts_of(sizes), batch, seed, shuffle)
    seen = epoch_of(order, epoch).ravel()
    assert len(seen) == len(set(seen.tolist())) == sum(sizes) // batch * batch
    assert set(seen.tolist()) <= set(range(sum(sizes)))
    assert order.views(epoch * order.steps_per_epoch).tolist() == [epoch] * batch


@settings(max_examples=60)
@given(shards, st.integers(1, 70), st.integers(1, 300), st.lists(st.integers(0, 60), min_size=1, max_size=12))
def test_a_windowed_batch_depends_on_the_step_alone(sizes, batch, shuffle, steps):
    batch = min(batch, sum(sizes))
    order = WindowedOrder(starts_of(sizes), batch, 3, shuffle)
    for step in steps:
        assert np.array_equal(order.batch(step), WindowedOrder(starts_of(sizes), batch, 3, shuffle).batch(step))


def test_numpy_still_draws_the_recorded_windowed_order():
    order = WindowedOrder(starts_of([5] * 24), 4, 0, 12)  # two lanes
    assert order.batch(0).tolist() == [65, 68, 58, 55]
    assert order.batch(7).tolist() == [77, 79, 108, 105]


def test_a_rank_reads_few_shards_at_a_time_and_each_of_them_once():
    sizes, batch, shuffle, ranks = [100] * 640, 128, 8192, 4
    order = WindowedOrder(starts_of(sizes), batch, 1, shuffle)
    epoch = epoch_of(order, 2) // 100  # (steps, rows): the shard of each sample
    readers = np.zeros(len(sizes), int)
    for rank in range(ranks):
        mine = epoch[:, rank * batch // ranks : (rank + 1) * batch // ranks]
        first, last = (np.full(len(sizes), fill) for fill in (len(epoch), -1))
        for step, shards_of_step in enumerate(mine):
            np.minimum.at(first, shards_of_step, step)
            np.maximum.at(last, shards_of_step, step)
        used = last >= 0
        readers += used
        # One window of the line holds parts of at most so many shards, and a shard lies in two windows at most.
        assert (last - first)[used].max() < 2 * order.window_steps
        assert max(len(set(mine[s : s + order.window_steps].ravel().tolist())) for s in range(len(mine) - 64)) <= 96
    assert readers.mean() < 1.08  # a shard at the border of two ranks' lanes is read by both


def mixing_of(batches: np.ndarray, classes: int) -> float:
    """Mean number of distinct classes in a batch (steps, rows)."""
    return float(np.mean([len(set(batch.tolist())) for batch in batches]))


def test_shards_that_were_packed_in_order_of_class_are_mixed_over_the_lanes():
    sizes, batch = [100] * 640, 128
    order = WindowedOrder(starts_of(sizes), batch, 0, 32768)
    true = np.random.default_rng(0).permutation(64000)[: len(epoch_of(order, 0)) * batch].reshape(-1, batch)
    windowed, shuffled = (mixing_of(batches // 100, 640) for batches in (epoch_of(order, 0), true))
    assert shuffled == pytest.approx(116, abs=1)
    assert windowed > 0.9 * shuffled


def test_samples_of_one_shard_meet_others_in_each_epoch():
    order = WindowedOrder(starts_of([50] * 200), 100, 0, 5000)
    together = [
        {frozenset(pair) for batch in epoch_of(order, epoch) for pair in pairwise(batch.tolist())} for epoch in (0, 1)
    ]
    assert len(together[0] & together[1]) < 30  # of 9,900 neighbours; a true shuffle repeats two


def test_every_sample_has_its_chance():
    order = WindowedOrder(starts_of([7] * 13), 20, 0, 40)  # 91 samples: 11 are left out of each epoch
    assert len({sample for epoch in range(40) for sample in epoch_of(order, epoch).ravel().tolist()}) == 91


def test_lanes_are_as_many_as_a_batch_has_rows_at_most():
    assert len(set(WindowedOrder(starts_of([10] * 50), 3, 0, 30).batch(5).tolist())) == 3
    assert len(WindowedOrder(starts_of([10] * 500), LANES + 36, 0, 300).batch(5)) == LANES + 36


@pytest.mark.parametrize(
    ("shards", "batch", "lanes"), [(5, 8, 1), (1282, 2048, 128), (10**5, 2048, 256), (10**5, 96, 64), (16, 2048, 2)]
)
def test_a_lane_has_shards_enough(shards, batch, lanes):
    assert lanes_of(shards, batch) == lanes


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 60)), min_size=1, max_size=4), st.integers(0, 40))
def test_a_mixture_has_the_same_rows_of_each_data_set_in_every_step(parts, step):
    rows, sizes = [row for row, _ in parts], [row + more for row, more in parts]
    order = MixedOrder(
        [GlobalOrder(size, row, i) for i, (row, size) in enumerate(zip(rows, sizes, strict=True))], sizes
    )
    ends = np.cumsum(sizes)
    owners = np.searchsorted(ends, order.batch(step), side="right")
    assert np.bincount(owners, minlength=len(rows)).tolist() == rows
    for place, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        own = GlobalOrder(size, row, place)
        mine = owners == place
        assert (order.batch(step)[mine] - (ends[place] - size)).tolist() == own.batch(step).tolist()
        assert order.views(step)[mine].tolist() == own.views(step).tolist()


def test_no_data_set_of_a_mixture_has_the_order_of_another_run(plain_folder):
    index = build_index(plain_folder)
    two = Mixture((index, index), ("data.shards", "data.further_shards.same.shards"))
    orders = [two.order(26, seed).batch(0) for seed in (0, 1)]
    drawn = [tuple((batch[batch // 26 == place] % 26).tolist()) for batch in orders for place in (0, 1)]
    assert len(set(drawn)) == 4


def test_rows_of_a_mixture_are_spread_evenly():
    order = MixedOrder([GlobalOrder(60, 6, 0), GlobalOrder(30, 2, 0)], [60, 30])
    assert (order.batch(0) >= 60).tolist() == [False, False, True, False, False, False, True, False]
    assert order.steps_per_epoch == 90 // 8


@pytest.mark.parametrize(
    ("batch", "shares", "rows"),
    [(8, [3, 1], [6, 2]), (10, [1, 1, 1], [4, 3, 3]), (2048, [2, 1], [1365, 683]), (4, [99, 1], [4, 0])],
)
def test_rows_by_share(batch, shares, rows):
    assert rows_by_share(batch, shares) == rows


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
