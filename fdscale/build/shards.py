"""What the programs that read shards share: their indices, loaders, augmentation and held-out means."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from fdscale.build.run import OpenData, Run
from fdscale.build.training import Measured
from fdscale.cluster import host_memory
from fdscale.config.programs import ShardSettings
from fdscale.config.settings import FinetuneSettings
from fdscale.data.ahead import ShardsAhead
from fdscale.data.augment import FILTERS, Augmentation
from fdscale.data.batches import EvalBatches, TrainBatches
from fdscale.data.index import Index, load_index
from fdscale.data.loader import EvalLoader, TrainLoader
from fdscale.data.mixture import Mixture, mixed
from fdscale.data.packing.digits import pack_digits
from fdscale.data.randaugment import RandAugment
from fdscale.data.remote.cache import Cache, cache_of
from fdscale.planning.data_check import DIGITS
from fdscale.students.student import Student
from fdscale.training.engine import Connection
from fdscale.training.evaluate import SampleTerms, evaluate, evaluate_average
from fdscale.training.guards import Guards
from fdscale.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def shards_of(settings: ShardSettings) -> OpenData[Mixture, Index]:
    """Opens the shards that the settings name."""
    return partial(_open, settings)


def _open(settings: ShardSettings, directory: RunDirectory, connection: Connection) -> tuple[Mixture, Index | None]:
    named = settings.data.data_sets
    cache = cache_of(settings.data)  # one, which counts what this rank fetches
    indices = [_index(shards, "train", cache, directory, connection) for shards, _ in named.values()]
    if isinstance(settings, FinetuneSettings) and settings.labelled is not None:
        indices[0] = _first(indices[0], settings.labelled, settings.seed)
    mixture = mixed(indices, list(named), [weight for _, weight in named.values()], settings.data.shuffle)
    held_out = settings.eval.shards and _index(settings.eval.shards, "test", cache, directory, connection)
    return mixture, held_out or None


def _index(
    shards: str,
    split: Literal["train", "test"],
    cache: Cache | None,
    directory: RunDirectory,
    connection: Connection,
) -> Index:
    if shards != DIGITS:
        return load_index(shards, cache)
    folder = directory.folder / "digits" / split
    connection.on_main(lambda: folder.exists() or pack_digits(folder, split))
    return load_index(folder)


def _first(index: Index, samples: int, seed: int) -> Index:
    """A subset of `samples` samples, drawn by `seed`: few labels, the same ones for every network compared."""
    chosen = np.random.Generator(np.random.Philox(seed)).permutation(len(index))[:samples]
    return replace(index, samples=index.samples[np.sort(chosen)])


def shard_loader(run: Run[Mixture, Index], settings: ShardSettings, student: Student) -> TrainLoader:
    """The training micro batches of this rank."""
    rank, view = run.connection.rank, augmentation(settings, student)
    batches = TrainBatches(run.samples, student.image_size, view, settings.seed, settings.data.views)
    ranks = (rank.rank, rank.world_size, run.micro_batch)
    ahead = ShardsAhead(run.samples, rank.local_world_size / rank.world_size, host_memory.available())
    return TrainLoader(batches, run.order, *ranks, settings.data.workers, run.device, ahead)


def augmentation(settings: ShardSettings, student: Student) -> Augmentation:
    """How one view of an image is made for this student; RandAugment is fine-tuning's."""
    data = settings.data
    policy = settings.augment.randaugment if isinstance(settings, FinetuneSettings) else None
    mean = tuple(student.mean.flatten().tolist())
    distorted = RandAugment(policy, student.image_size, mean, FILTERS[data.interpolation]) if policy else None
    return Augmentation(data.crop_scale, data.crop_ratio, data.interpolation, data.flip, distorted)


def held_out_means(
    run: Run[Mixture, Index], settings: ShardSettings, student: Student, sample_terms: SampleTerms
) -> Measured | None:
    """Measures the means of `sample_terms` over the held-out images, and those of the moving average's."""
    if run.held_out is None:
        return None
    rank, data = run.connection.rank, settings.data
    batches = EvalBatches(run.held_out, student.image_size, data.interpolation)
    together = (rank.rank, rank.world_size, run.micro_batch)
    loader = EvalLoader(batches, len(run.held_out), *together, data.workers, run.device)

    def measured(engine: DeepSpeedEngine, guards: Guards) -> dict[str, float]:
        found = evaluate(engine, sample_terms, guards.marking(loader), settings.eval.knn)
        if settings.optim.ema_decay:
            found |= evaluate_average(engine, sample_terms, guards.marking(loader))
        return found

    return measured
