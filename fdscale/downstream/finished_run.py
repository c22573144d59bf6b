"""The settings of a finished run of a dense task, looked at again; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fdscale.config.errors import UserError
from fdscale.config.programs import DenseSettings
from fdscale.config.recipe import load_recipe
from fdscale.training.run_directory import RunDirectory

CHANGEABLE = ("eval.", "data.workers=", "deepspeed=")  # the rest is what the run was trained with


def dense_settings(folder: Path, overrides: Sequence[str]) -> DenseSettings:
    """The settings of a finished run of a dense task, those of its evaluation overridden. Raises UserError."""
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
    return settings
