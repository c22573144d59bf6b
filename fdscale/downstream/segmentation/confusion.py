"""How many pixels of each class were taken for which: exact counts, and what follows from them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.downstream.segmentation.pixels import IGNORED
from fdscale.training.engine import Connection


def confusion_of(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts int64 (K labels, K predictions) of maps of class numbers, any shape; pixels labelled 255 do not count.

    Raises UserError for labels that are no class.
    """
    known = labels != IGNORED
    pairs = labels[known].long() * classes + predicted[known].long()
    counts = torch.bincount(pairs, minlength=classes**2)
    if len(counts) != classes**2:
        raise UserError(
            f"labels up to {int(labels[known].max())}: classes = {classes} allows 0 to {classes - 1} and 255"
        )
    return counts.view(classes, classes)


def merged(counts: Tensor, connection: Connection) -> Tensor:
    """The sum of all ranks' counts, on each of them; every rank must call it."""
    whole = counts.cpu()
    if connection.rank.world_size > 1:
        dist.all_reduce(whole, group=connection.control)
    return whole


def iou_of(counts: Tensor) -> Tensor:
    """The intersection over union (K,) of each class, float64; nan for one that is neither labelled nor predicted."""
    right = counts.diagonal().double()
    return right / (counts.sum(dim=0) + counts.sum(dim=1) - right)


def metrics_of(counts: Tensor) -> dict[str, float]:
    """mmseg's mIoU, mAcc and aAcc, in [0, 1]; nan where nothing was labelled.

    `miou` is the mean over the classes that are labelled or predicted, `mean_accuracy` that of the share of
    each labelled class's pixels that were found, `pixel_accuracy` the share of all labelled pixels.
    """
    right = counts.diagonal().double()
    return {
        "miou": float(iou_of(counts).nanmean()),
        "mean_accuracy": float((right / counts.sum(dim=1)).nanmean()),
        "pixel_accuracy": float(right.sum() / counts.sum()),
    }
