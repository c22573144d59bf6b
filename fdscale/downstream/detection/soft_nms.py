"""Overlapping boxes of one class: the best is kept, the others are dropped or decayed."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from fdscale.downstream.detection.design import Design


def suppressed(boxes: Tensor, scores: Tensor, labels: Tensor, design: Design) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4), scores and labels (n,) -> indices of the best `design.detections` and their scores, falling."""
    if design.suppression == "hard":
        kept = batched_nms(boxes, scores, labels, design.overlap)[: design.detections]
        return kept, scores[kept]
    sigma = design.sigma if design.suppression == "gaussian" else None
    return soft_nms(boxes, scores, labels, sigma, design.overlap, design.score_threshold, design.detections)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    sigma: float | None,
    overlap: float,
    threshold: float,
    most: int,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS (arXiv 1704.04503) by class: indices of at most `most` boxes and their scores, falling.

    Each box that is kept multiplies the scores of the rest of its class by exp(-iou^2 / sigma), or without a `sigma`
    by 1 - iou where that is above `overlap`. Scores at or below `threshold` are dropped. Of every class as many are
    kept as may be wanted in all, for scores only fall: all classes take their next box at the same time.
    """
    table = _by_class(labels)
    filled = table >= 0
    left = torch.where(filled, scores[table.clamp(min=0)].float(), -1.0)  # (classes, most boxes of one)
    corners = boxes.float()[table.clamp(min=0)]
    kept, told = [table[:, :0]], [left[:, :0]]
    for _ in range(min(most, table.shape[1])):
        best, place = left.max(dim=1, keepdim=True)
        kept.append(torch.where(best > threshold, table.gather(1, place), -1))
        told.append(best)
        ious = _ious(corners, corners.gather(1, place[..., None].expand(-1, -1, 4)))
        left = (left * _decay(ious, sigma, overlap)).scatter(1, place, -1.0)
    indices, falling = torch.cat(kept, dim=1).flatten(), torch.cat(told, dim=1).flatten()
    indices, falling = indices[indices >= 0], falling[indices >= 0]
    order = falling.argsort(descending=True, stable=True)[:most]
    return indices[order], falling[order]


def _by_class(labels: Tensor) -> Tensor:
    """Labels (n,) -> the places of each class that there is, (classes, most of one), filled up with -1."""
    _, classes, counts = labels.unique(return_inverse=True, return_counts=True)
    order = classes.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    columns = torch.arange(len(labels), device=labels.device) - starts[classes[order]]
    widest = int(counts.max()) if len(counts) else 0
    table = torch.full((len(counts), widest), -1, dtype=torch.long, device=labels.device)
    table[classes[order], columns] = order
    return table


def _ious(boxes: Tensor, best: Tensor) -> Tensor:
    """Boxes (classes, m, 4) with one box of each class (classes, 1, 4) -> (classes, m)."""
    low, high = torch.maximum(boxes[..., :2], best[..., :2]), torch.minimum(boxes[..., 2:], best[..., 2:])
    both = (high - low).clamp(min=0).prod(dim=-1)
    areas = [(each[..., 2:] - each[..., :2]).prod(dim=-1) for each in (boxes, best)]
    return both / (areas[0] + areas[1] - both).clamp(min=torch.finfo(torch.float32).tiny)


def _decay(ious: Tensor, sigma: float | None, overlap: float) -> Tensor:
    if sigma is not None:
        return torch.exp(-ious.square() / sigma)
    return torch.where(ious > overlap, 1 - ious, 1.0)
