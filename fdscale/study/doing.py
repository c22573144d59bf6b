"""What a worker does for each kind of task: a program of the house, or a look at what one has left."""

from __future__ import annotations

from pathlib import Path

from fdscale.build.networks import prepare_student
from fdscale.config.errors import UserError
from fdscale.config.recipe import load_recipe
from fdscale.config.settings import DistillSettings, FinetuneSettings
from fdscale.downstream.classify import finetune
from fdscale.downstream.probe import probe
from fdscale.students.files import save_student
from fdscale.study.contrastive import contrast
from fdscale.study.looking import looked_at
from fdscale.study.tasks import RECIPES, SCRATCH, Design, Task
from fdscale.train import distill
from fdscale.training.json_lines import read_rows

NEIGHBOURS, BATCH = 20, 64  # of a probe


def done(task: Task, design: Design, runs: Path) -> dict[str, float] | None:
    """Do a task; its values, or None where a signal stopped it. Raises UserError as the programs do."""
    if task.kind == "probe":
        if task.network == SCRATCH:
            _write_random(task)
        found = probe(Path(task.files[0]), Path(design.shards), Path(design.held_out), NEIGHBOURS, BATCH, workers=0)
        return {"linear_accuracy": found.linear_accuracy, "knn_accuracy": found.knn_accuracy}
    if task.kind == "diagnose":
        return looked_at(task.files, design.held_out, design.images, design.directions, runs / task.name)
    settings = load_recipe(str(RECIPES / f"{task.kind}.toml"), task.overrides)
    if isinstance(settings, DistillSettings):
        complete = distill(settings)
    elif isinstance(settings, FinetuneSettings):
        complete = contrast(settings) if task.kind == "contrastive" else finetune(settings)
    else:
        raise UserError(f"{task.name}: {settings.program} is no program of the study")
    assert settings.run_dir, "named by the task"
    return _measured(Path(settings.run_dir), settings.data.global_batch) if complete else None


def _write_random(task: Task) -> None:
    """The student file of the weights that a seed's distillations begin with."""
    settings = load_recipe(str(RECIPES / "finetune.toml"), task.overrides)
    student = prepare_student(settings.student, settings.seed)
    save_student(student, student.backbone.state_dict(), Path(task.files[0]).parent)


def _measured(run: Path, global_batch: int) -> dict[str, float]:
    """The last value of everything that a run has measured on held-out images, its loss, and what it has seen."""
    rows = read_rows(run / "metrics.jsonl")
    last: dict[str, float] = {}
    for row in rows:
        last |= {name: value for name, value in row.items() if name == "loss" or name.startswith("eval_")}
    steps = max(row["step"] for row in rows)
    return {**last, "steps": steps, "images": steps * global_batch}
