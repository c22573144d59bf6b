"""One square look at a scaled image: the same geometry for its pixels, its labels and its boxes; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Kind = TypeVar("Kind", bound=np.generic)


@dataclass(frozen=True)
class Window:
    """A square with `side` pixels on an image of `size` (w, h), scaled to `scaled` (w, h), from `left`, `top` on.

    `flip` mirrors what is seen. Where the scaled image ends before the square does, padding follows at the right and
    at the bottom; `seen` (h, w) is what lies before it.
    """

    size: tuple[int, int]
    scaled: tuple[int, int]
    left: int
    top: int
    side: int
    flip: bool

    @property
    def seen(self) -> tuple[int, int]:
        """Height and width of the part of the square that shows the image."""
        return min(self.side, self.scaled[1] - self.top), min(self.side, self.scaled[0] - self.left)

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """What is seen of the image, uint8 (h, w, 3): the scaled image cut out, which is never made as a whole.

        Bilinear over all pixels that a smaller one stands for (PIL's, as detectron2 scales), and the same bits on
        every machine.
        """
        height, width = self.seen
        across, down = self.size[0] / self.scaled[0], self.size[1] / self.scaled[1]
        right, bottom = min((self.left + width) * across, self.size[0]), min((self.top + height) * down, self.size[1])
        box = (self.left * across, self.top * down, right, bottom)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box))
        return pixels[:, ::-1] if self.flip else pixels

    def values(self, values: NDArray[Kind]) -> NDArray[Kind]:
        """What is seen of labels or masks (..., H, W), as (..., h, w): the value nearest to each pixel's centre."""
        height, width = self.seen
        rows = _nearest(self.top, height, self.size[1], self.scaled[1])
        columns = _nearest(self.left, width, self.size[0], self.scaled[0])
        # One axis after the other: both at once take ten times as long, and put the axes of n masks last to first.
        return values.take(columns[::-1] if self.flip else columns, -1).take(rows, -2)

    def boxes(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Boxes (n, 4) as x1, y1, x2, y2 of the image, in pixels of the square and cut at what is seen."""
        height, width = self.seen
        scale = np.array([self.scaled[0] / self.size[0], self.scaled[1] / self.size[1]] * 2)
        moved = boxes * scale - np.array([self.left, self.top] * 2)
        moved = np.clip(moved, 0, np.array([width, height] * 2))
        if self.flip:
            moved = np.stack([width - moved[:, 2], moved[:, 1], width - moved[:, 0], moved[:, 3]], axis=1)
        return moved.astype(np.float32)


def padded(seen: NDArray[Kind], side: int, fill: float | tuple[float, ...]) -> NDArray[Kind]:
    """What is seen, whole numbers (h, w) or (h, w, 3), on a square of `fill`, rounded."""
    square = np.empty((side, side, *seen.shape[2:]), seen.dtype)
    square[:] = np.rint(fill)
    square[: seen.shape[0], : seen.shape[1]] = seen
    return square


def placed(size: tuple[int, int], scaled: tuple[int, int], side: int, flip: float, draw: np.random.Generator) -> Window:
    """A window anywhere within the scaled image, flipped with probability `flip`."""
    left, top = (int(draw.integers(max(0, length - side) + 1)) for length in scaled)
    return Window(size, scaled, left, top, side, bool(draw.random() < flip))


def _nearest(start: int, length: int, size: int, scaled: int) -> NDArray[np.int64]:
    return ((start + np.arange(length) + 0.5) * (size / scaled)).astype(np.int64).clip(max=size - 1)
