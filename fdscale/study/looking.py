"""A teacher and what was distilled from it under the diagnostics: the paper's "before" and "after"."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from fdscale.study.tasks import AFTER, BEFORE

BATCH = 64
MEANS = ("head_similarity", "attention_diagonality", "attention_offset_share", "attention_column_share")
SPREAD = "attention_distance"


def looked_at(files: Sequence[str], held_out: str, images: int, directions: int, folder: Path) -> dict[str, float]:
    """Diagnose `files`: teacher and student as trained, then both fine-tuned, on the first shards' held-out images.

    Attention, features and alignment are those of the networks as trained; the landscape is that of the fine-tuned
    ones, under the heads that they were tuned with. `folder` gets every measurement; returned are the numbers that
    claims are about, as `before.NAME` and `after.NAME`: means over the last third of the blocks.
    """
    index, names = load_index(held_out), (BEFORE, AFTER)
    preset = Preset(images, images, LandscapePlan(directions=directions, points=11))
    trained, tuned = (build_subjects(asked_models(pair, names), torch.device("cpu")) for pair in (files[:2], files[2:]))
    as_trained = measure(trained, index, preset, (ATTENTION, FEATURES, ALIGNMENT), BATCH, workers=0)
    as_tuned = measure(tuned, index, preset, (LANDSCAPE,), BATCH, workers=0)
    found = Found([*as_trained.rows, *as_tuned.rows], as_trained.maps)
    told = f"{images} held-out images; attention and features before fine-tuning, the loss landscape after it"
    write_numbers(found, folder, {"told": told})
    return {f"{model}.{name}": value for model in names for name, value in _numbers(found.rows, model)}


def _numbers(rows: Sequence[Measurement], model: str) -> Iterator[tuple[str, float]]:
    spread = [values.std() for _, values in last_third(rows, model, SPREAD)]
    yield "attention_distance_spread", float(np.mean(spread))
    for name in MEANS:
        yield name, float(np.mean([values.mean() for _, values in last_third(rows, model, name)]))
    yield "sharpness", next(row.value for row in of(rows, model, "sharpness") if row.direction is None) or 0.0
