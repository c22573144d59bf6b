from __future__ import annotations

import subprocess
import sys

import pytest
import timm

from fdscale.config.errors import UserError
from fdscale.teachers.from_timm import _arguments
from fdscale.teachers.table import TEACHERS, UnbuiltTeacher, teacher_geometry

ON_THE_HUB = [name for name, spec in TEACHERS.items() if spec.source == "timm" and spec.pretrained]


@pytest.mark.parametrize(
    ("name", "width", "grid", "prefix_tokens"),
    [
        ("clip_vit_b16", 768, (14, 14), 1),
        ("clip_vit_l14", 1024, (16, 16), 1),
        ("clip_vit_b16_open_clip", 768, (14, 14), 1),
        ("dino_vit_b16", 768, (14, 14), 1),
        ("deit_b16", 768, (14, 14), 1),
        ("clip_vit_b32", 768, (7, 7), 1),
        ("clip_vit_l14_336", 1024, (24, 24), 1),
        ("laion_clip_vit_bigg14", 1664, (16, 16), 1),
        ("eva02_clip_e14", 1792, (16, 16), 1),
        ("siglip2_vit_so400m16", 1152, (16, 16), 0),
        ("mae_vit_h14", 1280, (16, 16), 1),
        ("dinov2_vit_g14", 1536, (16, 16), 1),
        ("dinov2_vit_l14_reg", 1024, (16, 16), 5),
        ("dinov3_vit_7b16", 4096, (16, 16), 5),
        ("esvit_swin_b", 1024, (7, 7), 0),
    ],
)
def test_the_table_knows_each_teachers_tokens(name: str, width: int, grid: tuple[int, int], prefix_tokens: int) -> None:
    spec = teacher_geometry(name)
    assert (spec.width, spec.grid, spec.prefix_tokens) == (width, grid, prefix_tokens)
    assert spec.licence


def test_every_openai_teacher_is_a_quickgelu_variant_and_no_other_is() -> None:
    assert [n for n, spec in TEACHERS.items() if "quickgelu" in spec.model] == [
        n for n, spec in TEACHERS.items() if spec.pretrained == "openai"
    ]


def test_every_siglip2_network_has_the_tanh_gelu() -> None:
    specs = [spec for spec in TEACHERS.values() if spec.family == "siglip2"]
    assert len(specs) == 5
    assert {_arguments(spec)["act_layer"] for spec in specs} == {"gelu_tanh"}


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_a_row_agrees_with_timms_configuration(name: str) -> None:
    spec = TEACHERS[name]
    config = timm.get_pretrained_cfg(f"{spec.model}.{spec.pretrained}", allow_unregistered=False)
    assert config is not None
    assert (config.mean, config.std) == (spec.mean, spec.std)
    assert config.hf_hub_id == spec.repository
    assert (config.hf_hub_filename or "model.safetensors") == spec.file
    assert config.input_size == (3, spec.pretrained_size, spec.pretrained_size)
    # DINOv2 was trained at 518 px and is taken at 224 by default; everyone else at the size of training
    assert spec.image_size == (224 if spec.family == "dinov2" else spec.pretrained_size)


def test_a_row_without_a_hub_says_so_throughout() -> None:
    spec = TEACHERS["esvit_swin_b"]
    assert (spec.pretrained, spec.repository, spec.file) == ("", "", "")


def test_open_clips_copy_lies_beside_timms() -> None:
    one, other = TEACHERS["clip_vit_b16_open_clip"], TEACHERS["clip_vit_b16"]
    assert one.repository == other.repository == "timm/vit_base_patch16_clip_224.openai"
    assert one.file == "open_clip_model.safetensors"


@pytest.mark.parametrize(
    ("start", "licence"),
    [
        ("clip_", "MIT"),
        ("laion_clip_", "MIT"),
        ("eva02_", "MIT"),
        ("siglip2_", "Apache-2.0"),
        ("dino_", "Apache-2.0"),
        ("deit_", "Apache-2.0"),
        ("mae_", "CC-BY-NC-4.0"),
        ("dinov2_", "Apache-2.0"),
        ("dinov3_", "DINOv3 License"),
        ("esvit_", "MIT"),
    ],
)
def test_licences_as_published(start: str, licence: str) -> None:
    assert {spec.licence for name, spec in TEACHERS.items() if name.startswith(start)} == {licence}


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
        ("dinov3_vit_s16", None, {"embed_dim": 36, "num_heads": 6}, "rotary positions need a multiple of 4"),
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


@pytest.mark.parametrize(
    ("name", "layer", "told"),
    [
        ("dino_vit_b16", 12, "allowed: 0 to 11; dino_vit_b16 has 12 blocks"),
        ("dino_vit_b16", -1, "allowed: 0 to 11"),
        ("esvit_swin_b", 4, "allowed: 0 to 3; esvit_swin_b has 4 stages"),
        ("own", 1, "leave it out"),
    ],
)
def test_a_layer_that_is_not_there_is_told(name: str, layer: int, told: str) -> None:
    with pytest.raises(UserError, match=r"teacher\.layer") as error:
        teacher_geometry(name, layer=layer)
    assert told in str(error.value)


def test_a_bad_layer_does_not_hide_what_else_is_wrong() -> None:
    with pytest.raises(UserError) as error:
        teacher_geometry("dino_vit_b16", overrides={"depth": 2, "num_heads": 5}, layer=2)
    assert "has 2 blocks" in str(error.value)
    assert "5 attention heads" in str(error.value)


@pytest.mark.parametrize(("name", "weights"), [("timm:resnet18", None), ("student_file", "run/student.safetensors")])
def test_an_unbuilt_teacher_carries_its_layer(name: str, weights: str | None) -> None:
    assert teacher_geometry(name, weights, layer=2).layer == 2
