"""The student file: `student.safetensors` (the backbone's weights) with `student.json` (its geometry) beside it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.students.geometry import ViTGeometry, file_description, geometry_to_json
from fdscale.students.resize import resized
from fdscale.students.student import Student

SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


def save_student(
    student: Student, state: dict[str, Tensor], folder: Path, source: dict[str, str] | None = None, ending: str = ""
) -> Path:
    """Write a student from its backbone's full state dict; returns the path of the weights, `student{ending}`.

    `source` says where weights came from that were not trained here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"student{ending}.safetensors"
    write_weights(state, path)
    describe_student(student, path, source)
    return path


def describe_student(student: Student, path: Path, source: dict[str, str] | None = None) -> None:
    """Write what stands beside a student file `path`: its geometry, and how it normalises.

    A network of one's own has no geometry that we could describe: nothing is written.
    """
    if student.geometry is None:
        return
    description = {
        "geometry": geometry_to_json(student.geometry),
        "mean": student.mean.flatten().tolist(),
        "std": student.std.flatten().tolist(),
        **({} if source is None else {"source": source}),
    }
    path.with_suffix(".json").write_text(json.dumps(description, indent=2) + "\n")


def write_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors, whole or not at all; raises UserError where there is no room."""
    beside = path.with_name(path.name + ".new")
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, beside)
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} could not be written: {error}; make room, then start the same command again"
        ) from error


def read_weights(weights: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises UserError where they cannot be read."""
    try:
        return load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: not a readable student file: {error}") from error


def load_weights(student: Student, weights: Path, resize: bool = False) -> None:
    """Fill a student from a student file, its input normalisation included.

    Raises UserError unless the keys and shapes are exactly the student's. One exception: a position bias table
    that the file's blocks share is copied to every block of a student with one per block (official fine-tuning).
    `resize` fits positions of another image size to the student's.
    """
    expected = {name: tensor.shape for name, tensor in student.backbone.state_dict().items()}
    state = read_weights(weights)
    if isinstance(student.geometry, ViTGeometry) and student.geometry.position_bias == "per_block":
        state = _table_per_block(state, student.geometry.depth)
    state = resized(state, student, weights) if resize else state
    missing, unexpected = sorted(expected.keys() - state), sorted(state.keys() - expected)
    shapes = [n for n in expected.keys() & state.keys() if expected[n] != state[n].shape]
    if missing or unexpected or shapes:
        raise UserError(
            f"{weights}: not the weights of this student: missing {missing[:3]}, unexpected {unexpected[:3]}, "
            f"of another shape {sorted(shapes)[:3]}; its geometry is in {weights.with_suffix('.json').name}"
        )
    with torch.no_grad():
        student.backbone.load_state_dict(state)
    load_statistics(student, weights)


def load_statistics(student: Student, weights: Path) -> None:
    """The input normalisation that stands beside a student file, without its weights."""
    if weights.with_suffix(".json").is_file():
        described = file_description(weights)
        for buffer, values in ((student.mean, described["mean"]), (student.std, described["std"])):
            buffer.copy_(torch.tensor(values).view_as(buffer))


def _table_per_block(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    shared = state.pop(SHARED_TABLE, None)
    if shared is None:
        return state
    return {**state, **{f"blocks.{index}.attn.relative_position_bias_table": shared for index in range(depth)}}


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `output` if nothing fails, and is gone otherwise."""
    refuse_taken(output)
    output = output.resolve()  # '.' has no name
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        folder = Path(scratch) / output.name
        folder.mkdir()
        yield folder
        os.replace(folder, output)


def refuse_taken(output: Path) -> None:
    """Raises UserError for an output that is there and is not an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists and is not an empty folder; name another output, nothing was written")
