"""The one loop on two ranks: what is written when, how it stops, what it counts, what a row holds."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdscale.cluster.ranks import StopSignals
from fdscale.config.errors import UserError
from fdscale.data.batches import Batch
from fdscale.training.checkpoint import Checkpoints
from fdscale.training.engine import Connection, start_engine
from fdscale.training.guards import Guards
from fdscale.training.loop import Plan, fit
from fdscale.training.metrics import METRICS
from fdscale.training.optim import Schedule, adamw, parameter_groups
from fdscale.training.progress import Progress
from fdscale.training.sinks import Sinks
from tests.training.first_attempt import first_attempt

GLOBAL_BATCH, WORLD = 8, 2
PLAN = Plan(
    last=7,
    steps_per_epoch=4,
    global_batch=GLOBAL_BATCH,
    log_every=3,
    eval_every=2,
    checkpoint_every=5,
    samples=40,
    max_bad_ratio=0.1,
)
SCHEDULE = Schedule(total_steps=10, warmup_steps=4, peak=1e-2, start=1e-3)
Row = tuple[int, dict[str, float]]


class Rows:
    """A sink that keeps what it is given, and what was said."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.said: list[str] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))

    def close(self) -> None:
        pass


class Batches:
    """This rank's micro batches, a pure function of the step; `bad` says at which steps this rank meets bad images."""

    def __init__(self, rank: int, micro_batch: int, bad: Mapping[int, int]) -> None:
        self.rank, self.micro_batch, self.bad = rank, micro_batch, bad
        self.data_wait_seconds, self.fetched_bytes = 0.0, 0

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        share = GLOBAL_BATCH // WORLD
        for step in range(first, last):
            self.data_wait_seconds += 0.5
            self.fetched_bytes += 1000 + self.rank
            starts = range(self.rank * share, (self.rank + 1) * share, self.micro_batch)
            batches = [self._batch(step, slice(start, start + self.micro_batch)) for start in starts]
            names = [f"shard.tar:{step}-{number}.png" for number in range(self.bad.get(step, 0))]
            yield [dataclasses.replace(batches[0], bad=names), *batches[1:]]

    def _batch(self, step: int, rows: slice) -> Batch:
        images = torch.rand(GLOBAL_BATCH, 6, generator=torch.Generator().manual_seed(step))[rows]
        labels = torch.full((len(images),), -1)
        return Batch(images, labels, labels, rows, [])


def engine_of(micro_batch: int, stage: int) -> Any:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
    optimizer = adamw(parameter_groups(module, 0.05, ()), 1e-3, (0.9, 0.999), 1e-8)
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    config = {"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": zero}
    return start_engine(module, optimizer, config, GLOBAL_BATCH // WORLD // micro_batch, 1.0)


@dataclasses.dataclass
class Outcome:
    """What one rank saw."""

    rows: list[Row]
    said: list[str]
    progress: dict[str, int]
    fetched: int
    done: bool | None
    error: str | None
    handlers_kept: bool  # after a stop: signals are ignored

    def steps_with(self, name: str) -> list[int]:
        return [step for step, values in self.rows if name in values]

    def values(self, name: str) -> list[float]:
        return [values[name] for _, values in self.rows if name in values]


def fitted(
    connection: Connection,
    folder: str,
    plan: Plan,
    micro_batch: int,
    stage: int,
    resume: bool,
    bad: Mapping[tuple[int, int], int],
    stop: tuple[int, int] | None,
    evaluating: bool,
    evaluation_seconds: float = 0.0,
) -> dict[str, Any]:
    """One call of `fit` on this rank; `bad` counts images by (rank, step), `stop` is (rank, step) of a signal."""
    engine, rank = engine_of(micro_batch, stage), connection.rank.rank
    checkpoints = Checkpoints(first_attempt(folder), connection, keep=2)
    progress = Progress.resumed(checkpoints.load(engine) if resume else None)
    sink, handler = Rows(), signal.getsignal(signal.SIGTERM)
    loader = Batches(rank, micro_batch, {step: count for (of_rank, step), count in bad.items() if of_rank == rank})

    def terms(engine: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        if (rank, step) == stop:
            signal.raise_signal(signal.SIGTERM)
        loss = engine(batch.images).square().mean()
        return {"loss": loss, "target_variance": torch.tensor(float(batch.rows.start))}

    def evaluate() -> dict[str, float]:
        time.sleep(evaluation_seconds)
        return {"eval_loss": float(progress.step)}

    done = error = None
    try:
        sinks, held_out = Sinks([sink], sink.said.append), evaluate if evaluating else None
        guards = Guards(connection, Path(folder), hang_seconds=60, skipped_in_a_row=3)
        everything = (engine, terms, loader, SCHEDULE, plan, connection, checkpoints, sinks, progress)
        with StopSignals() as asked, guards:
            done = fit(*everything, asked, held_out, guards)
    except UserError as mistake:
        error = str(mistake)
    left = signal.signal(signal.SIGTERM, handler)  # the warm rank goes on
    kept = left is (signal.SIG_IGN if asked.requested else handler)
    engine.destroy()
    fetched = guards.live.values.get("fetched_bytes_total")
    seen = {"rows": sink.rows, "said": sink.said, "progress": vars(progress), "fetched": fetched}
    return {**seen, "done": done, "error": error, "handlers_kept": kept}


def fit_on(
    ranks: Any,
    folder: Path,
    plan: Plan = PLAN,
    micro_batch: int = 4,
    stage: int = 3,
    resume: bool = False,
    bad: Mapping[tuple[int, int], int] | None = None,
    stop: tuple[int, int] | None = None,
    evaluating: bool = True,
    evaluation_seconds: float = 0.0,
) -> list[Outcome]:
    """`fitted` on both ranks; a hang is a failure after a minute."""
    arguments = (str(folder), plan, micro_batch, stage, resume, bad or {}, stop, evaluating, evaluation_seconds)
    return [Outcome(**found) for found in ranks(fitted, *arguments, timeout=60)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, two_ranks: Any) -> tuple[list[Outcome], Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return fit_on(two_ranks, folder), folder


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("0001/step_*"))


def test_each_cadence_and_always_the_last_step(undisturbed: tuple[list[Outcome], Path]) -> None:
    outcomes, folder = undisturbed
    for outcome in outcomes:
        assert outcome.steps_with("loss") == [1, 3, 6, 7]  # the first too: the loss before anything is learned
        assert outcome.steps_with("eval_loss") == [2, 4, 6, 7]
        assert outcome.values("eval_loss") == [2, 4, 6, 7]  # evaluated after its step
        assert outcome.steps_with("checkpoint_seconds") == [5, 7]
        assert outcome.done is True
        assert outcome.said == []
        assert outcome.handlers_kept
    assert saved_steps(folder) == [5, 7]


def test_rows_are_those_of_the_whole_run_on_every_rank(undisturbed: tuple[list[Outcome], Path]) -> None:
    first, second = undisturbed[0]
    timed = {"step_seconds", "images_per_second", "data_wait_seconds", "eta_seconds", "checkpoint_seconds"}
    plain = [
        [(step, {name: value for name, value in values.items() if name not in timed}) for step, values in outcome.rows]
        for outcome in (first, second)
    ]
    assert plain[0] == plain[1]
    names = {name for _, values in first.rows for name in values}
    assert all(any(metric.measures(name) for metric in METRICS.values()) for name in names)


def test_what_all_ranks_fetched_is_one_number(undisturbed: tuple[list[Outcome], Path]) -> None:
    of_a_step = sum(1000 + rank for rank in range(WORLD))
    assert [outcome.fetched for outcome in undisturbed[0]] == [7 * of_a_step] * WORLD


def test_what_a_row_holds(undisturbed: tuple[list[Outcome], Path]) -> None:
    outcome = undisturbed[0][0]
    assert outcome.values("lr") == [SCHEDULE.for_step(step - 1) for step in (1, 3, 6, 7)]
    assert outcome.values("epoch") == [0.25, 0.75, 1.5, 1.75]
    assert outcome.values("images") == [8, 24, 48, 56]
    assert outcome.values("target_variance") == [2.0] * 4  # the mean of the ranks' 0 and 4
    assert outcome.values("data_wait_seconds") == [0.5] * 4  # a step's, however many lie between two rows
    assert all(0 < norm < 10 for norm in outcome.values("grad_norm"))
    assert all(seconds > 0 for seconds in outcome.values("step_seconds"))
    assert outcome.values("eta_seconds")[-1] == 0
    for speed, seconds in zip(outcome.values("images_per_second"), outcome.values("step_seconds"), strict=True):
        assert speed * seconds == pytest.approx(GLOBAL_BATCH)


def test_the_first_loss_is_the_untrained_networks(undisturbed: tuple[list[Outcome], Path]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
    images = torch.rand(GLOBAL_BATCH, 6, generator=torch.Generator().manual_seed(0))
    expected = float(module(images).square().mean().detach())
    losses = undisturbed[0][0].values("loss")
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]


def test_accumulation_is_the_same_global_batch(
    undisturbed: tuple[list[Outcome], Path], tmp_path: Path, two_ranks: Any
) -> None:
    outcome = fit_on(two_ranks, tmp_path, micro_batch=2)[0]
    assert outcome.values("loss") == pytest.approx(undisturbed[0][0].values("loss"), rel=1e-5)
    assert outcome.values("grad_norm") == pytest.approx(undisturbed[0][0].values("grad_norm"), rel=1e-4)
    assert outcome.values("target_variance") == [3.0] * 4  # of micro batches that begin at rows 0, 2, 4 and 6


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_on_one_rank_stops_both_after_that_step_with_a_commit(
    rank: int, undisturbed: tuple[list[Outcome], Path], tmp_path: Path, two_ranks: Any
) -> None:
    stopped = fit_on(two_ranks, tmp_path, stop=(rank, 3))
    for outcome in stopped:
        assert outcome.done is False
        assert outcome.progress["step"] == 4
        assert outcome.steps_with("loss") == [1, 3, 4]  # the last row is written though it is not due
        assert outcome.said == ["stopped by a signal after step 4; the same command goes on from there"]
        assert outcome.handlers_kept
    assert saved_steps(tmp_path) == [4]

    resumed = fit_on(two_ranks, tmp_path, resume=True)[0]
    assert resumed.done is True
    assert resumed.steps_with("loss") == [6, 7]
    assert resumed.values("loss") == undisturbed[0][0].values("loss")[2:]
    assert resumed.values("grad_norm") == undisturbed[0][0].values("grad_norm")[2:]


def test_an_evaluation_between_two_rows_is_in_no_steps_time(tmp_path: Path, two_ranks: Any) -> None:
    plan = dataclasses.replace(PLAN, last=6, log_every=5, eval_every=3, checkpoint_every=0)
    for outcome in fit_on(two_ranks, tmp_path, plan, evaluation_seconds=2.0):
        assert outcome.steps_with("eval_loss") == [3, 6]
        assert all(seconds < 0.4 for seconds in outcome.values("step_seconds")[1:]), "two seconds over four steps"


def test_a_signal_during_the_last_step_changes_nothing(tmp_path: Path, two_ranks: Any) -> None:
    plan = dataclasses.replace(PLAN, last=2)
    for outcome in fit_on(two_ranks, tmp_path, plan, stop=(1, 1)):
        assert outcome.done is True
        assert outcome.steps_with("checkpoint_seconds") == [2]


def test_a_cadence_of_zero_means_only_at_the_end(tmp_path: Path, two_ranks: Any) -> None:
    plan = dataclasses.replace(PLAN, last=4, log_every=0, eval_every=0, checkpoint_every=0)
    outcome = fit_on(two_ranks, tmp_path, plan)[0]
    assert outcome.steps_with("loss") == [1, 4]
    assert outcome.steps_with("eval_loss") == [4]
    assert outcome.steps_with("checkpoint_seconds") == [4]


def test_a_run_that_was_stopped_amid_its_last_evaluation_makes_up_for_it(tmp_path: Path, two_ranks: Any) -> None:
    """The commit of the last step came before it."""
    plan = dataclasses.replace(PLAN, last=2)
    fit_on(two_ranks, tmp_path, plan, evaluating=False)
    for outcome in fit_on(two_ranks, tmp_path, plan, resume=True):
        assert outcome.done is True
        assert outcome.steps_with("eval_loss") == [2]
        assert outcome.steps_with("loss") == []


def test_without_held_out_data_nothing_is_evaluated(tmp_path: Path, two_ranks: Any) -> None:
    plan = dataclasses.replace(PLAN, last=2)
    assert fit_on(two_ranks, tmp_path, plan, evaluating=False)[0].steps_with("eval_loss") == []


def test_bad_samples_of_all_ranks_are_counted(tmp_path: Path, two_ranks: Any) -> None:
    """4 of 40 are allowed in an epoch of four steps; two epochs may have more together."""
    bad = {(0, 0): 1, (1, 0): 2, (1, 3): 1, (0, 4): 2, (1, 5): 2}
    for outcome in fit_on(two_ranks, tmp_path, bad=bad):
        assert outcome.error is None
        assert outcome.values("bad_samples") == [3, 3, 8, 8]
        assert (outcome.progress["bad_samples"], outcome.progress["bad_this_epoch"]) == (8, 4)


def test_counts_go_on_after_a_resume(tmp_path: Path, two_ranks: Any) -> None:
    bad = {(0, 4): 1, (1, 5): 3, (0, 6): 1}
    fit_on(two_ranks, tmp_path, dataclasses.replace(PLAN, last=6), bad=bad)
    for outcome in fit_on(two_ranks, tmp_path, resume=True, bad=bad):
        assert outcome.progress["bad_samples"] == 5
        assert str(outcome.error).startswith("5 of 40 samples cannot be decoded (12.50%); allowed: 10.00%")


def test_too_many_bad_samples_end_the_run_on_every_rank_by_name(tmp_path: Path, two_ranks: Any) -> None:
    outcomes = fit_on(two_ranks, tmp_path, bad={(0, 1): 2, (1, 2): 3})
    for outcome in outcomes:
        assert outcome.done is None
        assert outcome.progress["step"] == 3
        assert str(outcome.error).startswith("5 of 40 samples cannot be decoded")
        assert outcome.handlers_kept
    assert "shard.tar:2-0.png" in str(outcomes[1].error)


def test_stage_0_has_no_gradient_norm_and_claims_none(tmp_path: Path, two_ranks: Any) -> None:
    outcome = fit_on(two_ranks, tmp_path, dataclasses.replace(PLAN, last=1), stage=0)[0]
    assert outcome.steps_with("loss") == [1]
    assert outcome.steps_with("grad_norm") == []
