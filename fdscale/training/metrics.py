"""What is measured: the one table of metrics, the JSON lines file of a run, and the fan-out to every sink.

The loop measures and calls `Sinks.write`; a sink (console, file, Prometheus) only shows or keeps. A new
metric is one row of `METRICS`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal, Protocol

logger = logging.getLogger(__name__)

Kind = Literal["gauge", "counter"]


@dataclass(frozen=True)
class Metric:
    """One measured quantity: its name in the loop and in `metrics.jsonl`, kind, base unit and meaning.

    With a `label` it is measured for each of several things: `teacher_loss/dino` is that of the teacher `dino`.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    label: str | None = None

    @property
    def prometheus_name(self) -> str:
        return f"fdscale_{self.name}"

    def measures(self, name: str) -> bool:
        """Whether a value of that name is this quantity's."""
        return name == self.name if self.label is None else name.startswith(f"{self.name}/")


_ROWS = (
    Metric("step", "gauge", "steps", "Optimizer steps done since the run began"),
    Metric("epoch", "gauge", "epochs", "Passes over the data set, fractional"),
    Metric("images", "gauge", "images", "Images trained on since the run began; falls back on resume"),
    Metric("loss", "gauge", "1", "Training loss of the global batch"),
    Metric("loss_zero", "gauge", "1", "Distillation loss that predicting zero would have on the same target"),
    Metric("feature_cosine", "gauge", "1", "Mean cosine between projected student tokens and target tokens"),
    Metric("target_variance", "gauge", "1", "Variance of the target tokens; 1 when they are whitened"),
    Metric("teacher_loss", "gauge", "1", "Distillation loss of one of several teachers, not weighted", "teacher"),
    Metric("teacher_cosine", "gauge", "1", "Mean cosine between projected tokens and one teacher's", "teacher"),
    Metric("accuracy", "gauge", "ratio", "Correctly classified share of the global batch"),
    Metric("grad_norm", "gauge", "1", "Total gradient norm before clipping"),
    Metric("lr", "gauge", "1", "Learning rate of the head's or projector's group, which layer decay leaves whole"),
    Metric("images_per_second", "gauge", "images/second", "Training throughput of all ranks together"),
    Metric("step_seconds", "gauge", "seconds", "Time of one step, data wait included; mean since last row"),
    Metric("data_wait_seconds", "gauge", "seconds", "Time a step waited for its batch; mean since last row"),
    Metric("eta_seconds", "gauge", "seconds", "Estimated time to the last step"),
    Metric("checkpoint_seconds", "gauge", "seconds", "Time the last checkpoint took until it was committed"),
    Metric("bad_samples_total", "counter", "samples", "Undecodable images replaced since the run began"),
    Metric(
        "skipped_steps_total", "counter", "steps", "Steps whose loss or gradient was not finite, applied on no rank"
    ),
    Metric("phase_seconds", "gauge", "seconds", "Time of one step by phase; mean over ranks, since last row", "phase"),
    Metric("slowest_rank", "gauge", "1", "The rank whose own work takes longest"),
    Metric(
        "slowest_lag_seconds", "gauge", "seconds", "How much longer a step's work takes there than on the median rank"
    ),
    Metric("eval_loss", "gauge", "1", "Loss on the held-out shards"),
    Metric("eval_accuracy", "gauge", "ratio", "Correctly classified share of the held-out images"),
    Metric("eval_knn_accuracy", "gauge", "ratio", "k-NN accuracy of student features on the held-out shards"),
)
METRICS: dict[str, Metric] = {row.name: row for row in _ROWS}


class Sink(Protocol):
    """Shows or keeps the values of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """Hands every row to each sink and every event to `say`; with no sinks (another rank) it is silent.

    The step is itself a metric, so the sinks are given `values` with `step` first.
    """

    def __init__(self, sinks: Sequence[Sink] = (), say: Callable[[str], None] | None = None) -> None:
        self._sinks = tuple(sinks)
        self._say = say

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row. Raises KeyError for a name that `METRICS` lacks (our mistake, on every rank)."""
        unknown = sorted(name for name in values if not any(metric.measures(name) for metric in _ROWS))
        if unknown:
            raise KeyError(f"metrics without a row in METRICS: {', '.join(unknown)}")
        for sink in self._sinks:
            sink.write(step, {"step": step, **values})

    def say(self, text: str) -> None:
        """Tells an event (resumed, saved, stopped) to whoever reads the console."""
        if self._say is not None:
            self._say(text)

    def go_back(self, step: int) -> None:
        """Forget the rows after `step`, where rows are kept: their steps are done once more."""
        for sink in self._sinks:
            if isinstance(sink, JsonLines):
                sink.cut(step)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """`metrics.jsonl`: one JSON object a row with `step`, `time` (Unix seconds) and the values.

    Floats read back bit for bit; a value that is not finite becomes null, so that the file stays valid JSON.
    `resumed_step` is the step of the checkpoint that was loaded: later rows belong to work that was lost and
    will be done again, so they are cut off, as is a line torn by a kill. Without it the file starts empty.
    """

    def __init__(self, path: Path, resumed_step: int | None = None) -> None:
        self._path = path
        self._file = self._opened(resumed_step)

    def _opened(self, resumed_step: int | None) -> FileIO:
        rows = read_rows(self._path) if resumed_step is not None and self._path.exists() else []
        _replace(self._path, [row for row in rows if resumed_step is not None and row["step"] <= resumed_step])
        return FileIO(self._path, "a")  # without a buffer: a row that did not fit is not written later

    def cut(self, step: int) -> None:
        """Leave out the rows after `step`, as if the file were opened anew."""
        self._file.close()
        self._file = self._opened(step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, "time": time.time()} | {name: _plain(values[name]) for name in values if name != "step"}
        try:
            self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        except OSError as error:  # a full disk: a checkpoint will say so, what is only told must not end a run
            logger.warning("%s: the row of step %d could not be written: %s", self._path, step, error)

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl` in file order; a line torn by a kill is named and left out."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        row = _row(line)
        if row is None:
            logger.warning("%s line %d is not a whole row; left out", path, number)
        else:
            rows.append(row)
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # JSONDecodeError, or UnicodeDecodeError of a torn line
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _replace(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the whole file anew beside itself and renames it: a kill leaves the old one or the new."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _plain(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None
