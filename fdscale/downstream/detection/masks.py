"""The shape of each object: the mask head, what it learns from, and masks at the size of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.layers import LayerNorm2dFp32
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import roi_align

from fdscale.config.errors import UserError
from fdscale.downstream.detection.design import Design
from fdscale.downstream.detection.matching import Matched
from fdscale.downstream.detection.pooling import pooled

if TYPE_CHECKING:
    from fdscale.data.dense.batches import Objects

SIDE, CONVOLUTIONS = 14, 4  # bins of a pooled box; its mask has twice as many
AT_ONCE = 8  # masks that are floats at the same time: 75 MB at 1536 px
RunLengths = dict[str, Any]  # COCO's: size (h, w), counts


class MaskHead(nn.Module):
    """Pooled boxes (n, C, 14, 14) -> the logits of a mask for each class, fp32 (n, classes, 28, 28)."""

    def __init__(self, design: Design, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides, channels = tuple(strides), design.channels
        norm = LayerNorm2dFp32 if design.norms else None
        self.hidden = MaskRCNNHeads(channels, (channels,) * CONVOLUTIONS, 1, norm)
        self.predictor = MaskRCNNPredictor(channels, channels, design.classes)

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
            _seen(own[:AT_ONCE], logits.new_zeros(len(logits), 5))
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
    targets = matched.boxes.new_zeros(len(matched.boxes), 2 * SIDE, 2 * SIDE)
    for first in range(0, len(objects.masks), AT_ONCE):
        some = torch.where(torch.div(matched.objects, AT_ONCE, rounding_mode="floor") * AT_ONCE == first)[0]
        rois = torch.cat((matched.objects[some, None].float() - first, matched.boxes[some]), dim=1)
        targets[some] = (_seen(objects.masks[first : first + AT_ONCE], rois) >= 0.5).float()
    return targets


def _seen(masks: Tensor, rois: Tensor) -> Tensor:
    """What regions (k, 5) see of masks (n, H, W), which become floats for it: (k, 28, 28)."""
    return roi_align(masks[:, None].float(), rois, 2 * SIDE, sampling_ratio=0, aligned=True)[:, 0]


def run_lengths(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[RunLengths]:
    """Masks (n, 28, 28) in their boxes (n, 4) of an image of `size`, one after the other, as COCO's run lengths."""
    from faster_coco_eval.core import mask

    told = []
    for probability, box in zip(probabilities.float().cpu(), boxes.float().cpu().tolist(), strict=True):
        left, strip = pasted(probability, box, size)
        plain = {"size": list(size), "counts": _counts(strip.numpy().ravel(), left * size[0], size[0] * size[1])}
        counts = mask.frPyObjects(plain, *size)["counts"]
        told.append({"size": list(size), "counts": counts.decode() if isinstance(counts, bytes) else counts})
    return told


def _counts(strip: NDArray[np.bool_], start: int, pixels: int) -> list[int]:
    """How long the runs of an image with so many pixels are, which is zero outside a strip of it, zeros first."""
    changes = np.flatnonzero(np.diff(strip, prepend=False, append=False)) + start
    ends = changes if changes.size and changes[-1] == pixels else np.append(changes, pixels)
    counts: list[int] = np.diff(ends, prepend=0).tolist()
    return counts


def pasted(probability: Tensor, box: Sequence[float], size: tuple[int, int]) -> tuple[int, Tensor]:
    """One mask (28, 28), resampled in its box at the centres of an image's pixels, as COCO counts: column by column.

    The box's first column and its columns, bool (w, H): beside the box an image of `size` (H, W) has nothing. As
    detectron2; torchvision first moves the box to whole pixels.
    """
    left, right = max(math.floor(box[0]) - 1, 0), min(math.ceil(box[2]) + 1, size[1])
    top, bottom = max(math.floor(box[1]) - 1, 0), min(math.ceil(box[3]) + 1, size[0])
    strip = torch.zeros(max(right - left, 0), size[0], dtype=torch.bool)
    if left >= right or top >= bottom:
        return 0, strip[:0]
    columns = (torch.arange(left, right) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    rows = (torch.arange(top, bottom) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="ij"), dim=-1)
    inside = F.grid_sample(probability[None, None], grid[None], align_corners=False)[0, 0]
    strip[:, top:bottom] = inside >= 0.5
    return left, strip
