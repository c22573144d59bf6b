"""A model's measurements in a dozen numbers, from rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fdscale.diagnostics.rows import Measurement
from fdscale.diagnostics.selection import (
    FITTED,
    HEADS,
    classifier_of,
    images_in,
    last_third,
    models_in,
    of,
    output_layer,
)

Rows = Sequence[Measurement]


@dataclass(frozen=True)
class Line:
    """One number of each model, as text; empty where there is none."""

    title: str
    unit: str
    told: dict[str, str]


def summary(rows: Rows) -> list[Line]:
    """The lines that have a number for any model, models in the order in which they come."""
    models = models_in(rows)
    lines = [Line(title, unit, {model: tell(rows, model) for model in models}) for title, unit, tell in _LINES]
    return [line for line in lines if any(line.told.values())]


def _mean(measure: str, digits: int, rows: Rows, model: str) -> str:
    """Over the last third of the layers, each counted once."""
    found = last_third(rows, model, measure)
    return f"{np.mean([values.mean() for _, values in found]):z.{digits}f}" if found else ""


def _spread(measure: str, digits: int, rows: Rows, model: str) -> str:
    """The standard deviation over a layer's heads, likewise."""
    found = [values.std() for _, values in last_third(rows, model, measure) if len(values) > 1]
    return f"{np.mean(found):z.{digits}f}" if found else ""


def _of_output(measure: str, digits: int, rows: Rows, model: str) -> str:
    last = output_layer(rows, model, measure)
    found = [row.value for row in of(rows, model, measure) if row.layer == last]
    return f"{found[0]:z.{digits}f}" if found else ""


def _with_interval(measure: str, rows: Rows, model: str) -> str:
    for row in of(rows, model, measure):
        if row.direction is None:
            assert row.value is not None
            interval = "" if row.low is None or row.high is None else f" ({row.low:.3g} to {row.high:.3g})"
            return f"{row.value:.3g}{interval}"
    return ""


def _of_fitted(measure: str, digits: int, rows: Rows, model: str) -> str:
    return _at_centre(measure, digits, rows, model) if classifier_of(rows, model) == FITTED else ""


def _of_own(measure: str, digits: int, rows: Rows, model: str) -> str:
    return _at_centre(measure, digits, rows, model) if classifier_of(rows, model) != FITTED else ""


def _at_centre(measure: str, digits: int, rows: Rows, model: str) -> str:
    found = [row.value for row in of(rows, model, measure) if row.at is not None and not any(row.at)]
    return f"{found[0]:z.{digits}f}" if found else ""


def _head(rows: Rows, model: str) -> str:
    return HEADS.get(classifier_of(rows, model) or "", "")


def _side(rows: Rows, model: str) -> str:
    found = of(rows, model, "image_side")
    return f"{found[0].value:.0f}" if found else ""


def _images(place: int, rows: Rows, model: str) -> str:
    count = images_in(rows, model)[place]
    return f"{count:,}" if count else ""


_LINES: tuple[tuple[str, str, Callable[[Rows, str], str]], ...] = (
    ("attention distance", "pixels", partial(_mean, "attention_distance", 1)),
    ("its spread over the heads of a block", "pixels", partial(_spread, "attention_distance", 1)),
    ("head similarity", "cosine", partial(_mean, "head_similarity", 3)),
    ("diagonality of the averaged maps", "at most 1", partial(_mean, "attention_diagonality", 3)),
    ("share of the offset in them", "0 to 1", partial(_mean, "attention_offset_share", 3)),
    ("share of the column in them", "0 to 1", partial(_mean, "attention_column_share", 3)),
    ("attention entropy", "nats", partial(_mean, "attention_entropy", 2)),
    ("attention information", "0 to 1", partial(_mean, "attention_information", 3)),
    ("sharpness (95 % interval over directions)", "nats per distance²", partial(_with_interval, "sharpness")),
    ("rise of the loss at distance 1 (likewise)", "nats", partial(_with_interval, "loss_rise")),
    ("classifier of the landscape", "", _head),
    ("cross entropy, undisturbed", "nats", partial(_of_own, "landscape_loss", 3)),
    ("accuracy, undisturbed", "0 to 1", partial(_of_own, "landscape_accuracy", 3)),
    ("cross entropy on these images (head fitted to them)", "nats", partial(_of_fitted, "landscape_loss", 3)),
    ("accuracy on these images (head fitted to them)", "0 to 1", partial(_of_fitted, "landscape_accuracy", 3)),
    ("effective rank of the output", "dimensions", partial(_of_output, "feature_rank", 1)),
    ("token similarity of the output", "cosine", partial(_of_output, "token_similarity", 3)),
    ("image side", "pixels", _side),
    ("images", "", partial(_images, 0)),
    ("images of the landscape", "", partial(_images, 1)),
)
