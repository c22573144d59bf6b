"""What a program trains, in shapes alone: networks on the meta device, for the planner to trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fdscale.build.networks import prepare_student
from fdscale.build.training import optimizer_groups
from fdscale.config.programs import AnySettings
from fdscale.config.settings import StudentSettings
from fdscale.planning.activations import trace_step, trace_teacher
from fdscale.planning.engine_rules import engine_rules
from fdscale.planning.trace import Trace
from fdscale.students.student import Student
from fdscale.teachers.teacher import Teacher
from fdscale.training.engine import compute_dtype


@dataclass(frozen=True)
class Outline:
    """A module with its student, and the teachers by the settings that name them, all on the meta device.

    `inputs(B)` makes what the module is called with for B images, pixels first, `image_size` pixels a side.
    """

    module: nn.Module
    student: Student
    inputs: Callable[[int], tuple[Any, ...]]
    image_size: int
    teachers: Mapping[str, Teacher] = field(default_factory=dict)


class Sketch(nn.Module):
    """A network whose training forward no trace can follow: what is called is its `sketch`, of the same shapes."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any) -> dict[str, torch.Tensor]:
        return self.network.sketch(*inputs)


@dataclass(frozen=True)
class Traces:
    """The traces of one micro batch of images, `image_size` pixels a side: of what is trained, and of each teacher."""

    image_size: int
    student: Trace
    teachers: Mapping[str, Trace]


def student_outline(settings: StudentSettings) -> Student:
    """The student of the settings on the meta device; what `offload` keeps elsewhere, the trace accounts for."""
    recomputes = settings.activation_checkpointing != "none"
    changes = {"activation_checkpointing": "blocks" if recomputes else "none"}
    return prepare_student(settings.model_copy(update=changes), seed=0, device="meta")


def draws_for(student: Student, micro_batch: int) -> torch.Tensor | None:
    """Drop path draws of the right shape, as `drop_path_rows` makes them."""
    return torch.empty(student.drop_path_sites, micro_batch) if student.drop_path_sites else None


def pixels_for(image_size: int, micro_batch: int) -> torch.Tensor:
    """Pixels of the right shape, as `as_pixels` makes them."""
    return torch.empty(micro_batch, 3, image_size, image_size)


def traces_of(
    outline: Outline, settings: AnySettings, deepspeed_json: Mapping[str, Any], micro_batch: int, cuda: bool
) -> Traces:
    """Trace an outline, which is used up; `cuda`: as on a CUDA device."""
    rules = engine_rules(deepspeed_json)
    autocast = deepspeed_json.get("torch_autocast", {}).get("enabled", False)
    dtype = compute_dtype(deepspeed_json)
    groups = optimizer_groups(outline.module, outline.student, settings.optim)
    student = trace_step(
        outline.module,
        [group["params"] for group in groups],
        lambda: outline.inputs(micro_batch),
        torch.float32 if autocast else dtype,
        dtype if autocast else None,
        cuda,
        rules.keeper == "zero3",
        settings.student.activation_checkpointing == "offload" and cuda,
    )
    teachers = {
        where: trace_teacher(teacher, dtype, lambda: pixels_for(outline.image_size, micro_batch), cuda)
        for where, teacher in outline.teachers.items()
    }
    return Traces(outline.image_size, student, teachers)
