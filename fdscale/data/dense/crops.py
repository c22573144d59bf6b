"""Crops of labelled scenes, as mmsegmentation augments ADE20K: drawn only from (seed, sample key, view); no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fdscale.data.dense.ade20k import IGNORED
from fdscale.data.dense.window import Window, padded, placed
from fdscale.data.draws import Purpose, generator

TRIES = 10
# PhotoMetricDistortion's: added to pixels of 0..255, factors, and degrees around the circle of hues
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 36.0


@dataclass(frozen=True)
class Cropping:
    """What one crop is drawn from.

    Scenes are scaled to `short_side`, but no longer than `long_side`, times a number out of `scale`, keeping their
    ratio; `size`: side of the crop; `most_of_one_class`: a crop with a larger share of one class is drawn again, up
    to ten times; `flip`: probability; `distort`: brightness, contrast, saturation and hue; `fill`: colour (R, G, B)
    in 0..255 of what lies outside, which should be the mean of what the network normalises with.
    """

    size: int
    short_side: int
    long_side: int
    scale: tuple[float, float] = (0.5, 2.0)
    most_of_one_class: float = 0.75
    flip: float = 0.5
    distort: bool = True
    fill: tuple[float, float, float] = (124, 116, 104)


def crop_scene(
    image: Image.Image, labels: NDArray[np.uint8], key: int, view: int, seed: int, cropping: Cropping
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One random crop of a scene: pixels uint8 (3, S, S), and labels uint8 (S, S), 255 outside.

    `image` RGB, `labels` uint8 (h, w) of its size. `view` is the epoch.
    """
    window, seen = _chosen(image.size, labels, cropping, generator(seed, key, view, Purpose.CROP))
    pixels = window.pixels(image)
    if cropping.distort:
        pixels = distorted(pixels, generator(seed, key, view, Purpose.COLOURS))
    square = padded(pixels, cropping.size, cropping.fill)
    return np.ascontiguousarray(square.transpose(2, 0, 1)), padded(seen, cropping.size, IGNORED)


def _chosen(
    size: tuple[int, int], labels: NDArray[np.uint8], cropping: Cropping, draw: np.random.Generator
) -> tuple[Window, NDArray[np.uint8]]:
    """The first of ten windows that shows more than one class, none of them too much; else the last."""
    scaled = _scaled(size, cropping, draw.uniform(*cropping.scale))
    for _ in range(TRIES):
        window = placed(size, scaled, cropping.size, cropping.flip, draw)
        seen = window.values(labels)
        counts = np.bincount(seen.ravel(), minlength=IGNORED + 1)[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() < cropping.most_of_one_class * counts.sum():
            break
    return window, seen


def _scaled(size: tuple[int, int], cropping: Cropping, ratio: float) -> tuple[int, int]:
    factor = ratio * min(cropping.long_side / max(size), cropping.short_side / min(size))
    width, height = (max(1, int(length * factor + 0.5)) for length in size)
    return width, height


def distorted(pixels: NDArray[np.uint8], draw: np.random.Generator) -> NDArray[np.uint8]:
    """Pixels (h, w, 3) with brightness, contrast, saturation and hue changed, each with probability 0.5.

    As mmsegmentation's PhotoMetricDistortion: contrast comes before or after the colours.
    """
    changes = draw.random(4) < 0.5
    contrast_first = draw.random() < 0.5
    brightness, contrast = draw.uniform(-BRIGHTNESS, BRIGHTNESS), draw.uniform(*CONTRAST)
    saturation, hue = draw.uniform(*SATURATION), draw.uniform(-HUE, HUE)
    if changes[0]:
        pixels = _bytes(pixels + np.float32(brightness))
    if changes[1] and contrast_first:
        pixels = _bytes(pixels * np.float32(contrast))
    if changes[2] or changes[3]:
        pixels = _coloured(pixels, saturation if changes[2] else 1.0, hue if changes[3] else 0.0)
    if changes[1] and not contrast_first:
        pixels = _bytes(pixels * np.float32(contrast))
    return pixels


def _coloured(pixels: NDArray[np.uint8], saturation: float, hue: float) -> NDArray[np.uint8]:
    hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
    hsv[..., 0] = (hsv[..., 0] + np.int16(round(hue * 255 / 360))) % 255  # PIL's circle has 255 steps
    hsv[..., 1] = _bytes(hsv[..., 1] * np.float32(saturation))
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def _bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Cut to 0..255 and cut off, as mmsegmentation does."""
    return values.clip(0, 255).astype(np.uint8)
