"""Distillation: what one batch means."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdscale.build.foreseen import StepWatch
from fdscale.build.networks import as_pixels, prepare_teacher, seeded, student_of, teacher_of
from fdscale.build.outline import Outline, draws_for, pixels_for, student_outline
from fdscale.build.run import Run, open_run
from fdscale.build.shards import held_out_means, shard_loader, shards_of
from fdscale.build.training import train
from fdscale.build.weights import RANDOM
from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.errors import UserError, told_as
from fdscale.config.settings import FIRST_TEACHER, DistillSettings, TeacherSettings
from fdscale.data.batches import Batch
from fdscale.distill.distiller import Distiller, Lesson
from fdscale.distill.layout import TokenLayout
from fdscale.distill.targets import TargetMaker
from fdscale.students.drop_path import drop_path_rows
from fdscale.students.student import Student
from fdscale.teachers.table import OWN, STUDENT_FILE
from fdscale.teachers.teacher import Teacher
from fdscale.training.engine import compute_dtype

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def distill(
    settings: DistillSettings,
    student: Student | None = None,
    teacher: Teacher | None = None,
    further_teachers: Mapping[str, Teacher] | None = None,
) -> bool:
    """Distil teachers into a student; True when the run is complete, False when a signal stopped it.

    The networks are built from the settings, or given: any network wrapped as `Student` or `Teacher`. Raises
    UserError for anything that does not fit together, before training starts.
    """
    given = {f"further_teachers.{name}": one for name, one in (further_teachers or {}).items()}
    given |= {} if teacher is None else {FIRST_TEACHER: teacher}
    _refuse_misnamed(settings, student, given)
    run = open_run(settings, shards_of(settings))
    if run.is_complete():
        return True
    teachers = {where: _teacher(run, where, given.get(where)) for where in settings.teachers}
    trained = student or student_of(run)
    lessons = lessons_of(settings, trained, teachers)
    with seeded(settings.seed):
        distiller = Distiller(trained, trained.width, lessons, settings.loss.beta)
    global_batch, sites = settings.data.global_batch, trained.drop_path_sites

    def targets_of(pixels: Tensor) -> list[Tensor]:
        """Each teacher's whitened tokens on the student's grid."""
        return [lesson.targets(teacher(pixels)) for lesson, teacher in zip(lessons, teachers.values(), strict=True)]

    def distill_batch(engine: DeepSpeedEngine, batch: Batch, step: int) -> dict[str, Tensor]:
        """One micro batch: how far the projected student is from its targets."""
        pixels = as_pixels(batch.images)
        draws = drop_path_rows(settings.seed, step, sites, global_batch, batch.rows)
        return engine(pixels, targets_of(pixels), draws)

    def held_out_batch(engine: DeepSpeedEngine, batch: Batch) -> dict[str, Tensor]:
        """The loss of each held-out image, and its features for the k-NN."""
        pixels = as_pixels(batch.images)
        return engine(pixels, targets_of(pixels))

    loader, measured = shard_loader(run, settings, trained), held_out_means(run, settings, trained, held_out_batch)
    watch_of = partial(StepWatch, run, teachers, None if student or given else partial(outline, settings))
    return train(run, distiller, trained, loader, distill_batch, measured, watch_of=watch_of, teachers=teachers)


def outline(settings: DistillSettings) -> Outline:
    """The same distiller and teachers in shapes alone, for the planner."""
    student = student_outline(settings.student)
    dtype = compute_dtype(load_deepspeed_json(settings.deepspeed))
    teachers = {where: _teacher_outline(table, dtype) for where, (table, _) in settings.teachers.items()}
    lessons = lessons_of(settings, student, teachers)
    with torch.device("meta"):
        distiller = Distiller(student, student.width, lessons, settings.loss.beta)

    def inputs(micro_batch: int) -> tuple[Tensor, list[Tensor], Tensor | None]:
        targets = [torch.empty(micro_batch, lesson.targets.tokens, lesson.width) for lesson in lessons]
        return pixels_for(student.image_size, micro_batch), targets, draws_for(student, micro_batch)

    return Outline(distiller, student, inputs, student.image_size, teachers)


def _teacher_outline(table: TeacherSettings, dtype: torch.dtype) -> Teacher:
    weights = str(table.weights) if table.name == STUDENT_FILE else RANDOM  # the file alone knows its network
    return prepare_teacher(table, weights, dtype, "meta")


def _refuse_misnamed(settings: DistillSettings, student: Student | None, teachers: Mapping[str, Teacher]) -> None:
    names = {where: table.name for where, (table, _) in settings.teachers.items()}
    given = set(teachers) if student is None else {"student", *teachers}
    for where, name in {"student": settings.student.name, **names}.items():
        if (where in given) != (name == OWN):
            raise UserError(
                f"{where}.name={name}: a network given in Python is named {OWN!r} in the settings, and only that"
            )
    if unknown := sorted(given - {"student", *names}):
        raise UserError(f"{', '.join(unknown)}: given in Python, but no such teacher in the settings")


def _teacher(run: Run[Any, Any], where: str, given: Teacher | None) -> Teacher:
    assert isinstance(run.settings, DistillSettings)
    with told_as(where):
        return teacher_of(run, where, run.settings.teachers[where][0], run.weights[where].path, given)


def lessons_of(settings: DistillSettings, student: Student, teachers: Mapping[str, Teacher]) -> list[Lesson]:
    """What each teacher asks of this student, as the settings say; in the order of `teachers`."""
    lessons = []
    for where, teacher in teachers.items():
        table, target = settings.teachers[where]
        layouts = TokenLayout(teacher.grid, teacher.prefix_tokens), TokenLayout(student.grid, student.prefix_tokens)
        with told_as(where):
            targets = TargetMaker(*layouts, target.grid, target.prefix_tokens, target.whiten)
        lessons.append(Lesson(where.rsplit(".", 1)[-1], teacher.width, targets, table.weight))
    return lessons
