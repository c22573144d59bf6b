"""The study from its first run to its report; what is done already is not done again. No torch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fdscale.config.errors import UserError
from fdscale.data.index import Index, load_index
from fdscale.data.packing.digits import pack_digits
from fdscale.data.processes import terminated_as_interrupted
from fdscale.data.progress import progress
from fdscale.study.queue import work_off
from fdscale.study.report import write_report
from fdscale.study.results import Result, append, read_results
from fdscale.study.tasks import QUICK, QUICK_LOOK, TRAINED, Design, Task, load_settings, tasks_of
from fdscale.study.worker import Answer
from fdscale.training.run_directory import differences, write_text

RESULTS, DESIGN, RUNS, LOGS = "results.jsonl", "design.json", "runs", "logs"
COMMIT = "commit"  # at which the first run began


def design_of(
    shards: tuple[Path, Path] | None, seeds: range, own: Mapping[str, tuple[str, ...]], quick: bool, output: Path
) -> Design:
    """The design for labelled shards (training, held-out), or for the digits, which are packed into `output`.

    Raises UserError, before anything runs, for shards without labels and for settings that cannot be.
    """
    train, held_out = shards or _digits(output / "digits")
    classes = _classes(load_index(train), load_index(held_out))
    overrides = {kind: ((*QUICK[kind], *own.get(kind, ())) if quick else own.get(kind, ())) for kind in TRAINED}
    design = Design(str(train), str(held_out), classes, tuple(seeds), overrides, *(QUICK_LOOK if quick else ()))
    for kind in TRAINED:
        load_settings(design, kind)
    return design


def conduct(design: Design, output: Path, workers: int) -> None:
    """Do every task of the design that was not done yet, `workers` at a time, then write the report.

    Raises UserError where `output` holds another study, and for a run that fails.
    """
    if find_spec("matplotlib") is None:
        raise UserError(
            "the report is drawn by matplotlib, which is not installed: pip install 'fdscale[demo,diagnose]'"
        )
    _refuse_another(design, output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be made: {error.strerror}; name another folder") from error
    commit = _begun_at(output)
    write_text(output / DESIGN, json.dumps({**asdict(design), COMMIT: commit}, indent=2) + "\n")
    results, tasks = output / RESULTS, tasks_of(design, output / RUNS)
    done = {row.task for row in read_results(results)} & {task.name for task in tasks}
    with terminated_as_interrupted(), progress(len(tasks), len(done), "tasks") as advance:

        def finished(task: Task, answer: Answer) -> None:
            append(_result(task, answer), results)
            advance(1)

        if len(done) < len(tasks):
            work_off(tasks, done, workers, output / LOGS, (design, output / RUNS), finished)
    write_report(design, commit, read_results(results), output)


def _result(task: Task, answer: Answer) -> Result:
    assert answer.values is not None, "of a finished task"
    spent = (time.time(), answer.seconds, answer.cpu_seconds, answer.resident_bytes)
    return Result(task.name, task.kind, task.seed, task.of, task.network, answer.values, *spent)


def _digits(folder: Path) -> tuple[Path, Path]:
    for split in ("train", "test"):
        if not (folder / split).exists():
            pack_digits(folder / split, split)
    return folder / "train", folder / "test"


def _classes(train: Index, held_out: Index) -> int:
    """How many there are; raises UserError where an image has no label, or one that training does not know."""
    for index in (train, held_out):
        if int(index.samples["label"].min()) < 0:
            raise UserError(f"{index.folder}: there are images without a label; pack class folders for a study")
    classes, highest = int(train.samples["label"].max()) + 1, int(held_out.samples["label"].max())
    if highest >= classes:
        raise UserError(f"{held_out.folder} has label {highest}, {train.folder} only 0 to {classes - 1}")
    return classes


def _begun_at(output: Path) -> str:
    """The commit at which the study began; empty without a repository."""
    if (output / DESIGN).exists():
        return str(json.loads((output / DESIGN).read_text())[COMMIT])
    from fdscale.build.run_info import code_commit  # imports torch

    return code_commit()


def _refuse_another(design: Design, output: Path) -> None:
    """More seeds may be asked for later; everything else decides the numbers."""
    file = output / DESIGN
    before: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    now = json.loads(json.dumps(asdict(design)))
    if before and (changed := differences(before, now, {"seeds", "shards", "held_out", COMMIT})):
        listed = "\n  ".join(changed)
        raise UserError(f"--output {output} holds another study:\n  {listed}\nname another folder")
