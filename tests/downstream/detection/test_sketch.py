"""The detector on shapes alone, for the planner: as much memory as a step with many objects takes."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from fdscale.data.dense.batches import Objects
from fdscale.downstream.detection.detector import Detector
from fdscale.planning.activations import trace_step
from fdscale.planning.trace import Trace
from fdscale.students.student import build_student, set_activation_checkpointing
from fdscale.training.allocator import live_bytes, memory_profile
from fdscale.training.optim import parameter_groups
from tests.downstream.detection.small import GEOMETRIES, design, objects_of

B, SIDE, MANY = 2, 128, 30


def built(kind: str, cascade: bool, device: str) -> Detector:
    student = build_student(GEOMETRIES[kind], seed=1, device=device)
    set_activation_checkpointing(student, "blocks")
    with torch.device(device):
        # With ViTDet's heads, but in the one case that has detectron2's older ones.
        new = {"box_convolutions": 2, "norms": True} if cascade or kind == "swin" else {}
        return Detector(student, design(cascade=cascade, channels=32, box_width=64, **new))


def inputs(number: int) -> tuple[Any, ...]:
    objects = Objects(
        torch.zeros(number, 4), torch.zeros(number, dtype=torch.long), torch.zeros(number, SIDE, SIDE).byte()
    )
    return torch.zeros(B, 3, SIDE, SIDE), [objects] * B


def traced(kind: str, cascade: bool, cuda: bool = False, number: int = MANY) -> Trace:
    detector = built(kind, cascade, "meta")
    detector.forward = detector.sketch  # type: ignore[method-assign]
    groups = [group["params"] for group in parameter_groups(detector, 0.1, ())]
    return trace_step(detector, groups, lambda: inputs(number), torch.float32, None, cuda, True)


def measured(kind: str, cascade: bool) -> int:
    """The most bytes beside the weights in a real step, gradients let go of as soon as they are there."""
    detector = built(kind, cascade, "cpu")
    for weight in detector.parameters():
        weight.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    pixels, objects = torch.rand(B, 3, SIDE, SIDE), objects_of((MANY,) * B, SIDE)
    gc.collect()
    with memory_profile() as profiler:
        detector(pixels, objects)["loss"].backward()
    return max(live for _, live in live_bytes(profiler))


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("cascade", [False, True], ids=["one_stage", "cascade"])
def test_a_sketch_takes_what_a_real_step_takes(kind: str, cascade: bool) -> None:
    expected = measured(kind, cascade)  # first, see above
    assert traced(kind, cascade).peak == pytest.approx(expected, rel=0.1)


def test_a_sketch_calls_what_a_real_step_calls() -> None:
    calls: list[list[str]] = []
    for sketched in (False, True):
        detector = built("swin", True, "cpu")
        calls.append([])
        for name, part in detector.named_modules():
            if next(part.parameters(recurse=False), None) is not None:
                part.register_forward_hook(lambda *_, n=name, own=calls[-1]: own.append(n))
        (detector.sketch if sketched else detector)(torch.rand(B, 3, SIDE, SIDE), objects_of((4, 4), SIDE))
    assert calls[0] == calls[1]


def test_cuda_and_many_objects_are_traced_too() -> None:
    few, many = traced("swin", False), traced("swin", False, cuda=True, number=1000)
    assert many.forward_flops == pytest.approx(few.forward_flops, rel=0.01)
    assert many.peak > few.peak + 4 * 1000 * SIDE**2  # overlaps of all objects with all anchors
