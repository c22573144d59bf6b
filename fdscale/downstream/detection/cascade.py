"""The box heads: one stage (Mask R-CNN), or three, each of which refines the boxes of the one before.

Three are Cascade R-CNN (arXiv 1712.00726) as detectron2 has it and ViTDet uses it: overlaps of .5, .6, .7 make a box
an object's; offsets do not depend on the class; the later stages take all refined boxes that are left, matched anew
and not drawn again; each stage gives a third of its gradient to the maps; in the end the class scores are the mean
over the stages, the boxes the last one's.

mmdetection's Cascade Mask R-CNN draws boxes again in each stage, weighs the stages 1, .5, .25 and has a mask head for
each; here the stages weigh the same, and one mask head learns from the boxes that the first stage was given. Nor is
this HTC++: there is no semantic branch, and masks do not pass from stage to stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2dFp32
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.ops import clip_boxes_to_image

from fdscale.downstream.detection.design import Design
from fdscale.downstream.detection.matching import Matched, box_losses, by_box, drawn, has_area, match
from fdscale.downstream.detection.pooling import pooled
from fdscale.students.swin_v2 import Linear32

if TYPE_CHECKING:
    from fdscale.data.dense.batches import Objects

OVERLAPS = (0.5, 0.6, 0.7)  # a stage's boxes that overlap an object by so much are its
WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))  # of a stage's offsets
POSITIVES = 0.25  # of the boxes that are drawn
SIDE = 7  # bins of a pooled box
Size = tuple[int, int]


class BoxStage(nn.Module):
    """Pooled boxes (n, C, 7, 7) -> class logits (n, classes + 1), background last, and offsets, both fp32.

    Offsets are (n, 4), or (n, 4 * classes) where they depend on the class.
    """

    def __init__(self, design: Design, by_class: bool) -> None:
        super().__init__()
        self.hidden = _hidden(design)
        self.classes = Linear32(design.box_width, design.classes + 1)
        self.offsets = Linear32(design.box_width, 4 * design.classes if by_class else 4)
        for layer, std in ((self.classes, 0.01), (self.offsets, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(features.to(next(self.parameters()).dtype))
        return self.classes(hidden), self.offsets(hidden)


def _hidden(design: Design) -> nn.Module:
    """Pooled boxes (n, C, 7, 7) -> (n, box_width): convolutions 3x3 and a layer, or two layers."""
    if not design.box_convolutions:
        return TwoMLPHead(design.channels * SIDE**2, design.box_width)
    widths, norm = [design.channels] * design.box_convolutions, LayerNorm2dFp32 if design.norms else None
    hidden = FastRCNNConvFCHead((design.channels, SIDE, SIDE), widths, [design.box_width], norm)
    for layer in hidden:
        if isinstance(layer, nn.Linear):  # as detectron2
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    return hidden


class BoxHeads(nn.Module):
    """All stages on the same maps, whose `strides` they read."""

    def __init__(self, design: Design, strides: Sequence[int]) -> None:
        super().__init__()
        number = len(OVERLAPS) if design.cascade else 1
        self.strides, self.background, self.samples = tuple(strides), design.classes, design.box_samples
        self.coders = [BoxCoder(weights) for weights in WEIGHTS[:number]]
        self.stages = nn.ModuleList(BoxStage(design, by_class=number == 1) for _ in range(number))

    def chosen(self, proposals: Sequence[Tensor], objects: Sequence[Objects]) -> list[Matched]:
        """What the first stage learns from: proposals and the objects' own boxes, matched and drawn."""
        return [
            drawn(self._match(torch.cat((boxes, own.boxes)), own, 0), self.samples, POSITIVES, self.background)
            for boxes, own in zip(proposals, objects, strict=True)
        ]

    def losses(
        self, maps: Sequence[Tensor], chosen: Sequence[Matched], objects: Sequence[Objects], size: Size
    ) -> tuple[Tensor, Tensor]:
        """The losses of classes and boxes, summed over the stages; images are of `size` (H, W)."""
        found = []
        for stage, coder in enumerate(self.coders):
            boxes = [own.boxes for own in chosen]
            logits, offsets = self._stage(stage, maps, boxes)
            found.append(box_losses(logits, offsets, chosen, coder))
            if stage + 1 < len(self.stages):
                refined = [own[has_area(own)] for own in self._refined(stage, offsets.detach(), boxes, size)]
                chosen = [self._match(own, each, stage + 1) for own, each in zip(refined, objects, strict=True)]
        classes, offset = (torch.stack(parts).sum() for parts in zip(*found, strict=True))
        return classes, offset

    def scored(self, maps: Sequence[Tensor], proposals: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Proposals (n, 4) of one image of `size` -> boxes (n, 1 or classes, 4) inside it, scores (n, classes)."""
        boxes, scores = proposals, []
        for stage in range(len(self.stages)):
            logits, offsets = self._stage(stage, maps, [boxes])
            scores.append(logits.softmax(dim=1)[:, :-1])
            (boxes,) = self._refined(stage, offsets, [boxes], size)
        return by_box(boxes), torch.stack(scores).mean(dim=0)

    def sketch(self, features: Tensor) -> Tensor:
        """A loss of all stages, each on these pooled boxes (n, C, 7, 7)."""
        found = []
        for stage in self.stages:
            logits, offsets = stage(_shared(features.clone(), len(self.stages)))
            labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
            found.append(F.cross_entropy(logits, labels) + offsets.abs().mean())
        return torch.stack(found).sum()

    def _match(self, boxes: Tensor, objects: Objects, stage: int) -> Matched:
        return match(boxes, objects, OVERLAPS[stage], self.background)

    def _stage(self, stage: int, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        features = pooled(maps, self.strides, boxes, SIDE)
        logits, offsets = self.stages[stage](_shared(features, len(self.stages)))
        return logits, offsets

    def _refined(self, stage: int, offsets: Tensor, boxes: Sequence[Tensor], size: Size) -> list[Tensor]:
        """The boxes of each image moved by a stage's offsets, inside the image: (n, 4), or (n, 4 * classes)."""
        moved = self.coders[stage].decode_single(offsets, torch.cat(list(boxes)))
        inside = clip_boxes_to_image(by_box(moved), size).flatten(1)
        return list(inside.split([len(own) for own in boxes]))


def _shared(features: Tensor, stages: int) -> Tensor:
    """The same features, whose gradient is shared among so many stages."""
    if stages > 1 and features.requires_grad:
        features.register_hook(lambda gradient: gradient / stages)
    return features
