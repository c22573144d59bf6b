"""Crop, flip and RandAugment, drawn only from (seed, sample key, view): the same image on any rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fdscale.data.draws import Draws, Purpose, generator
from fdscale.data.images import READING, to_rgb
from fdscale.data.jpeg import PlainJpeg
from fdscale.data.randaugment import RandAugment

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
TRIES = 10
# A crop is decoded at a reduced scale where its sides stay so many times as long as the view's: the median difference
# from decoding it whole is then a PSNR of 40 dB on photos, as between bilinear and bicubic; at 1.0 it would be 36 dB.
REDUCED_AT_LEAST = 1.25

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Augmentation:
    """What one view is drawn from: area share, width/height ratio, filter, chance of a flip, RandAugment or None."""

    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    interpolation: Literal["bilinear", "bicubic"]
    flip: float
    randaugment: RandAugment | None = None


def augment(image: Image.Image, key: int, view: int, seed: int, size: int, augmentation: Augmentation) -> Image.Image:
    """One random view of an image, RGB, `size` pixels a side; a JPEG is decoded no further than the view needs.

    RandomResizedCrop and horizontal flip, which is all that distillation has (official implementation), then
    RandAugment where that is wanted; nobody normalises here. `view` is how often the sample was shown before.
    """
    draw = Draws(seed, key, view, Purpose.VIEW)
    flip = draw.random() < augmentation.flip
    box = crop_box(image.width, image.height, augmentation.crop_scale, augmentation.crop_ratio, draw)
    crop = _resized_crop(image, box, size, FILTERS[augmentation.interpolation])
    seen = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop
    if augmentation.randaugment is not None:
        seen = augmentation.randaugment(seen, generator(seed, key, view, Purpose.RANDAUGMENT))
    return seen


def centre_crop(image: Image.Image, size: int, interpolation: Literal["bilinear", "bicubic"]) -> NDArray[np.uint8]:
    """The evaluation view, uint8 (3, size, size): shorter side to size * 256/224, then the centre.

    Rounded as torchvision's Resize and CenterCrop do, and as the official implementation evaluates.
    """
    shorter = size * 256 // 224
    width, height = (shorter * side // min(image.size) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), FILTERS[interpolation])
    return np.asarray(resized.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def _resized_crop(image: Image.Image, box: Box, size: int, resampling: Image.Resampling) -> Image.Image:
    """The box resized to an RGB square; nothing outside it enters, as in torchvision, where it is not reduced."""
    with READING:
        times = _reduced(image, box, size)
        if isinstance(image, PlainJpeg):
            image.end_below(box[3])
        image.load()
    left, top, right, bottom = (side / times for side in box)
    whole = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    crop = image.crop(whole)  # copies no more than the box, of which alone other modes are made RGB
    rgb = crop if crop.mode == "RGB" else to_rgb(crop)
    inner = left - whole[0], top - whole[1], right - whole[0], bottom - whole[1]
    return rgb.resize((size, size), resampling, box=inner)


def _reduced(image: Image.Image, box: Box, size: int) -> int:
    """Have a JPEG decoded at 1/8, 1/4 or 1/2 of its size where the box stays large enough; how many times smaller."""
    side = min(box[2] - box[0], box[3] - box[1])
    for times in (8, 4, 2):
        if side >= times * size * REDUCED_AT_LEAST:
            width = image.width
            image.draft(image.mode, (width // times, image.height // times))  # nothing where it is no JPEG
            return times if image.width < width else 1
    return 1


def crop_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draw: Draws,
) -> Box:
    """(left, top, right, bottom) by torchvision's rule: ten tries of (area, log ratio), then the centre."""
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(TRIES):
        area = width * height * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(*log_ratio))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = draw.below(width - crop_width + 1), draw.below(height - crop_height + 1)
            return left, top, left + crop_width, top + crop_height
    return centre_box(width, height, ratio)


def centre_box(width: int, height: int, ratio: tuple[float, float]) -> Box:
    """The largest centred box whose ratio is allowed: torchvision's fallback for very long images."""
    crop_width = min(width, max(1, round(height * ratio[1])))
    crop_height = min(height, max(1, round(width / ratio[0])))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height
