"""`fdscale import`: an official checkpoint becomes a student file, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fdscale.config.errors import UserError
from fdscale.importing.clip import is_clip, read_clip
from fdscale.importing.found import Found, Overrides, parsed
from fdscale.importing.source import Source, StateDict, first, read_source, unknown
from fdscale.importing.swin import read_swin
from fdscale.importing.swin_v2 import read_swin_v2
from fdscale.importing.vit import read_vit
from fdscale.students.files import new_folder, refuse_taken, save_student
from fdscale.students.geometry import Geometry, OwnGeometry
from fdscale.students.student import IMAGENET_MEAN, IMAGENET_STD, Student, build_student
from fdscale.teachers.fetched import sha256_of
from fdscale.teachers.table import CLIP_MEAN, CLIP_STD

HALF = (0.5, 0.5, 0.5)
NORMALISATIONS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "inception": (HALF, HALF),
    "clip": (CLIP_MEAN, CLIP_STD),
}


@dataclass(frozen=True)
class ImportReport:
    """What an import took and what it left behind (counts by kind); `family` in words, `weights` the new file."""

    family: str
    geometry: Geometry
    weights: Path
    tensors: int
    left_behind: Mapping[str, int]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        behind = ", ".join(f"{kind} {count}" for kind, count in self.left_behind.items())
        lines = [
            f"{self.family} -> {self.weights}",
            f"taken: {self.tensors} tensors, {self.geometry}",
            f"left behind: {behind or 'nothing'}",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def import_checkpoint(file: Path, output: Path, overrides: Sequence[str] = ()) -> ImportReport:
    """Writes `student.safetensors` and `student.json` into the new folder `output`.

    `file`: a checkpoint of feature distillation, SimMIM, Swin, SwinV2, BEiT or CLIP in its original names. The geometry
    is read off it; `overrides` (`window_size=8`, `image_size=256`, ...) say what it does not tell. Raises UserError
    for a file that cannot be read, is of another family, does not fit its own geometry to the last tensor, or leaves a
    number open; and for an `output` that is there and is not an empty folder.
    """
    given = parsed(overrides)
    refuse_taken(output)
    source = read_source(file)
    found = _found(source, given)
    student = _student(source, found, given)
    state = _checked(source, found, student)
    with new_folder(output) as folder:
        save_student(student, state, folder, {"file": file.name, "sha256": sha256_of(file)})
    return ImportReport(
        family=f"{source.wrapper} {found.family}".strip(),
        geometry=found.geometry,
        weights=output / "student.safetensors",
        tensors=len(state),
        left_behind=source.left_behind,
        notes=found.notes,
    )


def _found(source: Source, overrides: Overrides) -> Found:
    keys = source.tensors.keys()
    if is_clip(source):
        return read_clip(source, overrides)
    if "layers.0.blocks.0.attn.logit_scale" in keys:
        return read_swin_v2(source, overrides)
    if "layers.0.blocks.0.attn.relative_position_bias_table" in keys:
        return read_swin(source, overrides)
    if "blocks.0.attn.qkv.weight" in keys and "blocks.0.attn.qkv.bias" not in keys:
        return read_vit(source, overrides)
    raise unknown(source)


def _student(source: Source, found: Found, overrides: Overrides) -> Student:
    """The network of the found geometry, without memory, with the normalisation that its weights are used to."""
    name = overrides.get("normalisation", found.normalisation)
    if name not in NORMALISATIONS:
        raise UserError(f"{source.path}: got normalisation={name!r}, allowed: {', '.join(NORMALISATIONS)}")
    assert not isinstance(found.geometry, OwnGeometry)
    if problems := found.geometry.problems():
        raise UserError(f"{source.path}: {'; '.join(problems)}")
    student = build_student(found.geometry, device="meta")
    for buffer, values in zip((student.mean, student.std), NORMALISATIONS[str(name)], strict=True):
        buffer.copy_(torch.tensor(values).view_as(buffer))
    return student


def _checked(source: Source, found: Found, student: Student) -> StateDict:
    """The student's tensors, each with memory of its own, nothing missing and nothing over; else UserError."""
    wanted = {name: tuple(tensor.shape) for name, tensor in student.backbone.state_dict().items()}
    problems = list(_problems(wanted, {name: tuple(tensor.shape) for name, tensor in found.state.items()}))
    broken = [name for name, t in found.state.items() if not t.is_floating_point() or not bool(t.isfinite().all())]
    if broken:
        problems.append(f"{len(broken)} not of finite floating-point numbers ({first(broken)})")
    if problems:
        raise UserError(
            f"{source.path} is not a whole checkpoint of the {found.family} that it looks like: {'; '.join(problems)}; "
            "nothing was written"
        )
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found.state.items()}


def _problems(wanted: Mapping[str, tuple[int, ...]], held: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    kinds = {
        "missing": sorted(wanted.keys() - held.keys()),
        "unexpected": sorted(held.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {held[name]}, not {wanted[name]}"
            for name in sorted(wanted.keys() & held.keys())
            if wanted[name] != held[name]
        ],
    }
    return (f"{len(names)} {kind} ({first(names)})" for kind, names in kinds.items() if names)
