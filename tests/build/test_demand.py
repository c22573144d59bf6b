"""What a run asks of its disk and its nodes, by hand."""

from __future__ import annotations

from dataclasses import replace

from fdscale.build.demand import demand_of
from fdscale.config.recipe import load_recipe
from fdscale.data.loader import AHEAD
from fdscale.planning.check import load_and_check
from fdscale.planning.cost import BATCHES_A_WORKER
from fdscale.planning.dense_sizes import trained_parameters
from fdscale.planning.smoke import smoke_patch
from fdscale.training.preflight import Demand


def demand(*overrides: str, steps: int | None = None) -> Demand:
    settings = load_recipe("vit_b_dino", ["data.shards=digits", *overrides], smoke_patch)
    plan, deepspeed_json = load_and_check(settings, 2)
    return demand_of(settings, replace(plan, steps=steps), deepspeed_json, local_ranks=2)


def parameters() -> tuple[int, int]:
    """Of the student, and of its projector: its width and one more for each channel of the teacher."""
    plan, _ = load_and_check(load_recipe("vit_b_dino", ["data.shards=digits"], smoke_patch), 2)
    student, width = plan.student.parameters(), plan.student.width
    assert student is not None
    assert width is not None
    return student, (width + 1) * (plan.teachers["teacher"].width or 0)


def test_the_disk_holds_what_is_kept_one_that_is_being_written_and_the_student() -> None:
    student, projector = parameters()
    one = 12 * (student + projector)  # ZeRO-3: fp32 weights and two moments
    assert demand("checkpoint.keep=2").disk == 3 * one + 4 * student
    average = 16 * (student + projector)
    assert demand("checkpoint.keep=2", "optim.ema_decay=0.9").disk == 3 * average + 8 * student


def test_checkpoints_that_stay_for_ever_count_where_the_number_of_steps_is_known() -> None:
    for_ever = ("checkpoint.keep=1", "checkpoint.keep_every=10")
    student, projector = parameters()
    more = (demand(*for_ever, steps=100).disk or 0) - (demand("checkpoint.keep=1").disk or 0)
    assert more == 10 * 12 * (student + projector)
    assert demand(*for_ever).disk == demand("checkpoint.keep=1").disk


def test_batches_of_shards_need_no_room_of_their_own() -> None:
    assert demand("data.workers=4").shared_memory == 0


def dense_demand(recipe: str, *overrides: str) -> tuple[Demand, int]:
    """Of one rank, and the parameters of the whole network."""
    settings = load_recipe(recipe, overrides)
    plan, deepspeed_json = load_and_check(settings, 1)
    parameters = trained_parameters(settings, plan.student)
    assert parameters is not None
    return demand_of(settings, replace(plan, steps=None), deepspeed_json, local_ranks=1), parameters


def test_the_planner_and_the_loader_mean_the_same_batches() -> None:
    assert BATCHES_A_WORKER == AHEAD


def test_targets_lie_in_shared_memory_beside_their_images() -> None:
    images = 2 * 2 * 16  # workers, batches a worker, images of a micro batch
    assert dense_demand("scenes_segment", "data.workers=2")[0].shared_memory == images * (3 + 1) * 96**2
    detection = dense_demand("scenes_detect", "data.workers=2")[0].shared_memory
    assert detection == images * (3 + 8) * 128**2  # the masks of so many objects
    boxes = dense_demand("scenes_detect", "data.workers=2", "head.masks=false")[0].shared_memory
    assert boxes == images * 3 * 128**2


def test_the_heads_of_a_dense_task_are_kept_too() -> None:
    found, parameters = dense_demand("scenes_detect", "checkpoint.keep=1")
    assert parameters == 3_913_340
    assert found.disk == 2 * 12 * parameters + 4 * parameters
