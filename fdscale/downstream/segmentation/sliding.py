"""Class scores of a whole image: by windows of the size that was trained, or at once; by several views, averaged.

Windows lie as in mmseg's `slide_inference`, the last of a row shifted inwards. Scores are averaged as they come, which
are probabilities for UperNet: over windows, then, at the label's size, over views. (mmseg averages and resizes the
logits of one view and takes the softmax of the result, then averages views.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Segment = Callable[[Tensor], Tensor]  # pixels (B, 3, h, w) -> scores (B, K, h, w)
Size = tuple[int, int]
CLASSES_AT_ONCE = 16  # that are resized: no second map of all classes and pixels is made


@dataclass(frozen=True)
class Windows:
    """Square windows of `crop` pixels, `stride` apart, `batch` in one forward; beyond an image they see `fill`."""

    crop: int
    stride: int
    batch: int
    fill: tuple[float, float, float]

    def corners(self, size: Size) -> list[tuple[int, int]]:
        """The upper left corners of the windows over an image of this size."""
        tops, lefts = (_starts(side, self.crop, self.stride) for side in size)
        return [(top, left) for top in tops for left in lefts]


def forwards_of(size: Size, windows: Windows | None) -> int:
    """How many forwards an image of this size takes."""
    return 1 if windows is None else -(-len(windows.corners(size)) // windows.batch)


def scores_of(segment: Segment, pixels: Tensor, windows: Windows | None) -> Tensor:
    """The scores (K, h, w) of an image's pixels (3, h, w), averaged over its windows; None: of the whole at once.

    Beside them only a batch of windows is held.
    """
    if windows is None:
        return segment(pixels[None])[0]
    height, width = pixels.shape[-2:]
    padded = _padded(pixels, windows)
    corners, total = windows.corners((height, width)), None
    counts = pixels.new_zeros(padded.shape[-2:])
    for start in range(0, len(corners), windows.batch):
        places = [_place(corner, windows.crop) for corner in corners[start : start + windows.batch]]
        found = segment(torch.stack([padded[(..., *place)] for place in places]))
        total = found.new_zeros(found.shape[1], *padded.shape[-2:]) if total is None else total
        for place, scores in zip(places, found, strict=True):
            total[(..., *place)] += scores
            counts[place] += 1
    assert total is not None, "every image has a window"
    return total.div_(counts)[:, :height, :width]


def averaged_scores(
    segment: Segment, image: Tensor, sizes: Iterable[Size], flip: bool, wanted: Size, windows: Windows | None
) -> Tensor:
    """The mean (K, *wanted) of the scores of an image (3, h, w) seen in these sizes, each mirrored, too, if `flip`.

    Resized bilinearly, corners not aligned, images as well as scores (mmseg's; no antialiasing).
    """
    total, views = None, 0
    for size in sizes:
        pixels = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
        for mirrored in (False, True) if flip else (False,):
            scores = scores_of(segment, pixels.flip(-1) if mirrored else pixels, windows)
            total = scores.new_zeros(len(scores), *wanted) if total is None else total
            _add_resized(total, scores.flip(-1) if mirrored else scores)
            views += 1
    assert total is not None, "there is a view"
    return total.div_(views)


def view_size(size: Size, short_side: int, long_side: int, scale: float) -> Size:
    """The size at which an image (h, w) is seen: its short side `short_side`, its long one at most `long_side`.

    Both are multiplied by `scale`; the ratio is kept (mmcv's `rescale_size`).
    """
    factor = min(int(long_side * scale) / max(size), int(short_side * scale) / min(size))
    height, width = (max(int(side * factor + 0.5), 1) for side in size)
    return height, width


def _starts(side: int, crop: int, stride: int) -> Sequence[int]:
    """Where windows begin along one side; the last one ends with the image, unless that is smaller than a window."""
    count = max(side - crop + stride - 1, 0) // stride + 1
    return [max(min(number * stride, side - crop), 0) for number in range(count)]


def _place(corner: tuple[int, int], crop: int) -> tuple[slice, slice]:
    top, left = corner
    return slice(top, top + crop), slice(left, left + crop)


def _padded(pixels: Tensor, windows: Windows) -> Tensor:
    """Pixels (3, h, w) with `fill` below and to the right, at least as large as a window."""
    height, width = pixels.shape[-2:]
    padded = pixels.new_tensor(windows.fill)[:, None, None].repeat(
        1, max(height, windows.crop), max(width, windows.crop)
    )
    padded[:, :height, :width] = pixels
    return padded


def _add_resized(total: Tensor, scores: Tensor) -> None:
    size = (total.shape[-2], total.shape[-1])
    for part, given in zip(total.split(CLASSES_AT_ONCE), scores.split(CLASSES_AT_ONCE), strict=True):
        part += F.interpolate(given[None], size, mode="bilinear", align_corners=False)[0]
