"""The shape of each object: the mask head, what it learns from, and masks at the size of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import roi_align

from fdscale.config.errors import UserError
from fdscale.downstream.detection.matching import Matched
from fdscale.downstream.detection.pooling import pooled

if TYPE_CHECKING:
    from fdscale.data.dense.batches import Objects

SIDE, CONVOLUTIONS = 14, 4  # bins of a pooled box; its mask has twice as many
RunLengths = dict[str, Any]  # COCO's: size (h, w), counts


class MaskHead(nn.Module):
    """Pooled boxes (n, C, 14, 14) -> the logits of a mask for each class, fp32 (n, classes, 28, 28)."""

    def __init__(self, channels: int, classes: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.hidden = MaskRCNNHeads(channels, (channels,) * CONVOLUTIONS, dilation=1)
        self.predictor = MaskRCNNPredictor(channels, channels, classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.predictor(self.hidden(features.to(next(self.parameters()).dtype))).float()

    def of_boxes(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, h, w) and boxes (n, 4) of each image -> logits (sum of n, classes, 28, 28)."""
        return self(pooled(maps, self.strides, boxes, SIDE))

    def loss(self, maps: Sequence[Tensor], positive: Sequence[Matched], objects: Sequence[Objects]) -> Tensor:
        """Mean binary cross entropy of the masks of each box's own class; 0 where there are none."""
        logits = self.of_boxes(maps, [own.boxes for own in positive])
        told = _of_class(logits, torch.cat([own.labels for own in positive]))
        wanted = torch.cat([mask_targets(own, each) for own, each in zip(positive, objects, strict=True)])
        return F.binary_cross_entropy_with_logits(told, wanted, reduction="sum") / max(told.numel(), 1)

    def sketch(self, logits: Tensor, objects: Sequence[Objects]) -> Tensor:
        """A loss of these logits, with each image's masks read as for their targets."""
        for own in (each.masks for each in objects if each.masks is not None):
            roi_align(own[:, None].float(), logits.new_zeros(len(logits), 5), 2 * SIDE, sampling_ratio=0, aligned=True)
        return F.binary_cross_entropy_with_logits(logits[:, 0], torch.zeros_like(logits[:, 0]))

    def probabilities(self, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Maps of one image, boxes (n, 4) and their labels -> (n, 28, 28)."""
        return _of_class(self.of_boxes(maps, [boxes]), labels).sigmoid()


def _of_class(logits: Tensor, labels: Tensor) -> Tensor:
    return logits[torch.arange(len(logits), device=logits.device), labels]


def mask_targets(matched: Matched, objects: Objects) -> Tensor:
    """What the boxes (n, 4) of one image see of their objects' masks: fp32 (n, 28, 28) of 0 and 1."""
    if not len(matched.boxes):
        return matched.boxes.new_zeros(0, 2 * SIDE, 2 * SIDE)
    if objects.masks is None:
        raise UserError("masks: the objects of this data set have boxes alone; train without masks")
    rois = torch.cat((matched.objects[:, None].float(), matched.boxes), dim=1)
    seen = roi_align(objects.masks[:, None].float(), rois, 2 * SIDE, sampling_ratio=0, aligned=True)
    return (seen[:, 0] >= 0.5).float()


def run_lengths(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[RunLengths]:
    """Masks (n, 28, 28) in their boxes (n, 4) of an image of `size`, one after the other, as COCO's run lengths."""
    from faster_coco_eval.core import mask

    told = []
    for probability, box in zip(probabilities.float().cpu(), boxes.float().cpu().tolist(), strict=True):
        encoded = mask.encode(np.asfortranarray(pasted(probability, box, size).numpy().astype(np.uint8)))
        counts = encoded["counts"]
        told.append({"size": list(size), "counts": counts.decode() if isinstance(counts, bytes) else counts})
    return told


def pasted(probability: Tensor, box: Sequence[float], size: tuple[int, int]) -> Tensor:
    """One mask (28, 28), resampled in its box at the centres of an image's pixels: bool of `size`.

    As detectron2; torchvision first moves the box to whole pixels.
    """
    mask = torch.zeros(size, dtype=torch.bool)
    left, right = max(math.floor(box[0]) - 1, 0), min(math.ceil(box[2]) + 1, size[1])
    top, bottom = max(math.floor(box[1]) - 1, 0), min(math.ceil(box[3]) + 1, size[0])
    if left >= right or top >= bottom:
        return mask
    columns = (torch.arange(left, right) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    rows = (torch.arange(top, bottom) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    inside = F.grid_sample(probability[None, None], grid[None], align_corners=False)[0, 0]
    mask[top:bottom, left:right] = inside >= 0.5
    return mask
