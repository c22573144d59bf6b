"""Windows, views and their averages are those of a slow, independent computation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fdscale.downstream.segmentation.sliding import Windows, averaged_scores, forwards_of, scores_of, view_size

FILL = (0.5, 0.25, 0.125)


class Asked:
    """Scores (B, 4, h, w) that depend on a pixel, its place in the window and the whole window; the batches asked."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        self.batches.append(pixels)
        rows = torch.linspace(0, 1, pixels.shape[-2])[:, None].expand(pixels.shape[-2:])
        mean = pixels.mean(dim=(1, 2, 3), keepdim=True).expand_as(pixels[:, :1])
        return torch.cat((pixels[:, :2] * 3, rows[None, None] + 0 * mean, mean), dim=1)


def slowly(pixels: Tensor, crop: int, stride: int) -> Tensor:
    """mmseg's windows, one pixel at a time: each is the mean of what the windows that cover it say."""
    height, width = pixels.shape[-2:]
    canvas = torch.tensor(FILL)[:, None, None].repeat(1, max(height, crop), max(width, crop))
    canvas[:, :height, :width] = pixels
    said: dict[tuple[int, int], list[Tensor]] = {}
    for row in range(max(height - crop + stride - 1, 0) // stride + 1):
        for column in range(max(width - crop + stride - 1, 0) // stride + 1):
            bottom, right = (min(n * stride + crop, max(s, crop)) for n, s in ((row, height), (column, width)))
            window = canvas[:, bottom - crop : bottom, right - crop : right]
            scores = Asked()(window[None])[0]
            for y in range(crop):
                for x in range(crop):
                    said.setdefault((bottom - crop + y, right - crop + x), []).append(scores[:, y, x])
    found = torch.empty(4, height, width)
    for y in range(height):
        for x in range(width):
            found[:, y, x] = torch.stack(said[y, x]).mean(dim=0)
    return found


@settings(max_examples=40)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 8), st.data())
def test_windows_cover_every_pixel_and_are_averaged(height: int, width: int, crop: int, data: st.DataObject) -> None:
    stride, batch = data.draw(st.integers(1, crop)), data.draw(st.integers(1, 5))
    pixels = torch.rand(3, height, width, generator=torch.Generator().manual_seed(height * 100 + width))
    windows, segment = Windows(crop, stride, batch, FILL), Asked()
    found = scores_of(segment, pixels, windows)
    torch.testing.assert_close(found, slowly(pixels, crop, stride))
    assert len(segment.batches) == forwards_of((height, width), windows)
    assert all(len(given) <= batch and given.shape[-2:] == (crop, crop) for given in segment.batches)


def test_the_published_windows_of_an_ade20k_image() -> None:
    corners = Windows(640, 426, 1, FILL).corners((640, 960))
    assert corners == [(0, 0), (0, 320)]


@settings(max_examples=30)
@given(st.integers(2, 12), st.integers(2, 12), st.lists(st.integers(2, 14), min_size=1, max_size=3), st.booleans())
def test_views_are_averaged_at_the_wanted_size(height: int, width: int, sides: list[int], flip: bool) -> None:
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(height * 100 + width))
    sizes = [(side, side + 1) for side in sides]
    for windows in (None, Windows(5, 3, 2, FILL)):
        said = []
        for size in sizes:
            pixels = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
            views = [scores_of(Asked(), pixels, windows)]
            if flip:
                views.append(scores_of(Asked(), pixels.flip(-1), windows).flip(-1))
            said += [F.interpolate(view[None], (7, 9), mode="bilinear", align_corners=False)[0] for view in views]
        found = averaged_scores(Asked(), image, sizes, flip, (7, 9), windows)
        torch.testing.assert_close(found, torch.stack(said).mean(dim=0))


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([0.5, 0.75, 1.0, 1.25, 1.75]))
def test_views_keep_the_ratio_and_both_limits(height: int, width: int, scale: float) -> None:
    short, long = 512, 2048
    seen = view_size((height, width), short, long, scale)
    assert min(seen) <= int(short * scale)
    assert max(seen) <= int(long * scale)
    assert min(seen) == int(short * scale) or max(seen) == int(long * scale)
    factor = min(int(short * scale) / min(height, width), int(long * scale) / max(height, width))
    assert all(abs(new - old * factor) <= 0.5 or new == 1 for new, old in zip(seen, (height, width), strict=True))


@pytest.mark.parametrize(
    ("size", "expected"), [((512, 683), (512, 683)), ((600, 400), (768, 512)), ((100, 800), (256, 2048))]
)
def test_sizes_are_mmcvs(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert view_size(size, 512, 2048, 1.0) == expected
