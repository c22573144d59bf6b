"""Distillation: what one batch means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fdscale.build import Run, as_pixels, open_run, prepare_student, prepare_teacher, train
from fdscale.config.settings import DistillSettings
from fdscale.data.batches import Batch
from fdscale.distill.distiller import Distiller
from fdscale.distill.layout import TokenLayout
from fdscale.distill.targets import TargetMaker
from fdscale.students.drop_path import drop_path_rows
from fdscale.students.student import Student
from fdscale.teachers.teacher import Teacher

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def distill(settings: DistillSettings, student: Student | None = None, teacher: Teacher | None = None) -> bool:
    """Distil a teacher into a student; True when the run is complete, False when a signal stopped it.

    The pair is built from the settings, or given: any two networks wrapped as `Student` and `Teacher`. Raises
    UserError for anything that does not fit together, before training starts.
    """
    with open_run(settings) as run:
        if run.is_complete():
            return True
        teacher = (teacher or prepare_teacher(settings.teacher, run)).to(run.connection.device)
        student = student or prepare_student(settings.student, settings.seed)
        targets = TargetMaker(
            TokenLayout(teacher.grid, teacher.prefix_tokens),
            TokenLayout(student.grid, student.prefix_tokens),
            settings.target.grid,
            settings.target.prefix_tokens,
            settings.target.whiten,
        )
        distiller = Distiller(student, student.width, teacher.width, targets, settings.loss.beta)
        return train(run, distiller, student, _batch_terms(run, student, teacher), _sample_terms(teacher))


def _batch_terms(run: Run, student: Student, teacher: Teacher):  # type: ignore[no-untyped-def]
    seed, global_batch = run.settings.seed, run.settings.data.global_batch

    def distill_batch(engine: DeepSpeedEngine, batch: Batch, step: int) -> dict[str, Tensor]:
        """One micro batch: the teacher's whitened tokens, and how far the projected student is from them."""
        pixels = as_pixels(batch.images)
        target = engine.module.targets(teacher(pixels))
        draws = drop_path_rows(seed, step, student.drop_path_sites, global_batch, batch.rows)
        return engine(pixels, target, None if draws is None else draws.to(pixels.device))

    return distill_batch


def _sample_terms(teacher: Teacher):  # type: ignore[no-untyped-def]
    def held_out_batch(engine: DeepSpeedEngine, batch: Batch) -> dict[str, Tensor]:
        """The loss of each held-out image, and its features for the k-NN."""
        pixels = as_pixels(batch.images)
        return engine(pixels, engine.module.targets(teacher(pixels)))

    return held_out_batch
