"""A segmenter divided over ranks is the one of a single process: losses, gradients, and what a run would save."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fdscale.downstream.segmentation.segmenter import Segmenter, build_segmenter
from fdscale.students.geometry import SwinV2Geometry, ViTGeometry
from fdscale.students.student import build_student, set_activation_checkpointing
from fdscale.training.engine import Connection, start_engine
from fdscale.training.optim import adamw, parameter_groups
from fdscale.training.partition import divide
from tests.downstream.test_backbone import LEAN, perturb, pixels

VIT = ViTGeometry(16, 2, 2, patch_size=16, image_size=64)
GEOMETRIES: dict[str, ViTGeometry | SwinV2Geometry] = {
    "vit": VIT,
    "vit_per_block": dataclasses.replace(VIT, position_bias="per_block"),
    "swin_v2": SwinV2Geometry(8, (1, 2, 1, 1), (1, 2, 4, 8), window_size=4, image_size=64, extra_norm_period=2),
}
SMALL = {"classes": 5, "queries": 7, "decoder_layers": 3, "encoder_layers": 1, "points": 64, "pyramid_channels": 8}


def trained(
    connection: Connection, head: Any, kind: str, lean: bool, bits: int = 32
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of two steps, and the gradients of the first; blocks recomputed; rank 1 has not one labelled pixel.

    Lean: the student is divided before it becomes a backbone, and nothing stays resident.
    """
    from deepspeed.utils import safe_get_full_grad

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": LEAN if lean else {"stage": 0},
        "torch_autocast": {"enabled": bits == 16, "dtype": "bfloat16"},
    }
    segmenter = segmenter_of(
        head, kind, partial(divide, deepspeed_json=config, connection=connection) if lean else None
    )
    optimizer = adamw(parameter_groups(segmenter, 0.05, ()), 1e-3, (0.9, 0.99), 1e-8)
    engine, rank = start_engine(segmenter, optimizer, config, 1, 1.0), connection.rank.rank
    losses: list[float] = []
    found: dict[str, Tensor] = {}
    for step, (height, width) in enumerate(((50, 70), (64, 32))):
        labels = torch.randint(5, (2, height + 9 * rank, width), generator=torch.Generator().manual_seed(rank))
        labels[0, :20] = 255
        labels = torch.full_like(labels, 255) if rank == 1 and step == 0 else labels
        draws = torch.rand(segmenter.backbone.student.drop_path_sites, 2, generator=torch.Generator().manual_seed(rank))
        torch.manual_seed(100 * step + rank)
        loss = engine(pixels(2, height + 9 * rank, width, seed=rank), labels.to(torch.uint8), draws)["loss"]
        engine.backward(loss)
        found = found or {name: safe_get_full_grad(p).clone() for name, p in segmenter.named_parameters()}
        engine.step()
        losses.append(float(loss.detach()))
    engine.destroy()
    return losses, found


def segmenter_of(head: Any, kind: str, divided: Any = None, drop_path: float = 0.3) -> Segmenter:
    """A small segmenter whose weights, student's and head's, are not at their start."""
    student = build_student(GEOMETRIES[kind], drop_path, seed=1)
    set_activation_checkpointing(student, "blocks")
    perturb(student)
    if divided is not None:
        divided(student)
    torch.manual_seed(3)
    segmenter = build_segmenter(student, head, channels=32, **SMALL)
    perturb(segmenter.model)
    return segmenter


@pytest.mark.parametrize(
    ("head", "kind"),
    [("upernet", "vit_per_block"), ("upernet", "swin_v2"), ("mask2former", "vit"), ("mask2former", "swin_v2")],
)
def test_divided_weights_learn_the_same(head: str, kind: str, two_ranks: Any) -> None:
    whole, divided = (two_ranks(trained, head, kind, lean) for lean in (False, True))
    for (losses, found), (expected, theirs) in zip(divided, whole, strict=True):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert found.keys() == theirs.keys()
        assert max(float(gradient.abs().max()) for gradient in theirs.values()) > 1e-3
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("head", ["upernet", "mask2former"])
def test_divided_weights_learn_in_sixteen_bits(head: str, two_ranks: Any) -> None:
    whole, divided = (two_ranks(trained, head, "vit", True, bits) for bits in (32, 16))
    for (losses, found), (expected, theirs) in zip(divided, whole, strict=True):
        assert losses == pytest.approx(expected, rel=0.05, abs=0.01)
        assert losses != expected
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert found.keys() == theirs.keys()
