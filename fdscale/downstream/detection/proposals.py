"""Where objects may be: torchvision's region proposal network, with anchors and offsets in fp32.

Its loss of boxes is smooth L1, with a beta of 1/9; detectron2's is L1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from fdscale.downstream.detection.design import Design

OBJECT, NO_OBJECT, POSITIVES = 0.7, 0.3, 0.5  # overlaps of anchors with objects, the share of those drawn
OVERLAP = 0.7  # of two proposals
CPU = torch.device("cpu")


class Anchors(AnchorGenerator):
    """torchvision's anchors on known strides.

    Its own come in the type of the maps, and 16 bits round them to 8 pixels near 2000; its strides are the image's
    side over the map's, which is another number where the one does not divide the other; and it rounds anchors around
    the origin to whole pixels, which detectron2 does not.
    """

    def __init__(self, sides: Sequence[float], ratios: tuple[float, ...], strides: Sequence[int]) -> None:
        super().__init__(tuple((side,) for side in sides), (ratios,) * len(sides))
        self.strides = tuple(strides)

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> Tensor:
        """The anchors (n, 4) around the origin: `scales` are sides of squares as large, ratios height to width."""
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths, heights = (sides[None] / roots[:, None]).flatten(), (sides[None] * roots[:, None]).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors (n, 4) of every image, level by level, row by row: all images have the same."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [list(level.shape[-2:]) for level in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [[stride, stride] for stride in self.strides]))
        return [anchors] * len(image_list.image_sizes)


class Float32RPNHead(RPNHead):
    """torchvision's head, whose results are fp32: boxes are decoded in their type."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, offsets = super().forward(x)
        return [level.float() for level in objectness], [level.float() for level in offsets]


def build_rpn(design: Design, strides: Sequence[int]) -> RegionProposalNetwork:
    """The proposal network for maps of `design.channels` with these strides."""
    before, after = (
        {"training": training, "testing": evaluation}
        for training, evaluation in zip(design.proposals_training, design.proposals_evaluation, strict=True)
    )
    sides = [design.anchor_scale * stride for stride in strides]
    head = Float32RPNHead(design.channels, len(design.anchor_ratios), design.rpn_convolutions)
    return RegionProposalNetwork(
        Anchors(sides, design.anchor_ratios, strides),
        head,
        OBJECT,
        NO_OBJECT,
        design.rpn_samples,
        POSITIVES,
        before,
        after,
        OVERLAP,
    )
