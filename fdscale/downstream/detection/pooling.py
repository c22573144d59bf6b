"""What boxes see of a pyramid: each box on the level of its size, in a square of equal bins."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

CANONICAL_SIDE, CANONICAL_LEVEL = 224, 4  # a box of 224 x 224 belongs to stride 2**4 (FPN, equation 1)


def pooled(maps: Sequence[Tensor], strides: Sequence[int], boxes: Sequence[Tensor], side: int) -> Tensor:
    """RoIAlign, in fp32: maps (B, C, h, w) and boxes (n, 4) of each image -> (sum of n, C, side, side).

    As detectron2's pooler: aligned, as many samples a bin as it has cells. torchvision's `MultiScaleRoIAlign` is half
    a cell off, and takes its scales from the first image that it sees.
    """
    rois = regions(boxes)
    levels = level_of(rois[:, 1:], strides)
    places = [torch.where(levels == level)[0] for level in range(len(strides))]
    found = pooled_levels(maps, strides, [rois[place] for place in places], side)
    return found.index_select(0, torch.cat(places).argsort())


def pooled_levels(maps: Sequence[Tensor], strides: Sequence[int], rois: Sequence[Tensor], side: int) -> Tensor:
    """The regions (n, 5) of each level, one level after the other; every level is read, by no region at all, too."""
    return torch.cat(
        [
            roi_align(level.float(), own, side, 1 / stride, sampling_ratio=0, aligned=True)
            for level, stride, own in zip(maps[: len(strides)], strides, rois, strict=True)
        ]
    )


def regions(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes (n, 4) of each image -> (sum of n, 5), the image's number before its boxes."""
    numbers = [torch.full_like(own[:, :1], image) for image, own in enumerate(boxes)]
    return torch.cat((torch.cat(numbers), torch.cat(list(boxes))), dim=1)


def level_of(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """The level, from 0, of each box (n, 4): one up with every doubling of its side."""
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
    octaves = torch.floor(CANONICAL_LEVEL + torch.log2(sides / CANONICAL_SIDE + 1e-8))
    lowest, highest = (round(math.log2(stride)) for stride in (strides[0], strides[-1]))
    return octaves.clamp(lowest, highest).long() - lowest
