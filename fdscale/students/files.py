"""The student file: `student.safetensors` (the backbone's weights) with `student.json` (its geometry) beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.students.geometry import geometry_to_json
from fdscale.students.student import Student


def save_student(student: Student, state: dict[str, Tensor], folder: Path) -> Path:
    """Write a student from its backbone's full state dict; returns the path of the weights.

    A network of one's own has no geometry that we could describe: its weights alone are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "student.safetensors"
    beside = path.with_name(path.name + ".new")
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, beside)
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} could not be written: {error}; make room, then start the same command again"
        ) from error
    if student.geometry is None:
        return path
    description = {
        "geometry": geometry_to_json(student.geometry),
        "mean": student.mean.flatten().tolist(),
        "std": student.std.flatten().tolist(),
    }
    path.with_suffix(".json").write_text(json.dumps(description, indent=2) + "\n")
    return path


def load_weights(student: Student, weights: Path) -> None:
    """Fill a student from a student file; raises UserError unless the keys and shapes are exactly the student's."""
    state = _read(weights)
    expected = {name: tensor.shape for name, tensor in student.backbone.state_dict().items()}
    missing, unexpected = sorted(expected.keys() - state), sorted(state.keys() - expected)
    shapes = [n for n in expected.keys() & state.keys() if expected[n] != state[n].shape]
    if missing or unexpected or shapes:
        raise UserError(
            f"{weights}: not the weights of this student: missing {missing[:3]}, unexpected {unexpected[:3]}, "
            f"of another shape {sorted(shapes)[:3]}; its geometry is in {weights.with_suffix('.json').name}"
        )
    with torch.no_grad():
        student.backbone.load_state_dict(state)


def _read(weights: Path) -> dict[str, Tensor]:
    try:
        return load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: not a readable student file: {error}") from error
