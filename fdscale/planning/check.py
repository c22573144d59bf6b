"""What a recipe, a DeepSpeed JSON and a number of ranks say together, before torch or a GPU is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.errors import SettingsError, attempt
from fdscale.config.programs import AnySettings, DenseSettings
from fdscale.config.settings import DistillSettings, FinetuneSettings
from fdscale.data.order import accumulation_steps
from fdscale.planning.data_check import (
    DataFacts,
    augment_problems,
    data_facts,
    data_problems,
    opened_indices,
    room_problems,
    schedule_problems,
)
from fdscale.planning.dense_check import dense_facts, dense_problems, network_problems
from fdscale.planning.dense_sizes import trained_parameters
from fdscale.planning.engine_check import engine_problems
from fdscale.planning.engine_rules import engine_rules
from fdscale.planning.head_check import head_problems
from fdscale.planning.memory import (
    RankMemory,
    machine_memory,
    memory_per_rank,
    refuse_if_it_cannot_fit,
    teacher_bytes,
)
from fdscale.planning.networks import (
    TeacherGeometry,
    pair_problems,
    planned_student,
    planned_teacher_at,
    teacher_notes,
    teacher_parameters,
)
from fdscale.planning.placement import Choice, chosen_placements
from fdscale.planning.telemetry_check import telemetry_problems
from fdscale.students.geometry import Geometry


@dataclass(frozen=True)
class Plan:
    """What was derived from valid settings; None where only the built network or the packed data tells.

    `steps` is the schedule's length; `max_steps` may stop a run earlier. `placements` says for each teacher, by the
    setting that names it, where its weights lie, and why. `notes` are warnings.
    """

    ranks: int
    micro_batch: int
    accumulation: int
    global_batch: int
    student: Geometry
    teachers: Mapping[str, TeacherGeometry]
    samples: int | None
    steps_per_epoch: int | None
    steps: int | None
    memory: RankMemory | None
    placements: Mapping[str, Choice]
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
    accumulation = attempt(lambda: accumulation_steps(global_batch, ranks, micro_batch), problems)
    student = attempt(lambda: planned_student(settings.student), problems)
    teachers = _teachers(settings, student, problems)
    machine = None if local_ranks is None else machine_memory()
    states = None if student is None else _states(settings, student, teachers, ranks, deepspeed_json)
    here = None if machine is None or states is None else machine.of_rank(local_ranks or 1)
    placements = _placements(settings, teachers, deepspeed_json, states, here)
    memory = None if states is None else _with_teachers(states, teachers, placements, ranks, deepspeed_json)
    if memory is not None and machine is not None:
        attempt(lambda: refuse_if_it_cannot_fit(memory, ranks, local_ranks or 1, machine), problems)
    problems += engine_problems(settings, deepspeed_json, here=local_ranks is not None)
    problems += [] if local_ranks is None else telemetry_problems(settings.log, deepspeed_json)
    if isinstance(settings, FinetuneSettings):
        problems += head_problems(settings, None if student is None else student.width)
    if isinstance(settings, DenseSettings):
        problems += network_problems(settings, student, deepspeed_json)
    facts = _facts(settings, micro_batch, None if local_ranks is None else local_ranks / ranks, problems)
    problems += schedule_problems(settings, facts)
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
        teachers=teachers,
        samples=facts.samples,
        steps_per_epoch=facts.steps_per_epoch,
        steps=facts.steps,
        memory=memory,
        placements=placements,
        notes=tuple(_notes(settings, facts, ranks)),
    )


def _facts(settings: AnySettings, micro_batch: int, share: float | None, problems: list[str]) -> DataFacts | None:
    """What is known of the data, of which a node reads this share; what is wrong with it joins the problems."""
    if isinstance(settings, DenseSettings):
        facts = attempt(lambda: dense_facts(settings), problems)
        problems += dense_problems(settings, facts)
        return facts
    problems += augment_problems(settings, micro_batch)
    indices = opened_indices(settings, problems)
    facts = data_facts(settings, indices)
    problems += data_problems(settings, facts, indices)
    problems += [] if share is None else room_problems(settings, indices, share)
    return facts


def _teachers(settings: AnySettings, student: Geometry | None, problems: list[str]) -> dict[str, TeacherGeometry]:
    """Each teacher's geometry by the setting that names it, as far as there is no problem with it."""
    planned: dict[str, TeacherGeometry] = {}
    for where, (table, target) in settings.teachers.items() if isinstance(settings, DistillSettings) else ():
        teacher = attempt(partial(planned_teacher_at, where, table), problems)
        problems += pair_problems(where, target, student, teacher)
        planned |= {} if teacher is None else {where: teacher}
    return planned


def _states(
    settings: AnySettings,
    student: Geometry,
    teachers: Mapping[str, TeacherGeometry],
    ranks: int,
    deepspeed_json: Mapping[str, Any],
) -> RankMemory | None:
    """Student, dense heads and projectors under ZeRO, without teachers; None when the student's size is unknown."""
    parameters, width = trained_parameters(settings, student), student.width
    if parameters is None or width is None:
        return None
    projectors = sum((width + 1) * (teacher.width or 0) for teacher in teachers.values())
    return memory_per_rank(parameters + projectors, 0, ranks, deepspeed_json, settings.optim.ema_decay > 0)


def _placements(
    settings: AnySettings,
    teachers: Mapping[str, TeacherGeometry],
    deepspeed_json: Mapping[str, Any],
    states: RankMemory | None,
    memory: int | None,
) -> dict[str, Choice]:
    """Where each teacher's weights lie; `memory` is a rank's, where it is known."""
    rules = engine_rules(deepspeed_json)
    whole = {where: rules.frozen * teacher_parameters(teacher) for where, teacher in teachers.items()}
    return chosen_placements(settings, whole, states.resident if states else 0, memory)


def _with_teachers(
    states: RankMemory,
    teachers: Mapping[str, TeacherGeometry],
    placements: Mapping[str, Choice],
    ranks: int,
    deepspeed_json: Mapping[str, Any],
) -> RankMemory:
    rules = engine_rules(deepspeed_json)
    sizes = [
        teacher_bytes(teacher_parameters(teacher), placements[where].placement, ranks, rules)
        for where, teacher in teachers.items()
    ]
    return replace(states, teacher=sum(sizes))


def _notes(settings: AnySettings, facts: DataFacts, ranks: int) -> Iterator[str]:
    workers, every = max(settings.data.workers, 1), settings.checkpoint.every
    if facts.shards is not None and facts.shards < ranks * workers:
        yield (
            f"{facts.shards} shards for {ranks} ranks x {workers} workers = {ranks * workers} readers: "
            "correct, since samples are addressed and not shards, but several readers share a file"
        )
    if facts.steps is None:
        embedded = "scenes" if isinstance(settings, DenseSettings) else settings.data.shards
        yield f"the embedded {embedded} are made on first use: the steps are counted then"
    else:
        if settings.max_steps is not None and settings.max_steps > facts.steps:
            yield f"max_steps {settings.max_steps} exceeds the {facts.steps} steps of the run"
        if every > facts.steps:
            yield f"checkpoint.every {every} exceeds the {facts.steps} steps of the run: one at the end"
    if isinstance(settings, DistillSettings):
        for table, _ in settings.teachers.values():
            yield from teacher_notes(table)
