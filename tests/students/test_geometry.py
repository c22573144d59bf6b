"""The table says without torch what the built network has: widths, grids, parameters."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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
from fdscale.students.student import Student, build_student

BIASES = ("shared", "per_block")


@cache
def on_meta(geometry: Geometry) -> Student:
    """The network without memory, built once."""
    return build_student(geometry, device="meta")


def parameters_of(geometry: Geometry) -> list[nn.Parameter]:
    return list(on_meta(geometry).backbone.parameters())


@pytest.mark.parametrize("name", STUDENTS)
def test_the_count_is_the_networks(name: str) -> None:
    assert STUDENTS[name].parameters() == sum(p.numel() for p in parameters_of(STUDENTS[name]))
    assert STUDENTS[name].problems() == []


@settings(max_examples=10)
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


@settings(max_examples=10)
@given(
    st.integers(1, 3), st.integers(1, 3), st.sampled_from([4, 8]), st.sampled_from([1.5, 4.0]), st.sampled_from(BIASES)
)
def test_the_count_holds_for_any_vit(depth: int, heads: int, patch: int, mlp_ratio: float, bias: str) -> None:
    geometry = ViTGeometry(8 * heads, depth, heads, patch, 32, mlp_ratio=mlp_ratio, position_bias=bias)
    assert geometry.parameters() == sum(p.numel() for p in parameters_of(geometry))


def test_swin_v2_g_is_the_published_network() -> None:
    student = on_meta(STUDENTS["swinv2_g"])
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
    ("name", "millions"),
    [("swinv2_t", 28.35), ("swinv2_s", 49.7), ("swinv2_b", 87.9), ("swinv2_l", 196.7), ("swinv2_h", 658.0)],
)
def test_counts_are_those_published_for_1000_classes(name: str, millions: float) -> None:
    with_classifier = STUDENTS[name].parameters() + 1000 * (STUDENTS[name].width + 1)
    assert with_classifier / 1e6 == pytest.approx(millions, abs=0.06)


def test_the_mlp_of_vit_g_is_clips_and_evas() -> None:
    mlp = on_meta(STUDENTS["vit_g14"]).backbone.blocks[0].mlp
    assert (mlp.fc1.out_features, mlp.fc2.in_features, STUDENTS["vit_g14"].hidden) == (6144, 6144, 6144)


def test_swin_v2_h_has_heads_of_32_channels_and_an_extra_norm_every_six_blocks() -> None:
    backbone = on_meta(STUDENTS["swinv2_h"]).backbone
    assert [stage.blocks[0].dim // stage.blocks[0].num_heads for stage in backbone.layers] == [32] * 4
    extra = {name.rsplit(".", 2)[0] for name, _ in backbone.named_parameters() if ".enorm." in name}
    assert extra == {f"layers.2.blocks.{block}" for block in (5, 11, 17)}


def counted_flops(geometry: Geometry, batch: int = 8) -> float:
    """Of one image, among `batch`, as torch counts them on the meta device."""
    student = on_meta(geometry)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student.backbone.eval()(torch.empty(batch, 3, student.image_size, student.image_size, device="meta"))
    return counter.get_total_flops() / batch


@pytest.mark.parametrize("name", STUDENTS)
def test_flops_are_torchs_count(name: str) -> None:
    tolerance = 2e-3 if name.startswith("swin") else 0.0  # of the position bias networks, shared by 8 images
    assert STUDENTS[name].flops() == pytest.approx(counted_flops(STUDENTS[name]), rel=tolerance, abs=0)


@pytest.mark.parametrize("window", [2, 4, 8, 16, 32])
def test_flops_of_swin_v2_with_windows_that_shrink(window: int) -> None:
    geometry = SwinV2Geometry(16, (1, 2), (2, 4), window, image_size=64, mlp_ratio=2.0)
    windows = (min(window, 16), min(window, 8))
    rows = [(2 * w - 1) ** 2 for w in windows]
    once_per_forward = 2 * 512 * (rows[0] * (2 + 2) + 2 * rows[1] * (2 + 4))  # the position bias networks
    assert geometry.flops() + once_per_forward == counted_flops(geometry, batch=1)


@pytest.mark.parametrize(
    ("image_size", "window", "teraflops"),
    [(192, 12, 0.742), (224, 14, 1.014), (224, 7, 1.001), (256, 16, 1.331), (256, 8, 1.309)],
)
def test_flops_of_swin_v2_g(image_size: int, window: int, teraflops: float) -> None:
    geometry = dataclasses.replace(STUDENTS["swinv2_g"], image_size=image_size, window_size=window)
    assert geometry.flops() / 1e12 == pytest.approx(teraflops, rel=5e-3)  # the position bias networks are left out


def test_flops_of_a_vit_are_clips() -> None:
    assert STUDENTS["vit_b16"].flops() / 1e12 == pytest.approx(0.035, rel=0.02)
    assert TimmGeometry("resnet10t").flops() is None


@pytest.mark.parametrize(
    ("name", "width", "stride", "grid", "prefix_tokens", "blocks"),
    [
        ("vit_s16", 384, 16, (14, 14), 1, 12),
        ("vit_b16", 768, 16, (14, 14), 1, 12),
        ("vit_l14", 1024, 14, (16, 16), 1, 24),
        ("vit_l16", 1024, 16, (14, 14), 1, 24),
        ("vit_h14", 1280, 14, (16, 16), 1, 32),
        ("vit_g14", 1408, 14, (16, 16), 1, 40),
        ("swinv2_t", 768, 32, (8, 8), 0, 12),
        ("swinv2_b", 1024, 32, (7, 7), 0, 24),
        ("swinv2_s", 768, 32, (8, 8), 0, 24),
        ("swinv2_l", 1536, 32, (8, 8), 0, 24),
        ("swinv2_h", 2816, 32, (8, 8), 0, 24),
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
        ("swinv2_gg", None, {}, "known: vit_s16, vit_b16, vit_l14, vit_l16, vit_h14, vit_g14, swinv2_t, swinv2_s, "),
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
        ("vit_b16", None, {"depth": True}, "student.geometry.depth: got True, allowed: numbers"),
        ("vit_b16", None, {"depth": "12"}, "student.geometry.depth: got '12', allowed: numbers"),
        ("vit_b16", None, {"position_bias": "per_block"}, "geometry.position_bias: this is student.position_bias"),
        ("swinv2_t", None, {"pretrained_window_sizes": [6]}, "[2, 2, 6, 2] and pretrained_window_sizes [6] differ"),
        ("timm:beit", None, {"img_size": 2}, "student.geometry.img_size: this is student.image_size; set that"),
        ("timm:beit", None, {"drop_path_rate": 0.1}, "student.geometry.drop_path_rate: this is student.drop_path"),
        ("timm:beit", None, {"num_classes": 2}, "student.geometry.num_classes: a student has no head; leave it out"),
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


def test_keywords_go_to_timms_network_as_tuples() -> None:
    geometry = student_geometry("timm:swin_tiny", 64, {"depths": [1, 2], "use_abs_pos_emb": False, "act_layer": "gelu"})
    arguments = {"depths": (1, 2), "use_abs_pos_emb": False, "act_layer": "gelu"}
    assert geometry == TimmGeometry("swin_tiny", 64, arguments)
    assert hash(geometry) == hash(TimmGeometry("swin_tiny", 64))


def test_the_position_bias_is_as_named_or_as_told() -> None:
    assert student_geometry("vit_b16", None, {}).position_bias == "shared"
    changed = student_geometry("vit_b16", 32, {"depth": 2}, position_bias="per_block")
    assert changed == ViTGeometry(768, 2, 12, 16, 32, position_bias="per_block")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("swinv2_t", "swinv2_t is no ViT, whose position biases come from tables; leave it out"),
        ("own", "own is no ViT"),
        ("timm:beit_base_patch16_224", "timm's Beit has use_rel_pos_bias in student.geometry"),
    ],
)
@pytest.mark.parametrize("position_bias", BIASES)
def test_other_students_have_no_position_bias_to_choose(name: str, told: str, position_bias: str) -> None:
    with pytest.raises(UserError) as error:
        student_geometry(name, None, {}, position_bias=position_bias)
    assert str(error.value).startswith(f"student.position_bias={position_bias}: ")
    assert told in str(error.value)


def test_an_unknown_position_bias_is_refused() -> None:
    with pytest.raises(UserError, match="position_bias 'per_head' is none of shared, per_block"):
        student_geometry("vit_b16", None, {}, position_bias="per_head")


def test_a_student_file_can_be_given_tables_per_block_but_not_lose_them(tmp_path: Path) -> None:
    shared, per_block = (ViTGeometry(16, 2, 2, 8, 32, position_bias=bias) for bias in BIASES)
    weights = str(write_description(tmp_path, geometry=geometry_to_json(shared)))
    assert student_geometry("student_file", None, {}, weights) == shared
    assert student_geometry("student_file", None, {}, weights, "per_block") == per_block
    write_description(tmp_path, geometry=geometry_to_json(per_block))
    assert student_geometry("student_file", None, {}, weights) == per_block
    with pytest.raises(UserError, match="has a table per block, and no single one to share"):
        student_geometry("student_file", None, {}, weights, "shared")


def test_a_file_from_before_these_choices_is_read(tmp_path: Path) -> None:
    stored = [geometry_to_json(g) for g in (STUDENTS["vit_b16"], STUDENTS["swinv2_g"], TimmGeometry("resnet10t"))]
    for geometry in stored:
        new = {key: value for key, value in geometry.items() if key not in ("position_bias", "arguments")}
        new.pop("pretrained_window_sizes", None)
        assert geometry_to_json(file_geometry(write_description(tmp_path, geometry=new))) == geometry


@pytest.mark.parametrize(
    "geometry",
    [
        *STUDENTS.values(),
        ViTGeometry(16, 2, 2, 8, 32, position_bias="per_block"),
        SwinV2Geometry(16, (1, 2), (2, 4), 4, 64, pretrained_window_sizes=(3, 3)),
        TimmGeometry("swinv2_cr_tiny_224", 64),
        TimmGeometry("vit_tiny_patch16_224"),
        TimmGeometry("swin_base_patch4_window7_224", 64, {"depths": (1, 2), "mlp_ratio": 2.0, "qkv_bias": False}),
    ],
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
        ({"geometry": {"family": "timm", "name": "x", "args": {}}}, "not a geometry of family 'timm'"),
        (
            {"geometry": {**geometry_to_json(STUDENTS["vit_b16"]), "position_bias": "none"}},
            "position_bias 'none' is none of shared, per_block",
        ),
        ({"geometry": {**geometry_to_json(STUDENTS["vit_b16"]), "depth": "3", "num_heads": "x"}}, "not a geometry"),
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
