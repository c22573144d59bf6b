"""Semantic segmentation: a student under UperNet or Mask2Former, crops of scenes, cross entropy; mIoU."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdscale.build.foreseen import StepWatch
from fdscale.build.networks import as_pixels, seeded, student_of
from fdscale.build.outline import Outline, Sketch, draws_for, pixels_for, student_outline
from fdscale.build.run import open_run
from fdscale.build.training import train
from fdscale.config.dense_settings import SegmentSettings
from fdscale.config.errors import UserError
from fdscale.data.dense.ade20k import ScenePairs, load_ade20k
from fdscale.data.dense.batches import SegmentBatch, SegmentEval, SegmentImage, SegmentTrain
from fdscale.data.dense.crops import Cropping
from fdscale.data.dense.scenes import write_ade20k
from fdscale.downstream.dense import (
    Look,
    as_bytes,
    by_parts,
    dense_loader,
    image_loader,
    keep,
    mean_of,
    measured_by,
    rendered,
    seed_network,
)
from fdscale.downstream.overlays import segmentation_overlay
from fdscale.downstream.segmentation.evaluation import evaluate_segmentation
from fdscale.downstream.segmentation.files import load_segmenter, save_segmenter
from fdscale.downstream.segmentation.segmenter import Segmenter, build_segmenter
from fdscale.planning.dense_check import SCENES
from fdscale.students.drop_path import drop_path_rows
from fdscale.students.student import Student
from fdscale.training.engine import Connection
from fdscale.training.run_directory import RunDirectory, write_text

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

TRAINING, VALIDATION = "training", "validation"  # ADE20K's halves
SEGMENTER = "segmenter"  # the folder that a run leaves


def segment(settings: SegmentSettings) -> bool:
    """Fine-tune a student for segmentation; True when the run is complete, False when a signal stopped it."""
    run = open_run(settings, partial(open_scenes, settings))
    if run.is_complete():
        return True
    student = student_of(run)
    with seeded(settings.seed):
        segmenter = segmenter_of(settings, student)
    sites, global_batch = student.drop_path_sites, settings.data.global_batch

    def segment_batch(engine: DeepSpeedEngine, batch: SegmentBatch, step: int) -> dict[str, Tensor]:
        """One micro batch: how well the classes of its pixels are told."""
        draws = drop_path_rows(settings.seed, step, sites, global_batch, batch.rows)
        seed_network(settings.seed, step, batch.rows)
        return by_parts(engine(as_pixels(batch.images), batch.labels, draws))

    loader = dense_loader(run, SegmentTrain(run.samples, cropping_of(settings, mean_of(student)), settings.seed))
    measured = None
    if run.held_out is not None:
        scenes, folder = run.held_out, run.directory.folder
        held_out = image_loader(images_of(scenes), len(scenes), settings.data.workers, run.connection)
        look = look_with(segmenter, settings, scenes, run.connection, folder)
        measured = measured_by(look, held_out, settings)
    watch_of = partial(StepWatch, run, {}, partial(outline, settings))
    save = partial(_save, segmenter, settings, run.samples.class_names)
    return train(run, segmenter, student, loader, segment_batch, measured, save, watch_of)


def open_scenes(
    settings: SegmentSettings, directory: RunDirectory, connection: Connection
) -> tuple[ScenePairs, ScenePairs | None]:
    """Training and held-out scenes; the embedded ones are rendered into the run directory."""
    training = load_ade20k(_folder(settings.data.folder, directory, connection), TRAINING, settings.classes)
    return training, open_held_out(settings, directory, connection)


def open_held_out(settings: SegmentSettings, directory: RunDirectory, connection: Connection) -> ScenePairs | None:
    """The held-out scenes, if there are any."""
    if settings.eval.folder is None:
        return None
    return load_ade20k(_folder(settings.eval.folder, directory, connection), VALIDATION, settings.classes)


def _folder(named: str, directory: RunDirectory, connection: Connection) -> Path:
    return Path(named) if named != SCENES else rendered(directory, connection, write_ade20k)


def images_of(scenes: ScenePairs) -> SegmentEval:
    """Held-out scenes as they are read."""
    return SegmentEval(scenes)


def left_by(settings: SegmentSettings, folder: Path, ending: str, scenes: ScenePairs, device: str = "cpu") -> Segmenter:
    """What a run left; raises UserError where its classes have other names than those of `scenes`.

    On the meta device shapes only.
    """
    segmenter = load_segmenter(folder / f"{SEGMENTER}{ending}", device)
    learnt = [segmenter.config.id2label.get(label) for label in range(settings.classes)]
    named = learnt != [f"LABEL_{label}" for label in range(settings.classes)]  # transformers' word for: no names
    for label, (ours, theirs) in enumerate(zip(learnt, scenes.class_names or (), strict=False) if named else ()):
        if ours != theirs:
            raise UserError(f"eval.folder: label {label} is {theirs!r} there, {ours!r} in {folder}: another data set's")
    return segmenter


def segmenter_of(settings: SegmentSettings, student: Student) -> Segmenter:
    """The student under the heads that the settings name; these are new."""
    head, backbone = settings.head, settings.backbone
    return build_segmenter(
        student,
        head.kind,
        settings.classes,
        head.channels,
        head.auxiliary_weight,
        queries=head.queries,
        decoder_layers=head.decoder_layers,
        plain=backbone.plain,
        indices=backbone.indices,
        pyramid_channels=backbone.pyramid_channels,
        window_size=backbone.window_size,
    )


def cropping_of(settings: SegmentSettings, fill: tuple[float, float, float]) -> Cropping:
    """How one crop of a scene is made; what lies outside has the colour `fill`, from 0 to 1."""
    data = settings.data
    return Cropping(
        size=data.crop,
        short_side=data.short_side,
        long_side=data.long_side,
        scale=data.scale,
        most_of_one_class=data.most_of_one_class,
        flip=data.flip,
        distort=data.distortion,
        fill=as_bytes(fill),
    )


def look_with(
    segmenter: Segmenter, settings: SegmentSettings, scenes: ScenePairs, connection: Connection, folder: Path | None
) -> Look:
    """Measures segmentation as the settings say; overlays and the IoU of each class go to `folder`, if there is one."""
    seen = settings.eval

    def look(network: Callable[[Tensor], Tensor], images: Any, ending: str) -> dict[str, float]:
        with segmenter.backbone.windows(seen.window_size):
            found, by_class = evaluate_segmentation(
                network,
                images,
                classes=settings.classes,
                crop=seen.crop or None,
                stride=seen.stride,
                short_side=seen.short_side,
                long_side=seen.long_side,
                scales=seen.scales,
                flip=seen.flip,
                window_batch=seen.windows_at_once,
                connection=connection,
                device=connection.device,
                overlays=None if folder is None else partial(overlay, folder / f"overlays{ending}"),
                fill=mean_of(segmenter.backbone.student),
            )
        if connection.rank.is_main and folder is not None:
            keep(folder / f"iou{ending}.json", partial(_write_by_class, by_class, scenes))
        return found

    def overlay(pictures: Path, image: SegmentImage, predicted: Tensor) -> None:
        if image.number < seen.overlays:
            names = scenes.class_names or [str(label) for label in range(settings.classes)]
            picture = segmentation_overlay(image.image, predicted, image.labels, names)
            keep(pictures / f"{scenes.names[image.number]}.png", picture.save)

    return look


def _write_by_class(values: Tensor, scenes: ScenePairs, file: Path) -> None:
    names = scenes.class_names or [str(number) for number in range(len(values))]
    known = [(name, value) for name, value in zip(names, values.tolist(), strict=True) if not math.isnan(value)]
    write_text(file, json.dumps(dict(known), indent=2) + "\n")


def outline(settings: SegmentSettings) -> Outline:
    """The same segmenter in shapes alone, for the planner."""
    student, crop = student_outline(settings.student), settings.data.crop
    with torch.device("meta"):
        segmenter = segmenter_of(settings, student)

    def inputs(micro_batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        labels = torch.zeros(micro_batch, crop, crop, dtype=torch.uint8)
        return pixels_for(crop, micro_batch), labels, draws_for(student, micro_batch)

    return Outline(Sketch(segmenter), student, inputs, crop)


def _save(
    segmenter: Segmenter,
    settings: SegmentSettings,
    names: tuple[str, ...] | None,
    student: Student,
    state: dict[str, Tensor],
    folder: Path,
    ending: str,
) -> None:
    """The whole segmenter, as transformers loads it."""
    seen = settings.eval
    save_segmenter(segmenter, state, folder / f"{SEGMENTER}{ending}", names, seen.short_side, seen.long_side)
