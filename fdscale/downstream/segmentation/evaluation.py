"""A segmenter evaluated by all ranks together: every image at its own size, the numbers exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fdscale.downstream.segmentation.confusion import confusion_of, iou_of, merged, metrics_of
from fdscale.downstream.segmentation.sliding import (
    Segment,
    Windows,
    averaged_scores,
    forwards_of,
    view_size,
)
from fdscale.students.student import IMAGENET_MEAN
from fdscale.training.engine import Connection

Overlays = Callable[[Any, Tensor], None]


@torch.no_grad()
def evaluate_segmentation(
    segment: Segment,
    images: Iterable[Any],
    classes: int,
    crop: int | None,
    stride: int,
    short_side: int,
    long_side: int,
    scales: Sequence[float],
    flip: bool,
    window_batch: int,
    connection: Connection,
    device: torch.device,
    overlays: Overlays | None = None,
    fill: Sequence[float] = IMAGENET_MEAN,
) -> tuple[dict[str, float], Tensor]:
    """`miou`, `mean_accuracy`, `pixel_accuracy` in [0, 1], and each class's IoU (K,), nan if absent.

    `segment` is an engine in evaluation mode. `images` are this rank's, with `image` uint8 (3, h, w), `labels` uint8
    (h, w) and `number`, -1 for padding; every rank must have as many. They are resized as mmseg's, `scales` times
    `short_side` and `long_side`, and seen by windows of `crop` pixels, `stride` apart (None: at once), mirrored, too,
    with `flip`. Predictions have the label's size. `overlays` is called with each image and what was predicted, int64
    (h, w), on `device`. All ranks do as many forwards: under ZeRO-3 one more would wait for ever.
    """
    windows = None if crop is None else Windows(crop, stride, window_batch, (fill[0], fill[1], fill[2]))
    counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    for item in images:
        sizes = [view_size(item.image.shape[-2:], short_side, long_side, scale) for scale in scales]
        needed = sum(forwards_of(size, windows) for size in sizes) * (1 + flip) * (item.number >= 0)
        most = _most(needed, connection)  # before any forward: under ZeRO-3 all ranks are in one together
        if item.number >= 0:
            pixels, labels = item.image.to(device).float() / 255, item.labels.to(device)
            scores = averaged_scores(segment, pixels, sizes, flip, labels.shape[-2:], windows)
            predicted = scores.argmax(dim=0)
            del scores
            counts += confusion_of(predicted, labels, classes)
            if overlays is not None:
                overlays(item, predicted)
        for _ in range(most - needed):
            segment(torch.zeros(1, 3, *(sizes[0] if crop is None else (crop, crop)), device=device))
    whole = merged(counts, connection)
    return metrics_of(whole), iou_of(whole)


def _most(needed: int, connection: Connection) -> int:
    """The most forwards that any rank needs for its image of this turn."""
    if connection.rank.world_size == 1:
        return needed
    most = torch.tensor(needed)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=connection.control)
    return int(most)
