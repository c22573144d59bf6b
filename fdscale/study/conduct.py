"""The study from its first run to its report; what is done already is not done again. No torch."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fdscale.config.errors import UserError
from fdscale.config.programs import AnySettings
from fdscale.config.settings import FinetuneSettings
from fdscale.data.index import Index, load_index
from fdscale.data.packing.digits import pack_digits
from fdscale.data.processes import terminated_as_interrupted
from fdscale.data.progress import progress
from fdscale.study.queue import work_off
from fdscale.study.report import write_report
from fdscale.study.results import Result, append, read_results
from fdscale.study.tasks import LOOK, QUICK, QUICK_LOOK, TRAINED, Design, Task, load_settings, tasks_of
from fdscale.study.worker import Answer
from fdscale.training.run_directory import differences, write_text

RESULTS, DESIGN, RUNS, LOGS = "results.jsonl", "design.json", "runs", "logs"
COMMIT = "commit"  # at which the first run began

LOG = logging.getLogger(__name__)


def design_of(
    shards: tuple[Path, Path] | None, seeds: range, own: Mapping[str, tuple[str, ...]], quick: bool, output: Path
) -> Design:
    """The design for labelled shards (training, held-out), or for the digits, which are packed into `output`.

    Raises UserError, before anything runs, for shards without labels and for settings that cannot be.
    """
    train, held_out = shards or _digits(output / "digits")
    indices = (load_index(train), load_index(held_out))
    overrides = {kind: ((*QUICK[kind], *own.get(kind, ())) if quick else own.get(kind, ())) for kind in TRAINED}
    design = Design(
        str(train),
        str(held_out),
        indices[0].fingerprint(),
        indices[1].fingerprint(),
        _classes(*indices),
        tuple(seeds),
        overrides,
        *(QUICK_LOOK if quick else LOOK),
        quick,
    )
    for kind in TRAINED:
        _refuse_too_few(load_settings(design, kind), kind, indices[0])
    return design


def conduct(design: Design, output: Path, workers: int) -> None:
    """Do every task of the design that was not done yet, `workers` at a time, then write the report.

    Raises UserError where `output` holds another study or cannot be written, and for a run that fails.
    """
    if find_spec("matplotlib") is None:
        raise UserError(
            "the report is drawn by matplotlib, which is not installed: pip install 'fdscale[demo,diagnose]'"
        )
    _refuse_another(design, output)
    results, tasks = output / RESULTS, tasks_of(design, output / RUNS)
    asked = {task.name for task in tasks}
    done = {row.task for row in read_results(results)} & asked
    commit = _begun_at(output, gone_on_with=done < asked)
    with _writing(output):
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / DESIGN, json.dumps({**asdict(design), COMMIT: commit}, indent=2) + "\n")
    with terminated_as_interrupted(), progress(len(tasks), len(done), "tasks") as advance:

        def finished(task: Task, answer: Answer) -> None:
            with _writing(output):
                append(_result(task, answer), results)
            advance(1)

        if done < asked:
            work_off(tasks, done, workers, output / LOGS, (design, output / RUNS), finished)
    with _writing(output):
        write_report(design, commit, [row for row in read_results(results) if row.task in asked], output)


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


def _refuse_too_few(settings: AnySettings, kind: str, train: Index) -> None:
    if isinstance(settings, FinetuneSettings) and (settings.labelled or 0) > len(train):
        raise UserError(
            f"{kind}.labelled={settings.labelled}: {train.folder} has {len(train)} images; "
            f"allowed: 1 to {len(train)}, e.g. {kind}.labelled={max(len(train) // 7, 1)}"
        )


def _begun_at(output: Path, gone_on_with: bool) -> str:
    """The commit at which the study began, empty without a repository; warns where it is gone on with at another."""
    before = str(json.loads((output / DESIGN).read_text())[COMMIT]) if (output / DESIGN).exists() else None
    if before is not None and not gone_on_with:
        return before
    from fdscale.build.run_info import code_commit  # imports torch

    now = code_commit()
    if before is not None and before != now:
        told = "%s began at commit %s and is gone on with at %s: runs of a pair may be of different code"
        LOG.warning(told, output, before or "unknown", now or "unknown")
    return now if before is None else before


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """What cannot be written, on a full disk for example, is told with what to do."""
    try:
        yield
    except OSError as error:
        told = f"{error.filename or output}: cannot be written: {error.strerror}"
        raise UserError(f"{told}; make room or name another --output, then run the same command again") from error


def _refuse_another(design: Design, output: Path) -> None:
    """More seeds may be asked for later, and shards may be moved; everything else decides the numbers."""
    file = output / DESIGN
    before: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    now = json.loads(json.dumps(asdict(design)))
    if before and (changed := differences(before, now, {"seeds", "shards", "held_out", COMMIT})):
        listed = "\n  ".join(changed)
        raise UserError(f"--output {output} holds another study:\n  {listed}\nname another folder")
