"""The one training loop: every program is a caller of `fit`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fdscale.cluster.ranks import StopSignals
from fdscale.data.loader import check_bad_ratio
from fdscale.training.checkpoint import Checkpoints
from fdscale.training.engine import Connection, balanced_module_stack, gather_lists, set_learning_rate
from fdscale.training.finite import carried_by_gradient, take_step
from fdscale.training.guards import Guards
from fdscale.training.live import Live
from fdscale.training.meter import Meter
from fdscale.training.optim import Schedule
from fdscale.training.progress import Progress
from fdscale.training.sinks import Sinks
from fdscale.training.watchdog import PATIENCE

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

BatchTerms = Callable[["DeepSpeedEngine", Any, int], dict[str, Tensor]]


class Loader(Protocol):
    """Batches of this rank: one list of micro batches a step, each with `rows`, `keys` and `bad` as data's `Batch`."""

    data_wait_seconds: float

    @property
    def fetched_bytes(self) -> int: ...

    def steps(self, first: int, last: int) -> Generator[list[Any], None, None]: ...


class Watch(Protocol):
    """Looks at single steps from outside; every rank calls both."""

    def __call__(self, step: int) -> AbstractContextManager[object]: ...

    def tell(self, step: int) -> None: ...


class Unwatched:
    """Looks at nothing."""

    def __call__(self, step: int) -> AbstractContextManager[object]:
        return nullcontext()

    def tell(self, step: int) -> None:
        pass


UNWATCHED = Unwatched()


@dataclass(frozen=True)
class Plan:
    """When what happens, in steps: the run ends at `last`; 0 as a cadence means never in between."""

    last: int
    steps_per_epoch: int
    global_batch: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    samples: int
    max_bad_ratio: float

    def due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps (0: at the end only) is done after this step."""
        return step == self.last or (every > 0 and step % every == 0)

    def reports(self, step: int) -> bool:
        """Whether this step's values are a row of metrics: the first one's are, which tell what it began with."""
        return step == 1 or self.due(step, self.log_every)


def fit(
    engine: DeepSpeedEngine,
    batch_terms: BatchTerms,
    loader: Loader,
    schedule: Schedule,
    plan: Plan,
    connection: Connection,
    checkpoints: Checkpoints,
    sinks: Sinks,
    progress: Progress,
    stop: StopSignals,
    evaluate: Callable[[], dict[str, float]] | None,
    guards: Guards,
    watch: Watch = UNWATCHED,
) -> bool:
    """Train from `progress` to `plan.last`; True when done, False when stopped by a signal.

    `batch_terms(engine, micro_batch, step)` says what one batch means: it returns `loss` and what is measured.
    When `stop` was requested on any rank, the step is finished and committed before the loop ends. Each step runs
    inside `watch(step)`, and `watch.tell(step)` says what was seen. Raises what the guards raise: UserError, or
    StartAgain before anything is saved.
    """
    _make_up_for_the_last(evaluate, progress, plan, sinks)
    meter = Meter(plan.global_batch, plan.last, guards.live, guards.phase)
    for micro_batches in _steps(loader, progress, plan, guards, meter):
        set_learning_rate(engine, schedule, progress.step)
        with watch(progress.step), guards.amplitudes.watching(plan.reports(progress.step + 1)):
            terms = train_step(engine, batch_terms, micro_batches, progress.step, guards.phase)
        progress.step += 1
        guards.live.note({"step": progress.step, "last_step_timestamp_seconds": time.time()})
        with guards.phase("agree"):
            stopping = _agree(connection, stop, loader, micro_batches, progress, plan, guards.live)
        if guards.went_back(engine, checkpoints, progress, terms["loss"], micro_batches, sinks):
            continue
        if stopping or plan.reports(progress.step):
            row = _row(engine, terms | guards.amplitudes.terms(), progress, plan, schedule)
            sinks.write(progress.step, row | meter.row(progress, loader.data_wait_seconds))
        with meter.apart():
            watch.tell(progress.step)
            saving = stopping or _to_be_saved(progress, plan)
            guards.check_teachers(progress.step, saving)
            if saving:
                _save(engine, checkpoints, progress, sinks, guards)
            if evaluate and _to_be_evaluated(progress, plan, stopping):
                sinks.write(progress.step, evaluate())
        if stopping:
            stop.request()  # on this rank, too: a late signal must not find it unprepared
            sinks.say(f"stopped by a signal after step {progress.step}; the same command goes on from there")
            return progress.step == plan.last
    return True


def _steps(loader: Loader, progress: Progress, plan: Plan, guards: Guards, meter: Meter) -> Iterator[list[Any]]:
    """The micro batches of each step from `progress` on, which the loop moves: by one, or back to a checkpoint."""
    while (begun_at := progress.step) < plan.last:
        meter.restart(begun_at, loader.data_wait_seconds)
        with closing(loader.steps(begun_at, plan.last)) as steps:
            guards.mark("waiting for data", progress.step)
            for step, micro_batches in enumerate(steps, begun_at):
                guards.mark("training", step)
                yield micro_batches
                if progress.step != step + 1:
                    break
                guards.mark("waiting for data", progress.step)


def train_step(
    engine: DeepSpeedEngine,
    batch_terms: BatchTerms,
    micro_batches: Iterable[Any],
    step: int,
    phase: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Tensor]:
    """One optimizer step over this rank's micro batches; returns their mean terms, still on the device.

    Where loss or gradient are not finite on any rank nothing is updated: `engine.was_step_applied()` is False then.
    Each part runs inside `phase(its name)`.
    """
    engine.train()
    terms = []
    for batch in micro_batches:
        with balanced_module_stack():
            with phase("forward"):
                of_batch = batch_terms(engine, batch, step)
            with phase("backward"):
                engine.backward(carried_by_gradient(of_batch["loss"]))
            with phase("update"):
                take_step(engine)
        terms.append({name: value.detach() for name, value in of_batch.items()})
    return {name: torch.stack([of_batch[name] for of_batch in terms]).mean() for name in terms[0]}


def _agree(
    connection: Connection,
    stop: StopSignals,
    loader: Loader,
    batches: list[Any],
    progress: Progress,
    plan: Plan,
    live: Live,
) -> bool:
    """Whether any rank was asked to stop; counts bad samples of all ranks, and raises when there are too many.

    What all ranks have fetched is told along.
    """
    names = [name for batch in batches for name in batch.bad]
    flags = torch.tensor([int(stop.requested), loader.fetched_bytes, len(names)])
    dist.all_reduce(flags, group=connection.control)
    stopping, fetched, bad = flags.tolist()
    live.note({"fetched_bytes_total": fetched})
    if bad:
        live.count("bad_samples_total", bad)
        names = gather_lists(names, connection)
        if connection.rank.is_main:
            logger.warning("step %d: cannot be decoded, a neighbour stands in: %s", progress.step, "; ".join(names))
    if (progress.step - 1) % plan.steps_per_epoch == 0:
        progress.bad_this_epoch = 0
    progress.bad_samples += bad
    progress.bad_this_epoch += bad
    check_bad_ratio(progress.bad_this_epoch, plan.samples, plan.max_bad_ratio, names)
    return stopping > 0


def _row(
    engine: DeepSpeedEngine, terms: dict[str, Tensor], progress: Progress, plan: Plan, schedule: Schedule
) -> dict[str, float]:
    """This step's values over all ranks. The only place where the loop itself waits for the device."""
    values = torch.stack(list(terms.values()))
    dist.all_reduce(values)
    means = dict(zip(terms, (values / dist.get_world_size()).tolist(), strict=True))
    norm = engine.get_global_grad_norm()
    return {
        **means,
        **({} if norm is None else {"grad_norm": float(norm)}),  # ZeRO-0 keeps none
        "lr": schedule.for_step(progress.step - 1),
        "epoch": progress.step / plan.steps_per_epoch,
        "images": progress.step * plan.global_batch,
        "bad_samples": progress.bad_samples,
        "skipped_steps": progress.skipped_steps,
    }


def _make_up_for_the_last(
    evaluate: Callable[[], dict[str, float]] | None, progress: Progress, plan: Plan, sinks: Sinks
) -> None:
    """Evaluate a run that begins at its end: it was stopped after its last commit, perhaps amid its evaluation."""
    if evaluate and progress.step == plan.last:
        sinks.write(progress.step, evaluate())


def _to_be_saved(progress: Progress, plan: Plan) -> bool:
    """Whether a checkpoint is due; amid steps that were left out it waits: it is where they would go back to."""
    due = plan.due(progress.step, plan.checkpoint_every)
    return due and (progress.skipped_in_a_row == 0 or progress.step == plan.last)


def _to_be_evaluated(progress: Progress, plan: Plan, stopping: bool) -> bool:
    """Whether an evaluation is due, after the commit; a stop may not wait for one, unless it is the run's last."""
    return plan.due(progress.step, plan.eval_every) and (not stopping or progress.step == plan.last)


def _save(engine: DeepSpeedEngine, checkpoints: Checkpoints, progress: Progress, sinks: Sinks, guards: Guards) -> None:
    began = time.perf_counter()
    guards.mark("saving", progress.step, PATIENCE)
    checkpoints.save(engine, progress.step, vars(progress))
    guards.saved()
    sinks.write(progress.step, {"checkpoint_seconds": time.perf_counter() - began})
