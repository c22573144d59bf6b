"""Networks from settings: the student, the frozen teacher, and what they are fed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.config.settings import StudentSettings, TeacherSettings
from fdscale.planning.networks import up_to_layer
from fdscale.students.files import load_weights
from fdscale.students.geometry import STUDENTS, file_geometry, student_geometry
from fdscale.students.student import Student, build_student, set_activation_checkpointing
from fdscale.teachers.table import STUDENT_FILE, teacher_geometry
from fdscale.teachers.teacher import Float32LayerNorm, Teacher, build_teacher


def prepare_student(settings: StudentSettings, seed: int) -> Student:
    """The student of the settings, from scratch or from a student file's weights (the log names which)."""
    geometry = student_geometry(
        settings.name, settings.image_size, settings.geometry, settings.weights, settings.position_bias
    )
    student = build_student(geometry, settings.drop_path, seed)
    set_activation_checkpointing(student, settings.activation_checkpointing)
    if settings.weights:
        load_weights(student, Path(settings.weights))
    return student


def prepare_teacher(settings: TeacherSettings, weights: str, dtype: torch.dtype, device: str = "cpu") -> Teacher:
    """The frozen teacher of the settings, its weights `"random"` or a file, in the run's precision.

    On the meta device it has shapes only, and its weights must be random.
    """
    if settings.name == STUDENT_FILE or settings.name in STUDENTS:
        return _teacher_from_student(settings, weights, dtype, device)
    spec = teacher_geometry(settings.name, weights, settings.image_size, settings.geometry, settings.layer)
    return build_teacher(
        spec,
        weights,
        after_norm=settings.after_norm,
        rounded_norm=settings.rounded_norm,
        dtype=dtype,
        checkpoint_key=settings.checkpoint_key,
        device=device,
    )


def _teacher_from_student(settings: TeacherSettings, weights: str, dtype: torch.dtype, device: str) -> Teacher:
    """A network of the students' that teaches: SwinV2-G itself, or what an earlier run distilled."""
    if settings.name == STUDENT_FILE:
        geometry = file_geometry(Path(weights))
    else:
        geometry = student_geometry(settings.name, settings.image_size, settings.geometry)
    student = build_student(geometry, device=device)
    if weights != "random":
        load_weights(student, Path(weights))
    taken = up_to_layer(geometry, settings.layer)
    with torch.device(device):
        final_norm = _cut(student.backbone, settings.layer, geometry.width == taken.width)
    if not settings.after_norm and final_norm is None:
        raise UserError(f"teacher.after_norm=false: {settings.name} has no final norm that can be left out")
    for parameter in student.backbone.parameters():  # parameters alone: rounded coordinates would move position biases
        parameter.data = parameter.data.to(dtype)
    mean, std = (tuple(values.flatten().tolist()) for values in (student.mean, student.std))
    return Teacher(
        student.backbone,
        width=taken.width or student.width,
        grid=taken.grid or student.grid,
        prefix_tokens=student.prefix_tokens,
        mean=mean,
        std=std,
        image_size=student.image_size,
        final_norm=final_norm,
        after_norm=settings.after_norm,
        rounded_norm=settings.rounded_norm,
    )


def _cut(backbone: nn.Module, layer: int | None, norm_fits: bool) -> Float32LayerNorm | None:
    """Let go of the layers above `layer`; returns the final norm, which no earlier stage of a Swin has."""
    norm = _take_norm(backbone)
    if layer is None:
        return norm
    backbone.prune_intermediate_layers([layer], prune_norm=False, prune_head=False)  # type: ignore[operator]
    return norm if norm_fits else None


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
