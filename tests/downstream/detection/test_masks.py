"""Masks: what boxes see of them, and how they come back to an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask

from fdscale.config.errors import UserError
from fdscale.data.dense.batches import Objects
from fdscale.downstream.detection.masks import MaskHead, mask_targets, pasted, run_lengths
from fdscale.downstream.detection.matching import match
from tests.downstream.detection.small import CLASSES, ellipses, objects_of


def test_a_mask_seen_in_its_box_and_pasted_back_is_itself() -> None:
    """A disc of 80 pixels in 28 x 28 cells: its edge alone may move."""
    boxes = torch.tensor([[10.3, 20.6, 90.2, 100.4], [60.0, 2.0, 118.0, 62.0]])
    objects = Objects(boxes, torch.tensor([0, 1]), ellipses(boxes, 128))
    targets = mask_targets(match(boxes, objects, 0.5, CLASSES), objects)
    for target, box, whole in zip(targets, boxes.tolist(), objects.masks.bool(), strict=True):
        found = pasted(target, box, (128, 128))
        both, either = (found & whole).sum(), (found | whole).sum()
        assert both / either > 0.97


def test_pasting_is_bilinear_between_cell_centres() -> None:
    mask = torch.rand(28, 28, generator=torch.Generator().manual_seed(1))
    box, size = [-3.0, 4.5, 31.0, 20.25], (24, 30)
    found = pasted(mask, box, size)
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
    assert not pasted(torch.ones(28, 28), box, (20, 30)).any()


def test_run_lengths_hold_each_mask() -> None:
    boxes = torch.tensor([[2.0, 3, 12, 18], [0.0, 0, 30, 20]])
    told = run_lengths(torch.ones(2, 28, 28), boxes, (20, 30))
    for each, box in zip(told, boxes.int().tolist(), strict=True):
        decoded = coco_mask.decode(each)
        assert decoded.shape == (20, 30)
        assert decoded.sum() == (box[2] - box[0]) * (box[3] - box[1])
        assert decoded[box[1] : box[3], box[0] : box[2]].all()
    assert run_lengths(torch.ones(0, 28, 28), torch.zeros(0, 4), (20, 30)) == []


def test_each_box_learns_the_mask_of_its_own_class_alone() -> None:
    torch.manual_seed(1)
    head = MaskHead(8, CLASSES, (4, 8))
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
