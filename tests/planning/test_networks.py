"""Student and teacher by name: what teaches, up to which layer, from which file, and what must be told beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fdscale.config.errors import SettingsError, UserError
from fdscale.config.settings import StudentSettings, TeacherSettings
from fdscale.planning.networks import planned_student, planned_teacher, teacher_notes, up_to_layer
from fdscale.students.geometry import STUDENTS, Geometry, geometry_to_json, student_geometry


def student_file(folder: Path, geometry: Geometry) -> str:
    path = folder / "student.safetensors"
    path.touch()
    description = {"geometry": geometry_to_json(geometry), "mean": [0.5] * 3, "std": [0.5] * 3}
    path.with_suffix(".json").write_text(json.dumps(description))
    return str(path)


def test_swinv2_g_teaches_by_its_name_from_a_student_file(tmp_path: Path) -> None:
    weights = student_file(tmp_path, STUDENTS["swinv2_g"])
    teacher = planned_teacher(TeacherSettings(name="swinv2_g", weights=weights))
    assert (teacher.width, teacher.grid, teacher.prefix_tokens) == (4096, (8, 8), 0)


def test_a_student_that_teaches_needs_a_file_of_its_own_geometry(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no hub carries swinv2_g: give the path of a student file"):
        planned_teacher(TeacherSettings(name="swinv2_g"))
    weights = student_file(tmp_path, STUDENTS["swinv2_b"])
    with pytest.raises(UserError, match=r"teacher\.weights: .* holds embed_dim 128 \(settings: 512\)"):
        planned_teacher(TeacherSettings(name="swinv2_g", weights=weights))
    with pytest.raises(SettingsError, match=r"teacher\.geometry\.depthss: swinv2_g has no such number"):
        planned_teacher(TeacherSettings(name="swinv2_g", weights=weights, geometry={"depthss": 1}))


@pytest.mark.parametrize(
    ("name", "layer", "width", "grid"),
    [
        ("esvit_swin_b", 2, 512, (14, 14)),  # the official PRED_FEAT_S3
        ("esvit_swin_b", 3, 1024, (7, 7)),
        ("dino_vit_b16", 8, 768, (14, 14)),
        ("swinv2_g", 2, 2048, (16, 16)),
        ("vit_b16", 0, 768, (14, 14)),
    ],
)
def test_an_earlier_layer_has_its_own_width_and_grid(name: str, layer: int, width: int, grid: tuple[int, int]) -> None:
    teacher = planned_teacher(TeacherSettings(name=name, weights="random", layer=layer))
    assert (teacher.width, teacher.grid) == (width, grid)


@pytest.mark.parametrize(("name", "layers"), [("swinv2_t", "0 to 3"), ("vit_s16", "0 to 11")])
def test_a_layer_that_is_not_there(name: str, layers: str) -> None:
    with pytest.raises(UserError, match=rf"teacher\.layer: got 12, allowed: {layers}"):
        up_to_layer(STUDENTS[name], 12)


def test_a_shared_table_may_be_copied_to_every_block_and_nothing_else_may_differ(tmp_path: Path) -> None:
    weights = student_file(tmp_path, STUDENTS["vit_b16"])
    table = StudentSettings(name="vit_b16", weights=weights, position_bias="per_block")
    assert planned_student(table).parameters() == 85_761_984
    untied = student_geometry("vit_b16", None, {}, None, "per_block")
    weights = student_file(tmp_path, untied)
    told = r"holds position_bias per_block \(settings: shared\); set student\.position_bias=per_block"
    with pytest.raises(UserError, match=told):
        planned_student(StudentSettings(name="vit_b16", weights=weights))


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"name": "clip_vit_b16", "rounded_norm": True, "after_norm": False}, "no final norm to round"),
        ({"name": "vit_b16", "weights": "random", "checkpoint_key": "student"}, "holds one network"),
        ({"name": "vit_b16", "weights": "random", "revision": "abc"}, "these weights are not fetched"),
        ({"name": "clip_vit_b16", "weights": "random", "revision": "abc"}, "these weights are not fetched"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(table: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        planned_teacher(TeacherSettings(**table))


def test_missing_weights_of_a_shipped_recipe_say_how_to_make_them() -> None:
    hint = r"no such file: runs/vit_b_dino/student.safetensors; .*`fdscale launch distill vit_b_dino` leaves it there"
    with pytest.raises(UserError, match=hint):
        planned_student(StudentSettings(name="vit_b16", weights="runs/vit_b_dino/student.safetensors"))


def test_weights_to_fetch_and_licences_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDSCALE_WEIGHTS", str(tmp_path))
    assert list(teacher_notes(TeacherSettings(name="clip_vit_b16", weights="random"))) == []
    (fetch,) = teacher_notes(TeacherSettings(name="clip_vit_b16"))
    assert fetch == "the weights of clip_vit_b16 are not on this machine: `fdscale fetch` brings them"
    _, licence = teacher_notes(TeacherSettings(name="dinov3_vit_7b16"))
    assert "DINOv3 License" in licence
