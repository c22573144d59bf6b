"""Random erasing is timm's, drawn for each row of the global batch."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data.random_erasing import RandomErasing

from fdscale.data.draws import Purpose, generator
from fdscale.downstream.erase import Erasing, erased_box

MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def erasing(probability: float, seed: int = 0) -> Erasing:
    return Erasing(probability, MEAN, STD, seed)


class PythonDraws:
    """Python's global generator, asked as NumPy's are: what timm's class draws from."""

    uniform = staticmethod(random.uniform)
    random = staticmethod(random.random)

    def integers(self, end: int) -> int:
        return random.randint(0, end - 1)


@given(st.integers(0, 10**6), st.integers(4, 40), st.integers(4, 40))
def test_the_rectangle_is_timms(seed: int, height: int, width: int) -> None:
    random.seed(seed)
    theirs = RandomErasing(probability=0.5, mode="const", device="cpu")(torch.ones(3, height, width))
    random.seed(seed)
    draws: Any = PythonDraws()
    ours, box = torch.ones(3, height, width), erased_box(height, width, 0.5, draws)
    if box is not None:
        top, left, box_height, box_width = box
        ours[:, top : top + box_height, left : left + box_width] = 0
    assert torch.equal(ours, theirs)


def test_a_quarter_of_the_images_is_erased_between_two_and_33_percent() -> None:
    areas = []
    for row in range(4000):
        box = erased_box(224, 224, 0.25, generator(1, row, 0, Purpose.ERASING))
        if box is not None:
            top, left, height, width = box
            assert 0 <= top <= 224 - height
            assert 0 <= left <= 224 - width
            assert 0.28 < height / width < 3.6
            areas.append(height * width / 224**2)
    assert len(areas) / 4000 == pytest.approx(0.25, abs=0.03)
    assert 0.019 < min(areas) < 0.03
    assert 0.30 < max(areas) < 0.34


def test_the_network_sees_normal_noise_there_and_the_image_elsewhere() -> None:
    pixels = torch.full((64, 3, 48, 48), 2.0)  # no noise has this value
    seen = erasing(1.0)(pixels.clone(), slice(0, 64), step=3)
    erased = seen != 2.0
    normalised = ((seen - MEAN) / STD)[erased]
    assert 0.05 < erased.float().mean() < 0.35
    assert float(normalised.mean()) == pytest.approx(0, abs=0.02)
    assert float(normalised.std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(erased[:, 0], erased[:, 1])  # all channels of a pixel, each drawn for itself
    assert not math.isclose(float(normalised[0]), float(normalised[1]))


def test_rows_steps_and_seeds_differ_and_micro_batches_do_not() -> None:
    pixels = torch.rand(8, 3, 16, 16)
    whole = erasing(1.0)(pixels.clone(), slice(8, 16), step=2)
    parts = [erasing(1.0)(pixels[i : i + 2].clone(), slice(8 + i, 10 + i), step=2) for i in range(0, 8, 2)]
    assert torch.equal(whole, torch.cat(parts))
    same = pixels[:1].expand(8, -1, -1, -1)
    rows = erasing(1.0)(same.clone(), slice(0, 8), step=2)
    assert len({row.numpy().tobytes() for row in rows}) == 8
    assert not torch.equal(rows, erasing(1.0)(same.clone(), slice(0, 8), step=3))
    assert not torch.equal(rows, erasing(1.0, seed=1)(same.clone(), slice(0, 8), step=2))


def test_off_it_changes_nothing() -> None:
    pixels = torch.rand(4, 3, 8, 8)
    assert torch.equal(erasing(0.0)(pixels.clone(), slice(0, 4), step=0), pixels)
