"""What does not fit together is told before anything starts, all at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdscale.config.errors import SettingsError
from fdscale.config.recipe import load_recipe
from fdscale.planning.check import Plan, check, load_and_check
from fdscale.students.geometry import geometry_to_json, student_geometry

Shards = Callable[..., str]
DEEPSPEED: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
many = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


def plan_of(name: str, *overrides: str, ranks: int = 2) -> Plan:
    run = load_recipe(name, ["data.shards=digits", "data.global_batch=8", *overrides])
    return check(run, DEEPSPEED, ranks)


def problems(name: str, *overrides: str, ranks: int = 2) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        plan_of(name, *overrides, ranks=ranks)
    return caught.value.problems


def test_the_plan_of_a_good_run(shards: Shards) -> None:
    cadence = ["data.workers=0", "epochs=30", "checkpoint.every=5"]
    plan = plan_of("vit_b_clip_b", f"data.shards={shards(20)}", "teacher.weights=random", *cadence)
    assert (plan.ranks, plan.micro_batch, plan.accumulation, plan.global_batch) == (2, 2, 2, 8)
    assert (plan.samples, plan.steps_per_epoch, plan.steps) == (20, 2, 60)
    assert plan.notes == ()
    assert plan.student.grid == (14, 14)
    assert plan.memory is not None
    trained = 768 * 769 + (plan.student.parameters() or 0)  # with the projector
    assert plan.memory.moments == 8 * trained / 2
    assert plan.memory.teacher == pytest.approx(4 * 85.8e6, rel=0.02)  # CLIP ViT-B/16: 85.80 M parameters


DINO = "further_teachers.dino"
TWO_TEACHERS = ("teacher.weights=random", f"{DINO}.name=dino_vit_b16", f"{DINO}.weights=random")


def test_every_teacher_is_planned_and_counted_with_its_projector() -> None:
    alone, both = plan_of("vit_b_clip_b", "teacher.weights=random"), plan_of("vit_b_clip_b", *TWO_TEACHERS)
    assert [(where, teacher.width) for where, teacher in both.teachers.items()] == [("teacher", 768), (DINO, 768)]
    assert alone.memory is not None
    assert both.memory is not None
    assert both.memory.teacher == pytest.approx(2 * alone.memory.teacher, rel=0.01)
    assert both.memory.moments - alone.memory.moments == 8 * 768 * 769 / 2


def test_mistakes_of_a_further_teacher_name_its_settings() -> None:
    found = problems(
        "vit_b_clip_b",
        *TWO_TEACHERS,
        f"{DINO}.image_size=112",
        "further_teachers.b.name=clip_vit_b17",
        "teacher.layer=99",
    )
    assert any(p.startswith(f"{DINO}.target.grid: the teacher has 7x7") for p in found)
    assert any(p.startswith("further_teachers.b.name: unknown teacher 'clip_vit_b17'") for p in found)
    assert any(p.startswith("teacher.layer: got 99") for p in found)
    assert len(found) == 3


def test_an_average_needs_fp32_masters() -> None:
    run = load_recipe("vit_b_clip_b", ["data.shards=digits", "data.global_batch=8", "optim.ema_decay=0.999"])
    low = {**DEEPSPEED, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
    with pytest.raises(SettingsError, match=r"optim\.ema_decay: an average in bf16 stands still"):
        check(run, low, 2)
    assert check(run, {**DEEPSPEED, "bf16": {"enabled": True}}, 2).accumulation == 2


def test_everything_is_told_at_once(tmp_path: Path) -> None:
    found = problems(
        "vit_b_clip_b",
        "student.name=vit_b17",
        "teacher.name=clip_vit_b17",
        "data.global_batch=7",
        f"data.shards={tmp_path / 'nowhere'}",
        "optim.warmup_epochs=300",
        "optim.min_lr=1",
        "eval.every=5",
    )
    assert len(found) == 7
    for part in (
        "vit_b16",
        "clip_vit_b16",
        "7 / 4 = 1 rest 3",
        "nowhere",
        "warmup_epochs",
        "min_lr",
        "eval.every",
    ):
        assert any(part in problem for problem in found), part


def test_a_global_batch_that_does_not_divide_shows_the_arithmetic() -> None:
    (problem,) = problems("vit_b_clip_b", "data.global_batch=10")
    assert "2 ranks x micro batch 2 = 4" in problem
    assert "nearest: 8 or 12" in problem


@many
@given(st.integers(1, 64), st.integers(1, 16))
def test_accumulation_always_makes_the_global_batch_or_is_refused(global_batch: int, ranks: int) -> None:
    try:
        plan = plan_of("vit_b_clip_b", f"data.global_batch={global_batch}", ranks=ranks)
    except SettingsError:
        assert global_batch % (2 * ranks)
    else:
        assert plan.accumulation * ranks * 2 == global_batch


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["target.grid=exact"], "target.grid=pool, target.grid=interpolate or another student.image_size"),
        (["student.image_size=224", "student.geometry.window_size=7"], "16x16 does not pool to 7x7"),
        (["target.prefix_tokens=keep"], "target.prefix_tokens=drop"),
        (["student.geometry.window_size=5"], "window_size 5 does not divide its 64x64 map"),
        (["student.geometry.num_heads=[3,32,64,128]"], "is not a multiple of 3 heads"),
        (["student.image_size=250"], "250 is not a multiple of the stride 32"),
        (["student.geometry.embed_dimm=64"], "did you mean 'embed_dim'?"),
        (
            ["student.geometry.embed_dim=0"],
            "student.geometry.embed_dim: got 0, allowed: whole numbers, at least 1",
        ),
        (["student.geometry.depths=[2,2,-1,2]"], "student.geometry.depths: got [2, 2, -1, 2]"),
        (
            ["student.geometry.window_size=1.5"],
            "student.geometry.window_size: got 1.5, allowed: whole numbers",
        ),
        (["student.geometry.mlp_ratio=-1"], "student.geometry.mlp_ratio: got -1, allowed: a number above 0"),
        (["teacher.geometry.depht=2"], "did you mean 'depth'?"),
        (["teacher.name=esvit_swin_b", "target.grid=interpolate"], "no hub carries esvit_swin_b"),
    ],
)
def test_geometry_and_tokens_that_do_not_meet(overrides: list[str], told: str) -> None:
    assert any(told in problem for problem in problems("swinv2_g", *overrides))


def test_every_wrong_geometry_key_is_told_at_once() -> None:
    wrong = ["student.geometry.embed_dimm=64", "student.geometry.window=7", "teacher.geometry.depht=2"]
    assert len(problems("swinv2_g", *wrong)) == 3


def test_the_problems_of_the_json_are_told_along() -> None:
    run = load_recipe("vit_b_dino", ["deepspeed=laptopp", "student.name=vit_b12", "data.shards=digits"])
    with pytest.raises(SettingsError) as told:
        load_and_check(run, ranks=8)
    assert ["did you mean 'laptop'" in told.value.problems[0], "vit_b12" in told.value.problems[1]] == [True, True]


def test_timms_swin_v2_under_bf16_is_refused_with_the_remedy() -> None:
    run = load_recipe("vit_b_dino", ["student.name=timm:swinv2_tiny_window8_256", "data.shards=digits"])
    with pytest.raises(SettingsError, match="torch_autocast"):
        check(run, {**DEEPSPEED, "bf16": {"enabled": True}}, ranks=8)
    check(run, {**DEEPSPEED, "torch_autocast": {"enabled": True}}, ranks=8)


def test_interpolation_meets_any_grid() -> None:
    plan = plan_of("swinv2_g", "student.image_size=224", "student.geometry.window_size=7", "target.grid=interpolate")
    assert plan.student.grid == (7, 7)


def test_a_network_of_timms_is_known_once_it_is_built() -> None:
    plan = plan_of("swinv2_g", "student.name=timm:vit_tiny_patch16_224", "student.geometry={}")
    assert plan.student.parameters() is None
    assert plan.memory is None


def test_a_shard_folder_without_index_and_too_few_samples(shards: Shards, tmp_path: Path) -> None:
    (problem,) = problems("vit_b_clip_b", f"eval.shards={tmp_path}")
    assert problem.startswith("eval.shards: ")
    (problem,) = problems("vit_b_clip_b", f"data.shards={shards(6)}")
    assert problem == "data.global_batch: got 8, allowed: at most the 6 samples of data.shards"


def test_fewer_shards_than_readers_is_a_note(shards: Shards) -> None:
    cadence = ["data.workers=3", "max_steps=400", "epochs=20"]
    plan = plan_of("vit_b_clip_b", f"data.shards={shards(8)}", "teacher.weights=random", *cadence)
    assert [note.split(":")[0] for note in plan.notes] == [
        "2 shards for 2 ranks x 3 workers = 6 readers",
        "max_steps 400 exceeds the 20 steps of the run",
        "checkpoint.every 3125 exceeds the 20 steps of the run",
    ]


def test_weights_that_are_no_file(tmp_path: Path) -> None:
    found = problems("vit_b_clip_b", "student.weights=no.safetensors", "teacher.weights=no.pt")
    assert [problem.split(";")[0] for problem in found] == [
        "student.weights: no such file: no.safetensors",
        "teacher.weights: no such file: no.pt",
    ]


def student_file(folder: Path, **overrides: int) -> Path:
    path = folder / "student.safetensors"
    path.touch()
    geometry = student_geometry("vit_s16", 64, overrides)
    path.with_suffix(".json").write_text(
        json.dumps({"geometry": geometry_to_json(geometry), "mean": [0.5] * 3, "std": [0.5] * 3})
    )
    return path


def test_a_student_file_as_teacher_brings_its_grid(tmp_path: Path) -> None:
    weights = student_file(tmp_path, depth=4)
    overrides = ["teacher.name=student_file", f"teacher.weights={weights}", "student.image_size=64"]
    plan = plan_of("vit_b_clip_b", *overrides)
    assert plan.teachers["teacher"].grid == (4, 4)
    (problem,) = problems("vit_b_clip_b", *overrides[:2])
    assert "the teacher has 4x4 patch tokens, the student 14x14" in problem
    weights.with_suffix(".json").write_text("{}")
    (problem,) = problems("vit_b_clip_b", *overrides)
    assert "a student file has its geometry, mean and std there" in problem


def test_student_weights_of_another_geometry(tmp_path: Path) -> None:
    weights = student_file(tmp_path, depth=5)
    (problem,) = problems("digits_teacher", f"student.weights={weights}")
    assert "embed_dim 384 (settings: 96), depth 5 (settings: 4), num_heads 6 (settings: 3)" in problem
    (problem,) = problems("vit_b_clip_b", f"student.weights={weights}", "student.name=swinv2_b")[:1]
    assert "holds a vit, student.name is a swin_v2" in problem


def test_what_cannot_be_done_to_the_images_is_told_at_once(tmp_path: Path) -> None:
    weights = f"student.weights={student_file(tmp_path)}"
    asked = ["augment.cutmix=1.0", "augment.randaugment=rand-q9"]
    odd = {**DEEPSPEED, "train_micro_batch_size_per_gpu": 1}
    run = load_recipe("digits_finetune", ["data.shards=digits", "data.global_batch=8", weights, *asked])
    with pytest.raises(SettingsError) as caught:
        check(run, odd, 2)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "augment.randaugment",
        "augment.mixup, augment.cutmix",
    ]
    (problem,) = problems("vit_b_clip_b", "eval.normalisation=clip")
    assert problem.startswith("eval.normalisation: ")


def test_fine_tuning_needs_labels_and_enough_of_them(shards: Shards, tmp_path: Path) -> None:
    weights = f"student.weights={student_file(tmp_path)}"
    assert plan_of("digits_finetune", weights, f"data.shards={shards(16)}", "labelled=8").steps_per_epoch == 1
    assert problems(
        "digits_finetune", weights, f"data.shards={shards(16, labels=False)}", "labelled=4", "classes=2"
    ) == [
        "labelled: got 4, allowed: at least one global batch of 8 images",
        "data.shards: 16 of 16 samples have no label; fine-tuning needs one for each",
    ]
    assert problems("digits_finetune", weights, f"data.shards={shards(24)}", "labelled=200", "classes=3") == [
        "labelled: got 200, allowed: at most the 24 samples of data.shards",
        "classes: got 3, but data.shards has label 3; allowed: at least 4",
    ]
    assert problems("digits_finetune", weights, "classes=4") == ["classes: got 4, but the embedded digits have 10"]
