"""Collectives of the engine are seen by name, also the asynchronous ones; nothing of them changes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from fdscale.training.collectives import COLLECTIVES, timed_collectives
from fdscale.training.engine import Connection, start_engine
from fdscale.training.optim import adamw, parameter_groups


class Clock:
    def __init__(self) -> None:
        self.seconds, self.times = 0.0, 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began
        self.times += 1


def steps(connection: Connection, stage: int, late: float, timed: bool) -> tuple[list[float], float, int]:
    """Losses of three steps in which rank 1 comes late to each backward; seconds in collectives, and how many."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 64), nn.GELU(), nn.Linear(64, 2))
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
    if stage == 3:
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
    engine = start_engine(module, adamw(parameter_groups(module, 0.0, ()), 1e-2, (0.9, 0.99), 1e-8), config, 1, 1.0)
    clock, losses = Clock(), []
    images = torch.rand(4, 6, generator=torch.Generator().manual_seed(connection.rank.rank))

    def step() -> None:
        loss = engine(images).square().mean()
        time.sleep(late * connection.rank.rank)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))

    if timed:
        with timed_collectives(clock):
            for _ in range(3):
                step()
    else:
        for _ in range(3):
            step()
    engine.destroy()
    return losses, clock.seconds, clock.times


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_time_that_a_late_rank_costs_the_others_is_in_their_collectives(stage: int, two_ranks: Any) -> None:
    waiting, late = two_ranks(steps, stage, 0.2, True)
    assert waiting[1] > 3 * 0.2 * 0.9
    assert late[1] < 3 * 0.2 * 0.9
    assert waiting[2] == late[2] > 0
    assert [found[0] for found in two_ranks(steps, stage, 0.0, False)] == [waiting[0], late[0]], "the same arithmetic"


def restored(connection: Connection) -> tuple[int, int]:
    from deepspeed.comm import comm

    before = Counter(name for name in COLLECTIVES if name in vars(comm.cdb)).total()
    with pytest.raises(RuntimeError), timed_collectives(Clock()):
        raise RuntimeError
    return before, Counter(name for name in COLLECTIVES if name in vars(comm.cdb)).total()


def test_afterwards_the_backend_is_its_own_again(two_ranks: Any) -> None:
    assert two_ranks(restored) == [(0, 0), (0, 0)]
