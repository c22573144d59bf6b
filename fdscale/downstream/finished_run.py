"""The settings of a finished run of a dense task, looked at again; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.dense_settings import DetectSettings, SegmentSettings
from fdscale.config.errors import SettingsError, UserError, attempt
from fdscale.config.programs import DenseSettings
from fdscale.config.recipe import load_recipe
from fdscale.planning.dense_check import dense_problems, network_problems
from fdscale.students.geometry import file_geometry
from fdscale.training.run_directory import RunDirectory

CHANGEABLE = ("eval.", "data.workers=", "deepspeed=")  # the rest is what the run was trained with


def dense_settings(folder: Path, overrides: Sequence[str], average: bool = False) -> DenseSettings:
    """The settings of a finished run of a dense task, those of its evaluation overridden; checked.

    Its DeepSpeed JSON is the one that it ran with, unless an override names another. Raises UserError for a run that
    cannot be evaluated (`average`: that kept none), SettingsError for what does not fit it.
    """
    directory = RunDirectory(folder)
    if directory.completed_steps() is None:
        raise UserError(
            f"{folder}: not a finished run; give the folder of one that `fdscale segment` or `detect` ended"
        )
    if wrong := [text for text in overrides if not text.startswith(CHANGEABLE)]:
        raise UserError(f"{wrong[0]}: the run was trained otherwise, or not; allowed here: {', '.join(CHANGEABLE)}…")
    settings = load_recipe(str(directory.recipe), overrides)
    if not isinstance(settings, DenseSettings):
        raise UserError(
            f"{folder}: `fdscale {settings.program}` left it; allowed: runs of `fdscale segment` and `detect`"
        )
    if not any(text.startswith("deepspeed=") for text in overrides):
        settings = settings.model_copy(update={"deepspeed": str(directory.deepspeed)})
    _refuse_what_is_not_there(settings, directory, average)
    if problems := _problems(settings, directory):
        raise SettingsError(problems)
    return settings


def _refuse_what_is_not_there(settings: DenseSettings, directory: RunDirectory, average: bool) -> None:
    if average and not settings.optim.ema_decay:
        raise UserError(f"{directory.folder}: the run kept no average (optim.ema_decay = 0); leave --average out")
    ending = "_ema" if average else ""
    is_segmenter = isinstance(settings, SegmentSettings)
    left = f"segmenter{ending}/config.json" if is_segmenter else f"detector{ending}.safetensors"
    if not (directory.folder / left).is_file():
        raise UserError(f"{directory.folder / left} is not there; a finished run leaves it: bring it back")
    named = settings.eval.folder if isinstance(settings, SegmentSettings) else settings.eval.annotations
    if named is None:
        raise UserError(
            f"eval: the run in {directory.folder} names no held-out images; name them as its program's recipes do"
        )


def _problems(settings: DenseSettings, directory: RunDirectory) -> list[str]:
    """What is wrong with the held-out images, and with how they shall be looked at."""
    if isinstance(settings, DetectSettings):  # an earlier stage's file is needed no more
        settings = settings.model_copy(update={"head": settings.head.model_copy(update={"weights": None})})
    problems: list[str] = []
    deepspeed_json = attempt(lambda: load_deepspeed_json(settings.deepspeed), problems)
    student = attempt(lambda: file_geometry(directory.student), problems)
    problems += network_problems(settings, student, deepspeed_json or {})
    return [*problems, *dense_problems(settings, None)]
