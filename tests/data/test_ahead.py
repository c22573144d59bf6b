from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fdscale.data.ahead import ShardsAhead
from fdscale.data.augment import Augmentation
from fdscale.data.batches import TrainBatches
from fdscale.data.index import Index, build_index
from fdscale.data.loader import TrainLoader
from fdscale.data.mixture import Mixture

FREE = 2**30  # bytes of memory


@pytest.fixture
def index(write_shards, png) -> Index:
    return build_index(write_shards([{f"{shard}-{n}.png": png(n) for n in range(4)} for shard in range(5)]))


def bytes_read() -> int:
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def test_local_shards_are_brought_where_they_are_read_in_windows(index: Index) -> None:
    assert ShardsAhead(Mixture((index,), shuffle=8), 1.0, FREE)
    assert not ShardsAhead(Mixture((index,), shuffle=20), 1.0, FREE)
    ahead = ShardsAhead(Mixture((index, index), shuffle=8), 1.0, FREE)
    assert ahead.of(np.array([0, 3, 4, 19, 20, 39])) == [(0, 0), (0, 1), (0, 4), (1, 0), (1, 4)]
    assert ahead.steps(1) == 8
    assert ShardsAhead(Mixture((index,), shuffle=2**18), 1.0, FREE).steps(2048) == 16


def test_a_local_shard_is_read_through_once_for_its_stretch_of_steps(index: Index) -> None:
    ahead = ShardsAhead(Mixture((index,), shuffle=8), 1.0, FREE)
    before = bytes_read()
    assert ahead.bring((0, 3))
    first = bytes_read() - before
    assert first >= index.shards[3].bytes
    assert ahead.bring((0, 3))
    assert bytes_read() - before < 1.9 * first
    index.shard_path(2).unlink()
    assert ahead.bring((0, 2))  # told by the worker that needs it


def test_a_window_that_memory_does_not_hold_is_not_read_through(index: Index) -> None:
    held = 2 * sum(shard.bytes for shard in index.shards)
    assert ShardsAhead(Mixture((index,), shuffle=19), 1.0, held + 1)
    assert not ShardsAhead(Mixture((index,), shuffle=19), 1.0, held)


def test_what_several_nodes_would_read_through_is_not(index: Index) -> None:
    assert not ShardsAhead(Mixture((index,), shuffle=8), 0.5, FREE)  # five shards are one lane


def test_the_loader_shows_the_same_with_it(index: Index) -> None:
    mixture = Mixture((index,), shuffle=8)
    shown = []
    for ahead in (None, ShardsAhead(mixture, 1.0, FREE)):
        batches = TrainBatches(mixture, 6, Augmentation((0.2, 1.0), (0.75, 1.33), "bilinear", 0.5), 5)
        loader = TrainLoader(batches, mixture.order(4, 0), 0, 1, 4, 1, torch.device("cpu"), ahead)
        shown.append([batch.images.numpy().tobytes() for step in loader.steps(0, 7) for batch in step])
    assert shown[0] == shown[1]
