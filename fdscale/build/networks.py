"""Networks from settings: the student, the frozen teacher, and what they are fed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.config.settings import StudentSettings, TeacherSettings
from fdscale.students.files import load_weights
from fdscale.students.geometry import file_geometry, student_geometry
from fdscale.students.student import Student, build_student, set_activation_checkpointing
from fdscale.teachers.table import STUDENT_FILE
from fdscale.teachers.teacher import Float32LayerNorm, Teacher, build_teacher
from fdscale.training.engine import Connection, compute_dtype


def prepare_student(settings: StudentSettings, seed: int) -> Student:
    """The student of the settings, from scratch or from a student file's weights (the log names which)."""
    geometry = student_geometry(settings.name, settings.image_size, settings.geometry, settings.weights)
    student = build_student(geometry, settings.drop_path, seed)
    set_activation_checkpointing(student, settings.activation_checkpointing)
    if settings.weights:
        load_weights(student, Path(settings.weights))
    return student


def prepare_teacher(settings: TeacherSettings, deepspeed_json: Mapping[str, Any], connection: Connection) -> Teacher:
    """The frozen teacher of the settings, in the run's precision."""
    dtype = compute_dtype(deepspeed_json)
    if settings.name == STUDENT_FILE:
        return _teacher_from_student(Path(str(settings.weights)), settings.after_norm, dtype)
    with _one_rank_of_a_node_first(connection, wanted=settings.weights is None):
        return build_teacher(
            settings.name, settings.weights, settings.image_size, settings.geometry, settings.after_norm, dtype
        )


@contextmanager
def _one_rank_of_a_node_first(connection: Connection, wanted: bool) -> Iterator[None]:
    """Local rank 0 downloads into the node's cache, the others then find the file there."""
    first = connection.rank.local_rank == 0
    if wanted and not first:
        dist.barrier(group=connection.control)
    yield
    if wanted and first:
        dist.barrier(group=connection.control)


def _teacher_from_student(weights: Path, after_norm: bool, dtype: torch.dtype) -> Teacher:
    """A distilled or fine-tuned student as the next teacher."""
    geometry = file_geometry(weights)
    student = build_student(geometry)
    load_weights(student, weights)
    mean, std = (tuple(values.flatten().tolist()) for values in (student.mean, student.std))
    final_norm = _take_norm(student.backbone)
    if not after_norm and final_norm is None:
        raise UserError(f"teacher.after_norm=false: the network in {weights} has no final norm that can be left out")
    for parameter in student.backbone.parameters():  # parameters alone: rounded coordinates would move position biases
        parameter.data = parameter.data.to(dtype)
    return Teacher(
        student.backbone,
        width=student.width,
        grid=student.grid,
        prefix_tokens=student.prefix_tokens,
        mean=mean,
        std=std,
        image_size=student.image_size,
        final_norm=final_norm,
        after_norm=after_norm,
    )


def _take_norm(backbone: nn.Module) -> Float32LayerNorm | None:
    """The final norm, apart, so that it is computed in fp32; None where the network names it in another way."""
    found = getattr(backbone, "norm", None)
    if not isinstance(found, nn.LayerNorm):
        return None
    norm = Float32LayerNorm.of(found)
    backbone.norm = nn.Identity()
    return norm


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw what is built inside from `seed` alone, equal on every rank; the CPU's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def as_pixels(images: Tensor) -> Tensor:
    """Images uint8 (B, 3, H, W) -> pixels fp32 in [0, 1]."""
    return images.float() / 255
