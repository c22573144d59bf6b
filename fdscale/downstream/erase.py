"""Random erasing: a rectangle of some images becomes noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fdscale.data.draws import Purpose, generator

AREA = (0.02, 1 / 3)  # share of the image
LOG_RATIO = (math.log(0.3), math.log(1 / 0.3))
TRIES = 10


@dataclass(frozen=True)
class Erasing:
    """timm's RandomErasing, mode `pixel`, one rectangle (official: probability 0.25), drawn from (seed, step, row).

    `mean`, `std` (1, 3, 1, 1) are those of the network's input: what it sees there is N(0, 1) noise.
    """

    probability: float
    mean: Tensor
    std: Tensor
    seed: int

    def __call__(self, pixels: Tensor, rows: slice, step: int) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1], these rows of the step's global batch, changed in place."""
        if not self.probability:
            return pixels
        for image, row in zip(pixels, range(rows.start, rows.stop), strict=True):
            draw = generator(self.seed, row, step, Purpose.ERASING)
            box = erased_box(image.shape[1], image.shape[2], self.probability, draw)
            if box is not None:
                top, left, height, width = box
                noise = self._noise((1, 3, height, width), pixels.device, int(draw.integers(2**63)))
                image[:, top : top + height, left : left + width] = noise[0]
        return pixels

    def _noise(self, shape: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
        """Drawn on the device: no copy to wait for."""
        drawn = torch.Generator(device).manual_seed(seed)
        noise = torch.randn(shape, generator=drawn, device=device)
        return self.mean.to(device) + self.std.to(device) * noise


def erased_box(
    height: int, width: int, probability: float, draw: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """(top, left, height, width) by timm's rule: ten tries of (area, log ratio); None where nothing is erased."""
    if draw.random() > probability:
        return None
    for _ in range(TRIES):
        area = draw.uniform(*AREA) * height * width
        ratio = math.exp(draw.uniform(*LOG_RATIO))
        box_height, box_width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if box_width < width and box_height < height:
            top, left = draw.integers(height - box_height + 1), draw.integers(width - box_width + 1)
            return int(top), int(left), box_height, box_width
    return None
