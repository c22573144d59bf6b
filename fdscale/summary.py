"""One table over finished (or stopped) runs: what was trained, how the loss fell, the held-out results."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fdscale.config.errors import UserError
from fdscale.training.json_lines import read_rows
from fdscale.training.metrics import row_of
from fdscale.training.run_directory import RunDirectory

Rows = Sequence[Mapping[str, Any]]


STUDENT = "its student as RUN/student.safetensors"
LEFT = {
    "segment": "its network as RUN/segmenter, for transformers",
    "detect": "its network as RUN/detector.safetensors",
}
TRAINED = {"loss": "", "loss_zero": "zero ", "accuracy": "accuracy ", "pixel_accuracy": "pixels "}
HELD_OUT = {
    "eval_loss": "loss ",
    "eval_knn_accuracy": "k-NN ",
    "eval_accuracy": "accuracy ",
    "eval_miou": "mIoU ",
    "eval_ap/box/all": "box AP ",
    "eval_ap/mask/all": "mask AP ",
}


def summarise(run_dirs: Sequence[Path]) -> Table:
    """The table, one row a run, from each run directory's `recipe.toml` and `metrics.jsonl` alone.

    Numbers with an arrow are the first and the last of the run. Raises UserError for a folder that is no run.
    """
    runs = [(run_dir, *_read(run_dir)) for run_dir in run_dirs]
    held = dict.fromkeys(LEFT.get(recipe["program"], STUDENT) for _, recipe, _ in runs)
    table = Table(show_lines=True, caption=f"a finished run holds {', '.join(held)}")
    table.add_column("run", overflow="fold")
    for column in ("loss", "held out", "steps", "seconds"):
        table.add_column(column, no_wrap=True)
    for run in runs:
        table.add_row(*_cells(*run))
    return table


def _cells(run_dir: Path, recipe: Mapping[str, Any], rows: Rows) -> list[Text]:
    finished = RunDirectory(run_dir).completed_steps() is not None
    cells = [
        f"{run_dir}{'' if finished else ' (not finished)'}\n{_what(recipe)}",
        _lines(rows, TRAINED),
        _lines(rows, HELD_OUT),
        str(max((row["step"] for row in rows), default=0)),
        f"{_training_seconds(rows):.0f}",
    ]
    return [Text(cell) for cell in cells]  # brackets in a path are no markup


def _read(run_dir: Path) -> tuple[dict[str, Any], Rows]:
    recipe, metrics = run_dir / "recipe.toml", run_dir / "metrics.jsonl"
    missing = [path.name for path in (recipe, metrics) if not path.is_file()]
    if missing:
        raise UserError(f"{run_dir}: not a run directory: it has no {' and no '.join(missing)}")
    return tomllib.loads(recipe.read_text()), read_rows(metrics)


def _what(recipe: Mapping[str, Any]) -> str:
    """Program, student, and what it learned from: its teacher, or labels and the weights it started with."""
    student = f"{recipe['program']}: {recipe['student']['name']}"
    if "teacher" not in recipe:
        return f"{student}\n<- labels, from {_origin(recipe['student']) or 'random weights'}"
    teachers = [recipe["teacher"], *recipe.get("further_teachers", {}).values()]
    return "\n<- ".join([student, *(f"{table['name']} {_origin(table)}".rstrip() for table in teachers)])


def _origin(network: Mapping[str, Any]) -> str:
    """Where its weights are from: student files are all called the same, they are named by their run."""
    return (network.get("weights") or "").removesuffix("/student.safetensors")


def _lines(rows: Rows, labels: Mapping[str, str]) -> str:
    spans = {label: _span(rows, name) for name, label in labels.items()}
    return "\n".join(f"{label}{span}" for label, span in spans.items() if span)


def _span(rows: Rows, name: str) -> str:
    """First and last value of a metric; one value where they are equal, "" where it was never written."""
    values = [row[name] for row in rows if name in row]
    metric = row_of(name)
    style = ".1%" if metric is not None and metric.unit == "ratio" else ".4f"
    texts = ["not finite" if value is None else format(value, style) for value in values]
    ends = list(dict.fromkeys([texts[0], texts[-1]])) if texts else []
    return " → ".join(ends)


def _training_seconds(rows: Rows) -> float:
    """Seconds spent in steps: each row's mean step time times its steps; pauses are left out."""
    total, done = 0.0, 0
    for row in rows:
        if row.get("step_seconds") is not None:
            total += row["step_seconds"] * (row["step"] - done)
            done = row["step"]
    return total
