"""Detection of objects: a student under Mask R-CNN or its cascade, large-scale jitter; COCO's average precision."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdscale.build.foreseen import StepWatch
from fdscale.build.networks import as_pixels, seeded, student_of
from fdscale.build.outline import Outline, Sketch, draws_for, pixels_for, student_outline
from fdscale.build.run import open_run
from fdscale.build.training import train
from fdscale.config.dense_settings import DetectSettings
from fdscale.config.errors import UserError
from fdscale.data.dense.batches import DetectBatch, DetectEval, DetectImage, DetectTrain, Objects
from fdscale.data.dense.coco import CocoScenes, load_coco
from fdscale.data.dense.jitter import Jitter
from fdscale.data.dense.scenes import write_coco
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
from fdscale.downstream.detection.design import Design
from fdscale.downstream.detection.detector import Detections, Detector
from fdscale.downstream.detection.evaluation import evaluate_detection
from fdscale.downstream.detection.files import Category, load_detector, load_detector_weights, save_detector
from fdscale.downstream.detection.views import View, views_of
from fdscale.downstream.overlays import detection_overlay
from fdscale.planning.dense_check import SCENES
from fdscale.planning.dense_sizes import OBJECTS_OF_AN_IMAGE
from fdscale.students.drop_path import drop_path_rows
from fdscale.students.student import Student
from fdscale.training.engine import Connection
from fdscale.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

OVERLAY_SCORE = 0.3  # what is drawn is at least so certain


def detect(settings: DetectSettings) -> bool:
    """Fine-tune a student for detection; True when the run is complete, False when a signal stopped it."""
    run = open_run(settings, partial(open_scenes, settings))
    if run.is_complete():
        return True
    student = student_of(run)
    with seeded(settings.seed):
        detector = Detector(student, design_of(settings))
    if settings.head.weights is not None:
        load_detector_weights(detector, Path(settings.head.weights))
    sites, global_batch = student.drop_path_sites, settings.data.global_batch

    def detect_batch(engine: DeepSpeedEngine, batch: DetectBatch, step: int) -> dict[str, Tensor]:
        """One micro batch: how well its objects are found, told from one another, and outlined."""
        draws = drop_path_rows(settings.seed, step, sites, global_batch, batch.rows)
        seed_network(settings.seed, step, batch.rows)
        return by_parts(engine(as_pixels(batch.images), batch.objects, draws))

    loader = dense_loader(run, DetectTrain(run.samples, jitter_of(settings, mean_of(student)), settings.seed))
    measured = None
    if run.held_out is not None:
        scenes, folder = run.held_out, run.directory.folder
        held_out = image_loader(images_of(scenes), len(scenes), settings.data.workers, run.connection)
        look = look_with(detector, settings, scenes, run.connection, folder)
        measured = measured_by(look, held_out, settings)
    save = partial(_save, detector, categories_of(run.samples))
    watch_of = partial(StepWatch, run, {}, partial(outline, settings))
    return train(run, detector, student, loader, detect_batch, measured, save, watch_of)


def open_scenes(
    settings: DetectSettings, directory: RunDirectory, connection: Connection
) -> tuple[CocoScenes, CocoScenes | None]:
    """Scenes with objects to train on, and all held-out ones; the embedded ones are rendered into the run directory."""
    data, masks = settings.data, settings.head.masks
    where = _where(data.images, data.annotations, "train", directory, connection)
    return load_coco(*where, masks, data.max_bad_ratio).trainable(), open_held_out(settings, directory, connection)


def open_held_out(settings: DetectSettings, directory: RunDirectory, connection: Connection) -> CocoScenes | None:
    """The held-out scenes, if there are any."""
    seen = settings.eval
    if seen.annotations is None or seen.images is None:
        return None
    return load_coco(*_where(seen.images, seen.annotations, "val", directory, connection), settings.head.masks)


def _where(
    images: str, annotations: str, split: str, directory: RunDirectory, connection: Connection
) -> tuple[Path, Path]:
    """Images and annotations, rendered first where these are the embedded ones."""
    if SCENES not in (images, annotations):
        return Path(images), Path(annotations)
    folder = rendered(directory, connection, write_coco)
    return folder / f"{split}2017", folder / "annotations" / f"instances_{split}2017.json"


def images_of(scenes: CocoScenes) -> DetectEval:
    """Held-out scenes as they are read."""
    return DetectEval(scenes)


def left_by(settings: DetectSettings, folder: Path, ending: str, scenes: CocoScenes, device: str = "cpu") -> Detector:
    """What a run left, told to show what the settings say; raises UserError where `scenes` have other categories.

    On the meta device its student has shapes only.
    """
    detector, learnt = load_detector(folder / f"detector{ending}.safetensors", device)
    for ours, theirs in zip_longest(learnt, categories_of(scenes)):
        if ours != theirs:
            raise UserError(
                f"eval.annotations: {scenes.annotations} has {theirs}, the detector in {folder} {ours}, for the same "
                "label; name held-out images of the data set that it learnt"
            )
    detector.design = design_of(settings)
    return detector


def design_of(settings: DetectSettings) -> Design:
    """The numbers of the detector that the settings name."""
    head, seen = settings.head, settings.eval
    return Design(
        classes=settings.classes,
        cascade=head.kind == "cascade",
        masks=head.masks,
        channels=head.channels,
        box_width=head.box_width,
        box_convolutions=head.box_convolutions,
        norms=head.norms,
        window_size=settings.backbone.window_size,
        anchor_scale=head.anchor_scale,
        rpn_convolutions=head.rpn_convolutions,
        box_samples=head.box_samples,
        proposals_training=(2 * head.proposals, head.proposals),
        proposals_evaluation=(head.proposals, head.proposals),
        score_threshold=seen.score_threshold,
        suppression=seen.nms,
        overlap=seen.nms_overlap,
        detections=seen.detections,
    )


def jitter_of(settings: DetectSettings, fill: tuple[float, float, float]) -> Jitter:
    """How one crop of a scene is made; what lies outside has the colour `fill`, from 0 to 1."""
    data = settings.data
    return Jitter(size=data.crop, scale=data.scale, flip=data.flip, fill=as_bytes(fill))


def categories_of(scenes: CocoScenes) -> tuple[Category, ...]:
    """What the labels stand for, in their order."""
    return tuple(Category(*pair) for pair in zip(scenes.category_ids, scenes.class_names, strict=True))


def look_with(
    detector: Detector, settings: DetectSettings, scenes: CocoScenes, connection: Connection, folder: Path | None
) -> Look:
    """Measures detection as the settings say; overlays go to `folder`, if there is one."""
    seen, fill = settings.eval, as_bytes(mean_of(detector.backbone.student))

    def look(network: Callable[[list[View]], Detections], images: Any, ending: str) -> dict[str, float]:
        pictures = None if folder is None else partial(overlay, folder / f"overlays{ending}")
        with detector.backbone.windows(seen.window_size):
            found = evaluate_detection(
                network, images, scenes.annotations, scenes.category_ids, views, connection, pictures
            )
        return {_metric(name): value for name, value in found.items()}

    def views(image: Tensor) -> list[View]:
        square = detector.fpn is None  # ViTDet's, to which position biases are not resized
        return views_of(image, seen.short_side, seen.long_side, seen.scales, seen.flip, fill=fill, square=square)

    def overlay(pictures: Path, image: DetectImage, found: Detections) -> None:
        if image.number < seen.overlays:
            shown = found.scores > OVERLAY_SCORE
            masks = None if found.masks is None else [found.masks[row] for row in shown.nonzero()[:, 0].tolist()]
            of_shown = (found.boxes[shown], found.labels[shown], found.scores[shown], masks)
            picture = detection_overlay(image.image, *of_shown, scenes.class_names)
            keep(pictures / f"{image.image_id}.png", picture.save)

    return look


def _metric(name: str) -> str:
    """`box_ap50` as the tables of metrics have it, `ap/box/50`."""
    of, _, at = name.partition("_ap")
    return f"ap/{of}/{at.removeprefix('_') or 'all'}"


def outline(settings: DetectSettings) -> Outline:
    """The same detector in shapes alone, for the planner."""
    student, crop = student_outline(settings.student), settings.data.crop
    with torch.device("meta"):
        detector = Detector(student, design_of(settings))

    def objects() -> Objects:
        some = OBJECTS_OF_AN_IMAGE
        masks = torch.zeros(some, crop, crop, dtype=torch.uint8) if settings.head.masks else None
        return Objects(torch.zeros(some, 4), torch.zeros(some, dtype=torch.int64), masks)

    def inputs(micro_batch: int) -> tuple[Tensor, tuple[Objects, ...], Tensor | None]:
        found = tuple(objects() for _ in range(micro_batch))
        return pixels_for(crop, micro_batch), found, draws_for(student, micro_batch)

    return Outline(Sketch(detector), student, inputs, crop)


def _save(
    detector: Detector,
    categories: tuple[Category, ...],
    student: Student,
    state: dict[str, Tensor],
    folder: Path,
    ending: str,
) -> None:
    """The whole detector, and what builds it again."""
    save_detector(detector, state, folder, categories, ending)
