"""The table says without torch what the built network has: widths, grids, parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fdscale.config.errors import UserError
from fdscale.students.geometry import (
    STUDENTS,
    Geometry,
    SwinV2Geometry,
    TimmGeometry,
    ViTGeometry,
    file_geometry,
    geometry_to_json,
    student_geometry,
)
from fdscale.students.student import build_student


def parameters_of(geometry: Geometry) -> list[nn.Parameter]:
    return list(build_student(geometry, device="meta").backbone.parameters())


@pytest.mark.parametrize("name", STUDENTS)
def test_the_count_is_the_networks(name: str) -> None:
    assert STUDENTS[name].parameters() == sum(p.numel() for p in parameters_of(STUDENTS[name]))
    assert STUDENTS[name].problems() == []


@settings(max_examples=10, deadline=None)
@given(
    depths=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    head_width=st.sampled_from([4, 8]),
    period=st.integers(0, 3),
    mlp_ratio=st.sampled_from([1.5, 4.0]),
)
def test_the_count_holds_for_any_swin_v2(
    depths: tuple[int, ...], head_width: int, period: int, mlp_ratio: float
) -> None:
    heads = tuple(2**stage for stage in range(len(depths)))
    geometry = SwinV2Geometry(head_width, depths, heads, 4, 64, extra_norm_period=period, mlp_ratio=mlp_ratio)
    assert geometry.parameters() == sum(p.numel() for p in parameters_of(geometry))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([4, 8]), st.sampled_from([1.5, 4.0]))
def test_the_count_holds_for_any_vit(depth: int, heads: int, patch: int, mlp_ratio: float) -> None:
    geometry = ViTGeometry(8 * heads, depth, heads, patch, image_size=32, mlp_ratio=mlp_ratio)
    assert geometry.parameters() == sum(p.numel() for p in parameters_of(geometry))


def test_swin_v2_g_is_the_published_network() -> None:
    student = build_student(STUDENTS["swinv2_g"], device="meta")
    parameters = dict(student.backbone.named_parameters())
    assert STUDENTS["swinv2_g"].parameters() == 2_997_843_680
    assert (len(parameters), sum(p.numel() for p in parameters.values())) == (879, 2_997_843_680)
    extra_norms = {name.rsplit(".", 2)[0] for name in parameters if ".enorm." in name}
    assert extra_norms == {f"layers.2.blocks.{block}" for block in (5, 11, 17, 23, 29, 35, 41)}
    stages = [stage.blocks for stage in student.backbone.layers]
    assert [len(blocks) for blocks in stages] == [2, 2, 42, 4]
    assert [{block.dim for block in blocks} for blocks in stages] == [{512}, {1024}, {2048}, {4096}]
    assert [{block.num_heads for block in blocks} for blocks in stages] == [{16}, {32}, {64}, {128}]
    for blocks in stages:
        assert {block.attn.logit_scale.shape[0] for block in blocks} == {blocks[0].num_heads}
        assert {block.mlp.fc1.out_features for block in blocks} == {4 * blocks[0].dim}


@pytest.mark.parametrize(
    ("name", "width", "stride", "grid", "prefix_tokens", "blocks"),
    [
        ("vit_s16", 384, 16, (14, 14), 1, 12),
        ("vit_b16", 768, 16, (14, 14), 1, 12),
        ("vit_l14", 1024, 14, (16, 16), 1, 24),
        ("swinv2_t", 768, 32, (8, 8), 0, 12),
        ("swinv2_b", 1024, 32, (7, 7), 0, 24),
        ("swinv2_g", 4096, 32, (8, 8), 0, 50),
    ],
)
def test_layouts(name: str, width: int, stride: int, grid: tuple[int, int], prefix_tokens: int, blocks: int) -> None:
    found = STUDENTS[name]
    assert (found.width, found.stride, found.grid, found.prefix_tokens, found.blocks) == (
        width, stride, grid, prefix_tokens, blocks,
    )  # fmt: skip


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, fdscale.students.geometry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_single_numbers_are_replaced() -> None:
    geometry = student_geometry("swinv2_g", 128, {"embed_dim": 16, "num_heads": [1, 2, 4, 8], "window_size": 4})
    assert isinstance(geometry, SwinV2Geometry)
    assert (geometry.embed_dim, geometry.num_heads, geometry.window_size) == (16, (1, 2, 4, 8), 4)
    assert (geometry.image_size, geometry.grid, geometry.depths) == (128, (4, 4), (2, 2, 42, 4))
    assert student_geometry("vit_b16", None, {}) == STUDENTS["vit_b16"]


@pytest.mark.parametrize(
    ("name", "image_size", "overrides", "told"),
    [
        ("swinv2_gg", None, {}, "unknown student 'swinv2_gg'; did you mean 'swinv2_g'?"),
        ("swinv2_gg", None, {}, "known: vit_s16, vit_b16, vit_l14, swinv2_t, swinv2_b, swinv2_g, student_file"),
        ("vit_b16", None, {"embed_dims": 64}, "vit_b16 has no such number; did you mean 'embed_dim'?"),
        ("vit_b16", None, {"window_size": 8}, "student.geometry.window_size: vit_b16 has no such number"),
        ("vit_b16", None, {"depth": [2, 2]}, "student.geometry.depth: got [2, 2]; vit_b16 has 12 there"),
        ("swinv2_t", None, {"depths": 2}, "student.geometry.depths: got 2; swinv2_t has (2, 2, 6, 2) there"),
        ("vit_b16", None, {"num_heads": 7}, "embed_dim 768 is not a multiple of num_heads 7"),
        ("vit_b16", 225, {}, "image_size 225 is not a multiple of patch_size 16"),
        ("swinv2_t", 250, {}, "image_size 250 is not a multiple of the stride 32"),
        ("swinv2_t", 192, {"window_size": 7}, "stage 0: window_size 7 does not divide its 48x48 map"),
        ("swinv2_t", None, {"num_heads": [3, 6, 12, 25]}, "stage 3: width 768 is not a multiple of 25 heads"),
        ("swinv2_t", None, {"depths": [2, 2]}, "depths [2, 2] and num_heads [3, 6, 12, 24] differ in length"),
        ("timm:vit_tiny_patch16_224", None, {"depth": 2}, "'timm:' students take only student.image_size"),
        ("student_file", None, {}, "which file? name it with student.weights=FILE"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_what_would_be_right(
    name: str, image_size: int | None, overrides: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError) as error:
        student_geometry(name, image_size, overrides)
    assert told in str(error.value)


def test_a_window_larger_than_its_map_is_no_mistake() -> None:
    assert SwinV2Geometry(32, (2, 2), (1, 2), window_size=16, image_size=32).problems() == []


def write_description(folder: Path, **content: Any) -> Path:
    (folder / "student.json").write_text(json.dumps({"mean": [0.5], "std": [0.5], **content}))
    return folder / "student.safetensors"


@pytest.mark.parametrize(
    "geometry",
    [*STUDENTS.values(), TimmGeometry("swinv2_cr_tiny_224", 64), TimmGeometry("vit_tiny_patch16_224")],
    ids=lambda geometry: f"{geometry.family}-{geometry.image_size}",
)
def test_a_geometry_survives_json(geometry: Geometry, tmp_path: Path) -> None:
    weights = write_description(tmp_path, geometry=geometry_to_json(geometry))
    assert file_geometry(weights) == geometry
    assert student_geometry("student_file", None, {}, str(weights)) == geometry


@pytest.mark.parametrize(("image_size", "overrides"), [(224, {}), (None, {"depth": 2})])
def test_a_student_file_is_not_changed(image_size: int | None, overrides: dict[str, int], tmp_path: Path) -> None:
    weights = write_description(tmp_path, geometry=geometry_to_json(STUDENTS["vit_b16"]))
    with pytest.raises(UserError, match=r"leave student\.geometry and student\.image_size out"):
        student_geometry("student_file", image_size, overrides, str(weights))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({}, "KeyError('geometry')"),
        ({"geometry": {"family": "resnet"}}, "unknown student family 'resnet'; known: vit, swin_v2, timm"),
        ({"geometry": {"family": "vit", "widht": 3}}, "not a geometry of family 'vit'"),
    ],
)
def test_a_file_without_a_known_geometry_is_refused(content: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        file_geometry(write_description(tmp_path, **content))
    assert str(error.value).startswith(str(tmp_path / "student.json"))
    assert told in str(error.value)


@pytest.mark.parametrize("text", [None, '{"geometry": {"family"', "[1, 2]"], ids=["absent", "torn", "a list"])
def test_a_damaged_description_is_refused_by_its_path(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "student.json").write_text(text)
    with pytest.raises(UserError, match=r"student\.json: a student file has its geometry, mean and std there, but"):
        file_geometry(tmp_path / "student.safetensors")
