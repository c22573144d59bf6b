from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fdscale.data.dense.outlines import run_lengths
from fdscale.downstream.overlays import beside, colour, detection_overlay, segmentation_overlay

GREY = torch.full((3, 60, 80), 100, dtype=torch.uint8)


def array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def test_colours_of_any_number_of_classes_differ():
    colours = np.array([colour(label) for label in range(150)])
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=-1) + 999 * np.eye(150, dtype=int)
    assert apart.min() > 10
    assert apart[:20, :20].min() > 60
    assert colour(7) == colour(7)


def test_prediction_and_truth_are_painted_side_by_side_with_a_legend():
    truth = torch.zeros(60, 80, dtype=torch.uint8)
    truth[:, 40:] = 2
    truth[:8] = 255
    prediction = torch.full((60, 80), 1)
    names = ["wall", "floor", "a very long name of a class that takes its place"]
    picture = segmentation_overlay(GREY, prediction, truth, names)
    pixels = array(picture)
    scale = 7  # 80 pixels become 560
    gap = picture.width - 2 * 80 * scale
    top = next(row for row in range(99) if not (pixels[row, : 80 * scale] >= 250).any())
    for (row, column), label in {(30, 20): 0, (30, 60): 2, (30, 80 + 40): 1}.items():
        place = row * scale + top, column * scale + (gap if column >= 80 else 0)
        assert np.abs(pixels[place] - (100 + np.array(colour(label))) / 2).max() <= 1
    assert picture.height > top + 60 * scale + 20
    legend = pixels[top + 60 * scale :].reshape(-1, 3).tolist()
    for label in (0, 1, 2):
        assert list(colour(label)) in legend
    assert list(colour(3)) not in legend
    alone = segmentation_overlay(GREY, prediction, None, names)
    assert alone.width == 80 * scale
    assert alone.mode == "RGB"


def test_the_legend_takes_as_many_lines_as_it_needs():
    labels = (torch.arange(60 * 80) % 150).view(60, 80)
    few = segmentation_overlay(GREY, labels * 0, None, ["wall"] * 150)
    many = segmentation_overlay(GREY, labels, None, [f"class number {label}" for label in range(150)])
    assert many.width == few.width
    assert many.height > few.height + 300


@pytest.mark.parametrize("encoded", [False, True])
def test_objects_are_painted_where_they_are(encoded):
    masks = torch.zeros(2, 60, 80, dtype=torch.uint8)
    masks[0, 20:50, 10:40] = 1
    masks[1, 30:58, 30:70] = 1
    boxes = torch.tensor([[10.0, 20, 40, 50], [30, 30, 70, 58]])
    given = [run_lengths(mask.numpy() > 0) for mask in masks] if encoded else masks
    picture = detection_overlay(GREY, boxes, torch.tensor([3, 1]), torch.tensor([0.9, 0.4]), given, list("abcd"))
    pixels = array(picture)
    assert picture.size == (560, 420)
    tint = (100 + np.array(colour(3))) / 2
    assert np.abs(pixels[35 * 7, 15 * 7] - tint).max() <= 1
    assert (pixels[5 * 7, 75 * 7] == 100).all()
    low = 0.5 * 100 + 0.5 * np.array(colour(1))
    both = pixels[45 * 7, 35 * 7]
    assert np.abs(both - (low + np.array(colour(3))) / 2).max() <= 2  # the better one on top
    assert (pixels[20 * 7, 25 * 7] == colour(3)).all()  # the box's edge


def test_texts_stay_within_the_image():
    boxes = torch.tensor([[-5.0, -5, 20, 20], [70, 0, 80, 30], [75, 55, 80, 60], [0, 59, 5, 60]])
    names = ["a name that is long"] * 4
    with_text = detection_overlay(GREY, boxes, torch.arange(4), None, None, names)
    assert with_text.size == (560, 420)
    pixels = array(with_text)
    for label, (rows, columns) in enumerate([((0, 60), (0, 160)), ((0, 60), (400, 560)), ((330, 420), (400, 560))]):
        inside = pixels[rows[0] : rows[1], columns[0] : columns[1]].reshape(-1, 3)
        assert (inside == colour(label)).all(axis=1).sum() > 800  # the label's background, whole


def test_no_objects_and_large_images_are_drawn_as_they_are():
    large = torch.full((3, 700, 1500), 9, dtype=torch.uint8)
    none = torch.zeros(0, 4)
    picture = detection_overlay(large, none, torch.zeros(0).long(), torch.zeros(0), torch.zeros(0, 700, 1500), [])
    assert picture.size == (1500, 700)
    assert (array(picture) == 9).all()
    assert beside({"a": picture, "b": picture}).width > 3000
