"""Detectors and objects small enough for a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fdscale.data.dense.batches import Objects
from fdscale.downstream.detection.design import Design
from fdscale.downstream.detection.detector import Detector
from fdscale.students.geometry import SwinV2Geometry, ViTGeometry
from fdscale.students.student import Student, build_student, set_activation_checkpointing

VIT = ViTGeometry(16, 2, 2, patch_size=16, image_size=64)
SWIN = SwinV2Geometry(8, (1, 1, 2), (1, 2, 4), window_size=4, image_size=64, extra_norm_period=2)
GEOMETRIES = {"vit": VIT, "swin": SWIN}
CLASSES, SIDE = 3, 64
LEAN = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}


def student_of(kind: str, drop_path: float = 0.0, mode: str = "none") -> Student:
    """Away from its start, where SwinV2's blocks are almost the identity."""
    student = build_student(GEOMETRIES[kind], drop_path, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    set_activation_checkpointing(student, mode)
    return student


def design(**changes: Any) -> Design:
    numbers: dict[str, Any] = {
        "classes": CLASSES,
        "channels": 8,
        "box_width": 16,
        "anchor_scale": 4.0,
        "box_samples": 32,
        "rpn_samples": 64,
        "proposals_training": (40, 40),
        "proposals_evaluation": (40, 40),
        "score_threshold": 0.05,
        "detections": 20,
    }
    return Design(**{**numbers, **changes})


def detector_of(kind: str, mode: str = "none", drop_path: float = 0.0, **changes: Any) -> Detector:
    torch.manual_seed(3)
    return Detector(student_of(kind, drop_path, mode), design(**changes))


def pixels_of(rows: int, side: int = SIDE, seed: int = 5) -> Tensor:
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


def objects_of(numbers: Sequence[int], side: int = SIDE, seed: int = 7, masks: bool = True) -> list[Objects]:
    """So many objects in each image: boxes, and as masks the ellipses in them."""
    generator = torch.Generator().manual_seed(seed)
    return [_objects(number, side, generator, masks) for number in numbers]


def _objects(number: int, side: int, generator: torch.Generator, masks: bool) -> Objects:
    low = torch.rand(number, 2, generator=generator) * side * 0.5
    high = low + side * (0.15 + 0.35 * torch.rand(number, 2, generator=generator))
    boxes = torch.cat((low, high), dim=1)
    labels = torch.randint(CLASSES, (number,), generator=generator)
    return Objects(boxes, labels, ellipses(boxes, side) if masks else None)


def ellipses(boxes: Tensor, side: int) -> Tensor:
    centres = torch.arange(side) + 0.5
    (left, top, right, bottom) = (edge[:, None, None] for edge in boxes.unbind(dim=1))
    x, y = centres[None, None, :], centres[None, :, None]
    across = (2 * x - left - right) / (right - left)
    down = (2 * y - top - bottom) / (bottom - top)
    return (across.square() + down.square() <= 1).to(torch.uint8)


def flat(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in losses.items()}
