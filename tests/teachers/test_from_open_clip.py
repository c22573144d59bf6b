from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fdscale.config.errors import UserError
from fdscale.teachers.teacher import build_teacher

NAME = "clip_vit_b16_open_clip"


def test_golden_target_and_timms_tokens(clip, tmp_path: Path) -> None:
    torch.save(clip.state, tmp_path / "clip.pt")
    teacher, timms = (
        build_teacher(name, str(tmp_path / "clip.pt"), geometry_overrides=clip.geometry)
        for name in (NAME, "clip_vit_b16")
    )
    tokens = teacher(clip.pixels)
    torch.testing.assert_close(F.layer_norm(tokens, (64,)), clip.target, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens, timms(clip.pixels), atol=1e-5, rtol=0)
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (teacher, timms)]
    assert sizes[0] == sizes[1]  # neither text tower nor projection


def test_positions_follow_another_image_size_as_in_timm(clip, tmp_path: Path) -> None:
    torch.save(clip.state, tmp_path / "clip.pt")
    shape = {**clip.geometry, "image_size": 64}
    teacher, timms = (
        build_teacher(name, str(tmp_path / "clip.pt"), geometry_overrides=shape) for name in (NAME, "clip_vit_b16")
    )
    torch.testing.assert_close(teacher(clip.pixels), timms(clip.pixels), atol=1e-5, rtol=0)


def test_another_familys_file_is_told(dino, tmp_path: Path) -> None:
    torch.save(dino.state, tmp_path / "dino.pth")
    with pytest.raises(UserError, match=r"dino\.pth does not fit open_clip's ViT-B-16-quickgelu"):
        build_teacher(NAME, str(tmp_path / "dino.pth"), geometry_overrides=dino.geometry)
