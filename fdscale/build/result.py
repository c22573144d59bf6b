"""What a completed run leaves: its student, what stands beside it, and both once more as their moving average."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fdscale.build.run import Run
from fdscale.students.files import save_student
from fdscale.students.student import Student
from fdscale.training.engine import full_state

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

BACKBONE = "student.backbone."  # what a trained module calls the student's network
NEW_NORM = "fc_norm."  # a classifier's norm after pooling: it takes the place of the student's final one
AVERAGED = "_ema"  # ends the names of files that hold the moving average
Save = Callable[[Student, dict[str, Tensor], Path, str], object]
"""Writes from the module's full state dict into a folder; the text ends the files' names: "" or AVERAGED."""


def student_names(names: Iterable[str]) -> dict[str, str]:
    """The student file's names among those of a trained module: {what the file says: what the module says}.

    A new norm after pooling is the file's final `norm`: a student of this geometry has one, and the distilled weights
    that were there belong to tokens that no longer exist.
    """
    known = {BACKBONE: "", NEW_NORM: NEW_NORM.replace("fc_", "")}
    prefixes = {name: prefix for name in names for prefix in known if name.startswith(prefix)}
    return {known[prefix] + name.removeprefix(prefix): name for name, prefix in prefixes.items()}


def save_result(run: Run, engine: DeepSpeedEngine, module: nn.Module, student: Student, save: Save, step: int) -> None:
    """Write what a completed run leaves from the gathered weights, then mark the run complete.

    Raises UserError on all ranks when a newer attempt has begun: the result is that one's to write.
    """
    run.connection.on_main(run.attempt.refuse_if_superseded)
    main, averaged = run.connection.rank.is_main, run.settings.optim.ema_decay > 0
    for ending in (AVERAGED, "") if averaged else ("",):
        state = full_state(engine, module, wanted=main, average=ending == AVERAGED)
        run.connection.on_main(partial(save, student, state, run.directory.folder, ending))
    run.connection.on_main(lambda: _mark_complete(run, step))


def _mark_complete(run: Run, step: int) -> None:
    run.attempt.refuse_if_superseded()
    run.directory.mark_complete(step)


def save_backbone(student: Student, state: dict[str, Tensor], folder: Path, ending: str = "") -> None:
    """The student alone: a projector is dropped."""
    backbone = {short: state[name] for short, name in student_names(state).items()}
    save_student(student, backbone, folder, ending=ending)
