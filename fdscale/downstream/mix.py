"""Mixup and cutmix: pairs of images become one between them, their labels likewise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from fdscale.data.draws import Purpose, generator

Box = tuple[int, int, int, int]  # top, bottom, left, right


@dataclass(frozen=True)
class Mixing:
    """timm's Mixup, mode `batch`: one draw for `images_per_draw` rows of the global batch, from (seed, step, block).

    `mixup`, `cutmix` are the alphas of the Beta distributions of the own image's share; `switch_probability` is
    cutmix's where both are on. timm pairs the i-th image with the i-th from the end; here rows 2k and 2k + 1 are a
    pair, so that any number of ranks mixes the same images (their order is random anyway).
    """

    mixup: float
    cutmix: float
    probability: float
    switch_probability: float
    images_per_draw: int
    classes: int
    seed: int

    @property
    def is_on(self) -> bool:
        return self.probability > 0 and max(self.mixup, self.cutmix) > 0

    def __call__(self, pixels: Tensor, labels: Tensor, rows: slice, step: int) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) and labels (B,), these rows of the global batch -> mixed pixels, targets (B, classes).

        The targets are each label's share of the image, not smoothed. When mixing is off, both come back as they are.
        """
        if not self.is_on:
            return pixels, labels
        targets = F.one_hot(labels, self.classes).float()
        partners, their_targets = _neighbours(pixels), _neighbours(targets)
        mixed, shares = pixels.clone(), targets.clone()
        for block, part in self._blocks(rows):
            draw = generator(self.seed, block, step, Purpose.MIXING)
            share, box = self.draw(pixels.shape[2], pixels.shape[3], draw)
            shares[part] = targets[part] * share + their_targets[part] * (1 - share)
            if box is None:
                mixed[part] = pixels[part] * share + partners[part] * (1 - share)
            else:
                top, bottom, left, right = box
                mixed[part, :, top:bottom, left:right] = partners[part, :, top:bottom, left:right]
        return mixed, shares

    def draw(self, height: int, width: int, draw: np.random.Generator) -> tuple[float, Box | None]:
        """The own image's share, and the box that is the partner's (None: the images are blended)."""
        if draw.random() >= self.probability:
            return 1.0, None
        cut = self.cutmix > 0 and (self.mixup == 0 or draw.random() < self.switch_probability)
        alpha = self.cutmix if cut else self.mixup
        share = float(draw.beta(alpha, alpha))
        if not cut:
            return share, None
        box = cut_box(height, width, share, int(draw.integers(height)), int(draw.integers(width)))
        return kept_share(height, width, box), box

    def _blocks(self, rows: slice) -> Iterator[tuple[int, slice]]:
        """The blocks that these rows touch, and where in the micro batch each of them lies."""
        size = self.images_per_draw
        for block in range(rows.start // size, -(-rows.stop // size)):
            first, last = max(block * size, rows.start), min((block + 1) * size, rows.stop)
            yield block, slice(first - rows.start, last - rows.start)


def _neighbours(values: Tensor) -> Tensor:
    """Rows (B, ...) with 2k and 2k + 1 exchanged."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def cut_box(height: int, width: int, share: float, row: int, column: int) -> Box:
    """The box around (row, column) that leaves `share` of the image, cut off at its borders (CutMix)."""
    side = math.sqrt(1 - share)
    box_height, box_width = int(height * side), int(width * side)
    top, left = max(row - box_height // 2, 0), max(column - box_width // 2, 0)
    bottom, right = min(row + (box_height + 1) // 2, height), min(column + (box_width + 1) // 2, width)
    return top, bottom, left, right


def kept_share(height: int, width: int, box: Box) -> float:
    """The share of the image outside the box, which counts where the border cut the box off."""
    top, bottom, left, right = box
    return 1 - (bottom - top) * (right - left) / (height * width)
