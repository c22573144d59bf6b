"""The region proposal network has detectron2's numbers."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from fdscale.downstream.detection.design import Design
from fdscale.downstream.detection.proposals import build_rpn

STRIDES = (4, 8, 16, 32, 64)


def test_its_numbers_are_detectron2s() -> None:
    """Config of Mask R-CNN with a pyramid: thresholds .3 and .7, 256 anchors, half of them objects, and so on."""
    with torch.device("meta"):
        rpn = build_rpn(Design(80, rpn_convolutions=2), STRIDES)
    assert (rpn.proposal_matcher.low_threshold, rpn.proposal_matcher.high_threshold) == (0.3, 0.7)
    assert rpn.proposal_matcher.allow_low_quality_matches
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (256, 0.5)
    assert rpn._pre_nms_top_n == {"training": 2000, "testing": 1000}
    assert rpn._post_nms_top_n == {"training": 1000, "testing": 1000}
    assert (rpn.nms_thresh, rpn.score_thresh) == (0.7, 0.0)
    assert rpn.box_coder.weights == (1.0, 1.0, 1.0, 1.0)
    assert len(rpn.head.conv) == 2
    assert rpn.head.cls_logits.out_channels == 3


def test_anchors_have_sides_of_32_to_512_and_are_not_rounded() -> None:
    """detectron2's ratios 0.5, 1, 2 of the same area: 32 is 45.25 x 22.63, which torchvision makes 46 x 22."""
    rpn = build_rpn(Design(80), STRIDES)
    maps = [torch.zeros(1, 256, 1, 1) for _ in STRIDES]
    (anchors,) = rpn.anchor_generator(ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]), maps)
    assert anchors.dtype == torch.float32
    for side, own in zip((32, 64, 128, 256, 512), anchors.view(5, 3, 4).tolist(), strict=True):
        for ratio, box in zip((0.5, 1.0, 2.0), own, strict=True):
            width, height = side / ratio**0.5, side * ratio**0.5
            assert box == pytest.approx([-width / 2, -height / 2, width / 2, height / 2], rel=1e-6)
