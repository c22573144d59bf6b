"""Students and teachers from settings: a student file that teaches, its precision, its norm; seeds."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from fdscale.build.networks import as_pixels, prepare_student, prepare_teacher, seeded, student_of, teacher_of
from fdscale.build.run import Run
from fdscale.config.errors import UserError
from fdscale.config.settings import FinetuneSettings, StudentSettings, TeacherSettings
from fdscale.planning.placement import Placement
from fdscale.students.files import save_student
from fdscale.students.geometry import SwinV2Geometry, TimmGeometry, ViTGeometry
from fdscale.students.student import Student, build_student
from fdscale.training.engine import Connection
from fdscale.training.sharding import place

SWIN = SwinV2Geometry(16, (1, 1), (2, 4), window_size=4, image_size=32)
VIT = ViTGeometry(32, 2, 4, patch_size=8, image_size=32)


def perturbed(geometry: SwinV2Geometry | ViTGeometry | TimmGeometry) -> Student:
    student = build_student(geometry, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return student


def student_file(folder: Path, student: Student) -> str:
    return str(save_student(student, student.backbone.state_dict(), folder))


@pytest.mark.parametrize("geometry", [SWIN, VIT], ids=["swin_v2", "vit"])
def test_a_student_that_teaches_gives_its_own_tokens(geometry: SwinV2Geometry | ViTGeometry, tmp_path: Path) -> None:
    student = perturbed(geometry).eval()
    weights = student_file(tmp_path, student)
    teacher = prepare_teacher(TeacherSettings(name="student_file", weights=weights), weights, torch.float32)
    pixels = torch.rand(2, 3, 32, 32)
    assert (teacher.grid, teacher.width, teacher.prefix_tokens) == (student.grid, student.width, student.prefix_tokens)
    torch.testing.assert_close(teacher(pixels), student(pixels).detach(), atol=2e-6, rtol=0)


def test_its_final_norm_can_be_left_out(tmp_path: Path) -> None:
    student = perturbed(VIT).eval()
    weights = student_file(tmp_path, student)
    settings = TeacherSettings(name="student_file", weights=weights, after_norm=False)
    raw = prepare_teacher(settings, weights, torch.float32)(pixels := torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(student.backbone.norm(raw), student(pixels), atol=2e-6, rtol=0)


def test_a_network_whose_norm_is_elsewhere_cannot_leave_it_out(tmp_path: Path) -> None:
    weights = student_file(tmp_path, build_student(TimmGeometry("test_resnet", 32)))
    settings = TeacherSettings(name="student_file", weights=weights, after_norm=False)
    with pytest.raises(UserError, match=r"teacher\.after_norm=false"):
        prepare_teacher(settings, weights, torch.float32)


@pytest.mark.parametrize(("layer", "grid", "width"), [(0, (8, 8), 16), (1, (4, 4), 32)])
def test_an_earlier_stage_of_a_swin_teaches_without_the_final_norm(
    layer: int, grid: tuple[int, int], width: int, tmp_path: Path
) -> None:
    student, pixels = perturbed(SWIN).eval(), torch.rand(2, 3, 32, 32)
    weights = student_file(tmp_path, student)
    settings = TeacherSettings(name="student_file", weights=weights, layer=layer)
    teacher = prepare_teacher(settings, weights, torch.float32)
    images = (pixels - student.mean) / student.std
    maps = student.backbone.forward_intermediates(images, [layer], intermediates_only=True)[0]
    wanted = maps.flatten(2).transpose(1, 2)
    if layer == 1:  # the last stage has a final norm
        wanted = student.backbone.norm(wanted)
    assert (teacher.grid, teacher.width) == (grid, width)
    torch.testing.assert_close(teacher(pixels), wanted.detach(), atol=2e-6, rtol=0)


def test_an_earlier_block_of_a_vit_teaches_through_the_final_norm(tmp_path: Path) -> None:
    student, pixels, kept = perturbed(VIT).eval(), torch.rand(2, 3, 32, 32), []
    weights = student_file(tmp_path, student)
    student.backbone.blocks[0].register_forward_hook(lambda block, given, tokens: kept.append(tokens))
    student(pixels)
    settings = TeacherSettings(name="student_file", weights=weights, layer=0)
    teacher = prepare_teacher(settings, weights, torch.float32)
    assert len(teacher.backbone.blocks) == 1
    torch.testing.assert_close(teacher(pixels), student.backbone.norm(kept[0]).detach(), atol=2e-6, rtol=0)


def test_a_network_of_the_students_table_teaches_by_its_name(tmp_path: Path) -> None:
    small = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
    student = perturbed(SWIN).eval()
    weights = student_file(tmp_path, student)
    settings = TeacherSettings(name="swinv2_t", weights=weights, image_size=32, geometry=small)
    teacher = prepare_teacher(settings, weights, torch.float32)
    pixels = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(teacher(pixels), student(pixels).detach(), atol=2e-6, rtol=0)
    on_meta = prepare_teacher(TeacherSettings(name="swinv2_g"), "random", torch.bfloat16, "meta")
    assert sum(p.numel() for p in on_meta.parameters()) == 2_997_843_680


def test_a_vit_teaches_in_bf16() -> None:
    small = {"embed_dim": 32, "depth": 2, "num_heads": 4}
    settings = TeacherSettings(name="vit_s16", weights="random", image_size=32, geometry=small)
    exact, rounded = (prepare_teacher(settings, "random", dtype) for dtype in (torch.float32, torch.bfloat16))
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(rounded(pixels), exact(pixels), atol=0.1, rtol=0)


def test_bf16_rounds_the_parameters_alone(tmp_path: Path) -> None:
    weights = student_file(tmp_path, perturbed(SWIN))
    settings = TeacherSettings(name="student_file", weights=weights)
    exact, rounded = (prepare_teacher(settings, weights, dtype) for dtype in (torch.float32, torch.bfloat16))
    table = "relative_coords_table"
    for (name, buffer), (_, other) in zip(exact.named_buffers(), rounded.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert any(table in name for name, _ in exact.named_buffers())
    assert {p.dtype for p in rounded.backbone.parameters()} == {torch.bfloat16}
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(rounded(pixels), exact(pixels), atol=0.1, rtol=0)


def test_a_student_starts_from_a_file_and_the_settings_name_what_they_want(tmp_path: Path) -> None:
    weights = student_file(tmp_path, student := perturbed(SWIN))
    loaded = prepare_student(
        StudentSettings(name="student_file", weights=weights, drop_path=0.1, skip_dropped=False), seed=0
    )
    assert not loaded.draws.skip_dropped
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), student.parameters(), strict=True))
    assert loaded.drop_path_sites == 2  # the second block's two branches: the first block's rate is zero
    another = dataclasses.replace(SWIN, window_size=2)
    assert another != loaded.geometry


def test_seeded_building_is_repeatable_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    with seeded(5):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(5):
        assert torch.equal(torch.rand(3), first)


def test_pixels_are_fp32_between_zero_and_one() -> None:
    pixels = as_pixels(torch.tensor([[[[0, 128, 255]]]], dtype=torch.uint8))
    assert pixels.dtype == torch.float32
    assert pixels.flatten().tolist() == pytest.approx([0.0, 128 / 255, 1.0])


LEAN = {
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
FILES = Path(__file__).parents[1] / "teachers" / "original_files.py"


def run_of(connection: Connection, settings: Any, placement: Placement = "zero3", bf16: bool = False) -> Run:
    """What the networks of a run are built from, and nothing else of a run."""
    deepspeed_json = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, **LEAN},
        "bf16": {"enabled": bf16},
    }
    absent: Any = None
    places = {"teacher": placement}
    return Run(settings, deepspeed_json, connection, absent, absent, absent, absent, absent, {}, places, absent)


def original_file(teacher: str, folder: Path) -> tuple[TeacherSettings, str]:
    """A teacher's file in its published layout, and the settings for it."""
    spec = importlib.util.spec_from_file_location("original_files", FILES)
    assert spec is not None
    assert spec.loader is not None
    files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(files)
    row = files.row_of(teacher)
    weights = files.written(row, files.filled(row.shapes), folder)
    return TeacherSettings(name=teacher, weights=weights, geometry=row.geometry), weights


def divided_teacher(
    connection: Connection, settings: TeacherSettings, weights: str, elsewhere: str, bf16: bool
) -> list[bool]:
    """Whether a teacher whose file rank 0 alone has is the plain one: its tokens, its final norm, its statistics."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    plain = place(prepare_teacher(settings, weights, dtype), "replicated", {}, connection)
    mine = weights if connection.rank.is_main else elsewhere
    run = run_of(connection, None, bf16=bf16)
    divided = teacher_of(run, "teacher", settings.model_copy(update={"weights": mine}), mine, whole_up_to=0)
    pixels = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(connection.rank.rank))
    norms = [teacher.final_norm.state_dict() for teacher in (plain, divided) if teacher.final_norm is not None]
    return [
        all(parameter.numel() == 0 for parameter in divided.backbone.parameters()),
        *(torch.equal(plain(pixels), divided(pixels)) for _ in range(3)),
        all(torch.equal(norms[0][name], norms[1][name]) for name in norms[0]),
        torch.equal(plain.scale, divided.scale) and torch.equal(plain.shift, divided.shift),
        (plain.width, plain.grid, plain.mean, plain.std) == (divided.width, divided.grid, divided.mean, divided.std),
    ]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["clip_vit_b16", "dinov3_vit_l16", "eva02_clip_l14", "esvit_swin_b"])
def test_a_large_teacher_is_read_by_rank_0_alone(name: str, bf16: bool, tmp_path: Path, two_ranks: Any) -> None:
    settings, weights = original_file(name, tmp_path)
    assert two_ranks(divided_teacher, settings, weights, "nowhere", bf16) == [[True] * 7] * 2


def test_a_student_file_that_teaches_likewise(tmp_path: Path, two_ranks: Any) -> None:
    student = perturbed(SWIN)
    student.mean.fill_(0.4)
    weights = student_file(tmp_path, student)
    elsewhere = tmp_path / "described.safetensors"
    elsewhere.with_suffix(".json").write_text(Path(weights).with_suffix(".json").read_text())
    settings = TeacherSettings(name="student_file", weights=weights)
    assert two_ranks(divided_teacher, settings, weights, str(elsewhere), True) == [[True] * 7] * 2


def divided_student(connection: Connection, settings: StudentSettings, whole_up_to: int) -> list[str]:
    """What differs between the student of a run and the plain one, by name, buffers included."""
    import deepspeed

    plain = prepare_student(settings, seed=3)
    run = run_of(connection, FinetuneSettings.model_construct(student=settings, seed=3))
    student = student_of(run, whole_up_to)
    whole = [parameter.numel() > 0 for parameter in student.parameters()]
    assert all(whole) if whole_up_to else not any(whole)
    with deepspeed.zero.GatheredParameters(list(student.parameters()) if not whole_up_to else []):
        values = {**dict(student.named_parameters()), **dict(student.named_buffers())}
        expected = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
        assert values.keys() == expected.keys()
        return [name for name, value in expected.items() if not torch.equal(values[name], value)]


def test_a_large_student_is_built_or_read_by_rank_0_alone(tmp_path: Path, two_ranks: Any) -> None:
    small = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
    drawn = StudentSettings(name="swinv2_t", image_size=32, geometry=small)
    student = perturbed(VIT)
    student.std.fill_(0.3)
    read = StudentSettings(name="student_file", weights=student_file(tmp_path, student))
    for settings in (drawn, read):
        assert two_ranks(divided_student, settings, 0) == [[], []]
    assert two_ranks(divided_student, drawn, 10**9) == [[], []]  # a small one is whole everywhere


def refusal(connection: Connection, settings: TeacherSettings) -> str:
    try:
        teacher_of(run_of(connection, None), "teacher", settings, str(settings.weights), whole_up_to=0)
    except UserError as error:
        return str(error)
    return "accepted"


def test_what_rank_0_finds_wrong_is_told_on_every_rank(tmp_path: Path, two_ranks: Any) -> None:
    settings, weights = original_file("esvit_swin_b", tmp_path)
    Path(weights).write_bytes(Path(weights).read_bytes()[:1000])
    first, second = two_ranks(refusal, settings)
    assert "cannot be read" in first
    assert first == second
