from __future__ import annotations

import socket
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fdscale.config.errors import UserError
from fdscale.teachers import from_timm
from fdscale.teachers.table import TEACHERS
from fdscale.teachers.teacher import Teacher, as_tokens, build_teacher
from fdscale.teachers.weights import load_strictly, to_timm_names


def whitened(teacher: Teacher, pixels: torch.Tensor) -> torch.Tensor:
    tokens = teacher(pixels)
    return F.layer_norm(tokens, tokens.shape[-1:])


@pytest.mark.parametrize(
    ("fixture", "name"), [("clip", "clip_vit_b16"), ("dino", "dino_vit_b16"), ("esvit", "esvit_swin_b")]
)
def test_golden_targets(fixture: str, name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    golden = request.getfixturevalue(fixture)
    torch.save(golden.state, tmp_path / "teacher.pth")
    teacher = build_teacher(name, str(tmp_path / "teacher.pth"), geometry_overrides=golden.geometry)
    torch.testing.assert_close(whitened(teacher, golden.pixels), golden.target, atol=1e-5, rtol=0)
    assert golden.target.shape[1:] == (
        teacher.grid[0] * teacher.grid[1] + teacher.prefix_tokens,
        teacher.width,
    )


def test_a_plain_gelu_is_caught_by_the_golden_target(clip, tmp_path: Path) -> None:
    teacher = build_teacher("clip_vit_b16", "random", geometry_overrides=clip.geometry)
    shape = {**clip.geometry, "img_size": clip.geometry["image_size"], "num_classes": 0}
    del shape["image_size"]
    plain = timm.create_model("vit_base_patch16_clip_224.openai", **shape)
    load_strictly(plain, to_timm_names(clip.state), tmp_path / "x", "plain GELU")
    plain.reset_classifier(0, "")
    teacher.final_norm, teacher.backbone = plain.norm, plain.eval()
    plain.norm = torch.nn.Identity()
    assert (whitened(teacher, clip.pixels) - clip.target).abs().max() > 1e-2


@pytest.mark.parametrize("name", [n for n, spec in TEACHERS.items() if spec.source == "timm"])
def test_full_size_networks_have_the_tables_tokens(name: str) -> None:
    spec = TEACHERS[name]
    with torch.device("meta"):
        model = timm.create_model(spec.model, num_classes=0, **from_timm._arguments(spec)).eval()
        model.reset_classifier(0, "")
        tokens = model(torch.empty(1, 3, 224, 224)).flatten(1, -2)
    assert tokens.shape[1:] == (spec.grid[0] * spec.grid[1] + spec.prefix_tokens, spec.width)


def test_esvit_has_no_hub_weights() -> None:
    with pytest.raises(UserError, match=r"no hub carries.*checkpoint file"):
        build_teacher("esvit_swin_b")


@pytest.mark.parametrize(
    ("name", "width", "grid", "prefix_tokens", "has_norm"),
    [
        ("timm:test_vit", 64, (10, 10), 1, True),
        ("timm:test_vit2", 64, (10, 10), 1, True),
        ("timm:test_vit4", 96, (10, 10), 1, False),  # an RMSNorm, which stays inside
        ("timm:test_convnext", 64, (5, 5), 0, False),
        ("timm:test_resnet", 96, (5, 5), 0, False),
    ],
)
def test_any_timm_model_is_a_teacher(
    name: str, width: int, grid: tuple[int, int], prefix_tokens: int, has_norm: bool
) -> None:
    teacher = build_teacher(name, "random")
    assert (teacher.width, teacher.grid, teacher.prefix_tokens) == (width, grid, prefix_tokens)
    assert (teacher.final_norm is not None) == has_norm
    model = timm.create_model(name.removeprefix("timm:"), num_classes=0).eval()
    model.reset_classifier(0, "")
    norm = {} if teacher.final_norm is None else teacher.final_norm.state_dict()
    own = "norm" if "norm.weight" in model.state_dict() else "fc_norm"
    model.load_state_dict({**teacher.backbone.state_dict(), **{f"{own}.{k}": v for k, v in norm.items()}})
    images = torch.rand(2, 3, 160, 160)
    tokens = as_tokens(model(teacher.prepare(images)), width)
    torch.testing.assert_close(teacher(images), tokens, atol=1e-5, rtol=1e-5)


def test_a_timm_model_loads_a_local_file_with_its_head_and_another_size(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=7)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    weights = str(tmp_path / "vit.safetensors")
    same, larger = build_teacher("timm:test_vit", weights), build_teacher("timm:test_vit", weights, 192)
    pixels = torch.rand(1, 3, 160, 160)
    model.eval()
    torch.testing.assert_close(same(pixels), model.forward_features(same.prepare(pixels)), atol=1e-5, rtol=1e-5)
    assert (larger.grid, larger.image_size) == ((12, 12), 192)
    # a prefix position is not resampled
    assert torch.equal(larger.backbone.pos_embed[:, 0], model.pos_embed[:, 0])


def test_positions_are_resampled_only_for_another_image_size(dino, tmp_path: Path) -> None:
    torch.save(dino.state, tmp_path / "dino.pth")
    shape = {**dino.geometry, "image_size": 64}
    teacher = build_teacher("dino_vit_b16", str(tmp_path / "dino.pth"), geometry_overrides=shape)
    assert teacher(dino.pixels).shape == (4, 65, 48)
    at_224 = {**dino.geometry, "image_size": 224}
    with pytest.raises(UserError, match=r"pos_embed \(1, 17, 48\) where the network has \(1, 785, 48\)"):
        build_teacher("dino_vit_b16", str(tmp_path / "dino.pth"), geometry_overrides=at_224)


def test_swin_bias_tables_are_resampled_with_the_window(esvit, tmp_path: Path) -> None:
    torch.save(esvit.state, tmp_path / "esvit.pth")
    shape = {**esvit.geometry, "window_size": 8}
    teacher = build_teacher("esvit_swin_b", str(tmp_path / "esvit.pth"), geometry_overrides=shape)
    assert teacher(esvit.pixels).shape == (4, 64, 32)


def test_unknown_and_misleading_timm_names_are_told() -> None:
    with pytest.raises(UserError, match=r"no model 'vit_tiny_patch16_242'; did you mean"):
        build_teacher("timm:vit_tiny_patch16_242", "random")
    with pytest.raises(UserError, match=r"timm:vit_base_patch16_clip_quickgelu_224\.openai"):
        build_teacher("timm:vit_base_patch16_clip_224.openai")


def test_overrides_that_timm_refuses_are_told() -> None:
    with pytest.raises(UserError, match=r"cannot build test_resnet .*check the overrides"):
        build_teacher("timm:test_resnet", "random", geometry_overrides={"window_size": 3})


def test_an_unreachable_hub_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refused)
    with pytest.raises(UserError, match=r"hub .*teacher\.weights=FILE"):
        build_teacher("timm:test_vit")
