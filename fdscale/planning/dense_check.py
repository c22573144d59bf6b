"""What the folders and JSONs of dense tasks hold, and whether the recipe fits them; torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from fdscale.config.dense_settings import SegmentDataSettings, SegmentSettings
from fdscale.config.programs import DenseSettings
from fdscale.data.dense.ade20k import load_ade20k
from fdscale.data.dense.coco import load_coco
from fdscale.planning.data_check import DataFacts

SCENES = "scenes"  # the embedded sample, rendered on first use
SCENE_CLASSES = {"segment": 8, "detect": 5}


def dense_facts(settings: DenseSettings) -> DataFacts:
    """Read what there is to train on; raises UserError as its reader does."""
    if SCENES in training_data(settings):
        return DataFacts(None, None, None, None, None)
    samples = count_of(settings)
    steps_per_epoch = samples // settings.data.global_batch
    return DataFacts(None, None, samples, steps_per_epoch, settings.total_steps(steps_per_epoch))


def training_data(settings: DenseSettings) -> tuple[str, ...]:
    """The folder that is trained on, or images and annotations."""
    data = settings.data
    return (data.folder,) if isinstance(data, SegmentDataSettings) else (data.images, data.annotations)


def count_of(settings: DenseSettings) -> int:
    """The images that can be trained on; raises UserError for what is wrong with them."""
    if isinstance(settings, SegmentSettings):
        return len(load_ade20k(settings.data.folder, "training", settings.classes))
    data = settings.data
    return len(load_coco(data.images, data.annotations, masks=settings.head.masks).trainable())


def dense_problems(settings: DenseSettings, facts: DataFacts | None) -> Iterator[str]:
    """Every disagreement between the recipe and its images, one sentence each."""
    batch, samples = settings.data.global_batch, None if facts is None else facts.samples
    if samples is not None and samples < batch:
        yield f"data.global_batch: got {batch}, allowed: at most the {samples} images that can be trained on"
