"""A teacher and what was distilled from it under the diagnostics, the paper's "before" and "after"; and a control.

The control is the student's network with random weights: what it shows, nothing need have been distilled for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fdscale.data.index import load_index
from fdscale.diagnostics.diagnose import Found, Preset, measure, write_numbers
from fdscale.diagnostics.lines import LandscapePlan
from fdscale.diagnostics.models import asked_models, build_subjects
from fdscale.diagnostics.rows import Measurement
from fdscale.diagnostics.selection import last_third, of
from fdscale.diagnostics.watched import ALIGNMENT, ATTENTION, FEATURES, LANDSCAPE
from fdscale.study.tasks import LOOKED

BATCH = 64
MEANS = ("head_similarity", "attention_diagonality", "attention_offset_share", "attention_column_share")
SPREAD = "attention_distance"


def looked_at(files: Sequence[str], held_out: str, images: int, directions: int, folder: Path) -> dict[str, float]:
    """Diagnose `files`: those of LOOKED as trained, then the same fine-tuned, on the first shards' held-out images.

    Attention, features and alignment are those of the networks as trained; the landscape is that of the fine-tuned
    ones, under the heads that they were tuned with. `folder` gets every measurement; returned are the numbers that
    claims are about, as `before.NAME`, `after.NAME` and `random.NAME`: means over the last third of the blocks. A
    number that is not there, or not finite, is left out.
    """
    index, names = load_index(held_out), LOOKED
    preset = Preset(images, images, LandscapePlan(directions=directions, points=11))
    trained, tuned = (
        build_subjects(asked_models(each, names), torch.device("cpu"))
        for each in (files[: len(names)], files[len(names) :])
    )
    as_trained = measure(trained, index, preset, (ATTENTION, FEATURES, ALIGNMENT), BATCH, workers=0)
    as_tuned = measure(tuned, index, preset, (LANDSCAPE,), BATCH, workers=0)
    found = Found([*as_trained.rows, *as_tuned.rows], as_trained.maps)
    told = f"{images} held-out images; attention and features before fine-tuning, the loss landscape after it"
    write_numbers(found, folder, {"told": told})
    return {f"{model}.{name}": value for model in names for name, value in numbers(found.rows, model).items()}


def numbers(rows: Sequence[Measurement], model: str) -> dict[str, float]:
    """The numbers of one model that claims are about, as far as they are there and finite."""
    found = {f"{SPREAD}_spread": _mean([values.std() for _, values in last_third(rows, model, SPREAD)])}
    found |= {name: _mean([values.mean() for _, values in last_third(rows, model, name)]) for name in MEANS}
    found["sharpness"] = _mean([row.value for row in of(rows, model, "sharpness") if row.direction is None])
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean(np.array(values, np.float64))) if values else math.nan
