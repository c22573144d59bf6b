"""Another size gives what a network built for that size gives, with weights carried over by timm."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import resize_rel_pos_bias_table
from timm.models import beit, swin_transformer_v2
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.downstream.backbone import Backbone
from fdscale.downstream.image_size import resampled
from fdscale.students.geometry import Geometry, SwinV2Geometry, TimmGeometry, ViTGeometry
from fdscale.students.student import Student, build_student
from fdscale.students.swin_v2 import SwinV2
from fdscale.students.vit import build_vit

VIT = ViTGeometry(32, 3, 4, patch_size=8, image_size=32)
SWIN = SwinV2Geometry(16, (1, 2, 2), (1, 2, 4), window_size=8, image_size=64, extra_norm_period=2)
SWIN_WINDOWS = (8, 8, 4)  # of its stages: a window shrinks to its map
Perturbed = Callable[[Geometry], Student]


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(5))


def pixels_of(student: Student, normalised: Tensor) -> Tensor:
    return normalised * student.std + student.mean


def other_vit(student: Student, geometry: ViTGeometry, size: tuple[int, int]) -> Any:
    built = build_vit(dataclasses.replace(geometry, image_size=size), 0.0).eval()  # type: ignore[arg-type]
    built.load_state_dict(beit.checkpoint_filter_fn(student.backbone.state_dict(), built))
    return built


def other_swin(student: Student, size: tuple[int, int], windows: tuple[int, ...]) -> Any:
    g: Any = SWIN
    built: Any = SwinV2(
        size,  # type: ignore[arg-type]
        g.embed_dim,
        g.depths,
        g.num_heads,
        windows,  # type: ignore[arg-type]
        extra_norm_period=g.extra_norm_period,
        pretrained_window_sizes=SWIN_WINDOWS,
    ).eval()
    built.load_state_dict(swin_transformer_v2.checkpoint_filter_fn(student.backbone.state_dict(), built))
    for block in (block for stage in built.layers for block in stage.blocks):
        block.pads_first = True
    return built


def check(backbone: Backbone, built: Any, normalised: Tensor) -> None:
    """The maps are those of the network that was built for these images, after the same neck."""
    found = backbone.eval()(pixels_of(backbone.student, normalised))
    expected = backbone.neck(built.forward_intermediates(normalised, intermediates_only=True))
    assert any(float(level.detach().std()) > 0.1 for level in found)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)


@pytest.mark.parametrize("size", [(48, 48), (104, 24), (16, 32)])
@pytest.mark.parametrize("bias", ["shared", "per_block"])
def test_a_vit_of_another_size(bias: str, size: tuple[int, int], perturbed: Perturbed) -> None:
    geometry = dataclasses.replace(VIT, position_bias=bias)
    student = perturbed(geometry)
    built = other_vit(student, geometry, size)
    check(Backbone(student), built, images(*size))


@pytest.mark.parametrize("size", [(128, 128), (100, 76), (36, 132)])
def test_a_swin_of_another_size_keeps_its_windows(size: tuple[int, int], perturbed: Perturbed) -> None:
    student = perturbed(SWIN)
    built = other_swin(student, size, SWIN_WINDOWS)
    check(Backbone(student), built, images(*size))


def test_edges_of_a_padded_map_do_not_see_each_other(perturbed: Perturbed) -> None:
    """Windows of 8 shifted by 4 over 9 rows: the first four are the last window's, apart from the rows above them."""
    backbone = Backbone(perturbed(SWIN))
    backbone._resize((72, 72))
    block = backbone.student.backbone.layers[1].blocks[1]
    assert (block.window_size, block.shift_size) == ((8, 8), (4, 4))
    tokens = torch.randn(1, 9, 9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    seen = torch.autograd.grad(block(tokens)[0, 0, 0].sum(), tokens)[0].abs().sum(dim=-1)[0] > 0
    assert seen[:4, :4].all()
    assert not seen[4:].any()
    assert not seen[:, 4:].any()


@pytest.mark.parametrize("size", [(64, 64), (96, 72)])
def test_a_swin_with_another_window(size: tuple[int, int], perturbed: Perturbed) -> None:
    student = perturbed(SWIN)
    built = other_swin(student, size, (16,) * 3)
    check(Backbone(student, window_size=16), built, images(*size))


def test_sizes_follow_each_other_and_leave_nothing_behind(perturbed: Perturbed) -> None:
    for geometry in (VIT, SWIN):
        student = perturbed(geometry)
        names = list(student.backbone.state_dict())
        backbone, side = Backbone(student).eval(), geometry.image_size
        pixels = [torch.rand(1, 3, *size) for size in ((side, side), (side, 2 * side), (2 * side, side))]
        first = [backbone(p) for p in pixels]
        for index in (2, 0, 1):
            again = backbone(pixels[index])
            assert all(torch.equal(a, b) for a, b in zip(again, first[index], strict=True))
        assert list(student.backbone.state_dict()) == [n for n in names if not n.startswith("norm.")]
        assert [n for n, _ in student.backbone.named_buffers() if n.endswith("attn_mask")] == []


@pytest.mark.parametrize("size", [(9, 9), (4, 11), (7, 3), (4, 2)])
def test_a_table_is_resampled_as_timm_does(size: tuple[int, int]) -> None:
    table = torch.randn(7 * 7 + 3, 5, generator=torch.Generator().manual_seed(1))
    rows = (2 * size[0] - 1) * (2 * size[1] - 1) + 3
    expected = resize_rel_pos_bias_table(table, size, (rows, 5), old_window_size=(4, 4))
    torch.testing.assert_close(resampled(table, (4, 4), size), expected, rtol=0, atol=2e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(resampled(table, (4, 4), size), expected, rtol=0, atol=2e-6)


def test_a_resampled_table_learns_also_after_an_evaluation() -> None:
    table = torch.randn(7 * 7 + 3, 5, requires_grad=True)
    with torch.inference_mode():
        resampled(table, (4, 4), (6, 5))
    resampled(table, (4, 4), (6, 5)).square().sum().backward()
    assert table.grad is not None
    assert bool(table.grad.all())


def test_a_network_of_one_size_takes_that_alone() -> None:
    fixed = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    backbone = Backbone(build_student(TimmGeometry("vit_tiny_patch16_224", 32, fixed)))
    assert backbone(torch.rand(1, 3, 30, 17))[2].shape[2:] == (2, 2)
    with pytest.raises(UserError, match=r"48x32.*: this VisionTransformer takes 32x32 alone; .*dynamic_img_size=true"):
        backbone(torch.rand(1, 3, 40, 32))


@pytest.mark.parametrize(("geometry", "window"), [(VIT, 8), (SWIN, 0)])
def test_a_window_that_cannot_be_is_refused(geometry: Geometry, window: int) -> None:
    with pytest.raises(UserError, match=rf"window_size={window}: allowed are sizes from 1, and windows are SwinV2's"):
        Backbone(build_student(geometry), window_size=window)
