"""The students by name, and their geometries from settings and student files, without torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fdscale.config.errors import SettingsError, UserError, nearest
from fdscale.students.swin_geometry import SwinV2Geometry
from fdscale.students.unbuilt_geometry import OWN, OwnGeometry, TimmGeometry
from fdscale.students.vit_geometry import ViTGeometry

__all__ = [
    "FAMILIES",
    "OWN",
    "STUDENTS",
    "STUDENT_FILE",
    "Geometry",
    "OwnGeometry",
    "SwinV2Geometry",
    "TimmGeometry",
    "ViTGeometry",
    "file_description",
    "file_geometry",
    "geometry_from_json",
    "geometry_to_json",
    "student_geometry",
]

STUDENT_FILE = "student_file"  # as student.name: the geometry is the weights file's
FRACTIONAL = ("mlp_ratio", "init_values")  # the only numbers that need not be whole
MAY_BE_ZERO = ("extra_norm_period", "pretrained_window_sizes")
# timm's keywords that are settings of ours, and what a student has not got
SETTINGS_OF_TIMM = {"img_size": "student.image_size", "drop_path_rate": "student.drop_path"}
HEADS_OF_TIMM = ("num_classes", "global_pool")
WINDOW = "window_size"

Geometry = ViTGeometry | SwinV2Geometry | TimmGeometry | OwnGeometry
FAMILIES: dict[str, type[Geometry]] = {g.family: g for g in (ViTGeometry, SwinV2Geometry, TimmGeometry)}

STUDENTS: dict[str, ViTGeometry | SwinV2Geometry] = {
    "vit_s16": ViTGeometry(384, 12, 6, 16),
    "vit_b16": ViTGeometry(768, 12, 12, 16),
    "vit_l14": ViTGeometry(1024, 24, 16, 14),
    "vit_l16": ViTGeometry(1024, 24, 16, 16),
    "vit_h14": ViTGeometry(1280, 32, 16, 14),
    "vit_g14": ViTGeometry(1408, 40, 16, 14, mlp_ratio=6144 / 1408),  # CLIP's and EVA's g
    "swinv2_t": SwinV2Geometry(96, (2, 2, 6, 2), (3, 6, 12, 24), window_size=8),
    "swinv2_s": SwinV2Geometry(96, (2, 2, 18, 2), (3, 6, 12, 24), window_size=8),
    "swinv2_b": SwinV2Geometry(128, (2, 2, 18, 2), (4, 8, 16, 32), window_size=14, image_size=224),
    "swinv2_l": SwinV2Geometry(192, (2, 2, 18, 2), (6, 12, 24, 48), window_size=16),
    # SwinV2, table 1: an extra norm every 6 blocks; heads of 32 channels, as in the smaller ones
    "swinv2_h": SwinV2Geometry(352, (2, 2, 18, 2), (11, 22, 44, 88), window_size=16, extra_norm_period=6),
    "swinv2_g": SwinV2Geometry(512, (2, 2, 42, 4), (16, 32, 64, 128), window_size=16, extra_norm_period=6),
}


def student_geometry(
    name: str,
    image_size: int | None,
    overrides: Mapping[str, Any],
    weights: str | None = None,
    position_bias: str | None = None,
    resize: bool = False,
) -> Geometry:
    """The geometry of a named student (`timm:NAME`, `student_file`) with single numbers replaced.

    `overrides` of a `timm:` student are timm's keywords. `position_bias` None: as named, or as the file has it.
    `resize`: the weights may be of another size, as which a SwinV2 keeps normalising its coordinates.
    Raises UserError for an unknown student, SettingsError with every unknown key, every number that cannot be, and
    all that do not fit together.
    """
    if name == STUDENT_FILE:
        geometry = _of_file(weights, image_size, overrides, resize)
    elif name == OWN:
        geometry = _own(image_size, overrides)
    elif name.startswith("timm:"):
        geometry = _timm(name.removeprefix("timm:"), image_size, overrides)
    elif name in STUDENTS:
        changes = dict(overrides) if image_size is None else {**overrides, "image_size": image_size}
        geometry = _replace(STUDENTS[name], changes, name)
    else:
        raise UserError(
            f"student.name: unknown student '{name}'{nearest(name, STUDENTS)}; "
            f"known: {', '.join(STUDENTS)}, {STUDENT_FILE}, timm:NAME, or {OWN} (from Python)"
        )
    if resize and weights and isinstance(geometry, SwinV2Geometry) and Path(weights).is_file():
        held = file_geometry(Path(weights))  # another family is refused by who compares the two
        geometry = geometry.after(held) if isinstance(held, SwinV2Geometry) else geometry
    return geometry if position_bias is None else _with_position_bias(geometry, position_bias, name, weights)


def _of_file(weights: str | None, image_size: int | None, overrides: Mapping[str, Any], resize: bool) -> Geometry:
    if not weights:
        raise UserError(f"student.name={STUDENT_FILE}: which file? name it with student.weights=FILE")
    if resize and not overrides.keys() - {WINDOW}:
        held = file_geometry(Path(weights))
        changes = dict(overrides) if image_size is None else {**overrides, "image_size": image_size}
        return _resized_file(held, changes, Path(weights))
    if overrides or image_size:
        raise UserError(
            f"student.name={STUDENT_FILE} takes everything from {weights}; "
            "leave student.geometry and student.image_size out"
        )
    return file_geometry(Path(weights))


def _resized_file(held: Geometry, changes: Mapping[str, Any], weights: Path) -> Geometry:
    if isinstance(held, TimmGeometry) and WINDOW not in changes:
        return dataclasses.replace(held, **changes)
    if isinstance(held, ViTGeometry | SwinV2Geometry) and (WINDOW not in changes or isinstance(held, SwinV2Geometry)):
        return _replace(held, changes, str(weights))
    raise UserError(f"student.geometry.{WINDOW}: {weights} holds no SwinV2, which alone has windows; leave it out")


def _own(image_size: int | None, overrides: Mapping[str, Any]) -> OwnGeometry:
    if overrides or image_size:
        raise UserError(f"student.name={OWN} brings its own size; leave student.geometry and student.image_size out")
    return OwnGeometry()


def _timm(name: str, image_size: int | None, overrides: Mapping[str, Any]) -> TimmGeometry:
    problems = [
        f"student.geometry.{key}: this is {SETTINGS_OF_TIMM[key]}; set that"
        for key in overrides.keys() & SETTINGS_OF_TIMM
    ] + [f"student.geometry.{key}: a student has no head; leave it out" for key in HEADS_OF_TIMM if key in overrides]
    if problems:
        raise SettingsError(sorted(problems))
    return TimmGeometry(name, image_size, _frozen(overrides))


def _with_position_bias(geometry: Geometry, position_bias: str, name: str, weights: str | None) -> ViTGeometry:
    where = f"student.position_bias={position_bias}"
    if isinstance(geometry, TimmGeometry):
        raise UserError(
            f"{where}: leave it out for {geometry.name}; timm's Beit has use_rel_pos_bias in student.geometry"
        )
    if not isinstance(geometry, ViTGeometry):
        raise UserError(f"{where}: {name} is no ViT, whose position biases come from tables; leave it out")
    if name == STUDENT_FILE and (geometry.position_bias, position_bias) == ("per_block", "shared"):
        raise UserError(f"{where}: {weights} has a table per block, and no single one to share; leave it out")
    changed = dataclasses.replace(geometry, position_bias=position_bias)
    if found := changed.problems():
        raise SettingsError([f"student.position_bias: {problem}" for problem in found])
    return changed


def _replace(geometry: ViTGeometry | SwinV2Geometry, changes: Mapping[str, Any], name: str) -> Geometry:
    known = {field.name: getattr(geometry, field.name) for field in dataclasses.fields(geometry)}
    known.pop("position_bias", None)  # has a setting of its own
    problems = [problem for key, value in changes.items() for problem in _number_problems(key, value, known, name)]
    if problems:
        raise SettingsError(problems)
    changed = dataclasses.replace(geometry, **_frozen(changes))
    if found := changed.problems():
        raise SettingsError([f"student.geometry of {name}: {problem}" for problem in found])
    return changed


def _number_problems(key: str, value: Any, known: Mapping[str, Any], name: str) -> Iterator[str]:
    where, numbers = f"student.geometry.{key}", value if isinstance(value, list | tuple) else [value]
    lowest = 0 if key in MAY_BE_ZERO else 1
    if key == "position_bias":
        yield f"{where}: this is student.position_bias; set that"
    elif key not in known:
        yield f"{where}: {name} has no such number{nearest(key, known)}; known: {', '.join(known)}"
    elif isinstance(known[key], tuple) != isinstance(value, list | tuple):
        yield f"{where}: got {value!r}; {name} has {known[key]!r} there"
    elif not numbers or any(isinstance(number, bool | str) for number in numbers):
        yield f"{where}: got {value!r}, allowed: numbers"
    elif key in FRACTIONAL:
        if min(numbers) <= 0:
            yield f"{where}: got {value}, allowed: a number above 0"
    elif min(numbers) < lowest or any(isinstance(number, float) for number in numbers):
        yield f"{where}: got {value}, allowed: whole numbers, at least {lowest}"


def geometry_to_json(geometry: Geometry) -> dict[str, Any]:
    """A geometry as plain JSON, with its family."""
    return {"family": geometry.family, **dataclasses.asdict(geometry)}


def file_geometry(weights: Path) -> Geometry:
    """The geometry of a student file (`student.json` beside the weights), read without torch."""
    return geometry_from_json(file_description(weights)["geometry"], weights.with_suffix(".json"))


def file_source(weights: Path) -> dict[str, str] | None:
    """The `file` and `sha256` of the checkpoint that a student file was imported from; None where it was trained."""
    path = weights.with_suffix(".json")
    return json.loads(path.read_text()).get("source") if path.is_file() else None


def file_description(weights: Path) -> dict[str, Any]:
    """What stands beside a student file's weights: `geometry`, `mean`, `std`; raises UserError when it does not."""
    path = weights.with_suffix(".json")
    try:
        stored = json.loads(path.read_text())
        return {key: stored[key] for key in ("geometry", "mean", "std")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: a student file has its geometry, mean and std there, but: {error!r}") from error


def geometry_from_json(stored: Mapping[str, Any], source: Path) -> Geometry:
    """The geometry that `geometry_to_json` made `stored` of; raises UserError, naming `source`, for what is none."""
    values = _frozen(stored)
    family = values.pop("family", None)
    if family not in FAMILIES:
        raise UserError(f"{source}: unknown student family {family!r}; known: {', '.join(FAMILIES)}")
    try:
        geometry = FAMILIES[family](**values)
        found = [] if isinstance(geometry, OwnGeometry) else geometry.problems()
    except TypeError as error:
        raise UserError(f"{source}: not a geometry of family '{family}': {error}") from error
    if found:
        raise UserError(f"{source}: {'; '.join(found)}")
    return geometry


def _frozen(values: Any) -> Any:
    """Sequences as tuples, in dicts too: JSON and TOML know lists alone."""
    if isinstance(values, Mapping):
        return {key: _frozen(value) for key, value in values.items()}
    return tuple(_frozen(value) for value in values) if isinstance(values, list | tuple) else values
