"""Mask R-CNN and Cascade Mask R-CNN on a student: pixels and objects in, losses out; or views in, detections out.

The parts are torchvision's, put together here: its own `GeneralizedRCNN` resizes and normalises images again. The
student's maps go through a feature pyramid (SwinV2) or come from the simple one (ViT, as in ViTDet), a fifth level is
pooled from the last; region proposals, box heads (`cascade.py`) and the mask head (`masks.py`) read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from timm.layers import LayerNorm2dFp32
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import FeaturePyramidNetwork, box_iou

from fdscale.downstream.backbone import Backbone
from fdscale.downstream.detection.cascade import POSITIVES, BoxHeads
from fdscale.downstream.detection.cascade import SIDE as BOX_SIDE
from fdscale.downstream.detection.design import Design
from fdscale.downstream.detection.masks import SIDE as MASK_SIDE
from fdscale.downstream.detection.masks import MaskHead, RunLengths, run_lengths
from fdscale.downstream.detection.matching import has_area, with_area
from fdscale.downstream.detection.pooling import pooled_levels
from fdscale.downstream.detection.proposals import build_rpn
from fdscale.downstream.detection.soft_nms import suppressed
from fdscale.downstream.detection.views import View
from fdscale.downstream.pyramid import StageNorms
from fdscale.students.student import Student

if TYPE_CHECKING:
    from fdscale.data.dense.batches import Objects


class Detections(NamedTuple):
    """The n detections of one image, best first: boxes (n, 4) in its pixels, labels from 0, run lengths of masks."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: list[RunLengths] | None


class Detector(nn.Module):
    """In training pixels (B, 3, H, W) in [0, 1] and the objects of each image -> losses; else views -> detections.

    The student's parameters are not read here: they may be divided over ranks. The heads' start is drawn from torch's
    global generator, as are the anchors and boxes of each micro batch that losses are taken of.
    """

    def __init__(self, student: Student, design: Design) -> None:
        super().__init__()
        self.design = design
        self.backbone = Backbone(student, "pyramid", design.channels, window_size=design.window_size)
        strides = self.backbone.strides
        self.fpn: FeaturePyramidNetwork | None = None
        if isinstance(self.backbone.neck, StageNorms):
            self.fpn = FeaturePyramidNetwork(
                list(self.backbone.channels), design.channels, norm_layer=LayerNorm2dFp32 if design.norms else None
            )
        self.rpn = build_rpn(design, (*strides, 2 * strides[-1]))
        self.boxes = BoxHeads(design, strides)
        self.masks = MaskHead(design, strides) if design.masks else None
        for part in self.modules():
            if isinstance(part, nn.ReLU):
                part.inplace = False  # what a hook hands on must not be written into

    def forward(
        self, given: Tensor | Sequence[View], objects: Sequence[Objects] = (), drop_path: Tensor | None = None
    ) -> dict[str, Tensor] | Detections:
        """`losses` of pixels and objects in training; `detections` of one image's views otherwise."""
        if isinstance(given, Tensor):
            return self.losses(given, objects, drop_path)
        return self.detections(given)

    def losses(self, pixels: Tensor, objects: Sequence[Objects], drop_path: Tensor | None = None) -> dict[str, Tensor]:
        """`loss` and the parts that it is the sum of: the same ones, with a graph to every parameter, for any objects.

        Padding below and to the right of an image is treated as image, as in detectron2.
        """
        size = (pixels.shape[-2], pixels.shape[-1])
        maps = self._maps(pixels, drop_path)
        objects = [with_area(own) for own in objects]
        boxes = [{"boxes": own.boxes} for own in objects]
        proposals, found = self.rpn(ImageList(pixels, [size] * len(pixels)), _named(maps), boxes)
        chosen = self.boxes.chosen(proposals, objects)
        loss_class, loss_box = self.boxes.losses(maps, chosen, objects, size)
        parts = {
            "loss_objectness": found["loss_objectness"],
            "loss_rpn_box": found["loss_rpn_box_reg"],
            "loss_class": loss_class,
            "loss_box": loss_box,
        }
        if self.masks is not None:
            positive = [own.at(own.labels != self.design.classes) for own in chosen]
            parts["loss_mask"] = self.masks.loss(maps, positive, objects)
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    @torch.no_grad()
    def detections(self, views: Sequence[View]) -> Detections:
        """What one image shows, seen in all its views at once.

        Boxes of all views are brought together before overlaps are suppressed; masks of a box are the mean of what
        each view shows of it. Every module is called once a view, and once a level, whatever is found.
        """
        maps = [self._maps(view.pixels, None) for view in views]
        found = [self._candidates(own, view) for own, view in zip(maps, views, strict=True)]
        boxes, scores, labels = (torch.cat(part) for part in zip(*found, strict=True))
        kept, scores = suppressed(boxes, scores, labels, self.design)
        boxes, labels = boxes[kept], labels[kept]
        masks = None if self.masks is None else self._masks(self.masks, maps, views, boxes, labels)
        return Detections(boxes, scores, labels, masks)

    def sketch(self, pixels: Tensor, objects: Sequence[Objects], drop_path: Tensor | None = None) -> dict[str, Tensor]:
        """A `loss` through the same modules on shapes that no value decides, for a trace on fake tensors.

        As much as an image can ask for: all its boxes drawn, as many as may be positive, equally many on each level.
        """
        maps = self._maps(pixels, drop_path)
        parts = [self._sketched_rpn(maps, pixels, objects)]
        strides, images, samples = self.backbone.strides, len(pixels), self.design.box_samples
        rois = pixels.new_zeros(images * samples, 5)
        parts.append(self.boxes.sketch(pooled_levels(maps, strides, rois.tensor_split(len(strides)), BOX_SIDE)))
        if self.masks is not None:
            some = rois[: images * int(samples * POSITIVES)]
            logits = self.masks(pooled_levels(maps, strides, some.tensor_split(len(strides)), MASK_SIDE))
            parts.append(self.masks.sketch(logits, objects))
        return {"loss": torch.stack(parts).sum()}

    def _sketched_rpn(self, maps: list[Tensor], pixels: Tensor, objects: Sequence[Objects]) -> Tensor:
        scores, offsets = concat_box_prediction_layers(*self.rpn.head(maps))
        anchors = self.rpn.anchor_generator(ImageList(pixels, [(0, 0)] * len(pixels)), maps)
        self.rpn.box_coder.decode(offsets.detach(), anchors)
        for own, all_anchors in zip(objects, anchors, strict=True):
            box_iou(own.boxes, all_anchors)
        return scores.square().mean() + offsets.abs().mean()

    def _maps(self, pixels: Tensor, drop_path: Tensor | None) -> list[Tensor]:
        """Maps (B, channels, h, w), one more than the student's; the last has every other cell of the one before."""
        maps = list(self.backbone(pixels, drop_path))
        if self.fpn is not None:
            maps = list(self.fpn(_named(maps)).values())
        return [*maps, maps[-1][..., ::2, ::2]]

    def _candidates(self, maps: list[Tensor], view: View) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (n, 4) in pixels of the image, scores and labels (n,) of one view: all above the threshold."""
        (proposals,), _ = self.rpn(ImageList(view.pixels, [view.size]), _named(maps))
        boxes, scores = self.boxes.scored(maps, proposals, view.size)
        allowed = (scores > self.design.score_threshold) & has_area(boxes)
        which, labels = torch.where(allowed)
        own = boxes[which, labels if boxes.shape[1] > 1 else 0]
        return view.to_image(own), scores[which, labels], labels

    def _masks(
        self, head: MaskHead, maps: list[list[Tensor]], views: Sequence[View], boxes: Tensor, labels: Tensor
    ) -> list[RunLengths]:
        seen = []
        for own, view in zip(maps, views, strict=True):
            probability = head.probabilities(own, view.of_image(boxes), labels)
            seen.append(probability.flip(-1) if view.flipped else probability)
        return run_lengths(torch.stack(seen).mean(dim=0), boxes, views[0].image_size)


def _named(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    return {str(level): features for level, features in enumerate(maps)}
