"""The files of a detector: its weights, and beside them everything that builds it again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.downstream.detection.design import Design
from fdscale.downstream.detection.detector import Detector
from fdscale.planning.detector_file import refuse_another_student
from fdscale.students.files import load_statistics, write_weights
from fdscale.students.geometry import file_geometry, geometry_to_json
from fdscale.students.student import build_student
from fdscale.training.engine import gathered
from fdscale.training.partition import is_divided
from fdscale.training.run_directory import write_text

logger = logging.getLogger(__name__)
NAME = "detector"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Category:
    """What a label stands for: the data set's number and name of it."""

    id: int
    name: str


def save_detector(
    detector: Detector, state: Mapping[str, Tensor], folder: Path, categories: Sequence[Category], ending: str = ""
) -> Path:
    """Write `detector{ending}.safetensors` from a full state dict, and `.json`; returns the path of the weights.

    `categories` of the labels, in their order. Each file is whole, or as it was before. Raises UserError where there
    is no room for the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{NAME}{ending}.safetensors"
    student = detector.backbone.student
    description = {
        **({} if student.geometry is None else {"geometry": geometry_to_json(student.geometry)}),
        "mean": student.mean.flatten().tolist(),
        "std": student.std.flatten().tolist(),
        "design": asdict(detector.design),
        "categories": [asdict(category) for category in categories],
    }
    write_weights(dict(state), path)
    write_text(path.with_suffix(".json"), json.dumps(description, indent=2) + "\n")
    return path


def load_detector(path: Path, device: str = "cpu") -> tuple[Detector, tuple[Category, ...]]:
    """The detector of a file or of a folder's `detector.safetensors`, in eval mode, and its labels' categories.

    On the meta device its student has shapes only, and its heads random values: for `divide`, which takes rank 0's.
    Raises UserError for a file that is none, or does not hold what stands beside it.
    """
    file = path / f"{NAME}.safetensors" if path.is_dir() else path
    student = build_student(file_geometry(file), device=device)
    design, categories = _described(file)
    detector = Detector(student, design)
    if device == "meta":
        return detector.eval(), categories
    if new := load_detector_weights(detector, file):
        raise UserError(f"{file}: {', '.join(new[:3])} missing, or of another number of classes than beside it")
    return detector.eval(), categories


def _described(file: Path) -> tuple[Design, tuple[Category, ...]]:
    beside = file.with_suffix(".json")
    try:
        stored = json.loads(beside.read_text())
        numbers: dict[str, Any] = stored["design"]
        numbers |= {key: tuple(value) for key, value in numbers.items() if isinstance(value, list)}
        return Design(**numbers), tuple(Category(**category) for category in stored["categories"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{beside}: a detector has its design and categories there, but: {error!r}") from error


def load_detector_weights(detector: Detector, file: Path) -> list[str]:
    """Fill a detector from another one's file, of other classes, too; returns the names that it does not fill.

    Those stay as they are: the predictors of each class where the file has another number of classes, and the mask
    head where it has none. The log says so. The student's input statistics are the file's. The detector may be divided
    over ranks: then every rank must call this and can read the file; values of what is divided are read by rank 0
    alone. Raises UserError for a file of a student that computes otherwise (coordinates, windows), and for anything
    else that is missing, left over or of another shape.
    """
    student = detector.backbone.student
    refuse_another_student(file, student.geometry)
    wanted = detector.state_dict(keep_vars=True)
    shapes = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in wanted.items()}
    try:
        with safe_open(file, "pt") as held:
            found = {name: tuple(held.get_slice(name).get_shape()) for name in held.keys()}  # noqa: SIM118 - no dict
            new = _new_names(detector, shapes, found)
            _check(file, {name: shape for name, shape in shapes.items() if name not in new}, found, new)
            for name in (name for name in wanted if name not in new):
                _fill(wanted[name], partial(held.get_tensor, name))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not a readable detector file: {error}") from error
    load_statistics(student, file)
    kept = f"{len(wanted) - len(new)} of {len(wanted)} weights kept"
    logger.info("%s: %s%s", file, kept, f"; new: {_parts(new)}" if new else "")
    return new


def _new_names(detector: Detector, shapes: Mapping[str, Shape], found: Mapping[str, Shape]) -> list[str]:
    """What another data set's detector cannot give."""
    classes = "boxes.stages.0.classes.weight"
    other_classes = classes in found and found[classes][0] != shapes[classes][0]
    parts = [".classes.", "mask_fcn_logits."] if other_classes else []
    if other_classes and not detector.design.cascade:
        parts.append(".offsets.")
    if not any(name.startswith("masks.") for name in found):
        parts.append("masks.")
    heads = [name for name in shapes if name.startswith(("boxes.", "masks."))]
    return [name for name in heads if any(part in name for part in parts)]


def _check(file: Path, shapes: Mapping[str, Shape], found: Mapping[str, Shape], new: Sequence[str]) -> None:
    missing, unexpected = sorted(shapes.keys() - found), sorted(found.keys() - shapes.keys() - set(new))
    other = [
        f"{name} {found[name]} for {shapes[name]}" for name in shapes if found.get(name, shapes[name]) != shapes[name]
    ]
    if missing or unexpected or other:
        raise UserError(
            f"{file}: not the weights of this detector: missing {missing[:3]}, unexpected {unexpected[:3]}, of another "
            f"shape {other[:3]}; allowed to differ are the number of classes, and a mask head that is not there; what "
            f"it was built with is in {file.with_suffix('.json').name}"
        )


@torch.no_grad()
def _fill(tensor: Tensor, read: Callable[[], Tensor]) -> None:
    if not (isinstance(tensor, nn.Parameter) and is_divided(tensor)):
        tensor.copy_(read())
        return
    with gathered(tensor, written_by=0):
        if dist.get_rank() == 0:
            tensor.copy_(read())


def _parts(names: Sequence[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[0] for name in names}))
