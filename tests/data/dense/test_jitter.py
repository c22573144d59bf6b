from __future__ import annotations

import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fdscale.data.dense.jitter import Jitter, _drawn, boxes_of, jitter_scene
from fdscale.data.draws import Purpose, generator

CODES = np.array([(30 * number, 15 * (number - 4) ** 2, 200) for number in range(8)], np.uint8)  # a parabola
PLAIN = Jitter(size=48, fill=(1, 2, 3))


def rectangles(width: int, height: int, count: int, seed: int) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """An image whose colour says which rectangle is on top (as no mixture does), their masks, and their boxes."""
    draw = np.random.default_rng(seed)
    owner = np.zeros((height, width), np.uint8)
    for number in range(1, count + 1):
        x, y = draw.integers(0, width - 5), draw.integers(0, height - 5)
        owner[y : y + draw.integers(5, 40), x : x + draw.integers(5, 40)] = number
    masks = np.stack([owner == number for number in range(1, count + 1)]).astype(np.uint8)
    masks = masks[masks.any(axis=(1, 2))]
    return Image.fromarray(CODES[owner]), masks, boxes_of(masks)


def number_of(masks: np.ndarray, image: Image.Image) -> np.ndarray:
    """Which rectangle each mask is: it is kept as label."""
    owner = np.asarray(image)[..., 0] // 30
    return np.array([owner[mask > 0][0] for mask in masks], np.int64)


@settings(max_examples=60)
@given(st.integers(12, 90), st.integers(12, 90), st.integers(1, 7), st.integers(0, 2**64 - 1), st.integers(0, 99))
def test_image_masks_and_boxes_keep_together(width, height, count, key, seed):
    image, masks, boxes = rectangles(width, height, count, seed)
    labels = number_of(masks, image)
    seen = jitter_scene(image, boxes, labels, masks, key, 0, seed, PLAIN)
    assert seen.image.shape == (3, 48, 48)
    assert seen.masks.shape == (len(seen.labels), 48, 48)
    assert seen.boxes.shape == (len(seen.labels), 4)
    assert set(seen.labels) <= set(labels)
    assert len(set(seen.labels)) == len(seen.labels)
    outside = (seen.image == np.array(PLAIN.fill)[:, None, None]).all(axis=0)
    away = np.abs(CODES[:, :, None, None].astype(int) - seen.image).max(axis=1)
    said, sure = away.argmin(axis=0), (away.min(axis=0) <= 1) & ~outside
    for label, mask, box in zip(seen.labels, seen.masks, seen.boxes, strict=True):
        assert set(np.unique(mask)) <= {0, 1}
        assert not mask[outside].any()
        assert np.array_equal(mask[sure] > 0, said[sure] == label)
        rows, columns = np.nonzero(mask)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    lost = set(labels) - set(seen.labels)
    assert not np.isin(said[sure], list(lost)).any()
    again = jitter_scene(image, boxes, labels, masks, key, 0, seed, PLAIN)
    assert np.array_equal(seen.image, again.image)
    assert np.array_equal(seen.masks, again.masks)


@settings(max_examples=60)
@given(st.integers(12, 90), st.integers(12, 90), st.integers(1, 7), st.integers(0, 2**64 - 1), st.integers(0, 99))
def test_boxes_alone_lie_around_what_the_masks_show(width, height, count, key, seed):
    image, masks, boxes = rectangles(width, height, count, seed)
    labels = number_of(masks, image)
    shown = jitter_scene(image, boxes, labels, masks, key, 0, seed, PLAIN)
    alone = jitter_scene(image, boxes, labels, None, key, 0, seed, PLAIN)
    assert alone.masks is None
    assert np.array_equal(alone.image, shown.image)
    assert (alone.boxes[:, 2:] - alone.boxes[:, :2] >= 1).all()
    assert (alone.boxes >= 0).all()
    assert (alone.boxes <= 48).all()
    for label, box in zip(alone.labels, alone.boxes, strict=True):
        for inner in shown.boxes[shown.labels == label]:
            assert (box[:2] <= inner[:2] + 0.5).all()
            assert (box[2:] >= inner[2:] - 0.5).all()


def test_objects_out_of_sight_and_tiny_ones_are_left_out():
    image = Image.new("RGB", (100, 100))
    boxes = np.array([[0, 0, 100, 100], [0, 0, 4, 100], [99, 99, 100, 100]], np.float32)
    half = Jitter(size=50, scale=(2.0, 2.0), flip=0.0)
    kept = [jitter_scene(image, boxes, np.arange(3), None, key, 0, 0, half).labels.tolist() for key in range(100)]
    assert all(0 in labels for labels in kept)
    assert 0 < sum(1 in labels for labels in kept) < 30
    small = Jitter(size=50, scale=(0.5, 0.5))
    seen = jitter_scene(image, boxes, np.arange(3), None, 1, 0, 0, small)
    assert seen.labels.tolist() == [0, 1]  # the third has a quarter of a pixel
    assert jitter_scene(
        image, boxes[:0], np.arange(0), np.zeros((0, 100, 100), np.uint8), 1, 0, 0, half
    ).boxes.shape == (
        0,
        4,
    )


def test_scale_and_padding():
    image = Image.new("RGB", (80, 40), (200, 200, 200))
    whole = jitter_scene(
        image, np.zeros((0, 4), np.float32), np.arange(0), None, 1, 0, 0, Jitter(40, (0.5, 0.5), fill=(1, 2, 3))
    )
    assert (whole.image[:, :10, :20] == 200).all()
    assert (whole.image[:, 10:] == np.array([1, 2, 3])[:, None, None]).all()
    assert (whole.image[:, :, 20:] == np.array([1, 2, 3])[:, None, None]).all()


def test_masks_are_made_in_their_place_and_never_twice():
    masks = np.zeros((60, 96, 128), np.uint8)
    masks[:, 20:50, 30:70] = 1
    tracemalloc.start()
    seen = jitter_scene(
        Image.new("RGB", (128, 96)), np.zeros((60, 4), np.float32), np.arange(60), masks, 1, 0, 0, Jitter(256, (1, 1))
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen.masks.shape == (60, 256, 256)
    assert seen.masks.flags.c_contiguous
    assert peak < 1.3 * seen.masks.nbytes


def test_scales_offsets_and_flips_are_spread_as_asked():
    """Large-scale jitter of 500 images: sides of 0.1 to 2 squares, evenly, anywhere in it, half of them flipped."""
    size, side = (640, 480), 1000
    windows = [_drawn(size, Jitter(side), generator(0, key, 0, Purpose.JITTER)) for key in range(500)]
    scales = np.array([window.scaled[0] / side for window in windows])
    assert 0.1 <= scales.min() < 0.15
    assert 1.95 < scales.max() <= 2.0
    assert abs(scales.mean() - 1.05) < 0.1  # four deviations of the mean
    assert abs(scales.std() - 1.9 / 12**0.5) < 0.06
    assert all(abs(window.scaled[1] - 0.75 * window.scaled[0]) <= 1 for window in windows)
    assert abs(np.mean([window.flip for window in windows]) - 0.5) < 0.09
    for axis, start in ((0, "left"), (1, "top")):
        room = np.array([max(0, window.scaled[axis] - side) for window in windows])
        places = np.array([getattr(window, start) for window in windows])
        assert (places[room == 0] == 0).all()
        shares = places[room > 50] / room[room > 50]
        assert shares.min() < 0.1
        assert shares.max() > 0.9
        assert abs(shares.mean() - 0.5) < 0.12
    for flip in (0.0, 1.0):
        flips = {_drawn(size, Jitter(side, flip=flip), generator(0, key, 0, Purpose.JITTER)).flip for key in range(50)}
        assert flips == {bool(flip)}
