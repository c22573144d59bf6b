from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.teachers.table import teacher_geometry
from fdscale.teachers.teacher import Teacher, build_teacher

NAME = "clip_vit_b16_open_clip"
NAMES = (NAME, "clip_vit_b16")


def built(name: str, weights: Path, shape: dict[str, int | list[int]], layer: int | None = None) -> Teacher:
    return build_teacher(teacher_geometry(name, str(weights), None, shape, layer), str(weights))


def test_golden_target_and_timms_tokens(clip, tmp_path: Path) -> None:
    torch.save(clip.state, tmp_path / "clip.pt")
    teacher, timms = (built(name, tmp_path / "clip.pt", clip.geometry) for name in NAMES)
    tokens = teacher(clip.pixels)
    torch.testing.assert_close(F.layer_norm(tokens, (64,)), clip.target, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens, timms(clip.pixels), atol=1e-5, rtol=0)
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (teacher, timms)]
    assert sizes[0] == sizes[1]  # neither text tower nor projection


def test_positions_follow_another_image_size_as_in_timm(clip, tmp_path: Path) -> None:
    torch.save(clip.state, tmp_path / "clip.pt")
    shape = {**clip.geometry, "image_size": 64}
    teacher, timms = (built(name, tmp_path / "clip.pt", shape) for name in NAMES)
    torch.testing.assert_close(teacher(clip.pixels), timms(clip.pixels), atol=1e-5, rtol=0)


def test_an_earlier_blocks_tokens_are_those_that_a_hook_sees(clip, tmp_path: Path) -> None:
    torch.save(clip.state, tmp_path / "clip.pt")
    whole, cut = (built(NAME, tmp_path / "clip.pt", clip.geometry, layer) for layer in (None, 0))
    seen: list[Tensor] = []
    whole.backbone.transformer.resblocks[0].register_forward_hook(lambda block, inputs, output: seen.append(output))
    last = whole(clip.pixels)
    assert whole.final_norm is not None
    torch.testing.assert_close(cut(clip.pixels), whole.final_norm(seen[0]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(cut(clip.pixels), last, atol=1e-2)
    assert len(cut.backbone.transformer.resblocks) == 1


def test_another_familys_file_is_told(dino, tmp_path: Path) -> None:
    torch.save(dino.state, tmp_path / "dino.pth")
    with pytest.raises(UserError, match=r"dino\.pth does not fit open_clip's ViT-B-16-quickgelu"):
        built(NAME, tmp_path / "dino.pth", dino.geometry)


def test_a_shape_that_open_clip_refuses_is_told() -> None:
    spec = teacher_geometry(NAME, overrides={"embed_dim": 2**40, "num_heads": 2**40})
    with pytest.raises(UserError, match=r"open_clip cannot build ViT-B-16-quickgelu"):
        build_teacher(spec, "random", device="meta")
