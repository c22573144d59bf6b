"""Distillation: what one batch means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fdscale.build.networks import as_pixels, seeded, student_of, teacher_of
from fdscale.build.run import open_run
from fdscale.build.training import train
from fdscale.config.errors import UserError
from fdscale.config.settings import DistillSettings
from fdscale.data.batches import Batch
from fdscale.distill.distiller import Distiller
from fdscale.distill.layout import TokenLayout
from fdscale.distill.targets import TargetMaker
from fdscale.students.drop_path import drop_path_rows
from fdscale.students.student import Student
from fdscale.teachers.table import OWN
from fdscale.teachers.teacher import Teacher

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def distill(settings: DistillSettings, student: Student | None = None, teacher: Teacher | None = None) -> bool:
    """Distil a teacher into a student; True when the run is complete, False when a signal stopped it.

    The pair is built from the settings, or given: any two networks wrapped as `Student` and `Teacher`. Raises
    UserError for anything that does not fit together, before training starts.
    """
    for name, given in ((settings.student.name, student), (settings.teacher.name, teacher)):
        if (given is not None) != (name == OWN):
            raise UserError(f"a network given in Python is named {OWN!r} in the settings, and only that; got {name!r}")
    run = open_run(settings)
    if run.is_complete():
        return True
    frozen = teacher_of(run, "teacher", settings.teacher, run.weights["teacher"].path, teacher)
    trained = student or student_of(run)
    targets = target_maker(settings, trained, frozen)
    with seeded(settings.seed):
        distiller = Distiller(trained, trained.width, frozen.width, targets, settings.loss.beta)
    global_batch, sites = settings.data.global_batch, trained.drop_path_sites

    def distill_batch(engine: DeepSpeedEngine, batch: Batch, step: int) -> dict[str, Tensor]:
        """One micro batch: the teacher's whitened tokens, and how far the projected student is from them."""
        pixels = as_pixels(batch.images)
        draws = drop_path_rows(settings.seed, step, sites, global_batch, batch.rows, run.device)
        return engine(pixels, targets(frozen(pixels)), draws)

    def held_out_batch(engine: DeepSpeedEngine, batch: Batch) -> dict[str, Tensor]:
        """The loss of each held-out image, and its features for the k-NN."""
        pixels = as_pixels(batch.images)
        return engine(pixels, targets(frozen(pixels)))

    return train(run, distiller, trained, distill_batch, held_out_batch)


def target_maker(settings: DistillSettings, student: Student, teacher: Teacher) -> TargetMaker:
    """How this teacher's tokens become this student's target, as the settings say."""
    return TargetMaker(
        TokenLayout(teacher.grid, teacher.prefix_tokens),
        TokenLayout(student.grid, student.prefix_tokens),
        settings.target.grid,
        settings.target.prefix_tokens,
        settings.target.whiten,
    )
