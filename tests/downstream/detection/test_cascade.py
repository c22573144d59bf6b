"""The box heads beside the same computed in NumPy, in float64 and without torchvision: detectron2's, written anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fdscale.data.dense.batches import Objects
from fdscale.downstream.detection.cascade import BoxHeads
from fdscale.downstream.detection.matching import Matched, box_losses
from fdscale.downstream.detection.pooling import pooled
from tests.downstream.detection.small import CLASSES, design, objects_of

Array = NDArray[np.float64]
STRIDES, SIDE = (4, 8, 16, 32), 160
OVERLAPS = (0.5, 0.6, 0.7)  # detectron2's, of three stages
WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))


def heads_of(cascade: bool, **changes: Any) -> BoxHeads:
    """With weights large enough to tell classes apart and to move boxes by a fifth of their sides."""
    torch.manual_seed(1)
    heads = BoxHeads(design(cascade=cascade, box_width=12, **changes), STRIDES)
    with torch.no_grad():
        for stage in heads.stages:
            stage.classes.weight.normal_(std=1.0)
            stage.offsets.weight.normal_(std=1.0)
    return heads


def maps_of(rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(rows, 8, SIDE // stride, SIDE // stride, generator=generator) for stride in STRIDES]


def proposals_of(objects: Sequence[Objects], each: int = 60) -> list[torch.Tensor]:
    """Near the objects, anywhere, and some without a width, as refined boxes may be that leave the image."""
    generator = torch.Generator().manual_seed(6)
    found = []
    for own in objects:
        low = torch.rand(each, 2, generator=generator) * SIDE * 0.9
        anywhere = torch.cat((low, low + 1 + torch.rand(each, 2, generator=generator) ** 2 * SIDE), 1).clamp(0, SIDE)
        near = own.boxes.repeat(10, 1)
        near = near + torch.randn(near.shape, generator=generator) * 4
        thin = anywhere[:20, [0, 1, 0, 3]]
        found.append(torch.cat((anywhere, near, thin)).clamp(0, SIDE))
    return found


# --- the same in NumPy


def bilinear(level: Array, y: float, x: float) -> Array:
    """One point of a map (C, h, w), as RoIAlign reads it: zeros beyond a cell outside."""
    height, width = level.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return np.zeros(level.shape[0])
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    below, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = level[:, top, left] * (1 - dx) + level[:, top, right] * dx
    lower = level[:, below, left] * (1 - dx) + level[:, below, right] * dx
    return upper * (1 - dy) + lower * dy


def roi(maps: Sequence[Array], box: Array, bins: int = 7) -> Array:
    side = math.sqrt(max((box[2] - box[0]) * (box[3] - box[1]), 0.0))
    index = min(max(math.floor(4 + math.log2(side / 224 + 1e-8)), 2), 5) - 2
    left, top, right, bottom = (edge / STRIDES[index] - 0.5 for edge in box)
    width, height = (right - left) / bins, (bottom - top) / bins
    across, down = math.ceil(width), math.ceil(height)
    found = np.zeros((maps[0].shape[0], bins, bins))
    for row, column in product(range(bins), range(bins)):
        for y, x in product(range(down), range(across)):
            at = top + (row + (y + 0.5) / down) * height, left + (column + (x + 0.5) / across) * width
            found[:, row, column] += bilinear(maps[index], *at)
    return found / max(across * down, 1)


def values(tensor: torch.Tensor) -> Array:
    return tensor.detach().numpy().astype(np.float64)


def head(stage: Any, features: Array) -> tuple[Array, Array]:
    for layer in (stage.hidden.fc6, stage.hidden.fc7):
        features = np.maximum(features.reshape(len(features), -1) @ values(layer.weight).T + values(layer.bias), 0)
    logits, offsets = (
        features @ values(layer.weight).T + values(layer.bias) for layer in (stage.classes, stage.offsets)
    )
    return logits, offsets


def overlap(one: Array, other: Array) -> float:
    width = max(min(one[2], other[2]) - max(one[0], other[0]), 0)
    height = max(min(one[3], other[3]) - max(one[1], other[1]), 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def matched(box: Array, objects: Objects, least: float) -> tuple[int, Array | None]:
    best, label, target = least, CLASSES, None
    for own, number in zip(values(objects.boxes), objects.labels.tolist(), strict=True):
        found = overlap(box, own)
        if found >= best and (target is None or found > best):
            best, label, target = found, number, own
    return label, target


def centred(box: Array) -> Array:
    return np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]])


def encoded(box: Array, target: Array, weights: Sequence[float]) -> Array:
    (x, y, w, h), (tx, ty, tw, th) = centred(box), centred(target)
    return np.array([(tx - x) / w, (ty - y) / h, math.log(tw / w), math.log(th / h)]) * weights


def moved(box: Array, offset: Array, weights: Sequence[float]) -> Array:
    (x, y, w, h), (dx, dy, dw, dh) = centred(box), offset / weights
    limit = math.log(1000 / 16)
    x, y, w, h = x + dx * w, y + dy * h, w * math.exp(min(dw, limit)), h * math.exp(min(dh, limit))
    return np.clip([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 0, SIDE)


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def numpy_losses(
    heads: BoxHeads, maps: list[torch.Tensor], boxes: list[list[Array]], objects: Sequence[Objects]
) -> tuple[list[tuple[float, float]], int, int]:
    """The losses of each stage, how many boxes had an object in the later stages, and how many vanished."""
    by_image = [[values(level)[image] for level in maps] for image in range(len(objects))]
    losses, positives, gone = [], 0, 0
    for number, stage in enumerate(heads.stages):
        whole = np.concatenate([[roi(by_image[image], box) for box in own] for image, own in enumerate(boxes)])
        logits, offsets = head(stage, whole)
        cross, distance, row = 0.0, 0.0, 0
        refined: list[list[Array]] = [[] for _ in boxes]
        for image, own in enumerate(boxes):
            for box in own:
                label, target = matched(box, objects[image], OVERLAPS[number])
                cross -= math.log(softmax(logits[row : row + 1])[0, label])
                offset = offsets[row] if len(heads.stages) > 1 else offsets[row].reshape(-1, 4)[min(label, CLASSES - 1)]
                if target is not None:
                    positives += number > 0
                    distance += float(np.abs(offset - encoded(box, target, WEIGHTS[number])).sum())
                to = moved(box, offset, WEIGHTS[number])
                if to[2] > to[0] and to[3] > to[1]:
                    refined[image].append(to)
                else:
                    gone += 1
                row += 1
        losses.append((cross / row, distance / row))
        boxes = refined
    return losses, positives, gone


def numpy_scores(heads: BoxHeads, maps: list[torch.Tensor], proposals: Array) -> tuple[Array, Array]:
    own = [values(level)[0] for level in maps]
    scores, boxes = [], list(proposals)
    for number, stage in enumerate(heads.stages):
        logits, offsets = head(stage, np.stack([roi(own, box) for box in boxes]))
        scores.append(softmax(logits)[:, :-1])
        if len(heads.stages) == 1:
            by_class = offsets.reshape(len(boxes), -1, 4)
            told = [[moved(box, each, WEIGHTS[0]) for each in row] for box, row in zip(boxes, by_class, strict=True)]
            return np.array(told), scores[0]
        boxes = [moved(box, offset, WEIGHTS[number]) for box, offset in zip(boxes, offsets, strict=True)]
    return np.array(boxes)[:, None], np.mean(scores, axis=0)


# --- and side by side


def test_convolutions_come_first_each_with_a_norm_over_its_channels() -> None:
    """As ViTDet's: 3x3 without bias, LayerNorm of each place, ReLU; then one linear layer."""
    stage = heads_of(True, box_convolutions=4, norms=True).stages[1]
    with torch.no_grad():
        for weight in stage.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    features = torch.randn(3, 8, 7, 7, generator=torch.Generator().manual_seed(3))
    weights = [values(weight) for weight in stage.hidden.parameters()]
    assert [weight.shape for weight in weights] == [(8, 8, 3, 3), (8,), (8,)] * 4 + [(12, 8 * 49), (12,)]
    x = values(features)
    for kernel, scale, shift in zip(weights[:12:3], weights[1:12:3], weights[2:12:3], strict=True):
        around = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        parts = [(kernel[:, :, r, c], around[:, :, r : r + 7, c : c + 7]) for r, c in product(range(3), range(3))]
        x = sum(np.einsum("oc,nchw->nohw", *part) for part in parts)
        x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-6)
        x = np.maximum(x * scale[:, None, None] + shift[:, None, None], 0)
    x = np.maximum(x.reshape(3, -1) @ weights[12].T + weights[13], 0)
    np.testing.assert_allclose(values(stage.hidden(features)), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cascade", [False, True], ids=["one_stage", "cascade"])
def test_losses_are_those_computed_by_hand(cascade: bool) -> None:
    heads, maps, objects = heads_of(cascade), maps_of(3), objects_of((4, 0, 2), SIDE)
    torch.manual_seed(2)
    chosen = heads.chosen(proposals_of(objects), objects)
    found = [float(part.detach()) for part in heads.losses(maps, chosen, objects, (SIDE, SIDE))]
    boxes = [list(values(own.boxes)) for own in chosen]
    expected, positives, gone = numpy_losses(heads, maps, boxes, objects)
    assert found == pytest.approx([sum(part) for part in zip(*expected, strict=True)], rel=1e-5)
    assert all(box > 0.1 for _, box in expected), expected  # every stage has boxes with objects
    assert not cascade or (positives > 3 and gone > 3), (positives, gone)


@pytest.mark.parametrize("cascade", [False, True], ids=["one_stage", "cascade"])
def test_boxes_and_scores_are_those_computed_by_hand(cascade: bool) -> None:
    heads, maps = heads_of(cascade), maps_of(1)
    proposals = proposals_of(objects_of((3,), SIDE))[0]
    with torch.no_grad():
        boxes, scores = heads.scored(maps, proposals, (SIDE, SIDE))
    expected, likely = numpy_scores(heads, maps, values(proposals))
    np.testing.assert_allclose(values(scores), likely, rtol=0, atol=1e-5)
    np.testing.assert_allclose(values(boxes), expected, rtol=1e-5, atol=1e-3)  # pixels, of 160
    assert (np.abs(expected[:, 0] - values(proposals)).max(axis=1) > 1).mean() > 0.5


def test_what_is_drawn_is_matched_and_mostly_background() -> None:
    heads, objects = heads_of(True), objects_of((4, 0, 2), SIDE)
    proposals = proposals_of(objects)
    chosen = heads.chosen(proposals, objects)
    assert [len(own.boxes) for own in chosen] == [32, 32, 32]
    for own, each, given in zip(chosen, objects, proposals, strict=True):
        among = {tuple(box) for box in torch.cat((given, each.boxes)).tolist()}
        for box, label, target in zip(values(own.boxes), own.labels.tolist(), values(own.targets), strict=True):
            expected, object_box = matched(box, each, 0.5)
            assert tuple(box.astype(np.float32).tolist()) in among
            assert label == expected
            assert object_box is None or np.array_equal(target, object_box)
        positive = int((own.labels < CLASSES).sum())
        assert positive == (8 if len(each.boxes) else 0)  # a quarter


def test_the_maps_get_a_third_of_each_stages_gradient_the_heads_all_of_it() -> None:
    heads, objects = heads_of(True), objects_of((3, 1), SIDE)
    maps = [level.requires_grad_() for level in maps_of(2)]
    torch.manual_seed(2)
    chosen = heads.chosen(proposals_of(objects), objects)
    weights = list(heads.parameters())
    found = torch.autograd.grad(sum(heads.losses(maps, chosen, objects, (SIDE, SIDE))), [*maps, *weights])
    parts = []
    for number, stage in enumerate(heads.stages):
        logits, offsets = stage(pooled(maps, STRIDES, [own.boxes for own in chosen], 7))
        parts += box_losses(logits, offsets, chosen, heads.coders[number])
        if number < 2:
            chosen = _next(heads, number, chosen, offsets.detach(), objects)
    whole: Any = sum(parts)
    expected = torch.autograd.grad(whole, [*maps, *weights])
    for mine, theirs in zip(found[: len(maps)], expected[: len(maps)], strict=True):
        torch.testing.assert_close(mine, theirs / 3, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(found[len(maps) :], expected[len(maps) :], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def _next(
    heads: BoxHeads, number: int, chosen: list[Matched], offsets: torch.Tensor, objects: Sequence[Objects]
) -> list[Matched]:
    moved_boxes, row = [], 0
    for own in chosen:
        to = [moved(values(box), values(offsets[row + at]), WEIGHTS[number]) for at, box in enumerate(own.boxes)]
        kept = [box for box in to if box[2] > box[0] and box[3] > box[1]]
        moved_boxes.append(torch.tensor(np.array(kept), dtype=torch.float32))
        row += len(own.boxes)
    return [heads._match(boxes, own, number + 1) for boxes, own in zip(moved_boxes, objects, strict=True)]


@pytest.mark.parametrize("cascade", [False, True], ids=["one_stage", "cascade"])
def test_no_boxes_at_all_lose_nothing_and_still_reach_every_weight(cascade: bool) -> None:
    new = {"box_convolutions": 2, "norms": True} if cascade else {}
    heads, objects = heads_of(cascade, **new), objects_of((0, 0), SIDE)
    maps = [level.requires_grad_() for level in maps_of(2)]
    none = [torch.zeros(0, 4), torch.zeros(0, 4)]
    chosen = heads.chosen(none, objects)
    total: Any = sum(heads.losses(maps, chosen, objects, (SIDE, SIDE)))
    total.backward()
    assert float(total.detach()) == 0
    assert all(weight.grad is not None and not weight.grad.any() for weight in [*maps, *heads.parameters()])
    boxes, scores = heads.scored(maps_of(1), none[0], (SIDE, SIDE))
    assert boxes.shape == (0, 1 if cascade else CLASSES, 4)
    assert scores.shape == (0, CLASSES)
