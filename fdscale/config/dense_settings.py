"""The settings of dense tasks: segmentation in the layout of ADE20K, detection in that of COCO."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from fdscale.config.data_settings import BatchSettings
from fdscale.config.kinds import (
    Count,
    Fraction,
    Layers,
    Name,
    NonNegative,
    Positive,
    Ratios,
    Scales,
    Settings,
)
from fdscale.config.settings import CadenceSettings, RunSettings


class BackboneSettings(Settings):
    """How a student gives maps of strides 4 to 32: `window_size` replaces SwinV2's trained windows."""

    window_size: Positive | None = None


class SegmentBackboneSettings(BackboneSettings):
    """The same, and what networks of one stride give.

    `plain` is for them alone: a "pyramid" of the last layer, each map `pyramid_channels` wide, or four "layers"
    rescaled, those with these `indices` (None: BEiT's).
    """

    plain: Literal["pyramid", "layers"] = "pyramid"
    pyramid_channels: Positive = 256
    indices: Layers | None = None


class ViewSettings(CadenceSettings):
    """How held-out images are seen: ratio kept, the short side as said unless the long one would be longer.

    With `scales` and `flip` each image is seen several times, at these multiples of that size and mirrored, and the
    predictions are merged. Of the first `overlays` images a picture is written.
    """

    short_side: Positive
    long_side: Positive
    scales: Scales = (1.0,)
    flip: bool = False
    overlays: Count = 8

    @field_validator("long_side")
    @classmethod
    def _longer(cls, side: int, others: ValidationInfo) -> int:
        return _at_least(side, "short_side", others)


class SegmentDataSettings(BatchSettings):
    """A folder in the layout of ADEChallengeData2016, and mmseg's augmentation.

    An image's short side becomes `short_side` (the long one `long_side` at most) times a factor drawn from `scale`;
    then it is cropped to a square, in which no class fills more than `most_of_one_class`, as far as ten tries find one.
    """

    folder: Name
    crop: Positive = 512
    short_side: Positive = 512
    long_side: Positive = 2048
    scale: Ratios = (0.5, 2.0)
    most_of_one_class: Fraction = 0.75
    distortion: bool = True


class SegmentEvalSettings(ViewSettings):
    """The folder whose `validation` half is looked at (None: nothing is), in windows of `crop` every `stride` pixels.

    `crop` 0 takes each image as a whole; else a rank computes so many `windows_at_once`. `window_size` gives SwinV2
    other windows of attention than in training.
    """

    folder: Name | None = None
    short_side: Positive = 512
    long_side: Positive = 2048
    crop: Count = 512
    stride: Positive = 341
    windows_at_once: Positive = 4
    window_size: Positive | None = None

    @field_validator("stride")
    @classmethod
    def _without_gaps(cls, stride: int, others: ValidationInfo) -> int:
        if stride > (others.data.get("crop") or stride):
            raise ValueError(f"1 to eval.crop = {others.data['crop']}: larger ones leave gaps")
        return stride


class SegmentHeadSettings(Settings):
    """UperNet, its maps `channels` wide and with an auxiliary head of that `auxiliary_weight`, or Mask2Former.

    `queries` and `decoder_layers` are Mask2Former's.
    """

    kind: Literal["upernet", "mask2former"] = "upernet"
    channels: Positive = 512
    auxiliary_weight: NonNegative = 0.4
    queries: Positive = 100
    decoder_layers: Positive = 9


class SegmentSettings(RunSettings):
    """Semantic segmentation."""

    program: Literal["segment"]
    classes: Annotated[int, Field(ge=2, le=255)] = 150
    data: SegmentDataSettings
    eval: SegmentEvalSettings = SegmentEvalSettings()
    backbone: SegmentBackboneSettings = SegmentBackboneSettings()
    head: SegmentHeadSettings = SegmentHeadSettings()


class DetectDataSettings(BatchSettings):
    """A COCO-style JSON and the folder of its images; large-scale jitter.

    Each image is scaled so that its long side is `crop` times a factor drawn from `scale`, then cropped or padded to a
    square of `crop`.
    """

    images: Name
    annotations: Name
    crop: Positive = 1024
    scale: Ratios = (0.1, 2.0)


class DetectEvalSettings(ViewSettings):
    """What is looked at (`annotations` None: nothing is), and what counts as detected.

    `nms` merges boxes of one class that overlap by `nms_overlap`: "hard" drops all but the best, "linear" and
    "gaussian" lower their scores (soft-NMS). `window_size` gives SwinV2 other windows than in training.
    """

    images: Name | None = None
    annotations: Annotated[Name | None, Field(validate_default=True)] = None
    short_side: Positive = 800
    long_side: Positive = 1333
    nms: Literal["hard", "linear", "gaussian"] = "hard"
    nms_overlap: Fraction = 0.5
    score_threshold: Fraction = 0.05
    detections: Positive = 100
    window_size: Positive | None = None

    @field_validator("annotations")
    @classmethod
    def _beside_images(cls, annotations: str | None, others: ValidationInfo) -> str | None:
        if (annotations is None) != (others.data.get("images") is None):
            raise ValueError("both eval.images and eval.annotations, or neither")
        return annotations


class DetectHeadSettings(Settings):
    """Mask R-CNN or its cascade, on maps `channels` wide; without `masks` boxes alone are learned.

    A box head has so many `box_convolutions` and one layer of `box_width`, or, without them, two layers; `norms`:
    LayerNorms after the convolutions of heads and feature pyramid. Anchors have sides of `anchor_scale` strides. Of an
    image so many `proposals` go to the box head in an evaluation, and `box_samples` of them in training. `weights` is
    the `detector.safetensors` of an earlier stage: all of it is kept but what depends on the classes, where their
    number is another.
    """

    kind: Literal["mask_rcnn", "cascade"] = "mask_rcnn"
    masks: bool = True
    channels: Positive = 256
    box_width: Positive = 1024
    box_convolutions: Count = 0
    norms: bool = False
    rpn_convolutions: Positive = 1
    anchor_scale: Annotated[float, Field(gt=0)] = 8.0
    proposals: Positive = 1000
    box_samples: Positive = 512
    weights: Name | None = None


class DetectSettings(RunSettings):
    """Detection of objects: boxes and masks."""

    program: Literal["detect"]
    classes: Positive = 80
    data: DetectDataSettings
    eval: DetectEvalSettings = DetectEvalSettings()
    backbone: BackboneSettings = BackboneSettings()
    head: DetectHeadSettings = DetectHeadSettings()


def _at_least(value: int, other: str, others: ValidationInfo) -> int:
    least: Any = others.data.get(other, value)
    if value < least:
        raise ValueError(f"at least {other} = {least}")
    return value
