from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize
from torchvision.transforms.functional import hflip, resized_crop

from fdscale.data.augment import Augmentation, augment, centre_box, centre_crop, crop_box
from fdscale.data.draws import Draws, Purpose
from fdscale.data.images import open_image

PAPER = Augmentation(crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), interpolation="bilinear", flip=0.5)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def seen(*numbers: object) -> np.ndarray:
    """A view as it comes in a batch: (3, size, size)."""
    return np.asarray(augment(*numbers)).transpose(2, 0, 1)


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**64 - 1), st.integers(0, 500), st.integers(0, 99))
def test_a_view_is_a_pure_function_of_seed_key_and_view(width, height, key, view, seed):
    image = noise(width, height)
    first = seen(image, key, view, seed, 8, PAPER)
    assert first.shape == (3, 8, 8)
    assert first.dtype == np.uint8
    assert np.array_equal(first, seen(image, key, view, seed, 8, PAPER))


def test_seed_key_and_view_each_change_the_view():
    image = noise(40, 30)
    views = [seen(image, *numbers, 16, PAPER) for numbers in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))]
    assert len({view.tobytes() for view in views}) == 4


def encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def torchvisions(image: Image.Image, key: int, size: int) -> np.ndarray:
    """What torchvision makes of the whole RGB image with the crop and the flip that are drawn for this key."""
    draw = Draws(3, key, 0, Purpose.VIEW)
    flip = draw.random() < PAPER.flip
    left, top, right, bottom = crop_box(*image.size, PAPER.crop_scale, PAPER.crop_ratio, draw)
    view = resized_crop(image.convert("RGB"), top, left, bottom - top, right - left, [size, size])
    return np.asarray(hflip(view) if flip else view).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "jpeg"), ("L", "jpeg"), ("CMYK", "jpeg"), ("P", "png"), ("RGBA", "webp"), ("1", "png")]
)
def test_a_view_of_an_image_not_yet_decoded_is_torchvisions_of_the_whole(mode, kind):
    data = encoded(noise(61, 47).convert(mode), kind)
    for key in range(8):
        whole = torchvisions(Image.open(io.BytesIO(data)), key, 40)
        assert np.array_equal(seen(open_image(io.BytesIO(data)), key, 0, 3, 40, PAPER), whole)


@pytest.mark.parametrize(("size", "times"), [(20, 8), (40, 4), (80, 2), (150, 1)])
def test_a_jpeg_is_decoded_as_small_as_its_crop_permits(size, times):
    smooth = noise(12, 9).resize((331, 257), Image.Resampling.BICUBIC)
    whole = Augmentation((1.0, 1.0), (1.2, 1.3), "bicubic", flip=0.5)
    data = encoded(smooth, "jpeg", quality=95)
    for key in range(4):
        opened = open_image(io.BytesIO(data))
        reduced = seen(opened, key, 0, 0, size, whole).astype(float)
        assert opened.size == (math.ceil(331 / times), math.ceil(257 / times))
        full = seen(Image.open(io.BytesIO(data)).convert("RGB"), key, 0, 0, size, whole)
        assert 10 * math.log10(255**2 / max(((reduced - full) ** 2).mean(), 1e-9)) > 37
        assert np.array_equal(reduced, full) == (times == 1)


def test_a_reduced_crop_shows_the_place_that_was_drawn():
    ramp = np.add.outer(np.arange(200) * 0.4, np.arange(400) * 0.4).astype(np.uint8)
    data = encoded(Image.fromarray(np.stack([ramp] * 3, axis=2)), "jpeg", quality=100)
    for key in range(20):
        view = seen(open_image(io.BytesIO(data)), key, 0, 3, 12, PAPER).astype(float)
        expected = torchvisions(Image.open(io.BytesIO(data)), key, 12)
        assert np.abs(view - expected).mean() < 0.8  # a pixel of the reduced image is 0.8 to 3.2 levels


def test_the_recorded_crop_is_still_drawn():
    box = crop_box(500, 375, (0.08, 1.0), (3 / 4, 4 / 3), Draws(7, 12345, 6, Purpose.VIEW))
    assert box == (269, 169, 438, 300)


def test_crop_is_the_whole_image_when_nothing_is_left_to_draw():
    image = noise(24, 24)
    pixels = np.asarray(image).transpose(2, 0, 1)
    plain = Augmentation((1.0, 1.0), (1.0, 1.0), "bicubic", flip=0.0)
    mirrored = Augmentation((1.0, 1.0), (1.0, 1.0), "bicubic", flip=1.0)
    assert np.array_equal(seen(image, 5, 0, 0, 24, plain), pixels)
    assert np.array_equal(seen(image, 5, 0, 0, 24, mirrored), pixels[:, :, ::-1])


def test_half_of_the_views_are_flipped():
    image = noise(8, 8)
    whole = Augmentation((1.0, 1.0), (1.0, 1.0), "bilinear", flip=0.5)
    plain = np.asarray(image).transpose(2, 0, 1)
    same = sum(np.array_equal(seen(image, key, 0, 0, 8, whole), plain) for key in range(400))
    assert 160 < same < 240


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (64, 64), (150, 60)])
def testcrop_boxes_are_distributed_as_torchvisions(size):
    width, height = size
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(4000)])
    boxes = [crop_box(width, height, scale, ratio, Draws(0, key, 0, Purpose.VIEW)) for key in range(4000)]
    ours = np.array([(top, left, bottom - top, right - left) for left, top, right, bottom in boxes])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
    spread = theirs.std(axis=0)
    assert np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) == pytest.approx(0, abs=0.1 * spread.max())
    assert ours.std(axis=0) == pytest.approx(spread, rel=0.06)


@settings(max_examples=100)
@given(st.integers(1, 300), st.integers(1, 300))
def test_the_fallback_is_torchvisionscentre_box(width, height):
    scale, ratio = [1e9, 1e9], [3 / 4, 4 / 3]  # no try can fit
    top, left, crop_height, crop_width = RandomResizedCrop.get_params(torch.empty(3, height, width), scale, ratio)
    if crop_width and crop_height:
        assert centre_box(width, height, (3 / 4, 4 / 3)) == (left, top, left + crop_width, top + crop_height)
    assert crop_box(width, height, (1e9, 1e9), (3 / 4, 4 / 3), Draws(0, 0, 0, Purpose.VIEW)) == centre_box(
        width, height, (3 / 4, 4 / 3)
    )


@pytest.mark.parametrize("size", [(100, 60), (61, 97), (110, 64), (32, 32), (7, 9)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_centre_crop_is_torchvisions_resize_and_centre_crop(size, interpolation):
    image = noise(*size)
    resampling = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    expected = CenterCrop(28)(Resize(32, interpolation=resampling.value)(image))
    assert np.array_equal(centre_crop(image, 28, interpolation), np.asarray(expected).transpose(2, 0, 1))
