"""`--smoke` keeps the path and shrinks the numbers."""

from __future__ import annotations

import pytest

from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.errors import UserError
from fdscale.config.recipe import load_recipe
from fdscale.config.settings import DistillSettings
from fdscale.planning.check import check
from fdscale.planning.smoke import smoke_patch
from fdscale.teachers.table import TeacherSpec, teacher_geometry


def smoke(name: str, *overrides: str) -> DistillSettings:
    settings = load_recipe(name, overrides, smoke_patch)
    assert isinstance(settings, DistillSettings)
    return settings


def teacher(settings: DistillSettings) -> TeacherSpec:
    table = settings.teacher
    spec = teacher_geometry(table.name, table.weights, table.image_size, table.geometry)
    assert isinstance(spec, TeacherSpec)
    return spec


def test_swinv2_g_in_miniature() -> None:
    settings = smoke("swinv2_g")
    assert settings.student.geometry == {
        "embed_dim": 32,
        "depths": [2, 2, 6, 2],
        "num_heads": [1, 2, 4, 8],
        "window_size": 4,
        "patch_size": 4,
        "extra_norm_period": 6,
    }
    assert settings.student.image_size == 64
    assert (settings.target.grid, settings.target.prefix_tokens) == ("pool", "drop")
    assert settings.student.activation_checkpointing == "blocks"
    spec = teacher(settings)
    assert (spec.grid, spec.embed_dim, spec.image_size) == ((4, 4), 64, 56)  # twice the student's 2x2


@pytest.mark.parametrize(("name", "grid"), [("vit_b_clip_b", (4, 4)), ("swinv2_b_esvit", (2, 2))])
def test_grids_stay_equal_where_they_were(name: str, grid: tuple[int, int]) -> None:
    settings = smoke(name)
    plan = check(settings, load_deepspeed_json(settings.deepspeed), 2)
    assert plan.student.grid == grid
    assert teacher(settings).grid == grid


def test_extra_norms_only_where_the_original_has_them() -> None:
    assert smoke("swinv2_b_esvit").student.geometry["extra_norm_period"] == 0


def test_it_shrinks_what_the_command_line_chose() -> None:
    settings = smoke(
        "swinv2_g",
        "student.name=vit_l14",
        "student.image_size=224",
        "student.geometry={}",
        "target.grid=exact",
    )
    assert settings.student.geometry == {}  # the command line wins, even with an empty table
    chosen = smoke("vit_b_clip_b", "student.name=swinv2_t", "student.image_size=256", "target.prefix_tokens=drop")
    assert chosen.student.geometry["embed_dim"] == 32
    assert chosen.student.image_size == 256


def test_the_command_line_wins() -> None:
    settings = smoke("swinv2_g", "data.global_batch=64", "teacher.weights=mine.pth", "epochs=2", "optim.lr=5e-4")
    assert (settings.data.global_batch, settings.epochs, settings.optim.lr) == (64, 2, 5e-4)
    assert settings.teacher.weights == "mine.pth"


@pytest.mark.parametrize("overrides", [(), ("epochs=1",)])
def test_warm_up_is_shorter_than_the_run(overrides: tuple[str, ...]) -> None:
    settings = smoke("vit_b_clip_b", *overrides)
    assert 0 < settings.optim.warmup_epochs < settings.epochs


@pytest.mark.parametrize("name", ["student_file", "timm:vit_tiny_patch16_224"])
def test_teachers_of_their_own_size_stay_as_they_are(name: str) -> None:
    settings = smoke("swinv2_g", f"teacher.name={name}", "teacher.weights=student.safetensors")
    assert settings.teacher.geometry == {}
    assert settings.teacher.image_size is None


def test_fine_tuning_shrinks_as_well() -> None:
    settings = load_recipe("digits_teacher", ["classes=1000"], smoke_patch)
    assert settings.data.global_batch == 32
    assert settings.student.image_size == 128  # its patches of 32 pixels, four a side


def test_unknown_networks_are_told() -> None:
    with pytest.raises(UserError, match="did you mean 'swinv2_g'"):
        smoke("swinv2_g", "student.name=swinv2_gg")
