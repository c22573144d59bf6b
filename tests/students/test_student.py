"""A student normalises for itself, gives tokens whatever is inside, and is decided by its seed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.distill.distiller import Distiller
from fdscale.distill.layout import TokenLayout
from fdscale.distill.targets import TargetMaker
from fdscale.students.geometry import STUDENTS, Geometry, OwnGeometry, SwinV2Geometry, TimmGeometry, ViTGeometry
from fdscale.students.student import IMAGENET_MEAN, IMAGENET_STD, Student, build_student, set_activation_checkpointing
from fdscale.training.optim import parameter_groups

SWIN = SwinV2Geometry(16, (1, 2), (2, 4), window_size=4, image_size=32)
VIT = ViTGeometry(16, 2, 2, patch_size=8, image_size=32)
OWN = pytest.mark.parametrize("geometry", [SWIN, VIT], ids=["swin_v2", "vit"])


class Seen(nn.Module):
    """A backbone that keeps what it was given: images (B, 3, H, W) -> maps (B, H, W, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        return images.permute(0, 2, 3, 1)


def test_normalisation_is_inside_and_maps_become_tokens_row_by_row() -> None:
    student = Student(Seen(), width=3, grid=(4, 4), prefix_tokens=0, image_size=4)
    pixels = torch.rand(2, 3, 4, 4)
    tokens = student(pixels)
    for channel in range(3):
        expected = (pixels[:, channel] - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        assert torch.allclose(tokens[..., channel], expected.flatten(1), atol=1e-6)
    grey = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert float(student(grey).abs().max()) == 0


def test_normalisation_is_fp32_and_the_backbone_gets_its_own_type() -> None:
    student = Student(Seen().bfloat16(), width=3, grid=(4, 4), prefix_tokens=0, image_size=4)
    pixels = torch.rand(1, 3, 4, 4)
    student(pixels)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.equal(student.backbone.images, ((pixels - mean) / std).bfloat16())


@OWN
def test_the_state_dict_is_the_backbones_alone(geometry: Geometry) -> None:
    student = build_student(geometry)
    assert {name.removeprefix("backbone.") for name in student.state_dict()} == set(student.backbone.state_dict())


@OWN
def test_tokens_have_the_layout_that_is_promised(geometry: ViTGeometry | SwinV2Geometry) -> None:
    student = build_student(geometry)
    rows = student.prefix_tokens + student.grid[0] * student.grid[1]
    assert student(torch.rand(2, 3, 32, 32)).shape == (2, rows, student.width)
    assert (student.width, student.grid, student.prefix_tokens) == (
        geometry.width,
        geometry.grid,
        geometry.prefix_tokens,
    )


@OWN
def test_a_seed_decides_every_weight_and_asks_no_other_generator(geometry: Geometry) -> None:
    torch.manual_seed(3)
    undisturbed = torch.rand(4)
    torch.manual_seed(3)
    first = build_student(geometry, seed=1)
    assert torch.equal(torch.rand(4), undisturbed)
    again, other = build_student(geometry, seed=1), build_student(geometry, seed=2)
    weights = [dict(student.backbone.named_parameters()) for student in (first, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    matrices = [name for name in weights[0] if name.endswith("proj.weight")]
    assert matrices
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in matrices)


@pytest.mark.parametrize(
    ("name", "size", "width", "grid", "prefix_tokens", "mean"),
    [
        ("swinv2_cr_tiny_224", 64, 768, (2, 2), 0, IMAGENET_MEAN),  # gives (B, C, h, w)
        ("swinv2_tiny_window8_256", 64, 768, (2, 2), 0, IMAGENET_MEAN),  # gives (B, h, w, C)
        ("vit_tiny_patch16_224", 48, 192, (3, 3), 1, (0.5, 0.5, 0.5)),  # gives tokens, CLS first
        ("resnet10t", None, 512, (6, 6), 0, IMAGENET_MEAN),  # convolutional, of its own 176 pixels
    ],
)
def test_any_network_of_timms_is_a_student(
    name: str, size: int | None, width: int, grid: tuple[int, int], prefix_tokens: int, mean: tuple[float, ...]
) -> None:
    student = build_student(TimmGeometry(name, size), drop_path=0.1).eval()
    assert (student.width, student.grid, student.prefix_tokens) == (width, grid, prefix_tokens)
    assert student.mean.flatten().tolist() == pytest.approx(mean)
    assert student.image_size == (size or 176)
    pixels = torch.rand(1, 3, student.image_size, student.image_size)
    with torch.no_grad():
        tokens = student(pixels)
        maps = student.backbone((pixels - student.mean) / student.std)
    assert tokens.shape == (1, prefix_tokens + grid[0] * grid[1], width)
    if maps.ndim == 4:
        channels_last = maps if maps.shape[-1] == width else maps.permute(0, 2, 3, 1)
        assert torch.equal(tokens[0, grid[1]], channels_last[0, 1, 0])  # the second row's first token


def test_drop_path_of_timms_networks_reads_the_table() -> None:
    student = build_student(TimmGeometry("vit_tiny_patch16_224", 32), drop_path=0.9)
    assert student.drop_path_sites == 22  # two a block; the first block drops nothing
    kept, dropped = (student(torch.ones(1, 3, 32, 32), torch.full((22, 1), draw)) for draw in (1.0, 0.0))
    assert not torch.allclose(kept, dropped)


@pytest.mark.parametrize("name", ["vit_tinny", "deit_tiny_distilled_patch16_224"])  # unknown; two outputs
def test_what_cannot_be_a_student_is_the_users_mistake(name: str) -> None:
    with pytest.raises(UserError, match=f"timm's '{name}' cannot be a student here"):
        build_student(TimmGeometry(name))


def test_timms_network_takes_its_own_keywords() -> None:
    arguments = {"embed_dim": 16, "depth": 3, "num_heads": 2, "use_abs_pos_emb": True, "use_rel_pos_bias": False}
    student = build_student(TimmGeometry("beit_base_patch16_224", 32, arguments))
    names = dict(student.backbone.named_parameters()).keys()
    assert (student.width, student.grid, student.prefix_tokens) == (16, (2, 2), 1)
    assert "pos_embed" in names
    assert not any("relative_position_bias" in name for name in names)
    assert {name.split(".")[1] for name in names if name.startswith("blocks")} == {"0", "1", "2"}
    swin = {"embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4}
    assert build_student(TimmGeometry("swinv2_tiny_window8_256", 64, swin)).grid == (8, 8)


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("beit_base_patch16_224", {"depht": 3}, "timm's beit_base_patch16_224, has no depht; did you mean 'depth'?"),
        ("beit_base_patch16_224", {"a": 1, "depth": 2, "b": 1}, "has no a, b; it has patch_size, in_chans, embed_dim"),
        ("resnet10t", {"pretrained": True}, "ResNet, timm's resnet10t, has no pretrained"),  # it would download
        ("resnet10t", {"features_only": True}, "has no features_only"),
        ("beit_base_patch16_224", {"num_heads": 0}, "cannot be a student here: ZeroDivisionError"),
        ("beit_base_patch16_224", {"embed_dim": "x"}, "cannot be a student here: TypeError"),
    ],
)  # fmt: skip
def test_keywords_that_timms_network_has_not_are_named(name: str, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        build_student(TimmGeometry(name, None, arguments))
    assert told in str(error.value)


def test_timms_networks_are_built_on_the_meta_device_too() -> None:
    student = build_student(TimmGeometry("swin_tiny_patch4_window7_224"), device="meta")
    assert all(parameter.is_meta for parameter in student.backbone.parameters())
    assert (student.grid, student.width) == ((7, 7), 768)


def test_a_convolutional_network_takes_any_size() -> None:
    student = build_student(TimmGeometry("resnet10t", 64))
    assert (student.grid, student.prefix_tokens, student.width) == ((2, 2), 0, 512)


def test_a_network_of_ones_own_cannot_be_built_from_a_name() -> None:
    with pytest.raises(UserError, match=r"give the network to fdscale\.train\.distill"):
        build_student(OwnGeometry())


def groups_of(name: str, target_width: int) -> tuple[set[str], set[str]]:
    """Names of decayed and undecayed parameters of a whole distiller, as a program groups them."""
    student = build_student(STUDENTS[name], device="meta")
    layout = TokenLayout(student.grid, student.prefix_tokens)
    distiller = Distiller(student, student.width, target_width, TargetMaker(layout, layout), beta=2.0)
    undecayed = {f"student.backbone.{parameter}" for parameter in student.undecayed_parameters()}
    names = {id(parameter): parameter_name for parameter_name, parameter in distiller.named_parameters()}
    decayed, other = parameter_groups(distiller, 0.05, undecayed)
    return ({names[id(p)] for p in decayed["params"]}, {names[id(p)] for p in other["params"]})


def test_vit_b_decays_as_the_official_implementation_does() -> None:
    decayed, undecayed = groups_of("vit_b16", 768)
    assert (len(decayed), len(undecayed)) == (51, 137)
    assert "student.backbone.rel_pos_bias.relative_position_bias_table" in decayed
    assert "projector.weight" in decayed
    assert {"student.backbone.cls_token", "projector.bias", "student.backbone.norm.weight"} <= undecayed


def test_swin_v2_does_not_decay_what_makes_its_position_bias_and_temperature() -> None:
    decayed, undecayed = groups_of("swinv2_b", 1024)
    assert len(decayed) == 1 + 3 + 24 * 4 + 1  # patch convolution, mergings, four matrices a block, projector
    for part in ("cpb_mlp.0.weight", "cpb_mlp.2.weight", "logit_scale", "q_bias"):
        assert f"student.backbone.layers.2.blocks.3.attn.{part}" in undecayed


def test_timms_networks_follow_their_own_rule() -> None:
    vit = build_student(TimmGeometry("vit_tiny_patch16_224", 32))
    assert vit.undecayed_parameters() >= {"pos_embed", "cls_token"}
    assert build_student(TimmGeometry("resnet10t")).undecayed_parameters() == set()


@OWN
def test_activation_checkpointing_computes_the_blocks_again(geometry: Geometry) -> None:
    counts = {}
    for mode in ("none", "blocks", "offload"):
        student, calls = build_student(geometry), []
        set_activation_checkpointing(student, mode)
        norm = next(module for name, module in student.named_modules() if name.endswith("norm1"))
        norm.register_forward_hook(lambda *call, calls=calls: calls.append(1))
        student(torch.rand(1, 3, 32, 32)).sum().backward()
        counts[mode] = len(calls)
    assert counts == {"none": 1, "blocks": 2, "offload": 2}


def test_a_network_that_cannot_recompute_is_refused() -> None:
    student = Student(Seen(), width=3, grid=(4, 4), prefix_tokens=0, image_size=4)
    set_activation_checkpointing(student, "none")
    with pytest.raises(UserError, match="cannot checkpoint its blocks; use 'none'"):
        set_activation_checkpointing(student, "blocks")
