"""Supervised fine-tuning: a student and a classifier, images disturbed and mixed, cross entropy."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fdscale.build.foreseen import StepWatch
from fdscale.build.networks import as_pixels, seeded, student_of
from fdscale.build.outline import Outline, draws_for, pixels_for, student_outline
from fdscale.build.run import open_run
from fdscale.build.shards import held_out_means, shard_loader, shards_of
from fdscale.build.training import train
from fdscale.config.errors import UserError
from fdscale.config.settings import FinetuneSettings
from fdscale.data.batches import Batch
from fdscale.data.index import Index
from fdscale.downstream.classifier import Classifier, load_head, save_classifier
from fdscale.downstream.erase import Erasing
from fdscale.downstream.mix import Mixing
from fdscale.students.drop_path import drop_path_rows
from fdscale.teachers.table import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)


def finetune(settings: FinetuneSettings) -> bool:
    """Fine-tune a student with labels; True when the run is complete, False when a signal stopped it."""
    run = open_run(settings, shards_of(settings))
    if run.is_complete():
        return True
    for name, index in {
        **dict(zip(run.samples.names, run.samples.indices, strict=True)),
        "eval.shards": run.held_out,
    }.items():
        _check_labels(name, index, settings.classes)
    mix = mixing(settings)
    student = student_of(run)
    head = settings.head
    with seeded(settings.seed):
        classifier = Classifier(student, settings.classes, settings.label_smoothing, head.norm, head.init_scale)
    if head.weights is not None:
        load_head(classifier, Path(head.weights), head.keep)
    mean, std = student.mean.to(run.device), student.std.to(run.device)
    erase = Erasing(settings.augment.erasing, mean, std, settings.seed)
    sites, global_batch = student.drop_path_sites, settings.data.global_batch
    as_clip = settings.eval.normalisation == "clip"
    if run.held_out is not None and run.connection.rank.is_main:
        logger.info("held-out images are normalised %s", "with CLIP's mean and std" if as_clip else "as in training")

    def labelled_batch(engine: DeepSpeedEngine, batch: Batch, step: int) -> dict[str, Tensor]:
        """One micro batch: images erased in part and mixed with their neighbours, and how well they are classified."""
        pixels = erase(as_pixels(batch.images), batch.rows, step)
        pixels, labels = mix(pixels, batch.labels, batch.rows, step)
        draws = drop_path_rows(settings.seed, step, sites, global_batch, batch.rows)
        return engine(pixels, labels, draws)

    def held_out_batch(engine: DeepSpeedEngine, batch: Batch) -> dict[str, Tensor]:
        """The loss of each held-out image, and whether it is classified correctly."""
        pixels = as_pixels(batch.images)
        return engine(seen_as_clip(pixels, mean, std) if as_clip else pixels, batch.labels)

    loader, measured = shard_loader(run, settings, student), held_out_means(run, settings, student, held_out_batch)
    watch_of = partial(StepWatch, run, {}, partial(outline, settings))
    return train(run, classifier, student, loader, labelled_batch, measured, save_classifier, watch_of)


def outline(settings: FinetuneSettings) -> Outline:
    """The same classifier in shapes alone, for the planner."""
    student = student_outline(settings.student)
    head = settings.head
    with torch.device("meta"):
        classifier = Classifier(student, settings.classes, settings.label_smoothing, head.norm, head.init_scale)

    def inputs(micro_batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        labels = torch.empty(micro_batch, settings.classes)  # as shares; whole ones take less
        return pixels_for(student.image_size, micro_batch), labels, draws_for(student, micro_batch)

    return Outline(classifier, student, inputs, student.image_size)


def mixing(settings: FinetuneSettings) -> Mixing:
    """How images of one batch are mixed, as the settings say."""
    augment = settings.augment
    return Mixing(
        augment.mixup,
        augment.cutmix,
        augment.mix_probability,
        augment.switch_probability,
        augment.images_per_draw,
        settings.classes,
        settings.seed,
    )


def seen_as_clip(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels that a student, which normalises with `mean` and `std`, sees normalised with CLIP's.

    The official implementation trains with ImageNet's statistics and evaluates with CLIP's.
    """
    clip_mean, clip_std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (pixels - clip_mean) / clip_std * std + mean


def _check_labels(name: str, index: Index | None, classes: int) -> None:
    """Raise UserError unless every sample has a label in [0, classes)."""
    if index is None:
        return
    labels = index.samples["label"]
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{name}: {index.folder} has labels {labels.min()} to {labels.max()} (-1: no label); "
            f"classes = {classes} allows 0 to {classes - 1}: set `classes` or pack labelled images"
        )
