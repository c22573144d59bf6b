"""A detector judged on images: every rank looks at its own, the main rank measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.downstream.detection.average_precision import coco_metrics
from fdscale.downstream.detection.detector import Detections
from fdscale.downstream.detection.views import View
from fdscale.training.engine import Connection

if TYPE_CHECKING:
    from fdscale.data.dense.batches import DetectImage


def evaluate_detection(
    detect: Callable[[list[View]], Detections],
    images: Iterable[DetectImage],
    annotations: Path | Mapping[str, Any],
    category_ids: Sequence[int],
    views: Callable[[Tensor], list[View]],
    connection: Connection,
    overlay: Callable[[Any, Detections], None] | None = None,
) -> dict[str, float]:
    """COCO's average precisions (`average_precision.py`) of what `detect` finds, the same on every rank.

    Every rank gives equally many `images`, padding included: each is one call of `detect`, an engine in eval mode,
    with as many `views`. `category_ids[label]` is the data set's number of a class. `overlay` is called with each
    image and what was found in it. Raises UserError on every rank for annotations that cannot be read, and
    where the main rank cannot measure.
    """
    found: list[dict[str, Any]] = []
    seen: list[int] = []
    masks = False
    for image in images:
        told = detect([view.to(connection.device) for view in views(image.image)])
        masks = told.masks is not None
        if image.valid:
            if overlay is not None:
                overlay(image, told)
            seen.append(image.image_id)
            found += as_coco(told, image.image_id, category_ids)
    gathered = _gathered_on_main([(seen, found)], connection)
    measured: dict[str, float] = {}

    def measure() -> None:
        image_ids = sorted({number for seen, _ in gathered for number in seen})
        detections = [each for _, found in gathered for each in found]
        try:
            measured.update(coco_metrics(annotations, detections, image_ids, masks))
        except (MemoryError, RuntimeError) as error:  # the other ranks wait for this one's word
            raise UserError(
                f"eval: {len(detections)} detections of {len(image_ids)} images could not be judged on rank 0 "
                f"({error!r}); give it more memory, lower eval.detections, or raise eval.score_threshold"
            ) from error

    connection.on_main(measure)
    return connection.broadcast(measured)


def as_coco(told: Detections, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The detections of one image as COCO's results file has them."""
    corners = told.boxes.float().cpu()
    sides = (corners[:, 2:] - corners[:, :2]).tolist()
    found, rows = [], zip(corners[:, :2].tolist(), sides, told.labels.tolist(), told.scores.tolist(), strict=True)
    for row, (corner, side, label, score) in enumerate(rows):
        shape = {} if told.masks is None else {"segmentation": told.masks[row]}
        found.append(
            {"image_id": image_id, "category_id": category_ids[label], "bbox": corner + side, "score": score, **shape}
        )
    return found


def _gathered_on_main(mine: list[Any], connection: Connection) -> list[Any]:
    """The lists of all ranks, one after the other, on the main rank alone: together they are large."""
    if connection.rank.world_size == 1:
        return mine
    parts: list[Any] = [None] * connection.rank.world_size
    dist.gather_object(mine, parts if connection.rank.is_main else None, dst=0, group=connection.control)
    return [item for part in parts if part is not None for item in part]
