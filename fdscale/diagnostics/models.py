"""Networks as the command line names them: student files, runs, teachers, timm's; nothing is downloaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import timm
import torch

from fdscale.build.networks import prepare_teacher
from fdscale.build.weights import RANDOM
from fdscale.config.errors import SettingsError, UserError, attempt, nearest
from fdscale.config.settings import TeacherSettings
from fdscale.diagnostics.heads import run_head
from fdscale.diagnostics.subjects import Subject
from fdscale.planning.networks import planned_teacher
from fdscale.students.files import load_weights
from fdscale.students.geometry import STUDENTS, file_geometry
from fdscale.students.student import build_student
from fdscale.teachers.fetched import fetched, verify
from fdscale.teachers.table import TEACHERS, TIMM_PREFIX
from fdscale.training.run_directory import RunDirectory

FORMS = "a run's folder, a student file, timm:NAME=FILE, TEACHER=FILE, or either with =random"
WEIGHTS = ".safetensors"
IMPORTED = ("set teacher.name to student_file", "name the student file that it leaves")
OF_A_RECIPE = re.compile(r"teacher\.(\w+: )?")  # here networks have no settings of that name


@dataclass(frozen=True)
class Asked:
    """A network that the command line names by `text`, and what rows shall call it.

    `source` is a student file, or the name of a network whose `weights` are a file in its original layout or "random".
    """

    text: str
    name: str
    source: Path | str
    weights: str = ""


def asked_models(texts: Sequence[str], names: Sequence[str] = ()) -> list[Asked]:
    """What each text means, before anything is built; `names` (one for each, or none) are what rows call them.

    Raises SettingsError with the mistakes of all texts.
    """
    problems = [] if len(names) in (0, len(texts)) else [_names_short(len(texts), len(names))]
    problems += [f"--name {name}: given twice; each model needs its own" for name in _twice(names)]
    found = [attempt(partial(_asked, text), problems) for text in texts]
    if problems:
        raise SettingsError(problems)
    asked = [one for one in found if one is not None]
    called = list(names) or list(_distinct(one.name for one in asked))
    return [replace(one, name=name) for one, name in zip(asked, called, strict=True)]


def build_subjects(asked: Sequence[Asked], device: torch.device) -> list[Subject]:
    """The networks in evaluation mode on a device, fp32; raises SettingsError with the mistakes of all of them."""
    problems: list[str] = []
    found = [attempt(partial(_built, one), problems) for one in asked]
    if problems:
        raise SettingsError(problems)
    return [_on(subject, device) for subject in found if subject is not None]


def not_finite(subject: Subject) -> str | None:
    """The sentence about a network whose weights are not all numbers, or None."""
    wrong = [(name, (~value.isfinite()).sum().item()) for name, value in subject.network.named_parameters()]
    found = [(name, count) for name, count in wrong if count]
    if not found:
        return None
    return f"{sum(count for _, count in found):,} of its weights are NaN or infinite, the first in {found[0][0]}"


def _asked(text: str) -> Asked:
    path = Path(text)
    if path.exists():
        return _student(text, path)
    source, _, weights = text.partition("=")
    if Path(source).exists():
        raise UserError(f"{text}: {source} has its own weights; leave ={weights} out")
    if not source.startswith(TIMM_PREFIX) and source not in TEACHERS and source not in STUDENTS:
        raise UserError(_unknown(text, source))
    if source.startswith(TIMM_PREFIX):
        _refuse_unknown_timm(text, source.removeprefix(TIMM_PREFIX))
    weights = weights or _fetched(text, source)
    with_weights = " (random)" if weights == RANDOM else ""
    try:
        planned_teacher(TeacherSettings(name=source, weights=weights))
    except UserError as error:
        raise _told_of(text, error) from error
    return Asked(text, source.removeprefix(TIMM_PREFIX) + with_weights, source, weights)


def _student(text: str, path: Path) -> Asked:
    weights = RunDirectory(path).student if path.is_dir() else path
    if not weights.is_file():
        raise UserError(f"{text}: no {weights.name} in it; a run leaves it when its last step is done")
    if path.is_file() and weights.suffix != WEIGHTS:
        raise UserError(f"{text}: no student file, whose name ends in {WEIGHTS}; other files as NAME={text}")
    if not weights.with_suffix(".json").is_file():
        raise UserError(_not_alone(text, weights))
    file_geometry(weights)
    folder = weights.resolve().parent.name
    name = weights.stem.replace("student", folder, 1) if weights.stem.startswith("student") else weights.stem
    return Asked(text, name, weights)


def _not_alone(text: str, weights: Path) -> str:
    """Of weights without a geometry beside them."""
    student = weights.with_name(weights.name.replace("classifier", "student", 1))
    if student != weights and student.is_file():
        return f"{text}: a run's classifier is no network; name {student}, which it comes with"
    described = weights.with_suffix(".json").name
    return f"{text}: no {described} beside it, which tells a student's network; weights of a named one as NAME={text}"


def _unknown(text: str, source: str) -> str:
    if "/" in source or source.endswith(WEIGHTS):
        return f"{text}: no such file or folder; allowed: {FORMS}"
    timm_name = timm.is_model(source)
    hint = f"; did you mean '{TIMM_PREFIX}{text}'?" if timm_name else nearest(source, [*TEACHERS, *STUDENTS])
    return f"{text}: no folder, file or network of that name{hint}; allowed: {FORMS} (`fdscale models` lists names)"


def _refuse_unknown_timm(text: str, name: str) -> None:
    if not timm.is_model(name):
        close = nearest(name, timm.list_models(pretrained=True) + timm.list_models())
        raise UserError(f"{text}: timm has no model {name!r}{close}")


def _fetched(text: str, name: str) -> str:
    """The file that `fdscale fetch` brought."""
    found = fetched(name)
    if found is None:
        raise UserError(
            f"{text}: which weights? Nothing is downloaded here, and `fdscale fetch` has brought none: name them, "
            f"{name}=FILE, or {name}=random for a trial"
        )
    verify(found)
    return str(found.path)


def _told_of(text: str, error: UserError) -> SettingsError:
    """Mistakes that are told of a recipe's teacher, told of a model."""
    source, _, weights = text.partition("=")
    if weights and _is_student(Path(weights)):
        return SettingsError([f"{text}: {weights} is a student and no {source}; name it alone, {weights}"])
    problems = error.problems if isinstance(error, SettingsError) else [str(error)]
    told = [OF_A_RECIPE.sub("", problem, count=1).replace(*IMPORTED) for problem in problems]
    return SettingsError([f"{text}: {problem}" for problem in told])


def _is_student(path: Path) -> bool:
    try:
        file_geometry(RunDirectory(path).student if path.is_dir() else path)
    except UserError:
        return False
    return True


def _names_short(models: int, names: int) -> str:
    return f"--name: given {names} times for {models} models; give one for each, in their order, or none"


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]


def _distinct(names: Iterable[str]) -> Iterator[str]:
    """Names of which some may be equal, the later ones numbered."""
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})"


def _built(asked: Asked) -> Subject:
    try:
        if isinstance(asked.source, Path):
            return _built_student(asked.name, asked.source)
        settings = TeacherSettings(name=asked.source, weights=asked.weights)
        return Subject(asked.name, prepare_teacher(settings, asked.weights, torch.float32))
    except UserError as error:
        raise _told_of(asked.text, error) from error


def _built_student(name: str, weights: Path) -> Subject:
    student = build_student(file_geometry(weights))
    load_weights(student, weights)
    classifier = weights.with_name(weights.name.replace("student", "classifier", 1))
    if classifier == weights or not classifier.is_file():
        return Subject(name, student)
    return Subject(name, student, run_head(student, classifier))


def _on(subject: Subject, device: torch.device) -> Subject:
    subject.network.eval().requires_grad_(False).to(device)
    if subject.head is not None:
        subject.head.eval().requires_grad_(False).to(device)
    return subject
