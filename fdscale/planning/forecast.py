"""A rank's memory from the traces of its networks: states, and what each phase of a step adds to them; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fdscale.planning.engine_rules import engine_rules
from fdscale.planning.memory import RankMemory, memory_per_rank, teacher_bytes
from fdscale.planning.placement import PLACEMENTS, Placement
from fdscale.planning.replay import Added, optimizer_peak, step_peak
from fdscale.planning.trace import Trace

IMAGE_CHANNELS = 3
BATCHES = 2  # of uint8 images on the device: the step's own, and the next one, on its way


@dataclass(frozen=True)
class Teaching:
    """A teacher's weights on one rank under each placement, and what its forward pass adds under the chosen one."""

    placement: Placement
    parameters: int
    placements: Mapping[Placement, int]
    forward: Added

    @property
    def weights(self) -> int:
        return self.placements[self.placement]


@dataclass(frozen=True)
class Forecast:
    """Bytes of one rank where its steps run.

    `states` stay; each phase adds to them, one after the other: the teachers' forward, `step` (forward and backward of
    what is trained) and `optimizer`. `images`: the uint8 batches that lie there all the time.
    """

    states: RankMemory
    images: int
    teachers: Mapping[str, Teaching]
    step: Added
    optimizer: int

    @property
    def phases(self) -> dict[str, int]:
        """What each phase adds to the states, by name."""
        teaching = max((teacher.forward.total for teacher in self.teachers.values()), default=0)
        return {"teachers": teaching, "forward and backward": self.step.total, "optimizer": self.optimizer}

    @property
    def peak(self) -> int:
        return self.states.resident + self.images + max(self.phases.values())


def forecast(
    student: Trace,
    teachers: Mapping[str, Trace],
    placements: Mapping[str, Placement],
    deepspeed_json: Mapping[str, Any],
    ranks: int,
    accumulation: int,
    image_bytes: int,
    ema: bool,
) -> Forecast:
    """The forecast for a DeepSpeed JSON on `ranks` ranks; `image_bytes`: of one micro batch as uint8."""
    rules = engine_rules(deepspeed_json)
    taught = {where: _teaching(trace, placements[where], deepspeed_json, ranks) for where, trace in teachers.items()}
    frozen = sum(teacher.weights for teacher in taught.values())
    states = memory_per_rank(student.weights, frozen, ranks, deepspeed_json, ema)
    if rules.keeper in ("ddp", "zero12"):  # their gradients come and go within a step: the replay counts them
        states = replace(states, gradients=0)
    elif rules.keeper == "bf16":
        states = replace(states, gradients=student.parameters * rules.gradient)
    return Forecast(
        states=states,
        images=image_bytes * accumulation * BATCHES,
        teachers=taught,
        step=step_peak(student, rules, ranks, accumulation),
        optimizer=optimizer_peak(student, rules, ranks),
    )


def _teaching(trace: Trace, placement: Placement, deepspeed_json: Mapping[str, Any], ranks: int) -> Teaching:
    rules = engine_rules(deepspeed_json)
    weights = {each: teacher_bytes(trace.weights, each, ranks, rules) for each in PLACEMENTS}
    zero = {**deepspeed_json["zero_optimization"], "stage": 3, "stage3_max_reuse_distance": 0}
    frozen = replace(rules, keeper="zero3", stage=3, weight=rules.frozen, zero=zero)
    added = step_peak(trace, frozen, 1 if placement == "replicated" else ranks, 1)
    return Teaching(placement, trace.parameters, weights, added)
