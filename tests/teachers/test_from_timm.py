from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.teachers.layouts import to_timm
from fdscale.teachers.table import TEACHERS, teacher_geometry
from fdscale.teachers.teacher import Teacher, build_teacher
from fdscale.teachers.weights import load_strictly
from fdscale.tokens import as_tokens

Shape = dict[str, int | float | list[int]]


def built(name: str, weights: str = "random", shape: Shape | None = None, layer: int | None = None) -> Teacher:
    return build_teacher(teacher_geometry(name, weights, None, shape, layer), weights)


def tiny(name: str) -> Shape:
    if TEACHERS[name].family == "swin":
        return {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64}
    size = 4 * TEACHERS[name].patch_size
    return {"embed_dim": 48, "depth": 2, "num_heads": 4, "image_size": size, "mlp_ratio": 2.3}


def whitened(teacher: Teacher, pixels: Tensor) -> Tensor:
    tokens = teacher(pixels)
    return F.layer_norm(tokens, tokens.shape[-1:])


def noisy(model: nn.Module) -> nn.Module:
    """Every parameter away from its start, where norms are ones and LayerScale is nearly nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


# --- the table's --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixture", "name"), [("clip", "clip_vit_b16"), ("dino", "dino_vit_b16"), ("esvit", "esvit_swin_b")]
)
def test_golden_targets(fixture: str, name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    golden = request.getfixturevalue(fixture)
    torch.save(golden.state, tmp_path / "teacher.pth")
    teacher = built(name, str(tmp_path / "teacher.pth"), golden.geometry)
    torch.testing.assert_close(whitened(teacher, golden.pixels), golden.target, atol=1e-5, rtol=0)
    assert golden.target.shape[1:] == (
        teacher.grid[0] * teacher.grid[1] + teacher.prefix_tokens,
        teacher.width,
    )


def test_a_plain_gelu_is_caught_by_the_golden_target(clip, tmp_path: Path) -> None:
    teacher = built("clip_vit_b16", shape=clip.geometry)
    shape = {**clip.geometry, "img_size": clip.geometry["image_size"], "num_classes": 0}
    del shape["image_size"]
    plain = timm.create_model("vit_base_patch16_clip_224.openai", **shape)
    load_strictly(plain, to_timm(clip.state, plain, resample=False), tmp_path / "x", "plain GELU")
    plain.reset_classifier(0, "")
    teacher.final_norm, teacher.backbone = plain.norm, plain.eval()
    plain.norm = torch.nn.Identity()
    assert (whitened(teacher, clip.pixels) - clip.target).abs().max() > 1e-2


@pytest.mark.parametrize("name", TEACHERS)
def test_every_row_runs_at_any_size(name: str) -> None:
    spec = teacher_geometry(name, overrides=tiny(name))
    teacher = build_teacher(spec, "random")
    noisy(teacher)
    pixels = torch.rand(1, 3, 40, 40)
    tokens = teacher(pixels)
    assert tokens.shape == (1, spec.prefix_tokens + spec.grid[0] * spec.grid[1], spec.width)
    assert torch.isfinite(tokens).all()
    assert torch.equal(tokens, teacher.train()(pixels))
    assert not torch.allclose(tokens, teacher(1 - pixels))


@pytest.mark.parametrize("name", ["dinov3_vit_s16", "eva02_clip_l14"])
def test_half_precision_leaves_the_rotary_positions_exact(name: str) -> None:
    spec = teacher_geometry(name, overrides=tiny(name))
    full, half = build_teacher(spec, "random"), build_teacher(spec, "random", dtype=torch.bfloat16)
    buffers = dict(half.backbone.rope.named_buffers())
    assert buffers
    for key, buffer in full.backbone.rope.named_buffers():
        assert torch.equal(buffers[key], buffer)
    assert {parameter.dtype for parameter in half.backbone.parameters()} == {torch.bfloat16}
    assert half(torch.rand(1, 3, 32, 32)).dtype == torch.float32


# --- an earlier layer -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("clip_vit_b16", "blocks"),
        ("eva02_clip_e14", "blocks"),
        ("siglip2_vit_b16", "blocks"),
        ("dinov2_vit_g14_reg", "blocks"),
        ("dinov3_vit_s16", "blocks"),
        ("esvit_swin_b", "layers"),
    ],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_an_earlier_layers_tokens_are_those_that_a_hook_sees(name: str, layers: str, layer: int, tmp_path) -> None:
    whole = built(name, shape=tiny(name))
    noisy(whole)
    norm = "" if whole.final_norm is None else "norm."
    state = {**whole.backbone.state_dict(), **{norm + k: v for k, v in whole.final_norm.state_dict().items()}}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "whole.safetensors")
    seen: list[Tensor] = []
    getattr(whole.backbone, layers)[layer].register_forward_hook(lambda module, inputs, output: seen.append(output))
    pixels = torch.rand(2, 3, 64, 64)
    last = whole(pixels)
    cut = built(name, str(tmp_path / "whole.safetensors"), tiny(name), layer)
    tokens = as_tokens(seen[0], cut.width)
    wanted = tokens if name == "esvit_swin_b" and layer == 0 else whole.final_norm(tokens)
    torch.testing.assert_close(cut(pixels), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(cut(pixels), last) == (layer == 1)  # the last layer's tokens are the teacher's own
    assert len(getattr(cut.backbone, layers)) == layer + 1


def test_the_third_stage_of_esvit_in_full_size() -> None:
    teacher = build_teacher(teacher_geometry("esvit_swin_b", layer=2), "random", device="meta")
    tokens = as_tokens(teacher.backbone(torch.empty(1, 3, 224, 224, device="meta")), teacher.width)
    assert (tokens.shape, teacher.grid) == ((1, 196, 512), (14, 14))


@pytest.mark.parametrize(("name", "shape"), [("esvit_swin_b", tiny("esvit_swin_b")), ("timm:test_convnext", {})])
def test_an_earlier_stage_without_a_norm_takes_either_setting_of_it(name: str, shape: Shape) -> None:
    spec = teacher_geometry(name, overrides=shape, layer=0)
    pixels = torch.rand(1, 3, 64, 64)
    with_norm, without = (build_teacher(spec, "random", after_norm=after_norm) for after_norm in (True, False))
    assert torch.equal(with_norm(pixels), without(pixels))


@pytest.mark.parametrize(
    ("name", "layers", "width", "normed"),
    [
        ("test_vit", "blocks", 64, True),
        ("test_vit2", "blocks", 64, True),  # the norm of timm's pooling, which a teacher applies to each token
        ("test_convnext", "stages", 32, False),
    ],
)
def test_an_earlier_layer_of_any_timm_model(name: str, layers: str, width: int, normed: bool, tmp_path: Path) -> None:
    uncut: nn.Module = noisy(timm.create_model(name, num_classes=0))
    save_file(uncut.state_dict(), tmp_path / "timm.safetensors")
    seen: list[Tensor] = []
    getattr(uncut, layers)[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    teacher = built(f"timm:{name}", str(tmp_path / "timm.safetensors"), layer=1)
    pixels = torch.rand(1, 3, teacher.image_size, teacher.image_size)
    uncut(teacher.prepare(pixels))
    tokens = as_tokens(seen[0], width)
    norm = uncut.norm if isinstance(getattr(uncut, "norm", None), nn.LayerNorm) else getattr(uncut, "fc_norm", None)
    torch.testing.assert_close(teacher(pixels), norm(tokens) if normed else tokens, atol=1e-5, rtol=1e-5)
    assert (teacher.width, teacher.grid[0] ** 2 + teacher.prefix_tokens) == (width, tokens.shape[1])
    size, whole = (sum(p.numel() for p in network.parameters()) for network in (teacher, uncut))
    assert size < 0.6 * whole


@pytest.mark.parametrize(
    ("name", "layer", "told"),
    [
        ("test_vit", 6, r"allowed: 0 to 5; timm:test_vit has 6 layers"),
        ("res2net50_26w_4s", 9, r"allowed: 0 to 4"),
        ("xcit_nano_12_p16_224", 1, "works on after layer 1"),  # its class attention follows every block
    ],
)
def test_a_layer_that_cannot_be_taken_is_told(name: str, layer: int, told: str) -> None:
    with pytest.raises(UserError, match=rf"teacher\.layer: .*{told}"):
        built(f"timm:{name}", layer=layer)


# --- any of timm's --------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
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
    name: str, width: int, grid: tuple[int, int], prefix_tokens: int, has_norm: bool, device: str
) -> None:
    teacher = build_teacher(teacher_geometry(name), "random", device=device)
    assert (teacher.width, teacher.grid, teacher.prefix_tokens) == (width, grid, prefix_tokens)
    assert (teacher.final_norm is not None) == has_norm
    assert {parameter.device.type for parameter in teacher.parameters()} == {device}
    if device == "meta":
        return
    model = timm.create_model(name.removeprefix("timm:"), num_classes=0).eval()
    model.reset_classifier(0, "")
    norm = {} if teacher.final_norm is None else teacher.final_norm.state_dict()
    own = "norm" if "norm.weight" in model.state_dict() else "fc_norm"
    model.load_state_dict({**teacher.backbone.state_dict(), **{f"{own}.{k}": v for k, v in norm.items()}})
    images = torch.rand(2, 3, 160, 160)
    tokens = as_tokens(model(teacher.prepare(images)), width)
    torch.testing.assert_close(teacher(images), tokens, atol=1e-5, rtol=1e-5)


def test_a_timm_model_loads_a_local_file_with_its_head_and_another_size(tmp_path: Path) -> None:
    model = noisy(timm.create_model("test_vit", num_classes=7))
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    weights = str(tmp_path / "vit.safetensors")
    same = build_teacher(teacher_geometry("timm:test_vit", weights), weights)
    larger = build_teacher(teacher_geometry("timm:test_vit", weights, 192), weights)
    pixels = torch.rand(1, 3, 160, 160)
    torch.testing.assert_close(same(pixels), model.forward_features(same.prepare(pixels)), atol=1e-5, rtol=1e-5)
    assert (larger.grid, larger.image_size) == ((12, 12), 192)
    # a prefix position is not resampled
    assert torch.equal(larger.backbone.pos_embed[:, 0], model.pos_embed[:, 0])


def test_positions_are_resampled_only_for_another_image_size(dino, tmp_path: Path) -> None:
    torch.save(dino.state, tmp_path / "dino.pth")
    teacher = built("dino_vit_b16", str(tmp_path / "dino.pth"), {**dino.geometry, "image_size": 64})
    assert teacher(dino.pixels).shape == (4, 65, 48)
    with pytest.raises(UserError, match=r"pos_embed \(1, 17, 48\) where the network has \(1, 785, 48\)"):
        built("dino_vit_b16", str(tmp_path / "dino.pth"), {**dino.geometry, "image_size": 224})


def test_swin_bias_tables_are_resampled_with_the_window(esvit, tmp_path: Path) -> None:
    torch.save(esvit.state, tmp_path / "esvit.pth")
    teacher = built("esvit_swin_b", str(tmp_path / "esvit.pth"), {**esvit.geometry, "window_size": 8})
    assert teacher(esvit.pixels).shape == (4, 64, 32)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("vit_tiny_patch16_242", r"no model 'vit_tiny_patch16_242'; did you mean"),
        ("inception_next_atto", r"timm:inception_next_atto gives no tokens \(Cannot disable pooling\)"),
        ("vit_base_patch16_clip_224.openai", r"use timm:vit_base_patch16_clip_quickgelu_224\.openai"),
        ("vit_huge_patch14_clip_224.dfn5b", r"use timm:vit_huge_patch14_clip_quickgelu_224\.dfn5b"),
    ],
)
def test_unknown_and_misleading_timm_names_are_told(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        built(f"timm:{name}")


def test_a_plain_gelu_is_refused_whatever_file_is_given(clip, tmp_path: Path) -> None:
    original = {**clip.state, "input_resolution": torch.tensor(32)}  # which no other CLIP's files carry
    torch.save(original, tmp_path / "ViT-B-16.pt")
    weights = str(tmp_path / "ViT-B-16.pt")
    with pytest.raises(UserError, match=r"timm:vit_base_patch16_clip_224\.openai were trained with QuickGELU"):
        built("timm:vit_base_patch16_clip_224.openai", weights)
    with pytest.raises(UserError, match=r"ViT-B-16\.pt is a file of OpenAI's CLIP, trained with QuickGELU"):
        built("laion_clip_vit_b16", weights, clip.geometry)
    assert built("clip_vit_b16", weights, clip.geometry).width == 64


def test_overrides_that_timm_refuses_are_told() -> None:
    with pytest.raises(UserError, match=r"cannot build test_resnet .*check the overrides"):
        built("timm:test_resnet", shape={"window_size": 3})
