"""Opening a run: everything that is checked, joined and opened before a network is built."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from fdscale.build.demand import demand_of
from fdscale.build.exports import exports_of
from fdscale.build.weights import (
    HEAD,
    STUDENT,
    WeightsRecord,
    head_weights,
    hold_weights,
    student_weights,
    teacher_weights,
)
from fdscale.cluster.orphans import watch_launchers
from fdscale.cluster.ranks import StopSignals, rank_from_environment
from fdscale.config.dense_settings import DetectSettings
from fdscale.config.errors import UserError
from fdscale.config.programs import AnySettings
from fdscale.config.settings import DistillSettings, FinetuneSettings
from fdscale.data.order import DataSet, Order, Samples
from fdscale.planning.check import load_and_check
from fdscale.planning.placement import Choice, Placement
from fdscale.training.attempts import Attempt, claim, note_current
from fdscale.training.engine import Connection, connect, gather_lists
from fdscale.training.live import Live
from fdscale.training.preflight import preflight
from fdscale.training.run_directory import RunDirectory
from fdscale.training.startup import Startup, this_start
from fdscale.training.writer import this_process

logger = logging.getLogger(__name__)

D = TypeVar("D", bound=Samples)
H = TypeVar("H", bound=DataSet)
OpenData = Callable[[RunDirectory, Connection], tuple[D, H | None]]
"""Opens training and held-out data, made in the run directory where embedded ones are named; all ranks call it."""


@dataclass(frozen=True)
class Run(Generic[D, H]):
    """One attempt at a run: who we are, where it is kept, what it reads."""

    settings: AnySettings
    deepspeed_json: dict[str, Any]
    connection: Connection
    directory: RunDirectory
    attempt: Attempt
    stop: StopSignals
    samples: D
    held_out: H | None
    weights: dict[str, WeightsRecord]
    placements: Mapping[str, Placement]
    startup: Startup

    @property
    def device(self) -> torch.device:
        return self.connection.device

    @property
    def micro_batch(self) -> int:
        return int(self.deepspeed_json["train_micro_batch_size_per_gpu"])

    @cached_property
    def order(self) -> Order:
        return self.samples.order(self.settings.data.global_batch, self.settings.seed)

    @property
    def total_steps(self) -> int:
        """Steps of the schedule."""
        return self.settings.total_steps(self.order.steps_per_epoch)

    @property
    def last_step(self) -> int:
        """The step at which this attempt ends, unless it is stopped."""
        return min(self.total_steps, self.settings.max_steps or self.total_steps)

    def fingerprints(self) -> dict[str, str]:
        """What tells the data of this run from others, by the settings that name them."""
        tables: dict[str, DataSet | None] = {"data": self.samples, "eval": self.held_out}
        found = [samples.fingerprints(table) for table, samples in tables.items() if samples is not None]
        return {setting: told for own in found for setting, told in own.items()}

    def is_complete(self) -> bool:
        """Whether an earlier attempt finished this run (said in the log)."""
        done = self.directory.completed_steps()
        if done is None or done < self.last_step:
            return False
        logger.info("already complete at step %d: %s", done, self.directory.folder)
        exports_of(self, Live()).forget_older()
        self.attempt.end(0, "already complete")
        self.stop.restore()
        return True


def open_run(settings: AnySettings, open_data: OpenData[D, H]) -> Run[D, H]:
    """Check everything, join the other ranks, and open the run directory and the data.

    Raises UserError before anything is written or a GPU is touched. From here on a stop signal is heeded by the loop.
    """
    assert settings.run_dir, "the command line names a run directory"
    startup = this_start()
    startup.ends("imports")
    rank = rank_from_environment(os.environ)
    checked, deepspeed_json = load_and_check(settings, rank.world_size, rank.local_world_size)
    directory = RunDirectory(Path(settings.run_dir))
    directory.check(settings, deepspeed_json)
    stop = StopSignals()
    stop.install()
    watch_launchers(stop, os.environ)
    startup.ends("settings")
    connection = connect(rank)
    startup.ends("connecting")
    weights = _weights(settings, connection)  # every rank has looked before the first one writes
    preflight(connection, directory.folder, demand_of(settings, checked, deepspeed_json, rank.local_world_size))
    startup.ends("preflight")
    attempt = _claim(directory, settings.guards.attempts, connection)
    connection.on_main(lambda: directory.begin(settings))
    for note in checked.notes if rank.is_main else ():
        logger.info("note: %s", note)
    hold_weights(directory, connection, weights)
    samples, held_out = open_data(directory, connection)
    placements = _agreed_placements(checked.placements, connection)
    run = Run(
        settings,
        deepspeed_json,
        connection,
        directory,
        attempt,
        stop,
        samples,
        held_out,
        weights,
        placements,
        startup,
    )
    directory.check_data(_agreed_fingerprints(run))
    startup.ends("data")
    return run


def _claim(directory: RunDirectory, most_without_progress: int, connection: Connection) -> Attempt:
    """This start's number, claimed by the main rank for all; from here on nobody else writes to the run directory."""
    size = connection.rank.world_size
    claimed: list[Attempt] = []
    connection.on_main(lambda: claimed.append(claim(directory.attempts, size, most_without_progress, os.environ)))
    folder = connection.broadcast([attempt.folder for attempt in claimed])[0]
    attempt = claimed[0] if claimed else Attempt(folder)
    ranks = gather_lists([this_process()], connection)
    connection.on_main(lambda: attempt.record_ranks(ranks))
    note_current(attempt)
    return attempt


def _agreed_fingerprints(run: Run[D, H]) -> dict[str, str]:
    """What tells the data from others, the same on every rank: nodes may have copies, or ask a URL at other moments."""
    told = gather_lists([run.fingerprints()], run.connection)
    for setting, own in told[0].items():
        if others := [rank for rank, theirs in enumerate(told) if theirs[setting] != own]:
            raise UserError(
                f"{setting}: rank {others[0]} found other data than rank 0 ({len(others)} of {len(told)} ranks do); "
                "copy the same shards with their index to every node, and start again"
            )
    return told[0]


def _agreed_placements(mine: Mapping[str, Choice], connection: Connection) -> dict[str, Placement]:
    """The same placements on every rank: nodes may differ in memory, but a divided teacher needs them all.

    Where any rank has no room for a whole teacher, it is divided.
    """
    told = gather_lists([{where: choice.placement for where, choice in mine.items()}], connection)
    return {where: "zero3" if any(theirs[where] == "zero3" for theirs in told) else told[0][where] for where in told[0]}


def _weights(settings: AnySettings, connection: Connection) -> dict[str, WeightsRecord]:
    """What each network starts from, agreed on by all ranks."""
    found = {STUDENT: student_weights(settings.student, connection)}
    for where, (table, _) in settings.teachers.items() if isinstance(settings, DistillSettings) else ():
        found[where] = teacher_weights(where, table, connection)
    if isinstance(settings, FinetuneSettings | DetectSettings) and (head := head_weights(settings.head, connection)):
        found[HEAD] = head
    return found
