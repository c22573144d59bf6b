"""`fdscale doctor RECIPE`: everything that would fail or slow a run, looked for where it is to run, on every rank."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from fdscale.build.demand import demand_of
from fdscale.build.weights import WeightsRecord, head_weights, student_weights, teacher_weights
from fdscale.cluster.ranks import rank_from_environment
from fdscale.config.dense_settings import DetectSettings
from fdscale.config.errors import UserError
from fdscale.config.programs import AnySettings
from fdscale.config.settings import DistillSettings, FinetuneSettings
from fdscale.planning.check import load_and_check
from fdscale.terminal import terminal
from fdscale.training.engine import Connection, connect, part
from fdscale.training.preflight import Finding, collectives, examine, verdict
from fdscale.training.run_directory import RunDirectory

SECONDS = 1.0  # of the rate probe
LEAVING_SECONDS = 2.0  # within which the other ranks have left
STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red"}


def examine_ranks(settings: AnySettings) -> bool:
    """Examine this rank together with all others; the main rank prints one table, and alone says False for a fault.

    Raises UserError for settings that are wrong in themselves. Nothing is left in the run directory.
    """
    assert settings.run_dir, "the command line names a run directory"
    rank = rank_from_environment(os.environ)
    plan, deepspeed_json = load_and_check(settings, rank.world_size, rank.local_world_size)
    folder = Path(settings.run_dir)
    RunDirectory(folder).check(settings, deepspeed_json)
    connection = connect(rank)
    demand = demand_of(settings, plan, deepspeed_json, rank.local_world_size)
    found = [*_weights(settings, connection), *examine(connection, folder, demand, SECONDS), collectives(connection)]
    if not rank.is_main:
        return True
    terminal().print(_table(found, rank.world_size))
    terminal().print(Text(verdict(found)), soft_wrap=True)
    return all(finding.weight != "fault" for finding in found)


def leave(sound: bool) -> None:
    """Part from the other ranks; one that has a fault to tell goes last."""
    part()
    time.sleep(0 if sound else LEAVING_SECONDS)  # else the launcher's word on a failed rank would be the last line


def _weights(settings: AnySettings, connection: Connection) -> Iterator[Finding]:
    """Each network's weights: there, and the same bytes on every node."""
    try:
        yield _of_weights("student", student_weights(settings.student, connection))
        told = settings.head if isinstance(settings, FinetuneSettings | DetectSettings) else None
        if told is not None and (head := head_weights(told, connection)):
            yield _of_weights("the head", head)
        for where, (table, _) in settings.teachers.items() if isinstance(settings, DistillSettings) else ():
            yield _of_weights(where, teacher_weights(where, table, connection))
    except UserError as error:  # all ranks raise it
        yield Finding("weights", "fault", str(error))


def _of_weights(network: str, record: WeightsRecord) -> Finding:
    told = f"{record.path}, sha256 {record.sha256[:12]}" if record.sha256 else record.path
    return Finding(f"weights of {network}", "ok", told)


def _table(found: Sequence[Finding], ranks: int) -> Table:
    table = Table(title=f"{ranks} rank{'s' if ranks > 1 else ''}", title_justify="left")
    for column in ("check", "state", "found"):
        table.add_column(column, overflow="fold")
    for finding in found:
        table.add_row(finding.check, Text(finding.weight, STYLES[finding.weight]), Text(finding.told))
    return table
