"""What a recipe, a DeepSpeed JSON and a number of ranks say together, before torch or a GPU is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.errors import SettingsError, UserError, attempt
from fdscale.config.settings import DistillSettings, StudentSettings, TeacherSettings
from fdscale.data.order import accumulation_steps
from fdscale.distill.layout import TokenLayout, layout_problems
from fdscale.planning.data_check import AnySettings, DataFacts, data_facts, data_problems
from fdscale.planning.memory import RankMemory, machine_memory, memory_per_rank, refuse_if_it_cannot_fit
from fdscale.students.geometry import Geometry, file_geometry, student_geometry
from fdscale.teachers.table import STUDENT_FILE, TeacherSpec, UnbuiltTeacher, teacher_geometry

TeacherGeometry = TeacherSpec | UnbuiltTeacher | Geometry  # the last: a student file that teaches


@dataclass(frozen=True)
class Plan:
    """What was derived from valid settings; None where only the built network or the packed data tells.

    `steps` is the schedule's length; `max_steps` may stop a run earlier. `notes` are warnings.
    """

    ranks: int
    micro_batch: int
    accumulation: int
    global_batch: int
    student: Geometry
    teacher: TeacherGeometry | None
    samples: int | None
    steps_per_epoch: int | None
    steps: int | None
    memory: RankMemory | None
    notes: tuple[str, ...]


def load_and_check(settings: AnySettings, ranks: int, local_ranks: int | None = None) -> tuple[Plan, dict[str, Any]]:
    """`check` with the DeepSpeed JSON that the settings name, whose problems are told along; returns the JSON, too."""
    problems: list[str] = []
    deepspeed_json = attempt(lambda: load_deepspeed_json(settings.deepspeed), problems)
    if deepspeed_json is None:  # what else is wrong is found as if it were the least demanding one
        stand_in = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        attempt(lambda: check(settings, stand_in, ranks), problems)
        raise SettingsError(problems)
    return check(settings, deepspeed_json, ranks, local_ranks), deepspeed_json


def check(settings: AnySettings, deepspeed_json: Mapping[str, Any], ranks: int, local_ranks: int | None = None) -> Plan:
    """The plan of a run on `ranks` ranks; with `local_ranks` of them on this machine, whose memory must suffice.

    `deepspeed_json` comes from `load_deepspeed_json`. Raises SettingsError with every problem at once.
    """
    problems: list[str] = []
    micro_batch = deepspeed_json["train_micro_batch_size_per_gpu"]
    global_batch = settings.data.global_batch
    if settings.student.name.startswith("timm:swinv2") and deepspeed_json.get("bf16", {}).get("enabled"):
        problems.append(
            f"student.name: {settings.student.name} fails under bf16.enabled, which leaves its fp32 coordinates beside "
            "bf16 weights; use torch_autocast in the JSON, or a swinv2_* of our own"
        )
    accumulation = attempt(lambda: accumulation_steps(global_batch, ranks, micro_batch), problems)
    student = attempt(lambda: _student(settings.student), problems)
    teacher = None
    if isinstance(settings, DistillSettings):
        teacher = attempt(lambda: _teacher(settings.teacher), problems)
        problems += _layout_problems(settings, student, teacher)
    memory = None if student is None else _memory(student, teacher, ranks, deepspeed_json)
    if memory is not None and local_ranks is not None:
        attempt(lambda: refuse_if_it_cannot_fit(memory, ranks, local_ranks, machine_memory()), problems)
    facts = attempt(lambda: data_facts(settings), problems)
    problems += data_problems(settings, facts)
    if problems:
        raise SettingsError(problems)
    assert accumulation is not None, "what is missing here was told as a problem"
    assert student is not None
    assert facts is not None
    return Plan(
        ranks=ranks,
        micro_batch=micro_batch,
        accumulation=accumulation,
        global_batch=global_batch,
        student=student,
        teacher=teacher,
        samples=facts.samples,
        steps_per_epoch=facts.steps_per_epoch,
        steps=facts.steps,
        memory=memory,
        notes=tuple(_notes(settings, facts, ranks)),
    )


def _student(table: StudentSettings) -> Geometry:
    if table.weights is not None:
        _refuse_no_file("student.weights", table.weights)
    geometry = student_geometry(table.name, table.image_size, table.geometry, table.weights)
    if table.weights is not None:
        _refuse_another_geometry(table.weights, geometry)
    return geometry


def _refuse_another_geometry(weights: str, wanted: Geometry) -> None:
    """A student file carries its geometry; the settings must say the same."""
    held = _file_geometry("student.weights", weights)
    if held.family != wanted.family:
        raise UserError(f"student.weights: {weights} holds a {held.family}, student.name is a {wanted.family}")
    theirs, ours = asdict(held), asdict(wanted)
    different = [f"{key} {theirs[key]} (settings: {ours[key]})" for key in theirs if theirs[key] != ours[key]]
    if different:
        found = ", ".join(different)
        raise UserError(f"student.weights: {weights} holds {found}; set student.geometry to match")


def _file_geometry(where: str, weights: str) -> Geometry:
    _refuse_no_file(where, weights)
    return file_geometry(Path(weights))


def _refuse_no_file(where: str, weights: str) -> None:
    if not Path(weights).is_file():
        raise UserError(f"{where}: no such file: {weights}; allowed: the path of a weights file")


def _teacher(table: TeacherSettings) -> TeacherGeometry:
    teacher = teacher_geometry(table.name, table.weights, table.image_size, table.geometry)
    if table.name == STUDENT_FILE:
        return _file_geometry("teacher.weights", str(table.weights))
    if table.weights not in (None, "random"):
        _refuse_no_file("teacher.weights", str(table.weights))
    elif table.weights is None and isinstance(teacher, TeacherSpec) and not teacher.pretrained:
        raise UserError(f'teacher.weights: no hub carries {table.name}: give the path of its file, or "random"')
    return teacher


def _layout_problems(settings: DistillSettings, student: Geometry | None, teacher: TeacherGeometry | None) -> list[str]:
    ours, theirs = _layout(student), _layout(teacher)
    if ours is None or theirs is None:
        return []
    return layout_problems(theirs, ours, settings.target.grid, settings.target.prefix_tokens)


def _layout(network: TeacherGeometry | None) -> TokenLayout | None:
    if network is None or network.grid is None or network.prefix_tokens is None:
        return None  # wrong, or known only once it is built
    return TokenLayout(network.grid, network.prefix_tokens)


def _memory(
    student: Geometry, teacher: TeacherGeometry | None, ranks: int, deepspeed_json: Mapping[str, Any]
) -> RankMemory | None:
    """Student and projector under ZeRO, the teacher whole; None when the student's size is unknown."""
    parameters = student.parameters()
    if parameters is None or student.width is None:
        return None
    projector = 0 if teacher is None or teacher.width is None else (student.width + 1) * teacher.width
    frozen = 0 if teacher is None else teacher_parameters(teacher)
    return memory_per_rank(parameters + projector, frozen, ranks, deepspeed_json)


def teacher_parameters(teacher: TeacherGeometry) -> int:
    """Parameters of a teacher's blocks, to about one percent (0 where unknown): 4C^2 attention, 2rC^2 MLP."""
    if isinstance(teacher, UnbuiltTeacher):
        return 0
    if not isinstance(teacher, TeacherSpec):
        return teacher.parameters() or 0
    depths = teacher.depth if isinstance(teacher.depth, tuple) else (teacher.depth,)
    widths = [teacher.embed_dim * 2**stage for stage in range(len(depths))]
    per_width = 4 + 2 * teacher.mlp_ratio
    return sum(int(depth * per_width * width**2) for depth, width in zip(depths, widths, strict=True))


def _notes(settings: AnySettings, facts: DataFacts, ranks: int) -> Iterator[str]:
    workers, every = max(settings.data.workers, 1), settings.checkpoint.every
    if facts.shards is not None and facts.shards < ranks * workers:
        yield (
            f"{facts.shards} shards for {ranks} ranks x {workers} workers = {ranks * workers} readers: "
            "correct, since samples are addressed and not shards, but several readers share a file"
        )
    if facts.steps is None:
        yield f"data.shards={settings.data.shards} is packed on first use: its steps are counted then"
    else:
        if settings.max_steps is not None and settings.max_steps > facts.steps:
            yield f"max_steps {settings.max_steps} exceeds the {facts.steps} steps of the run"
        if every > facts.steps:
            yield f"checkpoint.every {every} exceeds the {facts.steps} steps of the run: one at the end"
