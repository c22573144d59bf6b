"""Weights of another image size: timm's own resampling to the last bit, and nothing at the same size."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import beit, swin_transformer_v2
from torch import nn

from fdscale.config.errors import UserError
from fdscale.students.files import load_weights, save_student
from fdscale.students.geometry import Geometry, SwinV2Geometry, TimmGeometry, ViTGeometry, student_geometry
from fdscale.students.student import Student, build_student

Perturb = Callable[[nn.Module], None]
VIT = ViTGeometry(16, 2, 2, patch_size=8, image_size=32)
PER_BLOCK = dataclasses.replace(VIT, position_bias="per_block")
SWIN = SwinV2Geometry(16, (1, 2), (2, 4), window_size=4, image_size=32)
CLIP = TimmGeometry("vit_tiny_patch16_224", 64, {"embed_dim": 16, "depth": 2, "num_heads": 2, "pre_norm": True})


def held(geometry: Geometry, folder: Path, perturbed: Perturb) -> tuple[Student, Path]:
    student = build_student(geometry, seed=1).eval()
    perturbed(student)
    return student, save_student(student, student.backbone.state_dict(), folder)


def larger(geometry: Geometry, image_size: int) -> Student:
    assert not isinstance(geometry, SwinV2Geometry)
    return build_student(dataclasses.replace(geometry, image_size=image_size), seed=2).eval()  # type: ignore[call-arg]


@pytest.mark.parametrize("geometry", [VIT, PER_BLOCK], ids=["shared", "per block"])
@pytest.mark.parametrize("image_size", [48, 16], ids=["larger", "smaller"])
def test_bias_tables_are_resized_as_timm_does(
    geometry: ViTGeometry, image_size: int, tmp_path: Path, perturbed: Perturb, caplog: pytest.LogCaptureFixture
) -> None:
    _, path = held(geometry, tmp_path, perturbed)
    student = larger(geometry, image_size)
    with caplog.at_level(logging.INFO, "fdscale"):
        load_weights(student, path, resize=True)
    expected = beit.checkpoint_filter_fn(load_file(path), student.backbone)
    found = student.backbone.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    tables = 1 if geometry is VIT else 2
    assert f"32 px taken for {image_size} px: {tables} tensors of positions resized" in caplog.text


def test_a_shared_table_is_resized_and_given_to_every_block(tmp_path: Path, perturbed: Perturb) -> None:
    _, path = held(VIT, tmp_path, perturbed)
    apart, together = larger(PER_BLOCK, 48), larger(VIT, 48)
    load_weights(apart, path, resize=True)
    load_weights(together, path, resize=True)
    for block in apart.backbone.blocks:
        table = together.backbone.rel_pos_bias.relative_position_bias_table
        assert torch.equal(block.attn.relative_position_bias_table, table)


def test_absolute_positions_are_resized_as_timm_does(tmp_path: Path, perturbed: Perturb) -> None:
    original, path = held(CLIP, tmp_path, perturbed)
    student = larger(CLIP, 96)
    load_weights(student, path, resize=True)
    expected = resample_abs_pos_embed(original.backbone.pos_embed.detach(), [6, 6])
    assert torch.equal(student.backbone.pos_embed, expected)


@pytest.mark.parametrize("geometry", [VIT, PER_BLOCK, SWIN, CLIP], ids=["shared", "per block", "swin_v2", "timm"])
def test_at_the_same_size_nothing_changes(geometry: Geometry, tmp_path: Path, perturbed: Perturb) -> None:
    original, path = held(geometry, tmp_path, perturbed)
    student = build_student(geometry, seed=2)
    load_weights(student, path, resize=True)
    theirs = original.backbone.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in student.backbone.state_dict().items())


def test_a_swin_v2_goes_to_another_window_as_timm_lets_it(tmp_path: Path, perturbed: Perturb) -> None:
    """The last stage's map, and so its window, was smaller: its coordinates were normalised by that."""
    small = dataclasses.replace(SWIN, image_size=16)  # maps of 4 and 2 tokens a side
    original, path = held(small, tmp_path, perturbed)
    geometry = student_geometry("student_file", 64, {"window_size": 8}, str(path), resize=True)
    assert geometry == dataclasses.replace(SWIN, image_size=64, window_size=8, pretrained_window_sizes=(4, 2))
    student = build_student(geometry, seed=2).eval()
    load_weights(student, path, resize=True)
    theirs = swin_transformer_v2.SwinTransformerV2(
        img_size=64,
        num_classes=0,
        global_pool="",
        embed_dim=16,
        depths=(1, 2),
        num_heads=(2, 4),
        window_size=8,
        pretrained_window_sizes=(4, 2),
    ).eval()
    theirs.load_state_dict(original.backbone.state_dict())
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = (pixels - student.mean) / student.std
    with torch.no_grad():
        torch.testing.assert_close(student(pixels), theirs(images).flatten(1, 2), rtol=0, atol=2e-5)


def test_windows_that_stay_need_no_others(tmp_path: Path, perturbed: Perturb) -> None:
    _, path = held(SWIN, tmp_path, perturbed)
    assert student_geometry("student_file", 64, {}, str(path), resize=True) == dataclasses.replace(SWIN, image_size=64)
    other = dataclasses.replace(SWIN, pretrained_window_sizes=(3, 2))
    _, path = held(other, tmp_path / "other", perturbed)
    geometry = student_geometry("student_file", 64, {"window_size": 8}, str(path), resize=True)
    assert geometry == dataclasses.replace(other, image_size=64, window_size=8)


def test_without_the_setting_another_size_is_refused(tmp_path: Path, perturbed: Perturb) -> None:
    _, path = held(VIT, tmp_path, perturbed)
    with pytest.raises(UserError, match=r"of another shape \['rel_pos_bias"):
        load_weights(larger(VIT, 48), path)
    with pytest.raises(UserError, match="holds no SwinV2, which alone has windows"):
        student_geometry("student_file", None, {"window_size": 8}, str(path), resize=True)
    with pytest.raises(UserError, match=r"leave student\.geometry and student\.image_size out"):
        student_geometry("student_file", 48, {}, str(path))
