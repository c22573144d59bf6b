from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fdscale.data.dense.crops import Cropping, _coloured, _scaled, crop_scene, distorted
from fdscale.data.draws import Purpose, generator

CODES = np.array([(40 * label + 30, 20 * (label - 3) ** 2, 200) for label in range(6)], np.uint8)  # a parabola
PLAIN = Cropping(size=40, short_side=48, long_side=192, distort=False, fill=(1, 2, 3))


def blocks(width: int, height: int, seed: int) -> tuple[Image.Image, np.ndarray]:
    """Blocks of 12 pixels, some unlabelled; the colour of a pixel says its label, and no mixture of others does."""
    draw = np.random.default_rng(seed)
    small = draw.integers(0, 6, (-(-height // 12), -(-width // 12)), dtype=np.uint8)
    labels = small.repeat(12, 0).repeat(12, 1)[:height, :width]
    image = Image.fromarray(CODES[labels])
    return image, np.where(labels == 5, np.uint8(255), labels)


@settings(max_examples=60)
@given(st.integers(20, 90), st.integers(20, 90), st.integers(0, 2**64 - 1), st.integers(0, 500), st.integers(0, 99))
def test_image_and_labels_keep_together_and_no_label_is_invented(width, height, key, view, seed):
    image, labels = blocks(width, height, seed)
    pixels, seen = crop_scene(image, labels, key, view, seed, PLAIN)
    assert pixels.shape == (3, 40, 40)
    assert seen.shape == (40, 40)
    assert pixels.dtype == seen.dtype == np.uint8
    assert set(np.unique(seen)) <= {*np.unique(labels), 255}
    outside = (pixels == np.array(PLAIN.fill)[:, None, None]).all(axis=0)
    assert (seen[outside] == 255).all()
    away = np.abs(CODES[:, :, None, None].astype(int) - pixels).max(axis=1)
    said, sure = away.argmin(axis=0), (away.min(axis=0) <= 1) & ~outside
    assert sure.sum() > 0.3 * (~outside).sum()  # the rest lies on edges
    assert np.array_equal(seen[sure], np.where(said == 5, 255, said)[sure])
    again = crop_scene(image, labels, key, view, seed, PLAIN)
    assert np.array_equal(pixels, again[0])
    assert np.array_equal(seen, again[1])


def test_seed_key_and_view_each_change_the_crop():
    image, labels = blocks(80, 70, 0)
    crops = [crop_scene(image, labels, *numbers, PLAIN)[0] for numbers in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))]
    assert len({crop.tobytes() for crop in crops}) == 4


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        ((683, 512), 1.0, (683, 512)),
        ((512, 683), 0.5, (256, 342)),
        ((300, 200), 2.0, (1536, 1024)),
        ((4096, 512), 1.0, (2048, 256)),
        ((256, 1), 1.0, (2048, 8)),
    ],
)
def test_scenes_are_scaled_as_mmcv_rescales(size, ratio, expected):
    assert _scaled(size, Cropping(512, 512, 2048), ratio) == expected


def good(seen: np.ndarray) -> bool:
    counts = np.bincount(seen[seen != 255], minlength=2)
    return bool(counts.min() > 0.25 * counts.sum())


@pytest.mark.parametrize(("rest", "start", "end"), [(0, 350, 400), (255, 190, 200)])
def test_crops_of_one_class_are_drawn_again(rest, start, end):
    """Class 1 from column `start` on, and 0 before it, all the rest of class 0 or unlabelled, which counts nothing."""
    labels = np.full((60, 400), rest, np.uint8)
    labels[:, start:end], labels[:, start - 10 : start] = 1, 0
    image = Image.new("RGB", (400, 60))
    once = np.mean([good(labels[:40, left : left + 40]) for left in range(361)])
    for share, tries in ((0.75, 10), (0.0, 1)):  # with 0.0 nothing is good enough, and the tenth is as any
        cropping = Cropping(40, 60, 800, (1.0, 1.0), most_of_one_class=share, distort=False)
        found = np.mean([good(crop_scene(image, labels, key, 0, 0, cropping)[1]) for key in range(800)])
        assert found == pytest.approx(1 - (1 - once) ** tries, abs=0.04)


def test_a_scene_of_one_class_or_of_none_has_a_crop():
    for value in (3, 255):
        labels = np.full((50, 50), value, np.uint8)
        _, seen = crop_scene(Image.new("RGB", (50, 50)), labels, 1, 0, 0, PLAIN)
        assert value in seen


def test_half_of_the_crops_are_flipped():
    image, labels = blocks(40, 40, 1)
    whole = Cropping(40, 40, 40, (1.0, 1.0), distort=False)
    same = sum(np.array_equal(crop_scene(image, labels, key, 0, 0, whole)[1], labels) for key in range(300))
    assert 120 < same < 180


def test_colours_change_within_the_limits_and_padding_does_not():
    image, labels = blocks(30, 20, 4)
    bent = Cropping(40, 20, 30, (1.0, 1.0), flip=0.0, fill=(1, 2, 3))
    changed, seen = crop_scene(image, labels, 7, 0, 0, bent)
    assert (changed[:, 20:] == np.array([1, 2, 3])[:, None, None]).all()
    assert np.array_equal(seen[:20, :30], labels)
    grey = np.full((2, 2, 3), 100, np.uint8)
    values = [distorted(grey, generator(0, key, 0, Purpose.COLOURS)) for key in range(400)]
    assert all(np.ptp(value) == 0 for value in values)  # no colour, whatever the hue and the saturation
    levels = np.array([value[0, 0, 0] for value in values])
    assert levels.min() >= int((100 - 32) * 0.5) - 1
    assert levels.max() <= (100 + 32) * 1.5
    assert 0.18 < np.mean(levels == 100) < 0.32  # neither brightness nor contrast: a quarter


def test_hue_turns_and_saturation_scales():
    red = np.full((1, 1, 3), (200, 100, 100), np.uint8)
    assert np.abs(_coloured(red, 1.0, 30.0)[0, 0] - np.array([200, 150, 100])).max() <= 2
    assert np.abs(_coloured(red, 1.0, -30.0)[0, 0] - np.array([200, 100, 150])).max() <= 2
    assert np.abs(_coloured(red, 0.5, 0.0)[0, 0] - np.array([200, 150, 150])).max() <= 2
    assert np.abs(_coloured(red, 1.5, 0.0)[0, 0] - np.array([200, 50, 50])).max() <= 2
    seen = {distorted(red, generator(1, key, 0, Purpose.COLOURS)).tobytes() for key in range(100)}
    assert len(seen) > 80
