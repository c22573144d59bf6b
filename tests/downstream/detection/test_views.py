"""Views of an image: sizes, flips, and boxes that come back to where they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdscale.downstream.detection.views import views_of

SIDES = st.integers(8, 90)


def image_of(height: int, width: int) -> torch.Tensor:
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@settings(max_examples=40)
@given(SIDES, SIDES, st.integers(8, 80), st.integers(8, 120), st.sampled_from([1, 32]))
def test_sides_are_bounded_and_boxes_come_back(h: int, w: int, short: int, long: int, divisible: int) -> None:
    views = views_of(image_of(h, w), short, long, (1.0, 0.5), flip=True, divisible=divisible)
    assert [view.flipped for view in views] == [False, True, False, True]
    boxes = torch.tensor([[0.0, 0, w, h], [1, 2, w / 2, h / 3]])
    for view, scale in zip(views, (1.0, 1.0, 0.5, 0.5), strict=True):
        low, high = sorted(view.size)
        assert low <= short * scale + 0.5
        assert high <= long * scale + 0.5
        assert low == 1 or abs(low - short * scale) <= 0.5 or abs(high - long * scale) <= 0.5
        assert view.image_size == (h, w)
        assert all(side % divisible == 0 for side in view.pixels.shape[-2:])
        seen = view.of_image(boxes)
        torch.testing.assert_close(seen[0], torch.tensor([0.0, 0, view.size[1], view.size[0]]))
        torch.testing.assert_close(view.to_image(seen), boxes, rtol=1e-5, atol=1e-3)
        assert (seen[:, 2:] > seen[:, :2]).all()


def test_pixels_are_the_images() -> None:
    image = image_of(40, 60)
    plain, mirrored = views_of(image, 40, 60, flip=True)
    assert plain.pixels.shape == (1, 3, 64, 64)
    assert torch.equal(plain.pixels[0, :, :40, :60], image.float() / 255)
    assert torch.equal(mirrored.pixels[0, :, :40, :60], image.flip(-1).float() / 255)
    for view in (plain, mirrored):
        padding = [view.pixels[..., 40:, :], view.pixels[..., 60:]]
        for channel, value in enumerate((124, 116, 104)):
            assert all((part[0, channel] == torch.tensor(value) / 255).all() for part in padding)
    box = torch.tensor([[10.0, 5, 20, 15]])
    assert mirrored.of_image(box).tolist() == [[40, 5, 50, 15]]


@pytest.mark.parametrize(("short", "long", "size"), [(20, 90, (20, 30)), (40, 45, (30, 45)), (80, 120, (80, 120))])
def test_a_view_is_as_large_as_it_may_be(short: int, long: int, size: tuple[int, int]) -> None:
    (view,) = views_of(image_of(40, 60), short, long)
    assert view.size == size


def test_views_are_made_where_the_image_is() -> None:
    for size in ((40, 50), (64, 64)):
        (view,) = views_of(torch.zeros(3, *size, dtype=torch.uint8, device="meta"), 64, 64)
        assert view.pixels.is_meta


def test_a_square_is_as_large_as_the_long_side() -> None:
    image = torch.zeros(3, 30, 60, dtype=torch.uint8)
    (view,) = views_of(image, 64, 64, square=True, fill=(255.0, 255.0, 255.0))
    assert (view.pixels.shape[-2:], view.size) == ((64, 64), (32, 64))
    assert float(view.pixels[..., :32, :].max()) == 0.0
    assert float(view.pixels[..., 32:, :].min()) == 1.0
