from __future__ import annotations

import subprocess
import sys

import pytest

from fdscale.config.errors import UserError
from fdscale.teachers.table import TEACHERS, UnbuiltTeacher, teacher_geometry


@pytest.mark.parametrize(
    ("name", "width", "grid", "prefix_tokens"),
    [
        ("clip_vit_b16", 768, (14, 14), 1),
        ("clip_vit_l14", 1024, (16, 16), 1),
        ("clip_vit_b16_open_clip", 768, (14, 14), 1),
        ("dino_vit_b16", 768, (14, 14), 1),
        ("deit_b16", 768, (14, 14), 1),
        ("esvit_swin_b", 1024, (7, 7), 0),
    ],
)
def test_the_table_knows_each_teachers_tokens(name: str, width: int, grid: tuple[int, int], prefix_tokens: int) -> None:
    spec = teacher_geometry(name)
    assert (spec.width, spec.grid, spec.prefix_tokens) == (width, grid, prefix_tokens)
    assert spec.licence


def test_every_clip_teacher_is_a_quickgelu_variant() -> None:
    assert all("quickgelu" in spec.model for spec in TEACHERS.values() if spec.family == "clip")


def test_the_table_leaves_torch_unimported() -> None:
    code = "import sys, fdscale.teachers.table; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_overrides_change_the_shape() -> None:
    spec = teacher_geometry(
        "esvit_swin_b",
        image_size=64,
        overrides={"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4},
    )
    assert (spec.width, spec.stride, spec.grid) == (32, 8, (8, 8))
    assert teacher_geometry("dino_vit_b16", overrides={"image_size": 256}).grid == (16, 16)


def test_an_odd_swin_map_rounds_up() -> None:
    assert teacher_geometry("esvit_swin_b", image_size=180).grid == (6, 6)  # 45, 23, 12, 6


@pytest.mark.parametrize(
    ("name", "image_size", "overrides", "told"),
    [
        ("clip_vit_b61", None, {}, "did you mean 'clip_vit_b16'"),
        ("dino_vit_b16", None, {"embed_dims": 64}, "did you mean 'embed_dim'"),
        ("dino_vit_b16", None, {"window_size": 7}, "unknown key 'window_size'"),
        ("esvit_swin_b", None, {"depths": 4}, "one per stage"),
        ("esvit_swin_b", None, {"depths": [2, 2]}, "2 depths but 4 num_heads"),
        ("esvit_swin_b", None, {"depths": []}, "one per stage"),
        ("dino_vit_b16", None, {"num_heads": [3, 6]}, "a whole number above 0"),
        ("dino_vit_b16", None, {"num_heads": 5}, "5 attention heads do not divide 768 channels"),
        ("dino_vit_b16", None, {"depth": True}, "a whole number above 0"),
        ("dino_vit_b16", None, {"mlp_ratio": -1.0}, "a number above 0"),
        ("dino_vit_b16", None, {"image_size": 0.5}, "whole number of pixels"),
        ("clip_vit_l14", 225, {}, "the next below is 224"),
        ("dino_vit_b16", 224, {"image_size": 256}, "keep one of them"),
        ("timm:vit_tiny_patch16_224", None, {"deph": 3}, "did you mean 'depth'"),
        ("student_file", None, {}, "student.safetensors"),
    ],
)
def test_mistakes_are_told(name: str, image_size: int | None, overrides: dict, told: str) -> None:
    with pytest.raises(UserError, match="teacher") as error:
        teacher_geometry(name, None, image_size, overrides)
    assert told in str(error.value)


def test_a_student_file_keeps_its_own_geometry() -> None:
    spec = teacher_geometry("student_file", "run/student.safetensors")
    assert isinstance(spec, UnbuiltTeacher)
    assert (spec.source, spec.model, spec.width) == ("student_file", "run/student.safetensors", None)
    with pytest.raises(UserError, match="carries its own geometry"):
        teacher_geometry("student_file", "run/student.safetensors", 256)


def test_any_timm_name_is_left_to_the_builder() -> None:
    spec = teacher_geometry("timm:resnet18", image_size=96)
    assert isinstance(spec, UnbuiltTeacher)
    assert (spec.source, spec.model, spec.image_size, spec.grid) == ("timm", "resnet18", 96, None)
