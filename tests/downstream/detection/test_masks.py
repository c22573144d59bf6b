"""Masks: what boxes see of them, and how they come back to an image."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.data.dense.batches import Objects
from fdscale.downstream.detection.masks import MaskHead, mask_targets, pasted, run_lengths
from fdscale.downstream.detection.matching import match, with_area
from tests.downstream.detection.small import CLASSES, design, ellipses, objects_of


def whole_image(probability: Tensor, box: list[float], size: tuple[int, int]) -> Tensor:
    """A pasted mask with the rest of its image, bool of `size`."""
    left, strip = pasted(probability, box, size)
    whole = torch.zeros(size[::-1], dtype=torch.bool)
    whole[left : left + len(strip)] = strip
    return whole.T


def encoded(mask: np.ndarray) -> dict[str, Any]:
    found = coco_mask.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}


def test_a_mask_seen_in_its_box_and_pasted_back_is_itself() -> None:
    """A disc of 80 pixels in 28 x 28 cells: its edge alone may move."""
    boxes = torch.tensor([[10.3, 20.6, 90.2, 100.4], [60.0, 2.0, 118.0, 62.0]])
    objects = Objects(boxes, torch.tensor([0, 1]), ellipses(boxes, 128))
    targets = mask_targets(match(boxes, objects, 0.5, CLASSES), objects)
    for target, box, whole in zip(targets, boxes.tolist(), objects.masks.bool(), strict=True):
        found = whole_image(target, box, (128, 128))
        both, either = (found & whole).sum(), (found | whole).sum()
        assert both / either > 0.97


def test_pasting_is_bilinear_between_cell_centres() -> None:
    mask = torch.rand(28, 28, generator=torch.Generator().manual_seed(1))
    box, size = [-3.0, 4.5, 31.0, 20.25], (24, 30)
    found = whole_image(mask, box, size)
    padded = np.pad(mask.numpy().astype(np.float64), 1)
    expected = np.zeros(size, bool)
    for row in range(size[0]):
        for column in range(size[1]):
            y = (row + 0.5 - box[1]) / (box[3] - box[1]) * 28 + 0.5
            x = (column + 0.5 - box[0]) / (box[2] - box[0]) * 28 + 0.5
            if not (0 <= y < 29 and 0 <= x < 29):
                continue
            top, left = int(y), int(x)
            part = padded[top : top + 2, left : left + 2]
            value = np.array([1 - (y - top), y - top]) @ part @ np.array([1 - (x - left), x - left])
            expected[row, column] = value >= 0.5
    assert 50 < expected.sum() < 400
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("box", [[-20.0, -20, -2, -2], [40.0, 3, 60, 9]])
def test_a_box_outside_leaves_an_empty_mask(box: list[float]) -> None:
    assert not whole_image(torch.ones(28, 28), box, (20, 30)).any()
    (told,) = run_lengths(torch.ones(1, 28, 28), torch.tensor([box]), (20, 30))
    assert told == encoded(np.zeros((20, 30), np.uint8))


def test_run_lengths_hold_each_mask() -> None:
    boxes = torch.tensor([[2.0, 3, 12, 18], [0.0, 0, 30, 20]])
    told = run_lengths(torch.ones(2, 28, 28), boxes, (20, 30))
    for each, box in zip(told, boxes.int().tolist(), strict=True):
        decoded = coco_mask.decode(each)
        assert decoded.shape == (20, 30)
        assert decoded.sum() == (box[2] - box[0]) * (box[3] - box[1])
        assert decoded[box[1] : box[3], box[0] : box[2]].all()
    assert run_lengths(torch.ones(0, 28, 28), torch.zeros(0, 4), (20, 30)) == []


def test_run_lengths_are_those_of_the_encoded_image() -> None:
    """Boxes within, over each edge, around the image, and of one pixel; masks of noise, of nothing, of all."""
    draw = torch.Generator().manual_seed(4)
    size = (37, 53)
    corners = torch.rand(60, 2, generator=draw) * torch.tensor([70.0, 50]) - 15
    sides = torch.rand(60, 2, generator=draw) ** 2 * torch.tensor([60.0, 50])
    boxes = torch.cat((corners, corners + sides + 1), dim=1)
    boxes = torch.cat((boxes, torch.tensor([[-9.0, -9, 70, 60], [0, 0, 53, 37], [5, -9, 9, 60], [50, 3, 60, 9]])))
    noise = torch.rand(len(boxes), 28, 28, generator=draw)
    for masks in (noise, torch.zeros_like(noise), torch.ones_like(noise)):
        told = run_lengths(masks, boxes, size)
        for each, mask, box in zip(told, masks, boxes.tolist(), strict=True):
            assert each == encoded(old_pasted(mask, box, size).numpy().astype(np.uint8)), box


def old_pasted(probability: Tensor, box: list[float], size: tuple[int, int]) -> Tensor:
    """The same on an image as a whole, row by row."""
    mask = torch.zeros(size, dtype=torch.bool)
    left, right = max(math.floor(box[0]) - 1, 0), min(math.ceil(box[2]) + 1, size[1])
    top, bottom = max(math.floor(box[1]) - 1, 0), min(math.ceil(box[3]) + 1, size[0])
    if left >= right or top >= bottom:
        return mask
    columns = (torch.arange(left, right) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    rows = (torch.arange(top, bottom) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    inside = F.grid_sample(probability[None, None], grid[None], align_corners=False)[0, 0]
    mask[top:bottom, left:right] = inside >= 0.5
    return mask


def test_small_boxes_of_large_images_do_not_make_the_images() -> None:
    """100 masks of 12 million pixels: as images they took 11 s."""
    boxes = torch.tensor([[2000.0, 1000, 2040, 1050]]).repeat(100, 1)
    before = time.process_time()
    run_lengths(torch.ones(100, 28, 28), boxes, (3000, 4000))
    assert time.process_time() - before < 2


def test_many_objects_teach_what_each_alone_does() -> None:
    """More than are read at once, each box with an object of its own or of another one."""
    (objects,) = objects_of((21,))
    matched = match(objects.boxes.repeat(2, 1), objects, 0.5, CLASSES)
    matched = replace(matched, objects=torch.cat((torch.arange(21), torch.arange(21).flip(0))))
    found = mask_targets(matched, objects)
    for row, number in enumerate(matched.objects.tolist()):
        alone = Objects(objects.boxes[number : number + 1], objects.labels[:1], objects.masks[number : number + 1])
        own = replace(matched.at(torch.tensor([row])), objects=torch.tensor([0]))
        assert torch.equal(found[row], mask_targets(own, alone)[0])


def test_objects_that_all_have_an_area_are_not_copied() -> None:
    (objects,) = objects_of((5,))
    assert with_area(objects) is objects


def test_each_box_learns_the_mask_of_its_own_class_alone() -> None:
    torch.manual_seed(1)
    head = MaskHead(design(), (4, 8))
    objects = objects_of((2, 0), 64)
    labels = objects[0].labels.tolist()
    positive = [match(own.boxes, own, 0.5, CLASSES) for own in objects]
    maps = [torch.randn(2, 8, 64 // stride, 64 // stride) for stride in (4, 8)]
    loss = head.loss(maps, positive, objects)
    logits = head.of_boxes(maps, [own.boxes for own in positive]).detach().numpy().astype(np.float64)
    wanted = mask_targets(positive[0], objects[0]).numpy()
    chosen = logits[np.arange(2), labels]
    expected = np.mean(np.log1p(np.exp(chosen)) - wanted * chosen)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert 0.2 < wanted.mean() < 0.9


def test_objects_without_masks_are_refused() -> None:
    objects = objects_of((1,), masks=False)[0]
    with pytest.raises(UserError, match="boxes alone"):
        mask_targets(match(objects.boxes, objects, 0.5, CLASSES), objects)
