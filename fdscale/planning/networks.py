"""Student and teacher as the settings name them: shapes, sizes and whether their files are there, without torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from fdscale.config.errors import SettingsError, UserError, settings_renamed, told_as
from fdscale.config.recipe import load_recipe, recipe_names
from fdscale.config.settings import StudentSettings, TargetSettings, TeacherSettings
from fdscale.distill.layout import TokenLayout, layout_problems
from fdscale.students.geometry import STUDENTS, Geometry, SwinV2Geometry, ViTGeometry, file_geometry, student_geometry
from fdscale.teachers.fetched import fetched
from fdscale.teachers.table import (
    OWN,
    STUDENT_FILE,
    TEACHERS,
    TIMM_PREFIX,
    TeacherSpec,
    UnbuiltTeacher,
    teacher_geometry,
)

TeacherGeometry = TeacherSpec | UnbuiltTeacher | Geometry  # the last: a network of the students' teaches
FREE_LICENCES = ("MIT", "Apache-2.0", "your own")
RESIZABLE = ("image_size", "window_size", "pretrained_window_sizes")
RUN_OF_A_RECIPE = re.compile(r"runs/(\w+)/(student|detector)\.safetensors")


def planned_student(table: StudentSettings) -> Geometry:
    """The student's geometry; raises UserError where its weights are missing or those of another network."""
    if table.weights is not None:
        refuse_no_file("student.weights", table.weights)
    elif table.resize:
        raise UserError("student.resize: it is student.weights that are resized; name them, or leave it out")
    geometry = geometry_of(table)
    if table.weights is not None:
        _refuse_another_geometry("student", table.weights, geometry, table.resize)
    return geometry


def geometry_of(table: StudentSettings) -> Geometry:
    """The student's geometry, whether or not its weights fit it; raises as `student_geometry`."""
    return student_geometry(
        table.name, table.image_size, table.geometry, table.weights, table.position_bias, table.resize
    )


def planned_teacher_at(where: str, table: TeacherSettings) -> TeacherGeometry:
    """`planned_teacher` of the setting `where`, which its mistakes name."""
    with told_as(where):
        return planned_teacher(table)


def planned_teacher(table: TeacherSettings) -> TeacherGeometry:
    """The teacher's shape up to the layer that is taken; raises UserError where its weights are known to be missing."""
    _refuse_what_contradicts(table)
    if table.name == STUDENT_FILE:
        teacher_geometry(table.name, table.weights, table.image_size, table.geometry)  # refuses what cannot be set
        return up_to_layer(_file_geometry("teacher.weights", str(table.weights)), table.layer)
    if table.name in STUDENTS:
        return up_to_layer(_student_as_teacher(table), table.layer)
    teacher = teacher_geometry(table.name, table.weights, table.image_size, table.geometry, table.layer)
    if table.weights not in (None, "random"):
        refuse_no_file("teacher.weights", str(table.weights))
    elif table.weights is None and isinstance(teacher, TeacherSpec) and not teacher.pretrained:
        raise UserError(f'teacher.weights: no hub carries {table.name}: give the path of its file, or "random"')
    return teacher


def _refuse_what_contradicts(table: TeacherSettings) -> None:
    problems = []
    if table.rounded_norm and not table.after_norm:
        problems.append("teacher.rounded_norm: with teacher.after_norm=false there is no final norm to round")
    of_ours = table.name == STUDENT_FILE or table.name in STUDENTS
    if of_ours and table.checkpoint_key is not None:
        problems.append(
            f"teacher.checkpoint_key: {table.name} is a student file, which holds one network; leave it out"
        )
    if table.revision is not None and (of_ours or table.weights is not None):
        problems.append("teacher.revision: it pins what `fdscale fetch` brings; these weights are not fetched")
    if problems:
        raise SettingsError(problems)


def _student_as_teacher(table: TeacherSettings) -> Geometry:
    """A network of the students' table that teaches: its weights are a student file, or random for a trial."""
    try:
        geometry = student_geometry(table.name, table.image_size, table.geometry)
    except SettingsError as error:
        raise SettingsError([problem.replace("student.", "teacher.", 1) for problem in error.problems]) from error
    if table.weights is None:
        raise UserError(
            f"teacher.weights: no hub carries {table.name}: give the path of a student file "
            '(`fdscale import FILE --output DIR` makes one of a published checkpoint), or "random"'
        )
    if table.weights != "random":
        refuse_no_file("teacher.weights", table.weights)
        _refuse_another_geometry("teacher", table.weights, geometry)
    return geometry


def up_to_layer(geometry: Geometry, layer: int | None) -> Geometry:
    """The geometry of the part that gives the tokens of `layer`: a stage of a SwinV2, a block of a ViT, from 0."""
    if layer is None:
        return geometry
    if isinstance(geometry, SwinV2Geometry):
        _refuse_no_layer(layer, len(geometry.depths), "stages")
        return replace(geometry, depths=geometry.depths[: layer + 1], num_heads=geometry.num_heads[: layer + 1])
    if isinstance(geometry, ViTGeometry):
        _refuse_no_layer(layer, geometry.depth, "blocks")
        return replace(geometry, depth=layer + 1)
    raise UserError("teacher.layer: this network teaches with its last layer only; leave it out")


def _refuse_no_layer(layer: int, layers: int, what: str) -> None:
    if layer >= layers:
        raise UserError(f"teacher.layer: got {layer}, allowed: 0 to {layers - 1}; the teacher has {layers} {what}")


def _refuse_another_geometry(who: str, weights: str, wanted: Geometry, resize: bool = False) -> None:
    """A student file carries its geometry; the settings must say the same, but for what can be resized."""
    held = _file_geometry(f"{who}.weights", weights)
    if held.family != wanted.family:
        raise UserError(f"{who}.weights: {weights} holds a {held.family}, {who}.name is a {wanted.family}")
    theirs, ours = asdict(held), asdict(wanted)
    if theirs.get("position_bias") == "shared":  # may be copied to every block
        theirs["position_bias"] = ours["position_bias"]
    unlike = [key for key in theirs if theirs[key] != ours[key] and not (resize and key in RESIZABLE)]
    different = [f"{key} {theirs[key]} (settings: {ours[key]})" for key in unlike]
    if different and who == "student" and not resize and set(unlike) <= set(RESIZABLE):
        raise UserError(
            f"student.weights: {weights} holds {', '.join(different)}; set student.resize=true to resize it, or "
            "student.image_size and student.geometry to match"
        )
    if different:
        found = ", ".join(different)
        untied = theirs.get("position_bias") != ours.get("position_bias")
        match = f"{who}.geometry to match" if not untied else f"{who}.position_bias={theirs['position_bias']}"
        remedy = f"set {match}" if who == "student" else f"set {who}.name={STUDENT_FILE}, which takes it from the file"
        raise UserError(f"{who}.weights: {weights} holds {found}; {remedy}")


def _file_geometry(where: str, weights: str) -> Geometry:
    refuse_no_file(where, weights)
    return file_geometry(Path(weights))


def refuse_no_file(where: str, weights: str) -> None:
    """Raise UserError, naming the setting, where there is no file; what a recipe would leave there is told."""
    if Path(weights).is_file():
        return
    recipe = RUN_OF_A_RECIPE.fullmatch(weights)
    hint = ""
    if recipe and recipe[1] in recipe_names():
        hint = f"; `fdscale launch {load_recipe(recipe[1]).program} {recipe[1]}` leaves it there"
    raise UserError(f"{where}: no such file: {weights}; allowed: the path of a weights file{hint}")


def teacher_parameters(teacher: TeacherGeometry) -> int:
    """Parameters of a teacher, 0 where only the built network tells."""
    return 0 if isinstance(teacher, UnbuiltTeacher) else teacher.parameters() or 0


def pair_problems(
    where: str, target: TargetSettings, student: Geometry | None, teacher: TeacherGeometry | None
) -> list[str]:
    """Why the token layouts of the two do not meet; nothing where one is wrong, or known only once it is built."""
    ours, theirs = _layout(student), _layout(teacher)
    if ours is None or theirs is None:
        return []
    problems = layout_problems(theirs, ours, target.grid, target.prefix_tokens)
    return [settings_renamed(problem, where) for problem in problems]


def _layout(network: TeacherGeometry | None) -> TokenLayout | None:
    if network is None or network.grid is None or network.prefix_tokens is None:
        return None
    return TokenLayout(network.grid, network.prefix_tokens)


def teacher_notes(table: TeacherSettings) -> Iterator[str]:
    """Weights that must still be fetched, and a licence that restricts what becomes of them."""
    found = fetched(table.name, table.revision) if table.weights is None and table.name != OWN else None
    if table.weights is None and table.name != OWN and (found is None or not found.path.is_file()):
        yield f"the weights of {table.name} are not on this machine: `fdscale fetch` brings them"
    if table.name.startswith(TIMM_PREFIX):
        yield f"{table.name} is looked up in timm when it is built, at the start"
    spec = TEACHERS.get(table.name)
    if table.weights != "random" and spec is not None and spec.licence not in FREE_LICENCES:
        yield f"the weights of {table.name} come under {spec.licence}: so may what is distilled from them"
