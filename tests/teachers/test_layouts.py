from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.teachers.layouts import to_open_clip, to_timm
from fdscale.teachers.weights import load_strictly

SHAPE = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "num_classes": 0}
SWIN = {"embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "patch_size": 4, "num_classes": 0}


def network(name: str, size: int = 32, **arguments: object) -> nn.Module:
    shape = SWIN if name.startswith("swin") else SHAPE
    model = timm.create_model(name, img_size=size, **{**shape, **arguments})
    model.reset_classifier(0, "")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_clip_quickgelu_224",
        "eva02_large_patch14_clip_224",
        "eva02_enormous_patch14_clip_224",
        "vit_base_patch16_siglip_gap_224",
        "vit_base_patch16_224",
        "vit_base_patch14_reg4_dinov2",
        "vit_giant_patch14_dinov2",
        "vit_large_patch16_dinov3_qkvb",
        "vit_huge_plus_patch16_dinov3_qkvb",
        "swin_base_patch4_window7_224",
        "swinv2_base_window8_256",
    ],
)
def test_a_file_in_timms_names_stays_as_it_is(name: str) -> None:
    model = network(name)
    state = model.state_dict()
    mapped = to_timm(state, model, resample=False)
    assert list(mapped) == list(state)
    assert all(mapped[key] is value for key, value in state.items())


@pytest.mark.parametrize(
    ("name", "prefix_tokens"),
    [
        ("vit_base_patch16_clip_224", 1),
        ("vit_base_patch16_siglip_gap_224", 0),
        ("vit_base_patch14_reg4_dinov2", 0),
        ("eva02_enormous_patch14_clip_224", 1),
    ],
)
def test_positions_are_fitted_to_another_size_only_where_asked(name: str, prefix_tokens: int, tmp_path: Path) -> None:
    state, larger = network(name, 32).state_dict(), network(name, 64)
    with pytest.raises(UserError, match=r"1 of another shape \(pos_embed .*teacher.geometry to the file's shape"):
        load_strictly(larger, to_timm(state, larger, resample=False), tmp_path / "file.pth", name)
    positions = to_timm(state, larger, resample=True)["pos_embed"]
    assert torch.equal(positions[:, :prefix_tokens], state["pos_embed"][:, :prefix_tokens])
    old = state["pos_embed"][:, prefix_tokens:].unflatten(1, (4, 4)).movedim(-1, 1)
    fitted = F.interpolate(old, (8, 8), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(positions[:, prefix_tokens:], fitted.movedim(1, -1).flatten(1, 2))
    load_strictly(larger, to_timm(state, larger, resample=True), tmp_path / "file.pth", name)


def test_a_patch_of_another_size_is_never_fitted(tmp_path: Path) -> None:
    state, coarser = network("vit_base_patch16_224").state_dict(), network("vit_base_patch16_224", 64, patch_size=16)
    with pytest.raises(UserError, match=r"1 of another shape \(patch_embed\.proj\.weight"):
        load_strictly(coarser, to_timm(state, coarser, resample=True), tmp_path / "file.pth", "vit")


def test_positions_that_are_no_square_stay(tmp_path: Path) -> None:
    model = network("vit_base_patch16_224", 64)
    state = {"pos_embed": torch.ones(1, 13, 48)}
    assert to_timm(state, model, resample=True)["pos_embed"].shape == (1, 13, 48)


def test_swins_bias_tables_are_fitted_only_where_asked(tmp_path: Path) -> None:
    state = network("swin_base_patch4_window7_224", 64, window_size=4).state_dict()
    wider = network("swin_base_patch4_window7_224", 64, window_size=8)
    with pytest.raises(UserError, match=r"3 of another shape \(layers\.0\.blocks\.0\.attn\.relative_position_bias"):
        load_strictly(wider, to_timm(state, wider, resample=False), tmp_path / "file.pth", "swin")
    load_strictly(wider, to_timm(state, wider, resample=True), tmp_path / "file.pth", "swin")


def test_every_merging_moves_to_the_next_stage() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=16, num_heads=(1, 2, 4, 8), num_classes=0)
    merged = {f"layers.{stage}.downsample.reduction.weight": torch.ones(stage + 1) for stage in range(3)}
    mapped = to_timm(merged, model, resample=False)
    assert {key: len(value) for key, value in mapped.items()} == {
        f"layers.{stage + 1}.downsample.reduction.weight": stage + 1 for stage in range(3)
    }


def test_the_files_state_is_left_alone() -> None:
    model = network("vit_large_patch16_dinov3_qkvb")
    state: dict[str, Tensor] = {
        "rope_embed.periods": torch.ones(4),
        "storage_tokens": torch.ones(1, 4, 48),
        "blocks.0.attn.qkv.bias": torch.ones(144),
    }
    before = dict(state)
    mapped = to_timm(state, model, resample=False)
    assert state == before
    assert {"reg_token", "blocks.0.attn.q_bias", "blocks.0.attn.k_bias", "blocks.0.attn.v_bias"} <= mapped.keys()


def test_open_clips_tower_is_cut_out_and_its_positions_fitted(clip) -> None:
    text = {"positional_embedding": torch.ones(77, 5), "transformer.resblocks.0.ln_1.weight": torch.ones(5)}
    tower = to_open_clip({**clip.state, **text})
    assert tower["positional_embedding"].shape == (17, 64)
    assert tower.keys() == {key.removeprefix("visual.") for key in clip.state} - {"proj"}
    assert to_open_clip(clip.state, (4, 4))["positional_embedding"] is clip.state["visual.positional_embedding"]
    fitted = to_open_clip(clip.state, (8, 8))["positional_embedding"]
    assert fitted.shape == (65, 64)
    assert torch.equal(fitted[0], clip.state["visual.positional_embedding"][0])
