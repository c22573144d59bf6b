"""Layers are the official ones, parameter for parameter; timm's networks follow timm."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from fdscale.config.errors import UserError
from fdscale.students.geometry import STUDENTS, SwinV2Geometry, TimmGeometry, ViTGeometry
from fdscale.students.layers import swin_v2_layer, vit_layer
from fdscale.students.student import Student, build_student

SWIN = SwinV2Geometry(16, (2, 3, 2), (2, 4, 8), window_size=4, image_size=64, extra_norm_period=3)


def meta(geometry: object) -> Student:
    return build_student(geometry, device="meta")  # type: ignore[arg-type]


def official_vit_layer(name: str, layers: int) -> int:
    """The rule of the official `get_vit_layer`, in its own names, which are ours."""
    if name == "cls_token" or name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks"):
        return int(name.split(".")[1]) + 1
    return layers


def official_swin_layer(name: str, layers: int, depths: tuple[int, ...]) -> int:
    """The rule of the official `get_swin_layer`, in its own names: a merging ends its stage."""
    if name.startswith("patch_embed"):
        return 0
    if not name.startswith("layers"):
        return layers
    stage, block = name.split(".")[1], name.split(".")[3]
    if block in ("reduction", "norm"):
        return sum(depths[: int(stage) + 1])
    return sum(depths[: int(stage)]) + int(block) + 1


def official_name(name: str) -> str:
    return re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)


@pytest.mark.parametrize("position_bias", ["shared", "per_block"])
def test_a_vits_layers_are_the_official_ones(position_bias: str) -> None:
    student = meta(ViTGeometry(16, 4, 2, 8, 32, position_bias=position_bias))
    layers = student.layer_ids()
    assert layers.keys() == dict(student.backbone.named_parameters()).keys()
    assert student.layers == 5
    assert layers == {name: official_vit_layer(name, 5) for name in layers}
    assert set(layers.values()) == set(range(6))


@pytest.mark.parametrize("geometry", [SWIN, STUDENTS["swinv2_b"]], ids=["extra norms", "swinv2_b"])
def test_swin_v2s_layers_are_the_official_ones(geometry: SwinV2Geometry) -> None:
    student = meta(geometry)
    layers, last = student.layer_ids(), sum(geometry.depths) + 1
    assert layers.keys() == dict(student.backbone.named_parameters()).keys()
    assert student.layers == last
    assert layers == {name: official_swin_layer(official_name(name), last, geometry.depths) for name in layers}
    assert set(layers.values()) == set(range(last + 1))


def test_scales_are_those_of_the_method() -> None:
    vit, swin = meta(STUDENTS["vit_b16"]), meta(STUDENTS["swinv2_b"])
    scale = {name: 0.65 ** (vit.layers - layer) for name, layer in vit.layer_ids().items()}
    assert scale["cls_token"] == scale["patch_embed.proj.weight"] == pytest.approx(0.0037, abs=5e-5)
    assert scale["blocks.0.attn.qkv.weight"] == pytest.approx(0.0057, abs=5e-5)
    assert scale["blocks.11.gamma_1"] == 0.65
    assert scale["norm.weight"] == scale["rel_pos_bias.relative_position_bias_table"] == 1
    layers = swin.layer_ids()
    scale = {name: 0.8 ** (swin.layers - layer) for name, layer in layers.items()}
    assert scale["patch_embed.norm.weight"] == pytest.approx(0.00378, abs=5e-6)
    merging = "layers.3.downsample.reduction.weight"  # after stage 2
    assert (layers[merging], scale[merging]) == (22, pytest.approx(0.512))
    assert scale["layers.3.blocks.1.norm2.weight"] == 0.8
    assert scale["norm.bias"] == 1


def test_an_extra_norm_belongs_to_its_block() -> None:
    layers = meta(SWIN).layer_ids()
    assert layers["layers.1.blocks.2.enorm.weight"] == layers["layers.1.blocks.2.attn.qkv.weight"] == 5


@pytest.mark.parametrize("name", ["mask_token", "fc_norm.weight", "head.weight", "block.0.x", "norms.weight"])
def test_unknown_names_fail_and_do_not_fall_into_the_last_layer(name: str) -> None:
    with pytest.raises(AssertionError, match=f"no layer is known for the ViT's {name}"):
        vit_layer(name, 4)
    with pytest.raises(AssertionError, match=f"no layer is known for SwinV2's {name}"):
        swin_v2_layer(name, (2, 2))
    with pytest.raises(AssertionError, match="no layer is known"):
        swin_v2_layer("layers.0.rel_pos_bias.rpe_mlp.0.weight", (2, 2))


def test_position_bias_tables_are_named() -> None:
    assert meta(ViTGeometry(16, 2, 2, 8, 32)).position_bias_parameters() == {
        "rel_pos_bias.relative_position_bias_table"
    }
    assert meta(ViTGeometry(16, 2, 2, 8, 32, position_bias="per_block")).position_bias_parameters() == {
        f"blocks.{block}.attn.relative_position_bias_table" for block in range(2)
    }
    assert meta(SWIN).position_bias_parameters() == set()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swinv2_tiny_window8_256", "convnext_atto", "resnet10t"])
def test_timms_networks_have_timms_layers(name: str) -> None:
    """Scales equal those that timm gives the whole network, whose head is last."""
    student = meta(TimmGeometry(name))
    with torch.device("meta"):
        whole = timm.create_model(name)
    names = {id(parameter): key for key, parameter in whole.named_parameters()}
    groups = param_groups_layer_decay(whole, layer_decay=0.5)
    expected = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    layers = student.layer_ids()
    assert layers.keys() == dict(student.backbone.named_parameters()).keys()
    assert {key: 0.5 ** (student.layers - layer) for key, layer in layers.items()} == {
        key: expected[key] for key in layers
    }
    assert expected[whole.pretrained_cfg["classifier"] + ".weight"] == 1


def test_a_network_of_ones_own_that_tells_no_layers_is_refused() -> None:
    student = Student(nn.Linear(3, 3), width=3, grid=(2, 2), prefix_tokens=0, image_size=2)
    for ask in (student.layer_ids, lambda: student.layers):
        with pytest.raises(UserError, match=r"Linear tells no layers .* set optim\.layer_decay=1"):
            ask()
