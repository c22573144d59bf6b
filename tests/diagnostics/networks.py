"""Tiny subjects of three families, every parameter perturbed, and their layers found without hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fdscale.diagnostics.subjects import Subject
from fdscale.students.geometry import SwinV2Geometry, TimmGeometry, ViTGeometry
from fdscale.students.student import build_student

Array = NDArray[np.float64]
SIDE = 32
GEOMETRIES = {
    "beit": ViTGeometry(32, 3, 4, patch_size=8, image_size=SIDE),
    "vit": TimmGeometry(
        "vit_tiny_patch16_224", SIDE, {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "reg_tokens": 3}
    ),
    "swin_v2": SwinV2Geometry(8, (2, 2), (2, 4), window_size=4, image_size=SIDE),  # its first maps: 8 x 8 x 8
}


def subject_of(family: str, seed: int = 2) -> Subject:
    student = build_student(GEOMETRIES[family], seed=seed).eval().requires_grad_(False)
    drawn = torch.Generator().manual_seed(seed)
    for parameter in student.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=drawn) * 0.1)
    return Subject(family, student)


def pixels(images: int, seed: int = 0) -> Tensor:
    return torch.rand(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def walked(subject: Subject, images: Tensor) -> list[Array]:
    """Patch tokens (B, N, C) after each block, and the network's output, by calling its parts one after another."""
    student: Any = subject.network
    network, scaled = student.backbone, (images - student.mean) / student.std
    if subject.name == "swin_v2":
        seen, x = [], network.patch_embed(scaled)
        for stage in network.layers:
            x = stage.downsample(x)
            for block in stage.blocks:
                seen.append(x := block(x))
        seen.append(network.norm(x))
        return [x.flatten(1, 2).double().numpy() for x in seen]
    maps = network.forward_intermediates(scaled, intermediates_only=True)
    seen = [x.flatten(2).transpose(1, 2) for x in maps] + [network(scaled)[:, subject.prefix_tokens :]]
    return [x.double().numpy() for x in seen]
