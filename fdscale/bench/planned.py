"""What the planner foresees of a part: parameters, operations, bytes, and how many images fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdscale.bench.parts import Row, TrainingStep, config_of
from fdscale.build.foreseen import forecast_of
from fdscale.build.networks import prepare_teacher
from fdscale.build.outline import Outline, draws_for, pixels_for, student_outline, traces_of
from fdscale.config.settings import FIRST_TEACHER, DistillSettings, StudentSettings, TeacherSettings
from fdscale.distill.distiller import Distiller, Lesson
from fdscale.distill.layout import TokenLayout
from fdscale.distill.targets import TargetMaker
from fdscale.planning.networks import geometry_of
from fdscale.students.geometry import STUDENTS, SwinV2Geometry, ViTGeometry, student_geometry
from fdscale.students.student import Student
from fdscale.teachers.table import teacher_geometry
from fdscale.teachers.teacher import Teacher


def planned(part: TrainingStep, micro_batch: int, cuda: bool) -> Row:
    """Parameters, floating point operations and planned bytes of a step with so many images; nothing is built."""
    settings, config = part.settings(micro_batch), config_of(micro_batch)
    student = own_geometry_of(settings.student)
    teacher = teacher_geometry_of(settings.teacher)
    traces = traces_of(_outline(settings), settings, config, micro_batch, cuda)
    foreseen = forecast_of(traces, settings, config, {FIRST_TEACHER: "replicated"}, 1)
    recomputed = settings.student.activation_checkpointing != "none"
    return {
        "student_parameters": student.parameters(),
        "teacher_parameters": teacher.parameters(),
        # a backward pass is two forwards; what checkpointing recomputes is no useful work and not counted here
        "flops_per_image": 3 * student.flops() + teacher.flops(),
        "flops_per_image_with_recomputing": (4 if recomputed else 3) * student.flops() + teacher.flops(),
        "planned_state_bytes": foreseen.states.resident,
        "planned_peak_bytes": foreseen.peak,
    }


def own_geometry_of(settings: StudentSettings) -> ViTGeometry | SwinV2Geometry:
    """The geometry of a student of the table: what it is benchmarked by is counted from it."""
    geometry = geometry_of(settings)
    assert isinstance(geometry, ViTGeometry | SwinV2Geometry), "the benchmark's students are of the table"
    return geometry


def teacher_geometry_of(settings: TeacherSettings) -> Any:
    """The geometry of a teacher with random weights, of the teachers' table or of the students'."""
    if settings.name in STUDENTS:
        return student_geometry(settings.name, settings.image_size, settings.geometry)
    return teacher_geometry(settings.name, "random", settings.image_size, settings.geometry)


def _outline(settings: DistillSettings) -> Outline:
    student = student_outline(settings.student)
    teacher = prepare_teacher(settings.teacher, "random", torch.float32, "meta")
    lesson = lesson_of(settings, student, teacher)
    with torch.device("meta"):
        distiller = Distiller(student, student.width, [lesson], settings.loss.beta)

    def inputs(micro_batch: int) -> tuple[Tensor, list[Tensor], Tensor | None]:
        target = torch.empty(micro_batch, lesson.targets.tokens, lesson.width)
        return pixels_for(student.image_size, micro_batch), [target], draws_for(student, micro_batch)

    return Outline(distiller, student, inputs, student.image_size, {FIRST_TEACHER: teacher})


def first_micro_batch(part: TrainingStep, device_bytes: int) -> int:
    """The largest power of two, up to the part's, whose planned peak leaves a twentieth of the device free."""
    micro_batch = part.micro_batch
    while micro_batch > 1 and planned(part, micro_batch, cuda=True)["planned_peak_bytes"] > 0.95 * device_bytes:
        micro_batch //= 2
    return micro_batch


def lesson_of(settings: DistillSettings, student: Student, teacher: Teacher) -> Lesson:
    """What the recipe's teacher asks of its student."""
    layouts = TokenLayout(teacher.grid, teacher.prefix_tokens), TokenLayout(student.grid, student.prefix_tokens)
    target = settings.target
    targets = TargetMaker(*layouts, target.grid, target.prefix_tokens, target.whiten)
    return Lesson(FIRST_TEACHER, teacher.width, targets)
