"""The numbers of a detector: enough, with its student's geometry, to build it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Design:
    """What a detector is built with; defaults are detectron2's, on which ViTDet builds, but for what is said.

    `cascade`: three stages instead of one; `masks`: with a mask head. `channels` of all maps and of the mask head,
    `box_width` of the two hidden layers of a box head; with `box_convolutions` these come first, and one such layer
    follows. `norms`: a LayerNorm over the channels after each convolution of box heads, mask head and feature pyramid.
    ViTDet has 4 convolutions, and norms. `window_size` replaces SwinV2's. Anchors have sides of
    `anchor_scale` strides and these `anchor_ratios` of height to width. `proposals_*`: of each level before the
    suppression of overlaps, of an image after it. `rpn_samples` anchors and `box_samples` boxes of an image are drawn.

    The last six decide what is told of an image: boxes above `score_threshold`, overlaps beyond `overlap` suppressed
    by class (`hard`, or decayed: `linear`, `gaussian` with this `sigma`), at most so many `detections`. Decayed scores
    must stay above the threshold, too: 0.001 is usual with them.
    """

    classes: int
    cascade: bool = False
    masks: bool = True
    channels: int = 256
    box_width: int = 1024
    box_convolutions: int = 0
    norms: bool = False
    window_size: int | None = None
    anchor_scale: float = 8.0
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_convolutions: int = 1  # ViTDet: 2
    rpn_samples: int = 256
    box_samples: int = 512
    proposals_training: tuple[int, int] = (2000, 1000)
    proposals_evaluation: tuple[int, int] = (1000, 1000)
    score_threshold: float = 0.05
    suppression: Literal["hard", "linear", "gaussian"] = "hard"
    overlap: float = 0.5
    sigma: float = 0.5
    detections: int = 100
