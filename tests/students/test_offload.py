"""Blocks whose inputs wait in host memory compute the same gradients, under the same names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.students.geometry import Geometry, SwinV2Geometry, TimmGeometry, ViTGeometry
from fdscale.students.student import Student, build_student, set_activation_checkpointing

STUDENTS = {
    "swin_v2": SwinV2Geometry(16, (2, 2), (2, 4), window_size=4, image_size=64, extra_norm_period=2),
    "vit": ViTGeometry(32, 3, 4, patch_size=8, image_size=32),  # its blocks share a table: a keyword, with a gradient
    "timm": TimmGeometry("vit_tiny_patch16_224", 32, {"depth": 3}),
    "timm_swin": TimmGeometry("swinv2_cr_tiny_224", 64, {"depths": (1, 2), "embed_dim": 32, "num_heads": (2, 4)}),
}


def perturbed(geometry: Geometry, mode: str) -> Student:
    student = build_student(geometry, drop_path=0.3, seed=1)
    set_activation_checkpointing(student, mode)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return student


def gradients(student: Student) -> dict[str, Tensor]:
    torch.manual_seed(3)
    pixels = torch.rand(4, 3, student.image_size, student.image_size)
    draws = torch.rand(student.drop_path_sites, 4)
    student(pixels, draws).square().mean().backward()
    found = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("geometry", STUDENTS.values(), ids=STUDENTS)
def test_gradients_are_bit_equal(geometry: Geometry) -> None:
    kept, blocks, offloaded = (gradients(perturbed(geometry, mode)) for mode in ("none", "blocks", "offload"))
    assert kept.keys() == offloaded.keys()
    for name in kept:
        assert kept[name].any(), name
        assert torch.equal(kept[name], blocks[name]), name
        assert torch.equal(kept[name], offloaded[name]), name


def test_only_what_enters_a_block_is_kept() -> None:
    saved = {}
    for mode in ("none", "offload"):
        student, sizes = perturbed(STUDENTS["vit"], mode), []

        def kept(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            student(torch.rand(4, 3, 32, 32), torch.rand(student.drop_path_sites, 4))
        saved[mode] = sum(sizes)
    assert saved["offload"] < saved["none"] / 3


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="offload: ResNet has no list of blocks; use 'blocks' or 'none'"):
        set_activation_checkpointing(build_student(TimmGeometry("test_resnet", 32)), "offload")
