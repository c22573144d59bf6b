"""Tiny networks whose attention is neither uniform nor all on one token, and what their blocks are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from fdscale.blocks import blocks_of
from fdscale.diagnostics.subjects import Subject
from fdscale.students.geometry import ViTGeometry
from fdscale.students.student import Student, build_student
from fdscale.students.swin_v2 import SwinV2
from fdscale.teachers.table import teacher_geometry
from fdscale.teachers.teacher import build_teacher

TINY_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
TINY_SWIN: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
CLIP: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}


@torch.no_grad()
def sharpened(network: nn.Module) -> nn.Module:
    """Noise on every parameter: attention that tells tokens apart, and SwinV2's blocks more than the identity."""
    generator = torch.Generator().manual_seed(2)
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network.eval().requires_grad_(False)


def student(backbone: nn.Module, name: str = "student", prefix_tokens: int = 0, image_size: int = 32) -> Subject:
    width = int(getattr(backbone, "num_features", 0))
    network = Student(sharpened(backbone), width, (0, 0), prefix_tokens, image_size).eval()
    return Subject(name, network)


def beit(position_bias: str = "shared") -> Subject:
    network = build_student(ViTGeometry(24, 2, 2, 8, image_size=32, position_bias=position_bias))
    sharpened(network)
    return Subject("beit", network)


def timm_network(name: str, prefix_tokens: int = 0, **arguments: Any) -> Subject:
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=0, global_pool="", **arguments)
    return student(backbone, name, prefix_tokens, arguments.get("img_size", 32))


def vit(**changes: Any) -> Subject:
    return timm_network("vit_tiny_patch16_224", prefix_tokens=1, **{**TINY_VIT, **changes})


def swin_v2(pads_first: bool = False, **changes: Any) -> Subject:
    torch.manual_seed(0)
    backbone = SwinV2(**{**TINY_SWIN, **changes})
    for block in blocks_of(backbone).values():
        block.dynamic_mask, block.attn_mask, block.pads_first = True, None, pads_first
    return student(backbone, "swin_v2", image_size=changes.get("img_size", 32))


def timm_swin_v2() -> Subject:
    return student(SwinTransformerV2(num_classes=0, global_pool="", **TINY_SWIN), "timm's swin_v2")


def open_clip() -> Subject:
    teacher = build_teacher(teacher_geometry("clip_vit_b16_open_clip", overrides=CLIP), "random")
    sharpened(teacher.backbone)
    return Subject("open_clip", teacher)


def pixels(images: int, size: tuple[int, int] = (32, 32), seed: int = 7) -> Tensor:
    return torch.rand(images, 3, *size, generator=torch.Generator().manual_seed(seed))


@contextmanager
def inputs_of_blocks(subject: Subject) -> Iterator[dict[int, Tensor]]:
    """What each block is given in the forwards inside: by number, batches joined."""
    given: dict[int, Tensor] = {}

    def keep(number: int, tokens: Tensor) -> None:
        given[number] = torch.cat((given[number], tokens)) if number in given else tokens

    handles = [
        block.register_forward_pre_hook(lambda _, args, number=number: keep(number, args[0]))
        for number, block in enumerate(blocks_of(subject.backbone).values())
    ]
    yield given
    for handle in handles:
        handle.remove()
