"""The weights that the networks of a run start from: found here, checked once a node, the same for the whole run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fdscale.config.dense_settings import DetectHeadSettings
from fdscale.config.errors import UserError, told_as
from fdscale.config.settings import HeadSettings, StudentSettings, TeacherSettings
from fdscale.students.geometry import file_description
from fdscale.teachers.fetched import fetched, sha256_of, verify, weights_folder
from fdscale.teachers.table import OWN
from fdscale.training.engine import Connection, gather_lists
from fdscale.training.run_directory import RunDirectory

STUDENT = "student"  # the others are called as the settings that name them: `teacher`, `further_teachers.NAME`
HEAD = "head"
RANDOM = "random"


@dataclass(frozen=True)
class WeightsRecord:
    """What a network starts from: `path` is its file, or `random` or `own` (given in Python), which have no hash.

    `description` is the hash of what stands beside a student file: its geometry, mean and std.
    """

    name: str
    path: str
    sha256: str | None = None
    repository: str | None = None
    revision: str | None = None
    description: str | None = None


def teacher_weights(where: str, settings: TeacherSettings, connection: Connection) -> WeightsRecord:
    """What a teacher's weights are: random, the user's file, or what `fdscale fetch` brought; all ranks call it.

    `where` is the setting that names the teacher, `teacher` or `further_teachers.NAME`.

    Nothing is downloaded. One rank of each node reads the whole file for its hash, the others wait. Raises the same
    UserError on every rank when a node lacks the file, or has other bytes than were fetched or than another node has.
    """
    with told_as(where):
        return _agreed(partial(_teacher_record, settings), connection)


def student_weights(settings: StudentSettings, connection: Connection) -> WeightsRecord:
    """What the student starts from, likewise: random weights or a student file."""
    return _agreed(partial(_student_record, settings), connection)


def head_weights(settings: HeadSettings | DetectHeadSettings, connection: Connection) -> WeightsRecord | None:
    """What a classifier's or detector's head starts from, likewise; None for a new one."""
    path = settings.weights
    return None if path is None else _agreed(lambda: _head_record(path), connection)


def hold_weights(directory: RunDirectory, connection: Connection, records: Mapping[str, WeightsRecord]) -> None:
    """Keep what a run starts from in its directory; raises UserError on every rank when it began with other bytes."""
    plain: dict[str, dict[str, str | None]] = {network: asdict(record) for network, record in records.items()}
    directory.check_weights(plain)
    connection.on_main(lambda: directory.record_weights(plain))


def _teacher_record(settings: TeacherSettings) -> WeightsRecord:
    if settings.weights == RANDOM or settings.name == OWN:
        return WeightsRecord(settings.name, settings.weights or OWN)
    if settings.weights is not None:
        return _file_record("teacher", settings.name, settings.weights)
    found = fetched(settings.name, settings.revision)
    if found is None:
        pinned = f" at revision {settings.revision!r}" if settings.revision else ""
        raise UserError(
            f"teacher.weights: {weights_folder()} has no weights of {settings.name}{pinned}: run `fdscale fetch "
            "RECIPE` on a node with network, or set teacher.weights=FILE, or teacher.weights=random for a trial"
        )
    verify(found)
    return WeightsRecord(settings.name, str(found.path), found.sha256, found.repository, found.revision)


def _student_record(settings: StudentSettings) -> WeightsRecord:
    if settings.weights is None:
        return WeightsRecord(settings.name, RANDOM)
    return _file_record("student", settings.name, settings.weights)


def _head_record(path: str) -> WeightsRecord:
    try:
        return WeightsRecord(HEAD, path, sha256_of(Path(path)))
    except UserError as error:
        raise UserError(f"head.weights: {error}") from error


def _file_record(network: str, name: str, path: str) -> WeightsRecord:
    try:
        return WeightsRecord(name, path, sha256_of(Path(path)), description=_description(Path(path)))
    except UserError as error:
        raise UserError(f"{network}.weights: {error}") from error


def _description(weights: Path) -> str | None:
    if not weights.with_suffix(".json").is_file():
        return None
    return hashlib.sha256(json.dumps(file_description(weights), sort_keys=True).encode()).hexdigest()


class _Outcome(NamedTuple):
    """What the first rank of a node found, or why it did not."""

    rank: int
    record: WeightsRecord | None
    failure: str


def _agreed(find: Callable[[], WeightsRecord], connection: Connection) -> WeightsRecord:
    """What `find` gives on the first rank of each node when all found the same bytes; a failure is told to all."""
    mine = [_outcome(find, connection.rank.rank)] if connection.rank.local_rank == 0 else []
    outcomes = gather_lists(mine, connection) if connection.rank.world_size > 1 else mine
    failed = [outcome for outcome in outcomes if outcome.failure]
    if failed:
        where = f"on the node of rank {failed[0].rank}" + (f" and {len(failed) - 1} more" if len(failed) > 1 else "")
        raise UserError(failed[0].failure if len(outcomes) == 1 else f"{where}: {failed[0].failure}")
    return _the_same({outcome.rank: outcome.record for outcome in outcomes if outcome.record})


def _outcome(find: Callable[[], WeightsRecord], rank: int) -> _Outcome:
    try:
        return _Outcome(rank, find(), "")
    except UserError as error:
        return _Outcome(rank, None, str(error))


def _the_same(records: Mapping[int, WeightsRecord]) -> WeightsRecord:
    """The one record of all nodes, by their first ranks; raises UserError when they hold different bytes."""
    ranks = {record.sha256: rank for rank, record in reversed(list(records.items()))}
    first = next(iter(records.values()))
    if len(ranks) > 1:
        listed = ", ".join(f"SHA-256 {sha256} at rank {rank}" for sha256, rank in ranks.items())
        raise UserError(f"{first.path}: the nodes have different bytes there ({listed}): copy one file to all of them")
    return first
