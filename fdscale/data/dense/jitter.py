"""Large-scale jitter of scenes with objects, as ViTDet trains, drawn only from (seed, sample key, view); no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fdscale.data.dense.window import Window, padded, placed
from fdscale.data.draws import Purpose, generator

SMALLEST = 1.0  # pixels of a box's side, below which an object is gone


@dataclass(frozen=True)
class Jitter:
    """What one view is drawn from.

    The image is scaled, keeping its ratio, to lie within a square of `size` times a number out of `scale`: (0.1, 2)
    is large-scale jitter; (0.48, 0.8) of 1333, for images of 4:3, the multi-scale training of Swin (short sides 480 to
    800). A random square of `size` is cut out, or padded with `fill` (R, G, B in 0..255); `flip`: probability.
    """

    size: int
    scale: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5
    fill: tuple[float, float, float] = (124, 116, 104)


@dataclass(frozen=True)
class Seen:
    """One view: `image` uint8 (3, S, S), and as `batches.Objects` `boxes` (n, 4), `labels` (n,), `masks` (n, S, S)."""

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.uint8] | None


def jitter_scene(
    image: Image.Image,
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    masks: NDArray[np.uint8] | None,
    key: int,
    view: int,
    seed: int,
    jitter: Jitter,
) -> Seen:
    """One random view of a scene: `image` RGB, `boxes` fp32 (n, 4), `labels` (n,), `masks` uint8 (n, h, w) or None.

    With masks the boxes are those of what is seen of them (detectron2's recompute_boxes), else cut at the view's
    edge. Objects that are no longer seen are left out, as are those below a pixel. `view` is the epoch.
    """
    window = _drawn(image.size, jitter, generator(seed, key, view, Purpose.JITTER))
    square = padded(window.pixels(image), jitter.size, jitter.fill)
    pixels = np.ascontiguousarray(square.transpose(2, 0, 1))
    if masks is None:
        boxes = window.boxes(boxes)
        kept = (boxes[:, 2:] - boxes[:, :2] >= SMALLEST).all(axis=1)
        return Seen(pixels, boxes[kept], labels[kept], None)
    shown, seen = _seen(window, masks)
    return Seen(pixels, boxes_of(seen), labels[shown], seen)


def _seen(window: Window, masks: NDArray[np.uint8]) -> tuple[list[int], NDArray[np.uint8]]:
    """Which masks are seen, and those on squares: each is made in its place, for all together are large."""
    kept: list[int] = []
    height, width = window.seen
    squares = np.zeros((len(masks), window.side, window.side), np.uint8)
    for number, mask in enumerate(masks):
        part = window.values(mask)
        if part.any():
            squares[len(kept), :height, :width] = part
            kept.append(number)
    return kept, squares[: len(kept)]


def boxes_of(masks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Boxes fp32 (n, 4) around masks (n, h, w), none of them empty; x2 and y2 are the far edges of pixels."""
    x1, x2 = _extent(masks.max(axis=1))
    y1, y2 = _extent(masks.max(axis=2))
    return np.stack([x1, y1, x2, y2], axis=1).astype(np.float32)


def _extent(touched: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return touched.argmax(axis=1), touched.shape[1] - touched[:, ::-1].argmax(axis=1)


def _drawn(size: tuple[int, int], jitter: Jitter, draw: np.random.Generator) -> Window:
    factor = draw.uniform(*jitter.scale) * jitter.size / max(size)
    scaled = tuple(max(1, round(length * factor)) for length in size)
    return placed(size, (scaled[0], scaled[1]), jitter.size, jitter.flip, draw)
