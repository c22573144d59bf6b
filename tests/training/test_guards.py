"""Steps left out, and the way back: real engines and checkpoints, a loss that is not finite on one rank of two."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdscale.cluster.ranks import StopSignals
from fdscale.config.errors import StartAgain, UserError
from fdscale.data.batches import Batch
from fdscale.teachers.teacher import Teacher
from fdscale.training.canary import Canary
from fdscale.training.checkpoint import Checkpoints
from fdscale.training.engine import Connection, full_state, start_engine
from fdscale.training.guards import Guards
from fdscale.training.json_lines import JsonLines, read_rows
from fdscale.training.loop import Plan, fit
from fdscale.training.optim import Schedule, adamw, parameter_groups
from fdscale.training.progress import Progress
from fdscale.training.sinks import Sinks
from tests.training.first_attempt import first_attempt

PLAN = Plan(
    last=9, steps_per_epoch=20, global_batch=4, log_every=1, eval_every=0, checkpoint_every=4, samples=40,
    max_bad_ratio=0.1,
)  # fmt: skip
LIMIT = 3


class Batches:
    """Two samples a step on each rank, whose keys tell rank and step; half of all keys have the highest bit set."""

    data_wait_seconds, fetched_bytes = 0.0, 0

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        for step in range(first, last):
            images = torch.rand(2, 6, generator=torch.Generator().manual_seed(2 * step + self.rank))
            keys = torch.tensor([step * 10 + self.rank, -1 - step])
            yield [Batch(images, keys, keys, slice(0, 2), [])]


def engine_of(stage: int) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2))  # generators must come back, too
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}
    groups = parameter_groups(module, 0.05, ())
    return start_engine(module, adamw(groups, 1e-2, (0.9, 0.999), 1e-8), config, 1, 1.0), module


def guarded(
    connection: Connection, folder: str, stage: int, broken: Mapping[tuple[int, int], int], plan: Plan
) -> dict[str, Any]:
    """A run on this rank, whose loss is not finite at (rank, step), so many times."""
    (engine, module), rank = engine_of(stage), connection.rank.rank
    torch.manual_seed(rank)
    left, done, said = dict(broken), [], []
    attempt, progress = first_attempt(folder), Progress()
    checkpoints = Checkpoints(attempt, connection, keep=9)
    rows = [JsonLines(Path(folder) / "metrics.jsonl")] if connection.rank.is_main else []

    def terms(engine: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        assert batch.keys[1] == -1 - step
        done.append(step)
        loss = engine(batch.images).square().mean()
        wrong, left[rank, step] = left.get((rank, step), 0) > 0, left.get((rank, step), 0) - 1
        return {"loss": loss * torch.nan if wrong else loss}

    error = None
    guards = Guards(connection, attempt.folder, hang_seconds=0, skipped_in_a_row=LIMIT)
    sinks, schedule = Sinks(rows, said.append), Schedule(10, 4, peak=1e-2, start=1e-3)
    try:
        everything = (engine, terms, Batches(rank), schedule, plan, connection, checkpoints, sinks, progress)
        fit(*everything, StopSignals(), None, guards)
    except UserError as mistake:
        error = str(mistake)
    weights = full_state(engine, module, wanted=True)
    sinks.close()
    engine.destroy()
    standing = {name: value for name, value in vars(progress).items() if name != "training_seconds"}
    found = {"done": done, "said": said, "error": error, "weights": weights, "progress": standing}
    return {**found, "live": guards.live.values}


def with_teacher(connection: Connection, folder: str, every: int) -> tuple[int, str | None, float]:
    """A run beside a teacher, of which a bit flips on rank 1 in step 3: how far it came, what was said, good checks."""
    (engine, _), attempt, progress = engine_of(1), first_attempt(folder), Progress()
    statistics = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    network = nn.Sequential(nn.Conv2d(3, 4, 8, 8))
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.1)
    teacher = Teacher(network, width=4, grid=(2, 2), prefix_tokens=0, image_size=16, **statistics)
    canary = Canary({"teacher": teacher}, {"teacher": "replicated"}, connection, "a chip", Path(folder) / "canary.json")
    guards = Guards(connection, attempt.folder, 0, LIMIT, canary=canary, canary_every=every)

    def terms(engine: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        if (connection.rank.rank, step) == (1, 2):
            network[0].weight.data.view(torch.int32)[1, 2, 3, 4] ^= 1
        return {"loss": engine(batch.images).square().mean()}

    schedule, checkpoints = Schedule(10, 4, peak=1e-2, start=1e-3), Checkpoints(attempt, connection, keep=9)
    loader, error = Batches(connection.rank.rank), None
    try:
        everything = (engine, terms, loader, schedule, PLAN, connection, checkpoints, Sinks(), progress)
        fit(*everything, StopSignals(), None, guards)
    except StartAgain as change:
        error = str(change)
    engine.destroy()
    return progress.step, error, guards.live.values.get("canary_checks_total", 0)


@pytest.mark.parametrize(("every", "noticed"), [(0, 4), (1, 3)])
def test_a_changed_teacher_ends_the_attempt_before_anything_is_saved(
    every: int, noticed: int, tmp_path: Path, two_ranks: Any
) -> None:
    for step, error, checks in two_ranks(with_teacher, str(tmp_path), every):
        assert (step, checks) == (noticed, 2 if every else 0)
        assert error.startswith(f"step {noticed}: rank 1 on ")
    assert saved_steps(tmp_path) == []


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("0001/step_*"))


def losses_in(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_after_so_many_in_a_row_the_run_is_what_it_was_at_its_last_checkpoint(
    stage: int, tmp_path: Path, two_ranks: Any
) -> None:
    """Transient: the second time all is well, and everything is bit for bit what an undisturbed run has."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    undisturbed = two_ranks(guarded, str(tmp_path / "a"), stage, {}, PLAN)
    found = two_ranks(guarded, str(tmp_path / "b"), stage, {(1, 5): 1, (0, 6): 1, (1, 7): 1}, PLAN)
    for rank, without in zip(found, undisturbed, strict=True):
        assert rank["error"] is None
        assert rank["done"] == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8]
        assert "3 steps in a row, up to step 8, were not finite: back to the checkpoint of step 4" in rank["said"][0]
        assert rank["progress"] == without["progress"]
        counted = {name: rank["live"].get(name) for name in ("step", "skipped_steps_total", "rollbacks_total")}
        assert counted == {"step": 9, "skipped_steps_total": 3, "rollbacks_total": 1}  # what was seen stays counted
        assert "skipped_steps_total" not in without["live"]
        assert without["weights"].keys() == rank["weights"].keys()
        assert all(torch.equal(weight, without["weights"][name]) for name, weight in rank["weights"].items())
    assert losses_in(tmp_path / "b") == losses_in(tmp_path / "a")  # the rows of what was undone are gone
    assert saved_steps(tmp_path / "b") == [4, 8, 9]
    (main, other), saved = (rank["live"] for rank in found), tmp_path / "b" / "0001" / "step_00000009"
    assert (main["checkpoint_step"], main["attempts_without_commit"]) == (9, 0)
    assert main["checkpoint_bytes"] == sum(f.stat().st_size for f in saved.iterdir() if f.name != "manifest.json")
    assert time.time() - 600 < main["checkpoint_timestamp_seconds"] <= time.time()
    assert "checkpoint_step" not in other  # one rank tells


def test_the_samples_of_a_step_that_was_left_out_are_kept(tmp_path: Path, two_ranks: Any) -> None:
    found = two_ranks(guarded, str(tmp_path), 1, {(1, 2): 1, (0, 4): 1, (1, 4): 1}, PLAN)
    rows = [json.loads(line) for line in (tmp_path / "0001" / "skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 5]
    assert rows[0]["keys"] == [[20, 2**64 - 3], [21, 2**64 - 3]]
    assert [loss == "nan" for loss in rows[0]["losses"]] == [False, True]
    assert rows[1]["losses"] == ["nan", "nan"]
    counts = [row["skipped_steps"] for row in read_rows(tmp_path / "metrics.jsonl") if "loss" in row]
    assert counts == [0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert [row["lr"] for row in read_rows(tmp_path / "metrics.jsonl") if "lr" in row][-1] == Schedule(
        10, 4, peak=1e-2, start=1e-3
    ).for_step(8)
    for rank in found:
        assert rank["error"] is None
        assert (rank["progress"]["skipped_steps"], rank["progress"]["skipped_in_a_row"]) == (2, 0)


def test_the_same_stretch_twice_ends_the_run(tmp_path: Path, two_ranks: Any) -> None:
    for rank in two_ranks(guarded, str(tmp_path), 2, {(0, step): 9 for step in (4, 5, 6)}, PLAN):
        assert rank["done"] == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6]
        assert rank["error"].startswith(
            "3 steps in a row, up to step 7, had a loss or gradient that is not finite, again, after going back"
        )
        assert str(tmp_path / "0001" / "skipped.jsonl") in rank["error"]
        assert "a lower optim.lr or optim.clip is another run" in rank["error"]
    assert saved_steps(tmp_path) == [4]


def test_without_a_checkpoint_there_is_nowhere_to_go_back_to(tmp_path: Path, two_ranks: Any) -> None:
    for rank in two_ranks(guarded, str(tmp_path), 0, {(1, step): 1 for step in (0, 1, 2)}, PLAN):
        assert rank["done"] == [0, 1, 2]
        assert "and there is no checkpoint yet" in rank["error"]


def test_amid_steps_that_are_left_out_no_checkpoint_is_made(tmp_path: Path, two_ranks: Any) -> None:
    plan = dataclasses.replace(PLAN, checkpoint_every=2, last=5)
    for rank in two_ranks(guarded, str(tmp_path), 1, {(1, 3): 1, (1, 4): 1}, plan):
        assert rank["error"] is None
    assert saved_steps(tmp_path) == [2, 5]  # not 4; the last one always


def evaluated(connection: Connection, folder: str) -> tuple[list[int], str]:
    guards = Guards(connection, first_attempt(folder).folder, hang_seconds=0, skipped_in_a_row=LIMIT)
    return list(guards.marking([1, 2])), guards.live.state


def test_every_batch_of_an_evaluation_is_progress(tmp_path: Path, two_ranks: Any) -> None:
    assert two_ranks(evaluated, str(tmp_path)) == [([1, 2], "evaluating")] * 2


def test_a_checkpoint_from_before_these_counts_is_taken() -> None:
    old = {"step": 7, "bad_samples": 1, "bad_this_epoch": 0, "lr_scheduler": None}
    assert Progress.resumed(old) == Progress(step=7, bad_samples=1)
