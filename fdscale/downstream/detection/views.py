"""Views of one image for a test: sizes and flips, and boxes taken from the image to a view and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize

Size = tuple[int, int]


@dataclass(frozen=True)
class View:
    """An image of `image_size` (h, w), resized to `size`, mirrored where it is `flipped`.

    `pixels` (1, 3, H, W) in [0, 1]; what is below and right of `size` is padding.
    """

    pixels: Tensor
    size: Size
    image_size: Size
    flipped: bool

    def to(self, device: torch.device) -> View:
        """The same view on a device."""
        return replace(self, pixels=self.pixels.to(device, non_blocking=True))

    def of_image(self, boxes: Tensor) -> Tensor:
        """Boxes (..., 4) in pixels of the image -> in pixels of the view."""
        return self._mirrored(boxes * boxes.new_tensor(self._scale()))

    def to_image(self, boxes: Tensor) -> Tensor:
        """Boxes (..., 4) in pixels of the view -> in pixels of the image."""
        return self._mirrored(boxes) / boxes.new_tensor(self._scale())

    def _scale(self) -> list[float]:
        rows, columns = (seen / whole for seen, whole in zip(self.size, self.image_size, strict=True))
        return [columns, rows, columns, rows]

    def _mirrored(self, boxes: Tensor) -> Tensor:
        if not self.flipped:
            return boxes
        left, top, right, bottom = boxes.unbind(dim=-1)
        return torch.stack((self.size[1] - right, top, self.size[1] - left, bottom), dim=-1)


def views_of(
    image: Tensor,
    short_side: int,
    long_side: int,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    divisible: int = 32,
    fill: tuple[float, float, float] = (124.0, 116.0, 104.0),
    square: bool = False,
) -> list[View]:
    """Views of an image uint8 (3, h, w): for every scale one, and with `flip` its mirror image.

    A view is as large as it can be with sides of at most `short_side` and `long_side` pixels, times the scale;
    bilinear with antialias, as in training. It is padded with `fill` (R, G, B in 0..255) to sides that `divisible`
    divides, or to a `square`, as training's crops are.
    """
    views = []
    whole = (image.shape[-2], image.shape[-1])
    for scale in scales:
        ratio = min(short_side * scale / min(whole), long_side * scale / max(whole))
        size = (max(round(whole[0] * ratio), 1), max(round(whole[1] * ratio), 1))
        seen = image if size == whole else resize(image, list(size), antialias=True)
        canvas = [side + -side % divisible for side in ((max(size),) * 2 if square else size)]
        for flipped in (False, True) if flip else (False,):
            pixels = torch.tensor(fill, device=image.device).view(1, 3, 1, 1).repeat(1, 1, *canvas)
            pixels[..., : size[0], : size[1]] = seen.flip(-1) if flipped else seen
            views.append(View(pixels / 255, size, whole, flipped))
    return views
