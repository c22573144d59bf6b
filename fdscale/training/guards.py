"""What stands around the loop: steps that are left out, hangs, slow ranks, and teachers that change."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.training.amplitudes import Amplitudes
from fdscale.training.canary import Canary
from fdscale.training.checkpoint import Checkpoints
from fdscale.training.collectives import timed_collectives
from fdscale.training.engine import Connection, gather_lists
from fdscale.training.finite import searches_scale
from fdscale.training.history import newest_commit
from fdscale.training.live import Live
from fdscale.training.phases import Phases
from fdscale.training.progress import Progress
from fdscale.training.sinks import Sinks
from fdscale.training.watchdog import PATIENCE, Watchdog, members_of

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

SKIPPED = "skipped.jsonl"
T = TypeVar("T")


class Guards:
    """The guards of one attempt, made by all ranks together; `folder`, which is there, holds what they write.

    As a context they watch for hangs and measure collectives. `hang_seconds` 0: no watchdog; `canary` None: no
    teacher, or not wanted.
    """

    def __init__(
        self,
        connection: Connection,
        folder: Path,
        hang_seconds: float,
        skipped_in_a_row: int,
        live: Live | None = None,
        canary: Canary | None = None,
        canary_every: int = 0,
    ) -> None:
        members = members_of(connection)
        self.connection, self.folder = connection, folder
        self.watchdog = Watchdog(folder / "stacks", members, connection.rank.rank, hang_seconds)
        self.live = live or Live()
        self.phase = Phases(connection, [member.host for member in members], folder / "phases.json", self.live)
        self.amplitudes = Amplitudes()
        self.skipped_in_a_row = skipped_in_a_row
        self.canary, self.canary_every = canary, canary_every
        self._went_back = False  # since the newest commit
        self._open = ExitStack()

    def __enter__(self) -> Guards:
        self._open.enter_context(self.watchdog)
        self._open.enter_context(timed_collectives(partial(self.phase, "collective")))
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def mark(self, state: str, step: int | None = None, patience: float = 1.0, doing: str = "") -> None:
        """The run enters a state; `doing` says it more exactly to whoever finds it hanging."""
        self.live.enter(state)
        self.watchdog.mark(doing or state, step, patience)

    def marking(self, things: Iterable[T]) -> Iterator[T]:
        """The same things, while the run evaluates: each of them is progress."""
        for thing in things:
            self.mark("evaluating")
            yield thing
        self.mark("evaluating")

    def check_teachers(self, step: int, saving: bool) -> None:
        """Before a checkpoint, and at a cadence of their own: raise StartAgain where a teacher is not what it was."""
        if self.canary is not None and (saving or (self.canary_every and step % self.canary_every == 0)):
            self.mark("looking at the teachers", step)
            self.canary.check(step)
            self.live.count("canary_checks_total")

    def saved(self) -> None:
        """A commit was made: to it the run may go back once."""
        self._went_back = False
        self.live.note({"attempts_without_commit": 0})
        self.note_commit()

    def note_commit(self) -> None:
        """Which commit the run would go on from now, for its metrics."""
        if self.connection.rank.is_main:
            self.live.look(lambda: newest_commit(self.folder.parent))

    def went_back(
        self,
        engine: DeepSpeedEngine,
        checkpoints: Checkpoints,
        progress: Progress,
        loss: Tensor,
        batches: Sequence[Any],
        sinks: Sinks,
    ) -> bool:
        """Count a step whose update was left out; True when `progress` is that of the last commit again.

        `loss` is this rank's, `batches` what it was computed of. Raises UserError when going back is of no use.
        """
        if engine.was_step_applied():
            progress.skipped_in_a_row = 0
            return False
        losses = self._note(progress.step, float(loss), batches)
        progress.skipped_steps += 1
        self.live.count("skipped_steps_total")
        if searches_scale(engine) and all(map(math.isfinite, losses)):
            return False  # what overflowed is the scaled gradient: the next one is scaled less
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row < self.skipped_in_a_row:
            return False
        self._go_back(engine, checkpoints, progress, sinks)
        return True

    def _note(self, step: int, loss: float, batches: Sequence[Any]) -> list[float]:
        """Keep what the step was made of and say whose loss it was; returns the ranks' losses."""
        keys = [key & (2**64 - 1) for batch in batches for key in batch.keys.tolist()]  # the bits of an unsigned one
        everyone: list[Any] = gather_lists([{"loss": loss, "keys": keys}], self.connection)
        losses = [own["loss"] for own in everyone]
        if self.connection.rank.is_main:
            culprits = [str(rank) for rank, loss in enumerate(losses) if not math.isfinite(loss)]
            whose = f"the loss of rank {', '.join(culprits)}" if culprits else "every loss is finite, the gradient"
            logger.warning(
                "step %d was applied on no rank: %s is not finite (samples: %s)", step, whose, self._keys_file
            )
            row = {"step": step, "time": time.time(), "losses": list(map(str, losses))}
            self._keep({**row, "keys": [own["keys"] for own in everyone]})
        return losses

    def _keep(self, row: dict[str, Any]) -> None:
        try:
            with self._keys_file.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # what is only told must not end a run, least of all on one rank
            logger.warning("could not write %s: %s", self._keys_file, error)

    @property
    def _keys_file(self) -> Path:
        return self.folder / SKIPPED

    def _go_back(self, engine: DeepSpeedEngine, checkpoints: Checkpoints, progress: Progress, sinks: Sinks) -> None:
        failed = progress.step
        self.mark("going back", failed, PATIENCE, "going back to the last checkpoint")
        state = None if self._went_back else checkpoints.load(engine)
        if state is None:
            why = (
                "again, after going back to the last checkpoint"
                if self._went_back
                else "and there is no checkpoint yet"
            )
            raise UserError(
                f"{progress.skipped_in_a_row} steps in a row, up to step {failed}, had a loss or gradient that is not "
                f"finite, {why}. Their samples are in {self._keys_file}. Look at those; a lower optim.lr "
                "or optim.clip is another run, with a run_dir of its own; "
                f"`fdscale doctor {self.folder.parent.parent}` reads the run"
            )
        self.live.count("rollbacks_total")
        self.note_commit()
        progress.become(Progress.resumed(state))
        progress.skipped_in_a_row = 0
        self._went_back = True
        sinks.go_back(progress.step)
        sinks.say(
            f"{self.skipped_in_a_row} steps in a row, up to step {failed}, were not finite: back to the checkpoint of "
            f"step {progress.step}, from there once more"
        )
