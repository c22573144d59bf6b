"""The whole detector: losses of any objects, what it learns, and what it tells of an image in several views."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor
from torchvision.ops import box_iou

from fdscale.data.dense.batches import Objects
from fdscale.downstream.detection.detector import Detector
from fdscale.downstream.detection.views import View, views_of
from fdscale.students.student import set_activation_checkpointing
from tests.downstream.detection.small import CLASSES, SIDE, detector_of, ellipses, flat, objects_of, pixels_of

PARTS = {"loss_objectness", "loss_rpn_box", "loss_class", "loss_box", "loss_mask"}
KINDS = pytest.mark.parametrize("kind", ["vit", "swin"])
CASCADE = pytest.mark.parametrize("cascade", [False, True], ids=["one_stage", "cascade"])


@KINDS
@CASCADE
@pytest.mark.parametrize("numbers", [(3, 0), (0, 0)], ids=["objects", "none"])
def test_every_loss_is_there_and_every_weight_reached(kind: str, cascade: bool, numbers: tuple[int, ...]) -> None:
    detector = detector_of(kind, cascade=cascade, rpn_samples=2048)  # all anchors: those of the last levels are few
    losses = detector(pixels_of(2), objects_of(numbers))
    losses["loss"].backward()
    told = flat(losses)
    assert told.keys() == PARTS | {"loss"}
    assert told["loss"] == pytest.approx(sum(told[name] for name in PARTS), rel=1e-5)
    assert all(np.isfinite(value) for value in told.values())
    assert (told["loss_mask"] > 0) == (told["loss_box"] > 0) == any(numbers)
    missing = [name for name, weight in detector.named_parameters() if weight.grad is None]
    assert missing == []
    still = [name for name, weight in detector.named_parameters() if not weight.grad.any()]
    assert not any(numbers) or still == []


def test_boxes_without_area_teach_nothing() -> None:
    """One would match every anchor that it does not overlap, which is all of them."""
    detector = detector_of("swin")
    (own,) = objects_of((2,))
    flat_box = torch.tensor([[5.0, 5, 5, 9]])
    more = Objects(torch.cat((own.boxes, flat_box)), torch.tensor([0, 1, 2]), torch.cat((own.masks, own.masks[:1])))
    less = Objects(own.boxes, torch.tensor([0, 1]), own.masks)
    found = []
    for objects in (more, less):
        torch.manual_seed(1)
        found.append(flat(detector(pixels_of(1), [objects])))
    assert found[0] == found[1]


def test_without_a_mask_head_masks_are_not_asked_for() -> None:
    detector = detector_of("swin", masks=False)
    losses = detector(pixels_of(2), objects_of((2, 1), masks=False))
    assert losses.keys() == {"loss", *PARTS} - {"loss_mask"}
    assert detector.eval()(views_of(torch.zeros(3, 40, 50, dtype=torch.uint8), 40, 50)).masks is None


@KINDS
@CASCADE
def test_torchs_autocast_to_bf16_changes_little(kind: str, cascade: bool) -> None:
    detector = detector_of(kind, mode="blocks", cascade=cascade)
    exact, rounded = _losses(detector, False), _losses(detector, True)
    assert rounded["loss_rpn_box"] == pytest.approx(exact["loss_rpn_box"], rel=0.02)
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.1)
    assert all(weight.grad.isfinite().all() for weight in detector.parameters())
    detector.eval()
    with torch.autocast("cpu", torch.bfloat16):
        told = detector(views_of(torch.zeros(3, 40, 50, dtype=torch.uint8), 40, 50))
    assert told.boxes.dtype == told.scores.dtype == torch.float32


def _losses(detector: Detector, autocast: bool) -> dict[str, float]:
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = detector(pixels_of(2), objects_of((3, 1)))
    losses["loss"].backward()
    assert all(part.dtype == torch.float32 for part in losses.values())
    return flat(losses)


@KINDS
@CASCADE
def test_weights_that_an_engine_has_cast_change_little(kind: str, cascade: bool) -> None:
    """As `bf16.enabled` does: parameters alone, no buffers."""
    detector = detector_of(kind, cascade=cascade)
    exact = _losses(detector, False)
    for weight in detector.parameters():
        weight.grad, weight.data = None, weight.data.bfloat16()
    rounded = _losses(detector, False)
    assert {name: pytest.approx(value, rel=0.02, abs=1e-3) for name, value in exact.items()} == rounded


@KINDS
def test_anchors_are_where_they_are_in_fp32_and_on_any_size(kind: str) -> None:
    """600 is no multiple of 64; in bf16 anchors there would be off by pixels."""
    detector, seen = detector_of(kind).eval(), []
    detector.rpn.anchor_generator.register_forward_hook(lambda *told: seen.append(told[2]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        maps = detector._maps(torch.rand(1, 3, 600, 70), None)
        detector.rpn.eval()
        list(detector._candidates(maps, View(torch.rand(1, 3, 600, 70), (600, 70), (600, 70), False)))
    assert torch.equal(maps[-1], F.max_pool2d(maps[-2], 1, 2))
    anchors, start = seen[0][0], 0
    for level, stride in zip(maps, (*detector.backbone.strides, 2 * detector.backbone.strides[-1]), strict=True):
        height, width = level.shape[-2:]
        own = anchors[start : (start := start + 3 * height * width)].view(height, width, 3, 4)
        centres = (own[..., :2] + own[..., 2:]) / 2
        assert torch.equal(
            centres[..., 0], (torch.arange(width) * stride * 1.0)[None, :, None].expand(height, width, 3)
        )
        assert torch.equal(
            centres[..., 1], (torch.arange(height) * stride * 1.0)[:, None, None].expand(height, width, 3)
        )
        sides = (own[..., 2:] - own[..., :2]).prod(dim=-1).sqrt()
        assert ((sides / (4 * stride) - 1).abs() < 0.1).all()
    assert start == len(anchors)
    assert anchors.dtype == torch.float32


def test_recomputed_blocks_change_nothing() -> None:
    plain, recomputed = detector_of("swin"), detector_of("swin")
    set_activation_checkpointing(recomputed.backbone.student, "blocks")
    assert _losses(plain, False) == _losses(recomputed, False)
    for (name, one), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


# --- a scene that can be learnt


def scene(seed: int) -> tuple[Tensor, Objects]:
    """Two ellipses on grey, a light and a dark one."""
    draw = torch.Generator().manual_seed(seed)
    low = torch.tensor([[4.0, 6], [34, 30]]) + torch.rand(2, 2, generator=draw) * 5
    boxes = torch.cat((low, low + 18 + torch.rand(2, 2, generator=draw) * 5), dim=1)
    labels = torch.randperm(2, generator=draw)
    masks = ellipses(boxes, SIDE)
    image = torch.full((3, SIDE, SIDE), 0.5)
    for mask, label in zip(masks.bool(), labels.tolist(), strict=True):
        image[:, mask] = torch.tensor([[1.0], [0.1], [0.1]]) if label else torch.tensor([[0.0], [0.2], [1.0]])
    return image, Objects(boxes, labels, masks)


@pytest.fixture(scope="module", params=[False, True], ids=["one_stage", "cascade"])
def taught(request: pytest.FixtureRequest) -> Detector:
    detector = detector_of("swin", cascade=request.param, channels=16, box_width=32, classes=CLASSES)
    optimizer = torch.optim.AdamW(detector.parameters(), 6e-3)
    torch.manual_seed(1)
    for step in range(60):
        images, objects = zip(*(scene(2 * step + row) for row in range(2)), strict=True)
        optimizer.param_groups[0]["lr"] = 6e-3 * min(1.0, (60 - step) / 30)
        detector(torch.stack(images), objects)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
    return detector.eval()


@pytest.mark.parametrize("kind", ["plain", "views", "soft"])
def test_what_was_taught_is_found_in_any_view(taught: Detector, kind: str) -> None:
    """Two images side by side: another shape than in training, and not the shape of its mirror image."""
    (left, one), (right, other) = scene(1000), scene(1001)
    image = (torch.cat((left, right), dim=2) * 255).to(torch.uint8)[:, :60]
    shift = torch.tensor([SIDE, 0, SIDE, 0])
    truth = torch.cat((one.boxes, other.boxes + shift))
    labels = torch.cat((one.labels, other.labels))
    empty = torch.zeros_like(one.masks)
    masks = torch.cat((torch.cat((one.masks, empty), 2), torch.cat((empty, other.masks), 2)))[:, :60].bool()
    views = {
        "plain": views_of(image, 60, 128),
        "views": views_of(image, 60, 128, (1.0, 1.25), flip=True)[1:],
        "soft": views_of(image, 60, 128),
    }[kind]
    if kind == "soft":
        taught.design = replace(taught.design, suppression="gaussian")
    told = taught(views)
    taught.design = replace(taught.design, suppression="hard")
    assert (told.scores[:-1] >= told.scores[1:]).all()
    assert (told.boxes >= 0).all()
    assert (told.boxes[:, 2] <= 128 + 1e-3).all()
    assert (told.boxes[:, 3] <= 60 + 1e-3).all()
    best = _best_of_each(truth, labels, told)
    assert (told.scores[best] > 0.5).all()
    for box, mask, row in zip(truth, masks, best.tolist(), strict=True):
        assert (told.boxes[row] - box).abs().max() < 5
        found = torch.from_numpy(coco_mask.decode(told.masks[row])).bool()
        assert found.shape == (60, 128)
        assert (found & mask).sum() / (found | mask).sum() > 0.7


def _best_of_each(truth: Tensor, labels: Tensor, told: Any) -> Tensor:
    """For each object the first detection of its class that is near it."""
    alike = (box_iou(truth, told.boxes) > 0.5) & (labels[:, None] == told.labels[None])
    assert alike.any(dim=1).all()
    return alike.int().argmax(dim=1)


@CASCADE
def test_a_mirrored_view_shows_what_the_mirrored_image_does(cascade: bool) -> None:
    """All that is found comes back mirrored, masks that are anything but symmetric, too."""
    detector = detector_of("swin", cascade=cascade, score_threshold=0.2).eval()
    with torch.no_grad():
        detector.masks.predictor.mask_fcn_logits.weight.mul_(50)  # type: ignore[union-attr]
    image = (pixels_of(1)[0, :, :50] * 255).to(torch.uint8)
    width = image.shape[2]
    seen = detector(views_of(image, 50, width, flip=True)[1:])
    there = detector(views_of(image.flip(-1), 50, width))
    assert len(seen.boxes) > 5
    back = torch.stack([width - there.boxes[:, 2], there.boxes[:, 1], width - there.boxes[:, 0], there.boxes[:, 3]], 1)
    torch.testing.assert_close(seen.boxes, back, rtol=0, atol=1e-3)
    for one, other in zip(seen.masks, there.masks, strict=True):
        masks = [coco_mask.decode(each) for each in (one, other)]
        assert (masks[0] != masks[1][:, ::-1]).mean() < 2e-3
    assert np.mean([(coco_mask.decode(one) != coco_mask.decode(one)[:, ::-1]).mean() for one in seen.masks]) > 0.01


@CASCADE
def test_nothing_found_is_told_in_the_same_calls(cascade: bool) -> None:
    calls: list[list[str]] = []
    for threshold in (0.0, 1.0):
        detector = detector_of("swin", cascade=cascade, score_threshold=threshold).eval()
        calls.append([])
        for name, part in detector.named_modules():
            part.register_forward_hook(lambda *_, n=name, own=calls[-1]: own.append(n))
        views = views_of((pixels_of(1)[0] * 255).to(torch.uint8), SIDE, SIDE, (0.5, 1.0), flip=True)
        told = detector(views)
        assert len(told.boxes) == len(told.scores) == len(told.labels) == len(told.masks) == 20 * (threshold < 1)
    assert calls[0] == calls[1]
