from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fdscale.data.dense.window import Window, padded


@st.composite
def windows(draw) -> Window:
    size = draw(st.integers(3, 60)), draw(st.integers(3, 60))
    factor, side = draw(st.floats(0.1, 3.0)), draw(st.integers(4, 70))
    scaled = tuple(max(1, round(length * factor)) for length in size)
    left, top = (draw(st.integers(0, max(0, length - side))) for length in scaled)
    return Window(size, scaled, left, top, side, draw(st.booleans()))


def cut(whole: np.ndarray, window: Window) -> np.ndarray:
    height, width = window.seen
    part = whole[..., window.top : window.top + height, window.left : window.left + width]
    return part[..., ::-1] if window.flip else part


@settings(max_examples=100)
@given(windows(), st.integers(0, 99))
def test_pixels_are_those_of_torchvisions_resized_image(window, seed):
    shape = (window.size[1], window.size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    whole = F.resize(tensor, [window.scaled[1], window.scaled[0]], antialias=True).numpy()
    ours = window.pixels(Image.fromarray(pixels)).transpose(2, 0, 1)
    assert np.abs(ours.astype(int) - cut(whole, window)).max() <= 2  # rounded twice, each in its own way


@settings(max_examples=100)
@given(windows())
def test_values_are_those_of_the_nearest_pixels(window):
    """Torch counts in fp32 and may take the other of two pixels that are equally near."""
    rows, columns = np.mgrid[: window.size[1], : window.size[0]].astype(np.uint8)
    both = np.stack([rows, columns])
    size = [window.scaled[1], window.scaled[0]]
    whole = F.resize(torch.from_numpy(both), size, interpolation=InterpolationMode.NEAREST_EXACT).numpy()
    ours, theirs = window.values(both), cut(whole, window)
    assert ours.shape == (2, *window.seen)
    differ = ours != theirs
    assert np.abs(ours.astype(int) - theirs)[differ].max(initial=0) <= 1
    for axis, (length, scaled) in enumerate(zip(window.size[::-1], window.scaled[::-1], strict=True)):
        exact = (np.arange(scaled) + 0.5) * length / scaled
        tie = np.abs(exact - exact.round()) < 1e-4
        places = np.arange(scaled)[tie]
        start, seen = (window.top, window.left)[axis], window.seen[axis]
        tied = np.isin(np.arange(start, start + seen), places)
        if axis and window.flip:
            tied = tied[::-1]
        assert not differ[axis].any(axis=1 - axis)[~tied].any()


@settings(max_examples=100)
@given(windows(), st.lists(st.floats(0, 60), min_size=4, max_size=4))
def test_boxes_move_with_the_pixels(window, numbers):
    x1, x2 = sorted(min(number, window.size[0]) for number in numbers[:2])
    y1, y2 = sorted(min(number, window.size[1]) for number in numbers[2:])
    box = window.boxes(np.array([[x1, y1, x2, y2]], np.float32))[0]
    height, width = window.seen
    across, down = window.scaled[0] / window.size[0], window.scaled[1] / window.size[1]
    left, right = (np.clip(x * across - window.left, 0, width) for x in (x1, x2))
    if window.flip:
        left, right = width - right, width - left
    expected = left, np.clip(y1 * down - window.top, 0, height), right, np.clip(y2 * down - window.top, 0, height)
    assert np.allclose(box, expected, atol=1e-4)


def test_padding_lies_right_and_below():
    square = padded(np.ones((2, 3, 3), np.uint8), 4, (7, 8, 9))
    assert square.shape == (4, 4, 3)
    assert (square[:2, :3] == 1).all()
    assert (square[2:] == (7, 8, 9)).all()
    assert (square[:, 3:] == (7, 8, 9)).all()
    assert padded(np.ones((4, 4)), 4, 255).tolist() == np.ones((4, 4)).tolist()
    assert padded(np.ones((1, 1, 3), np.uint8), 2, (123.675, 116.28, 0.5)).reshape(4, 3)[-1].tolist() == [124, 116, 0]
