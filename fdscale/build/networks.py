"""Networks from settings: the student, the frozen teacher, and what they are fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fdscale.build.run import Run
from fdscale.build.weights import RANDOM
from fdscale.config.errors import UserError, attempt
from fdscale.config.settings import StudentSettings, TeacherSettings
from fdscale.planning.networks import geometry_of, up_to_layer
from fdscale.students.files import load_statistics, load_weights
from fdscale.students.geometry import STUDENTS, file_geometry, student_geometry
from fdscale.students.student import Student, build_student, set_activation_checkpointing
from fdscale.teachers.table import STUDENT_FILE, teacher_geometry
from fdscale.teachers.teacher import Float32LayerNorm, Teacher, build_teacher
from fdscale.training.engine import Connection, compute_dtype, gather_lists, parameter_dtype
from fdscale.training.partition import divide
from fdscale.training.sharding import place

WHOLE_UP_TO = 1_000_000_000  # parameters; a larger network that is to be divided is whole on rank 0 alone
Network = TypeVar("Network", bound=nn.Module)


def student_of(run: Run, whole_up_to: int = WHOLE_UP_TO) -> Student:
    """The student of a run: whole, or under ZeRO-3, above `whole_up_to` parameters, divided over the ranks.

    A large one is built and loaded by rank 0 alone, so that nothing of its initialisation is lost. Its parameters
    then have the engine's type; the caller's projector or head is divided with the engine.
    """
    build = partial(prepare_student, run.settings.student, run.settings.seed)
    stage = run.deepspeed_json["zero_optimization"]["stage"]
    if stage < 3 or _size_of(build) <= whole_up_to:
        return build()
    student = on_first_rank(build, run.connection)
    divide(student, run.deepspeed_json, run.connection, parameter_dtype(run.deepspeed_json))
    return student


def teacher_of(
    run: Run,
    where: str,
    settings: TeacherSettings,
    weights: str,
    given: Teacher | None = None,
    whole_up_to: int = WHOLE_UP_TO,
) -> Teacher:
    """The teacher that the setting `where` names, built or `given`, its weights where the run places them.

    One that is to be divided and has more than `whole_up_to` parameters is built and loaded by rank 0 alone.
    """
    placement = run.placements[where]
    build = partial(prepare_teacher, settings, weights, compute_dtype(run.deepspeed_json))
    if given is not None:
        teacher = given
    elif placement == "replicated" or _size_of(build) <= whole_up_to:
        teacher = build()
    else:
        teacher = on_first_rank(build, run.connection)
    return place(teacher, placement, run.deepspeed_json, run.connection)


def _size_of(build: Callable[..., nn.Module]) -> int:
    """Parameters of a network; 0 for one that cannot be built without values, which every rank then builds whole."""
    network = attempt(lambda: build(device="meta"), [])
    return 0 if network is None else sum(parameter.numel() for parameter in network.parameters())


def on_first_rank(build: Callable[..., Network], connection: Connection) -> Network:
    """A network with values on rank 0 and shapes elsewhere; what rank 0 finds wrong is raised on every rank."""
    problems: list[str] = []
    network = attempt(lambda: build(device="cpu" if connection.rank.is_main else "meta"), problems)
    problems = gather_lists(problems, connection)
    if problems:
        raise UserError(problems[0])
    assert network is not None, "its absence was told as a problem"
    return network


def prepare_student(settings: StudentSettings, seed: int, device: str = "cpu") -> Student:
    """The student of the settings, from scratch or from a student file's weights (the log names which).

    On the meta device it has shapes only.
    """
    geometry = geometry_of(settings)
    student = build_student(geometry, settings.drop_path, seed, device)
    student.draws.skip_dropped = settings.skip_dropped
    set_activation_checkpointing(student, settings.activation_checkpointing)
    if settings.weights:
        _load(student, Path(settings.weights), device, settings.resize)
    return student


def prepare_teacher(settings: TeacherSettings, weights: str, dtype: torch.dtype, device: str = "cpu") -> Teacher:
    """The frozen teacher of the settings, its weights `"random"` or a file, in the run's precision.

    On the meta device it has shapes only.
    """
    if settings.name == STUDENT_FILE or settings.name in STUDENTS:
        return _teacher_from_student(settings, weights, dtype, device)
    spec = teacher_geometry(settings.name, weights, settings.image_size, settings.geometry, settings.layer)
    return build_teacher(
        spec,
        RANDOM if device == "meta" else weights,
        after_norm=settings.after_norm,
        rounded_norm=settings.rounded_norm,
        dtype=dtype,
        checkpoint_key=settings.checkpoint_key,
        device=device,
    )


def _load(student: Student, weights: Path, device: str, resize: bool = False) -> None:
    """A student file's values; on the meta device its input statistics alone."""
    if device == "meta":
        load_statistics(student, weights)
    else:
        load_weights(student, weights, resize)


def _teacher_from_student(settings: TeacherSettings, weights: str, dtype: torch.dtype, device: str) -> Teacher:
    """A network of the students' that teaches: SwinV2-G itself, or what an earlier run distilled."""
    if settings.name == STUDENT_FILE:
        geometry = file_geometry(Path(weights))
    else:
        geometry = student_geometry(settings.name, settings.image_size, settings.geometry)
    student = build_student(geometry, device=device)
    if weights != RANDOM:
        _load(student, Path(weights), device)
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
    return images.to(torch.float32, memory_format=torch.contiguous_format) / 255
