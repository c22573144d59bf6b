from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fdscale.teachers.spec import TeacherSpec
from fdscale.teachers.table import TEACHERS, teacher_geometry
from fdscale.teachers.teacher import Teacher, build_teacher

# one of each kind of block
FAMILIES = [
    "clip_vit_b16_open_clip",
    "laion_clip_vit_g14",
    "eva02_clip_l14",
    "siglip2_vit_so400m16",
    "dino_vit_s16",
    "dinov2_vit_g14_reg",
    "dinov3_vit_s16",
    "dinov3_vit_h16_plus",
    "esvit_swin_b",
]


def shapes(spec: TeacherSpec) -> Teacher:
    return build_teacher(spec, "random", device="meta")


def parameters(teacher: Teacher) -> int:
    return sum(parameter.numel() for parameter in teacher.parameters())


def measured(teacher: Teacher) -> tuple[int, tuple[int, ...]]:
    """Arithmetic of one image's forward, as torch counts it, and the features' shape."""
    image = torch.empty(1, 3, teacher.image_size, teacher.image_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        features = teacher.backbone(image)
    return counter.get_total_flops(), tuple(features.flatten(1, -2).shape)


def tiny(name: str) -> dict[str, int | float | list[int]]:
    if TEACHERS[name].family == "swin":
        return {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64}
    size = 4 * TEACHERS[name].patch_size
    return {"embed_dim": 48, "depth": 3, "num_heads": 4, "image_size": size, "mlp_ratio": 2.3}


@pytest.mark.parametrize("name", TEACHERS)
def test_every_row_counts_what_its_network_has(name: str) -> None:
    spec = TEACHERS[name]
    teacher = shapes(spec)
    assert spec.parameters() == parameters(teacher)
    if spec.source == "open_clip":
        assert teacher.backbone.grid_size == spec.grid
        assert len(teacher.backbone.positional_embedding) == spec.grid[0] * spec.grid[1] + spec.prefix_tokens
    elif spec.family != "swin":
        assert teacher.backbone.patch_embed.grid_size == spec.grid
        assert teacher.backbone.num_prefix_tokens == spec.prefix_tokens
        assert teacher.backbone.num_features == spec.width
    assert teacher.final_norm.normalized_shape == (spec.width,)


@pytest.mark.parametrize("name", FAMILIES)
def test_arithmetic_and_tokens_are_those_of_the_network(name: str) -> None:
    spec = TEACHERS[name]
    flops, shape = measured(shapes(spec))
    assert spec.flops() == pytest.approx(flops, rel=0.02)
    assert shape == (1, spec.prefix_tokens + spec.grid[0] * spec.grid[1], spec.width)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layer", [None, 0, 1])
def test_counts_follow_overrides_and_the_layer_taken(name: str, layer: int | None) -> None:
    spec = teacher_geometry(name, overrides=tiny(name), layer=layer)
    assert isinstance(spec, TeacherSpec)
    teacher = shapes(spec)
    assert spec.parameters() == parameters(teacher)
    flops, shape = measured(teacher)
    assert spec.flops() == pytest.approx(flops, rel=0.02)
    assert shape == (1, spec.prefix_tokens + spec.grid[0] * spec.grid[1], spec.width)


@settings(max_examples=15)
@given(side=st.integers(7, 24), window=st.integers(2, 8), stages=st.integers(1, 3))
def test_a_swins_counts_hold_for_any_map_and_window(side: int, window: int, stages: int) -> None:
    side *= 2 ** (stages - 1)  # timm and the originals agree on maps that halve evenly
    shape = {"embed_dim": 8, "depths": [2] * stages, "num_heads": [2] * stages, "window_size": window}
    spec = teacher_geometry("esvit_swin_b", image_size=4 * side, overrides=shape)
    assert isinstance(spec, TeacherSpec)
    teacher = shapes(spec)
    assert spec.parameters() == parameters(teacher)
    flops, tokens = measured(teacher)
    assert spec.flops() == pytest.approx(flops, rel=0.02)
    assert tokens == (1, spec.grid[0] * spec.grid[1], spec.width)


def test_published_sizes() -> None:
    """SwinV2-G's teachers: CLIP L/14 (method, section 4.2) and the 7B of DINOv3, as wide as SwinV2-G."""
    assert TEACHERS["clip_vit_l14"].parameters() / 1e6 == pytest.approx(303.2, abs=0.05)
    assert TEACHERS["clip_vit_l14"].flops() / 1e12 == pytest.approx(0.162, abs=5e-4)
    assert TEACHERS["dinov3_vit_7b16"].parameters() / 1e9 == pytest.approx(6.716, abs=5e-4)
    assert TEACHERS["dinov3_vit_7b16"].width == 4096


def test_the_official_third_stage_of_esvit() -> None:
    spec = teacher_geometry("esvit_swin_b", layer=2)
    assert (spec.grid, spec.width) == ((14, 14), 512)  # method, section 1.3: PRED_FEAT_S3
    assert isinstance(spec, TeacherSpec)
    assert (spec.stride, spec.has_norm) == (16, False)


def test_spec_leaves_torch_unimported() -> None:
    code = "import sys, fdscale.teachers.spec; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
