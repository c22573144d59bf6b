"""The moving average on the partitions is the one that a single process would keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdscale.training.average import keep_average
from fdscale.training.checkpoint import Checkpoints
from fdscale.training.engine import Connection, averaged_weights, full_state, has_average, start_engine
from fdscale.training.optim import adamw, parameter_groups
from tests.training.first_attempt import first_attempt

DECAY = 0.9
LEAN = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}


def averaged_engine(stage: int, seed: int = 0, **more: Any) -> Any:
    """Two groups, a frozen weight, sizes that two ranks cannot divide, and several flat partitions to a group."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(9, 17), nn.GELU(), nn.LayerNorm(17), nn.Linear(17, 5))
    module[0].bias.requires_grad_(False)
    optimizer = adamw(parameter_groups(module, 0.05, ()), 1e-2, (0.9, 0.999), 1e-8)
    keep_average(optimizer, DECAY)
    zero = {"stage": stage, **({**LEAN, "sub_group_size": 60} if stage == 3 else {})}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, **more}
    return start_engine(module, optimizer, config, 1, 1.0)


def steps(connection: Connection, engine: Any, first: int, last: int, broken: int = -1) -> list[dict[str, Tensor]]:
    """The gathered weights after each step; in step `broken` one rank's loss is not finite."""
    found = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(10 * step + connection.rank.rank)
        loss = engine(torch.randn(4, 9, generator=generator).to(next(engine.parameters()).dtype)).square().mean()
        if step == broken and connection.rank.rank == 0:
            loss = loss * float("nan")
        engine.backward(loss)
        engine.step()
        found.append(full_state(engine, engine.module, wanted=True))
    return found


def averages(connection: Connection, stage: int, broken: int = -1, **more: Any) -> dict[str, Any]:
    engine = averaged_engine(stage, **more)
    start = full_state(engine, engine.module, wanted=True)
    weights = steps(connection, engine, 0, 4, broken)
    average = full_state(engine, engine.module, wanted=True, average=True)
    engine.destroy()
    return {"start": start, "weights": weights, "average": average}


def expected(start: dict[str, Tensor], weights: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    average = {name: value.clone() for name, value in start.items()}
    for state in weights:
        for name, value in state.items():
            average[name].lerp_(value, 1 - DECAY)
    return average


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_average_on_partitions_is_that_of_one_process(stage: int, two_ranks: Any) -> None:
    for found in two_ranks(averages, stage):
        assert not torch.equal(found["average"]["0.weight"], found["weights"][-1]["0.weight"])
        assert torch.equal(found["average"]["0.bias"], found["start"]["0.bias"])  # frozen
        assert_equal(found["average"], expected(found["start"], found["weights"]))


@pytest.mark.parametrize("stage", [1, 3])
def test_under_bf16_the_fp32_masters_are_averaged(stage: int, two_ranks: Any) -> None:
    def in_full(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in state.items() if name != "0.bias"}

    found = two_ranks(averages_in_bf16, stage)[0]
    average = in_full(found["average"])
    assert any((value.bfloat16().float() != value).any() for value in average.values())
    assert_equal(average, expected(in_full(found["start"]), [in_full(state) for state in found["weights"]]))


def averages_in_bf16(connection: Connection, stage: int) -> dict[str, Any]:
    return averages(connection, stage, bf16={"enabled": True})


def swapped(connection: Connection, stage: int, more: dict[str, Any]) -> dict[str, Any]:
    """What a forward gives before, amid and after the swap, and what is learned then, beside an engine without it."""
    found: dict[str, Any] = {}
    pixels = torch.randn(4, 9, generator=torch.Generator().manual_seed(77))
    for swapping in (True, False):
        engine = averaged_engine(stage, **more)
        inputs = pixels.to(next(engine.parameters()).dtype)
        if swapping:
            found["early"] = has_average(engine)
        steps(connection, engine, 0, 3)
        engine.eval()
        if swapping:
            with torch.no_grad():
                found["before"] = engine(inputs)
                with averaged_weights(engine):
                    found["amid"] = engine(inputs)
                    found["average"] = full_state(engine, engine.module, wanted=True, average=True)
                found["after"] = engine(inputs)
            found["late"] = has_average(engine)
        engine.train()
        found[f"then_{swapping}"] = steps(connection, engine, 3, 5)[-1]
        found[f"average_{swapping}"] = full_state(engine, engine.module, wanted=True, average=True)
        engine.destroy()
    return found


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        (0, {}),
        (2, {}),
        (3, {}),
        (1, {"bf16": {"enabled": True}}),
        (3, {"bf16": {"enabled": True}}),
        (3, {"zero_optimization": {"stage": 3}}),  # small weights stay whole on every rank
        (3, {"zero_optimization": {**LEAN, "stage": 3, "zero_hpz_partition_size": 2}}),
    ],
    ids=["0", "2", "3", "1 bf16", "3 bf16", "3 resident", "3 with second copies"],
)
def test_the_average_takes_the_weights_place_for_a_while(stage: int, more: dict[str, Any], two_ranks: Any) -> None:
    for found in two_ranks(swapped, stage, more):
        assert (found["early"], found["late"]) == (False, True)
        assert torch.equal(found["after"], found["before"])
        assert_equal(found["then_True"], found["then_False"])
        assert_equal(found["average_True"], found["average_False"])
        module = nn.Sequential(nn.Linear(9, 17), nn.GELU(), nn.LayerNorm(17), nn.Linear(17, 5))
        module.load_state_dict(found["average"])
        module.to(found["amid"].dtype)
        inputs = torch.randn(4, 9, generator=torch.Generator().manual_seed(77)).to(found["amid"].dtype)
        assert not torch.equal(found["amid"], found["before"])
        torch.testing.assert_close(found["amid"], module(inputs).detach())


@pytest.mark.parametrize("stage", [1, 3])
def test_a_skipped_step_does_not_move_it(stage: int, two_ranks: Any) -> None:
    found = two_ranks(averages, stage, 2)[1]
    weights = found["weights"]
    assert_equal(weights[2], weights[1])
    assert_equal(found["average"], expected(found["start"], [weights[0], weights[1], weights[3]]))


def resumed_under_hpz(connection: Connection, folder: str) -> list[dict[str, Tensor]]:
    """The same under ZeRO++'s second copies inside a node, whose group lasts as long as the process."""
    zero = {**LEAN, "stage": 3, "zero_hpz_partition_size": 2}
    averaged_engine(3, zero_optimization=zero).destroy()
    return resumed_average(connection, 3, folder)


def test_second_copies_inside_a_node_are_of_the_loaded_weights(tmp_path: Path, two_ranks: Any) -> None:
    at_two, at_once, undisturbed, resumed = two_ranks(resumed_under_hpz, str(tmp_path))[0]
    assert_equal(at_once, at_two)
    assert_equal(resumed, undisturbed)


def resumed_average(connection: Connection, stage: int, folder: str) -> list[dict[str, Tensor]]:
    """The average after four steps undisturbed; saved after two by one engine and resumed by another; and at once."""
    checkpoints, engine = Checkpoints(first_attempt(folder), connection, keep=2), averaged_engine(stage)
    steps(connection, engine, 0, 2)
    at_two = full_state(engine, engine.module, wanted=True, average=True)
    checkpoints.save(engine, 2, {"step": 2})
    steps(connection, engine, 2, 4)
    undisturbed = full_state(engine, engine.module, wanted=True, average=True)
    engine.destroy()
    other = averaged_engine(stage, seed=99)
    checkpoints.load(other)
    at_once = full_state(other, other.module, wanted=True, average=True)
    steps(connection, other, 2, 4)
    resumed = full_state(other, other.module, wanted=True, average=True)
    other.destroy()
    return [at_two, at_once, undisturbed, resumed]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_it_is_saved_and_resumed_with_the_moments(stage: int, tmp_path: Path, two_ranks: Any) -> None:
    at_two, at_once, undisturbed, resumed = two_ranks(resumed_average, stage, str(tmp_path))[0]
    assert_equal(at_once, at_two)
    assert_equal(resumed, undisturbed)
