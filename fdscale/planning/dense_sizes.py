"""What dense tasks add to a student and to its images: necks and heads in parameters, targets in bytes; torch-free."""

from __future__ import annotations

from itertools import pairwise
from math import log2

from fdscale.config.dense_settings import DetectHeadSettings, DetectSettings, SegmentHeadSettings, SegmentSettings
from fdscale.config.programs import AnySettings, DenseSettings
from fdscale.planning.forecast import IMAGE_CHANNELS
from fdscale.students.geometry import Geometry, SwinV2Geometry, ViTGeometry

OBJECTS_OF_AN_IMAGE = 8  # that masks are counted for: COCO's mean is 7.3
STRIDES = (4, 8, 16, 32)
POOLED = 4  # scales of UperNet's pyramid pooling
AUXILIARY = 256  # channels of UperNet's auxiliary head, at most
ENCODER_LAYERS, OFFSETS = 6, 288  # of Mask2Former's deformable attention: 8 heads x 3 levels x 4 points x 3 numbers
ROI = 7  # pixels a side of what a box head sees
ANCHORS = 3  # a place


def trained_parameters(settings: AnySettings, student: Geometry) -> int | None:
    """The student's parameters, with the neck and heads of a dense task; None where only the built network tells."""
    if not isinstance(student, ViTGeometry | SwinV2Geometry):
        return None
    if not isinstance(settings, DenseSettings):
        return student.parameters()
    if isinstance(settings, SegmentSettings):
        added = _segment_head(settings.head, settings.classes, _widths(settings, student))
    else:
        added = _detect_head(settings.head, settings.classes)
    return student.parameters() + _neck(settings, student) + added


def image_bytes(settings: AnySettings, size: int) -> int:
    """Bytes of what loader workers hand over for one image: uint8 pixels, and the label map or masks of a dense task.

    `size` is the image's side. Every object has a mask as large as the crop: images with more than the mean take more.
    """
    masks = 1 if isinstance(settings, SegmentSettings) else 0
    if isinstance(settings, DetectSettings) and settings.head.masks:
        masks = OBJECTS_OF_AN_IMAGE
    return (IMAGE_CHANNELS + masks) * size**2


def _widths(settings: SegmentSettings, student: ViTGeometry | SwinV2Geometry) -> tuple[int, ...]:
    """Channels of the four maps that the head is given."""
    if isinstance(student, SwinV2Geometry):
        return _stages(student)
    pyramid = settings.backbone.plain == "pyramid"
    return (settings.backbone.pyramid_channels if pyramid else student.width,) * len(STRIDES)


def _stages(student: SwinV2Geometry) -> tuple[int, ...]:
    return tuple(student.embed_dim * 2**stage for stage in range(len(STRIDES)))


def _neck(settings: DenseSettings, student: ViTGeometry | SwinV2Geometry) -> int:
    """What makes maps of four strides, less the final norm that a ViT loses; a SwinV2's becomes one of its four."""
    if isinstance(student, SwinV2Geometry):
        norms = 2 * sum(_stages(student)[:-1])
        return norms if isinstance(settings, SegmentSettings) else norms + _fpn(settings, student)
    width, doublings = student.width, [max(round(log2(student.stride)) - round(log2(to)), 0) for to in STRIDES]
    if isinstance(settings, SegmentSettings) and settings.backbone.plain == "layers":
        return sum(_doubled([width] * (times + 1)) for times in doublings) - 2 * width
    channels = settings.head.channels if isinstance(settings, DetectSettings) else settings.backbone.pyramid_channels
    added = 0
    for times in doublings:
        halved = [width // 2**step for step in range(times + 1)]
        added += _doubled(halved) + halved[-1] * channels + 9 * channels**2 + 4 * channels
    return added - 2 * width


def _doubled(widths: list[int]) -> int:
    """Transposed convolutions 2x2 from each width to the next, a norm between two of them."""
    return sum(4 * before * after + after for before, after in pairwise(widths)) + 2 * sum(widths[1:-1])


def _fpn(settings: DetectSettings, student: SwinV2Geometry) -> int:
    channels = settings.head.channels
    shifts = (4 if settings.head.norms else 2) * channels  # of two convolutions: norms in place of biases
    return sum(_stages(student)) * channels + len(STRIDES) * (9 * channels**2 + shifts)


def _segment_head(head: SegmentHeadSettings, classes: int, widths: tuple[int, ...]) -> int:
    return _upernet(head, classes, widths) if head.kind == "upernet" else _mask2former(head, classes, widths)


def _upernet(head: SegmentHeadSettings, classes: int, widths: tuple[int, ...]) -> int:
    """Convolutions without bias, a norm after each; the auxiliary head is on the map of stride 16."""
    channels, last = head.channels, widths[-1]
    norm, aside = 2 * channels, min(channels, AUXILIARY)
    pooled = POOLED * (last * channels + norm) + 9 * (last + POOLED * channels) * channels + norm
    lateral = sum(widths[:-1]) * channels + 3 * norm
    merged = 3 * (9 * channels**2 + norm) + 9 * len(STRIDES) * channels**2 + norm
    auxiliary = 9 * widths[2] * aside + 2 * aside + (aside + 1) * classes
    return pooled + lateral + merged + (channels + 1) * classes + auxiliary


def _mask2former(head: SegmentHeadSettings, classes: int, widths: tuple[int, ...]) -> int:
    """Hidden layers are 4 (encoder) and 8 (decoder) times as wide as the rest."""
    c = head.channels
    square = c**2 + c
    pixels = sum(widths[1:]) * c + 9 * c + 3 * c + square + widths[0] * c + 9 * c**2 + 4 * c
    encoder = ENCODER_LAYERS * (OFFSETS * (c + 1) + 2 * square + 4 * c + 8 * c**2 + 5 * c)
    decoder = head.decoder_layers * (8 * square + 6 * c + 16 * c**2 + 9 * c)
    queries = 2 * head.queries * c + 3 * c + 2 * c + 3 * square
    return pixels + encoder + decoder + queries + (classes + 1) * (c + 1)


def _detect_head(head: DetectHeadSettings, classes: int) -> int:
    """Proposals, box heads (a cascade's three tell boxes of no class, a single one those of each) and masks."""
    channels, width, cascade = head.channels, head.box_width, head.kind == "cascade"
    convolution = 9 * channels**2 + (2 if head.norms else 1) * channels  # a norm has no bias beside it
    proposals = head.rpn_convolutions * (9 * channels**2 + channels) + 5 * ANCHORS * (channels + 1)
    told = classes + 1 + 4 * (1 if cascade else classes)
    hidden = head.box_convolutions * convolution if head.box_convolutions else (width + 1) * width
    boxes = (ROI**2 * channels + 1) * width + hidden + told * (width + 1)
    masks = 4 * convolution + 4 * channels**2 + channels + classes * (channels + 1)
    return proposals + boxes * (3 if cascade else 1) + (masks if head.masks else 0)
