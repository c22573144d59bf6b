from __future__ import annotations

import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from fdscale.config.errors import UserError
from fdscale.data.augment import Augmentation
from fdscale.data.batches import Batch, EvalBatches, TrainBatches
from fdscale.data.holding import note
from fdscale.data.index import Index, build_index, load_index
from fdscale.data.loader import EvalLoader, TrainLoader, check_bad_ratio
from fdscale.data.mixture import Mixture
from fdscale.data.order import GlobalOrder

CPU = torch.device("cpu")
VIEWS = Augmentation((0.2, 1.0), (0.75, 1.33), "bilinear", 0.5)
GLOBAL_BATCH = 8  # of 26 samples: 3 steps an epoch


@pytest.fixture(scope="module")
def index(plain_folder: Path) -> Index:
    build_index(plain_folder)
    return load_index(plain_folder)


@pytest.fixture(scope="module")
def mixture(index: Index, tmp_path_factory, png) -> Mixture:
    """26 and 41 images, each read in windows: of 67, 8 steps an epoch. Some are JPEGs that are decoded reduced."""
    folder = tmp_path_factory.mktemp("further")
    for shard in range(4):
        with tarfile.open(folder / f"s{shard}.tar", "w") as tar:
            for number in range(8 + shard, 19 + shard - shard // 2):
                reduced = number % 3 == 0
                info = tarfile.TarInfo(f"{shard}/{number}.{'jpg' if reduced else 'png'}")
                info.size = len(data := large_jpeg(number) if reduced else png(100 * shard + number))
                tar.addfile(info, io.BytesIO(data))
    return Mixture((index, build_index(folder)), ("data.shards", "data.further_shards.more.shards"), None, shuffle=9)


def large_jpeg(number: int) -> bytes:
    """Noise of 70 x 80 pixels: a crop of a fifth of it has more than twice the sides of a view."""
    pixels = np.random.default_rng(number).integers(0, 256, (70, 80, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "jpeg")
    return stream.getvalue()


def train_loader(
    read: Index | Mixture, rank=0, world_size=1, micro_batch=2, workers=0, batch=GLOBAL_BATCH, views=None
) -> TrainLoader:
    mixture = read if isinstance(read, Mixture) else Mixture((read,))
    batches, order = TrainBatches(mixture, 6, VIEWS, 5, views), mixture.order(batch, 5)
    return TrainLoader(batches, order, rank, world_size, micro_batch, workers, CPU)


def rows_of(batches: list[Batch]) -> list[tuple[int, int, bytes]]:
    return [
        (key, label, image.numpy().tobytes())
        for batch in batches
        for key, label, image in zip(batch.keys.tolist(), batch.labels.tolist(), batch.images, strict=True)
    ]


def plain_steps(index: Index, first: int, last: int) -> list[list[tuple[int, int, bytes]]]:
    """The undisturbed run: one rank, no workers, one micro batch a step."""
    loader = train_loader(index, micro_batch=GLOBAL_BATCH)
    return [rows_of(step) for step in loader.steps(0, last)][first:]


def test_what_a_batch_is(index):
    loader = train_loader(index, rank=1, world_size=2, micro_batch=2)
    assert loader.accumulation == 2
    (step,) = loader.steps(4, 5)
    expected = GlobalOrder(26, GLOBAL_BATCH, seed=5).batch(4)[4:]
    for micro, batch in enumerate(step):
        samples = index.samples[expected[2 * micro : 2 * micro + 2]]
        assert batch.images.shape == (2, 3, 6, 6)
        assert (batch.images.dtype, batch.labels.dtype, batch.keys.dtype) == (
            torch.uint8,
            torch.int64,
            torch.int64,
        )
        assert batch.labels.tolist() == samples["label"].tolist()
        assert batch.keys.numpy().view(np.uint64).tolist() == samples["key"].tolist()
        assert batch.rows == slice(4 + 2 * micro, 6 + 2 * micro)
        assert batch.bad == []
    assert loader.data_wait_seconds > 0


class Life(NamedTuple):
    """One start of a run: so many ranks, workers and images a micro batch, stopped after so many steps."""

    world_size: int
    workers: int
    micro_batch: int
    steps: int


def lived(read: Index | Mixture, life: Life, first: int) -> Iterator[list[tuple[int, int, bytes]]]:
    """The rows of each global batch that the ranks of one life see together."""
    size, last = life.world_size, first + life.steps
    runs = [train_loader(read, rank, size, life.micro_batch, life.workers).steps(first, last) for rank in range(size)]
    for _ in range(life.steps):
        steps = [next(run) for run in runs]
        edges = [(batch.rows.start, batch.rows.stop) for step in steps for batch in step]
        assert edges[0][0] == 0
        assert edges[-1][1] == GLOBAL_BATCH
        assert all(left[1] == right[0] for left, right in pairwise(edges))
        yield [row for step in steps for row in rows_of(step)]
    assert [next(run, None) for run in runs] == [None] * size


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_ranks_and_workers_give_the_same_ids_and_bytes_of_an_epoch(mixture, world_size, workers):
    epoch = mixture.order(GLOBAL_BATCH, 5).steps_per_epoch
    assert list(lived(mixture, Life(world_size, workers, 2, epoch), 0)) == plain_steps(mixture, 0, epoch)


lives = st.builds(
    Life, st.sampled_from([1, 2, 4]), st.sampled_from([0, 0, 1, 3]), st.sampled_from([1, 2]), st.integers(1, 7)
)


@settings(max_examples=15)
@given(st.lists(lives, min_size=1, max_size=4), st.booleans())
def test_a_run_stopped_anywhere_and_resumed_on_any_ranks_sees_what_the_undisturbed_one_sees(
    index, mixture, stretches, mixes
):
    read, step = mixture if mixes else index, 0
    expected = plain_steps(read, 0, sum(life.steps for life in stretches))
    for life in stretches:
        assert list(lived(read, life, step)) == expected[step : (step := step + life.steps)]


def test_views_repeat_where_they_are_bounded(index):
    loader = train_loader(index, micro_batch=26, batch=26, views=2)
    shown = [{key: image for key, _, image in rows_of(step)} for step in loader.steps(0, 4)]
    assert shown[0] == shown[2]
    assert shown[1] == shown[3]
    assert not set(shown[0].values()) & set(shown[1].values())


def test_a_data_set_seen_more_often_shows_new_views_each_time(index, mixture):
    weighted = Mixture(mixture.indices, mixture.names, (3.0, 1.0))
    loader = train_loader(weighted, micro_batch=GLOBAL_BATCH)
    keys = set(index.samples["key"].astype(np.int64).tolist())
    shown = [(key, image) for step in loader.steps(0, 9) for key, _, image in rows_of(step) if key in keys]
    assert len(shown) == 9 * 6
    assert len({key for key, _ in shown}) == 26
    assert len(set(shown)) == len(shown)


def test_epochs_show_other_views_of_the_same_samples(index):
    first, second = (rows_of([batch]) for step in (0, 1) for batch in next(epoch(index, step)))
    assert {key for key, _, _ in first} == {key for key, _, _ in second}
    assert not {image for _, _, image in first} & {image for _, _, image in second}


def epoch(index: Index, number: int):
    return train_loader(index, micro_batch=26, batch=26).steps(number, number + 1)


def test_one_shard_for_twelve_workers_loses_and_doubles_nothing(index):
    keys = []
    for rank in range(4):
        loader = train_loader(index, rank, world_size=4, micro_batch=1, workers=3, batch=24)
        keys += [key for step in loader.steps(0, 1) for key, _, _ in rows_of(step)]
    assert len(set(keys)) == len(keys) == 24


def test_batches_that_are_kept_are_never_written_over(index):
    kept = list(train_loader(index, workers=1).steps(0, 9))
    assert [rows_of(step) for step in kept] == plain_steps_of_two(index, 9)


def plain_steps_of_two(index: Index, last: int) -> list[list[tuple[int, int, bytes]]]:
    return [rows_of(step) for step in train_loader(index).steps(0, last)]


def test_one_loader_is_read_twice_at_once(index):
    loader = EvalLoader(EvalBatches(index, 6, "bilinear"), len(index), 0, 1, 4, 1, CPU)
    pairs = [(rows_of([one]), rows_of([other])) for one, other in zip(loader, loader, strict=True)]
    assert len(pairs) == 7
    assert all(one == other for one, other in pairs)


def test_batches_that_are_let_go_lie_where_earlier_ones_lay(index):
    places = {batch.images.data_ptr() for step in train_loader(index, workers=1).steps(0, 20) for batch in step}
    assert len(places) <= 11  # 4 of this step, 4 of the one before, 2 ahead and one in hand; 80 were read


def test_the_ranks_own_generators_are_left_alone(index):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1]
    list(train_loader(index, workers=1).steps(0, 2))
    list(EvalLoader(EvalBatches(index, 6, "bilinear"), len(index), 0, 1, 4, 1, CPU))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_named_and_counted(write_shards, png, workers):
    good = {f"{n}.{kind}": data for n in range(4) for kind, data in (("png", png(n)), ("cls", b"%d" % n))}
    index = build_index(write_shards([good | {"2.png": b"bad"}, {"4.png": b"bad", "5.png": png(5)}]))
    loader = train_loader(index, micro_batch=3, workers=workers, batch=6)
    (step,) = loader.steps(0, 1)
    keys = index.samples["key"].astype(np.int64)
    drawn = [{2: 3, 4: 5}.get(sample, sample) for sample in GlobalOrder(6, 6, seed=5).batch(0).tolist()]
    rows = rows_of(step)
    assert [key for key, _, _ in rows] == keys[drawn].tolist()
    assert [label for _, label, _ in rows] == [-1 if sample == 5 else sample for sample in drawn]
    assert sorted(name.split(" ")[0] for batch in step for name in batch.bad) == ["s0.tar:2.png", "s1.tar:4.png"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_reads_like_any_other(write_shards, png, workers):
    index = build_index(write_shards([{"a.png": b"bad", "b.png": b"bad"}]))
    with pytest.raises(UserError, match=r"^rank 1 of 2: no image can be decoded in .*index'$"):
        next(train_loader(index, 1, 2, 1, workers, batch=2).steps(0, 1))


def test_no_shard_stays_open(index):
    training, evaluation = (
        train_loader(index),
        EvalLoader(EvalBatches(index, 6, "bilinear"), len(index), 0, 1, 26, 0, CPU),
    )
    run = training.steps(0, 9)
    next(run)
    run.close()
    list(evaluation)
    opened = {link.resolve() for link in Path("/proc/self/fd").iterdir()}
    assert opened.isdisjoint(index.folder.resolve() / shard.name for shard in index.shards)


def test_uneven_batches_are_refused(index):
    with pytest.raises(UserError, match=r"3 ranks x micro batch 2 = 6"):
        train_loader(index, world_size=3)


def test_signals_to_the_process_group_leave_the_workers_to_the_rank(index):
    run = train_loader(index, workers=2).steps(0, 9)
    seen = [rows_of(next(run))]
    for worker in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(worker.pid, number)
    seen += [rows_of(step) for step in run]
    assert seen == plain_steps(index, 0, 9)


@pytest.fixture
def impatient(monkeypatch) -> None:
    """torch looks every half second whether its workers live, not every five."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,))
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)


@pytest.mark.usefixtures("impatient")
def test_a_worker_that_dies_is_told_with_its_rank_by_the_next_batch(index):
    others = multiprocessing.active_children()
    run = train_loader(index, rank=1, world_size=2, workers=1).steps(0, 10**6)
    next(run)
    (worker,) = set(multiprocessing.active_children()) - set(others)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    sum(range(10**6))  # the rank goes on working: nothing is raised here
    with pytest.raises(RuntimeError, match=r"rank 1 of 2: a data worker of 1 died .*lower data\.workers"):
        for _ in run:
            pass


class Deadly(TrainBatches):
    """Whose worker is killed, as by the kernel for want of memory, at the sample `deadly`."""

    deadly = -1

    def __getitem__(self, request):
        before = request.samples.tolist().index(self.deadly) if self.deadly in request.samples else len(request.samples)
        super().__getitem__(replace(request, samples=request.samples[:before], views=request.views[:before]))
        return super().__getitem__(request) if before == len(request.samples) else self._die()

    def _die(self):
        note(self.deadly)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_that_dies_is_told_with_the_sample_that_it_held(mixture, workers):
    batches, order = Deadly(mixture, 6, VIEWS, 5), mixture.order(GLOBAL_BATCH, 5)
    batches.deadly = int(order.batch(3)[5])
    name = re.escape(batches.name(batches.deadly))
    run = TrainLoader(batches, order, 0, 1, 4, workers, CPU).steps(0, 9)
    with pytest.raises(RuntimeError, match=rf"rank 0 of 1: a data worker of {workers} died at {name} \(.*workers"):
        list(run)


CRASH = """
import sys, torch, signal
sys.path[:] = {path!r}
from fdscale.data.augment import Augmentation
from fdscale.data.index import load_index
from fdscale.data.batches import TrainBatches
from fdscale.data.loader import TrainLoader
from fdscale.data.mixture import Mixture
from fdscale.data.order import GlobalOrder
signal.signal(signal.SIGTERM, lambda *_: None)  # as a rank that only notes the wish to stop
index = load_index({folder!r})
augmentation = Augmentation((1.0, 1.0), (1.0, 1.0), "bilinear", 0.5)
batches = TrainBatches(Mixture((index,)), 6, augmentation, 0)
loader = TrainLoader(batches, GlobalOrder(26, 8, 0), 0, 1, 2, 2, torch.device("cpu"))
run = loader.steps(0, 100)  # still alive, as in the frames of a traceback, when Python exits
next(run)
raise ValueError("the training step failed")
"""


def test_a_crash_of_the_rank_ends_its_workers(index, plain_folder):
    code = CRASH.format(path=sys.path, folder=str(plain_folder))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert "the training step failed" in run.stderr


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 26), (1, 4), (3, 4), (4, 8), (2, 13)])
def test_evaluation_sees_every_sample_once_in_equally_many_batches(index, world_size, batch_size, workers):
    keys = []
    for rank in range(world_size):
        loader = EvalLoader(EvalBatches(index, 6, "bicubic"), len(index), rank, world_size, batch_size, workers, CPU)
        batches = list(loader)
        assert len(batches) == len(loader) == -(-26 // (world_size * batch_size))
        for batch in batches:
            assert batch.images.shape == (batch_size, 3, 6, 6)
            assert batch.valid.tolist() == [label >= 0 for label in batch.labels.tolist()]
            keys += batch.keys[batch.valid].tolist()
    assert sorted(keys) == sorted(index.samples["key"].astype(np.int64).tolist())


def test_evaluation_leaves_bad_images_out(write_shards, png):
    index = build_index(write_shards([{"a.png": png(0), "b.png": b"bad", "c.png": png(2)}]))
    (batch,) = EvalLoader(EvalBatches(index, 6, "bicubic"), len(index), 0, 1, 4, 0, CPU)
    assert batch.valid.tolist() == [True, False, True, False]
    assert batch.labels.tolist() == [-1, -2, -1, -2]
    assert not batch.images[1].any()
    assert batch.bad[0].startswith("s0.tar:b.png")


def test_bad_ratio():
    check_bad_ratio(1, 100, 0.01, ["a"])
    check_bad_ratio(0, 100, 0.0, [])
    with pytest.raises(UserError, match=r"2 of 100 samples .*\(2\.00%\); allowed: 1\.00%.*\n  a\n  b"):
        check_bad_ratio(2, 100, 0.01, ["a", "b"])


def test_keys_stay_on_the_cpu(index):
    (batch,) = next(train_loader(index, micro_batch=8).steps(0, 1))
    moved = batch.to(torch.device("meta"))
    assert (moved.images.device.type, moved.labels.device.type, moved.keys.device.type) == ("meta", "meta", "cpu")
