"""What an export starts from: a finished student file, the classifier beside it, and what its run says of it."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fdscale.config.data_settings import DataSettings
from fdscale.config.errors import UserError
from fdscale.data.index import INDEX_FILE, Index, load_index
from fdscale.data.remote.cache import GIB, Cache
from fdscale.data.remote.urls import PIPE, is_remote
from fdscale.students.geometry import Geometry, SwinV2Geometry, file_description, file_geometry, file_source
from fdscale.training.run_directory import RunDirectory

logger = logging.getLogger(__name__)

CROP_PCT = 0.875  # evaluation resizes the shorter side to size * 256 / 224
NEW_NORM, HEAD = "fc_norm.", "head."  # names in a classifier's file
WHOLE = {  # what programs leave that export nothing further
    "segment": "segmenter, a folder for transformers once fdscale.downstream.segmentation.networks is imported",
    "detect": "detector.safetensors, for fdscale.downstream.detection.files.load_detector",
}


@dataclass(frozen=True)
class Head:
    """A classifier's file: its classes, and whether a new norm after pooling takes the place of the student's final."""

    weights: Path
    classes: int
    new_norm: bool


@dataclass(frozen=True)
class Finished:
    """A student file; `recipe` is that of the run around it, empty where there is none, `head` its classifier."""

    weights: Path
    geometry: Geometry
    mean: tuple[float, ...]
    std: tuple[float, ...]
    recipe: Mapping[str, Any]
    head: Head | None

    @property
    def interpolation(self) -> str:
        """As the run's; imported networks were trained, and are probed, with bicubic."""
        imported = file_source(self.weights) is not None
        return self.recipe.get("data", {}).get("interpolation", "bicubic" if imported or self.head else "bilinear")

    @cached_property
    def shown(self) -> Index | None:
        """The run's held-out shards, else its training shards; None when they are no longer where they were."""
        return self._index("eval") or self._trained

    @cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes' names, as the index of the training shards has them, which numbers the head's rows."""
        if self.head is None:
            return None
        names = self._trained.classes if self._trained is not None else None
        if names is not None and len(names) == self.head.classes:
            return names
        logger.warning("the classes are exported without names: data.shards, which has them, is not where it was")
        return None

    @cached_property
    def _trained(self) -> Index | None:
        return self._index("data")

    def _cache(self) -> Cache | None:
        """The run's, for shards behind URLs."""
        data = self.recipe.get("data", {})
        limit = data.get("cache_gib", DataSettings.model_fields["cache_gib"].default)
        return Cache(Path(data["cache"]), int(limit * GIB)) if "cache" in data else None

    def _index(self, table: str) -> Index | None:
        folder = self.recipe.get(table, {}).get("shards")
        if not folder or not (is_remote(folder) or (Path(folder) / INDEX_FILE).is_file()):
            return None
        if folder.startswith(PIPE):
            logger.warning("%s.shards, %s, is left out: an export runs no command of a recipe", table, folder)
            return None
        try:
            return load_index(folder, self._cache())
        except UserError as error:
            logger.warning("%s.shards of the run is left out of the export: %s", table, error)
            return None


def finished(source: Path) -> Finished:
    """The run directory of a completed run, an imported student's folder, or a student file.

    Raises UserError for anything else, and for a SwinV2's new norm after pooling, which no other library has.
    """
    weights = _weights_file(source)
    described, recipe = file_description(weights), weights.with_name("recipe.toml")
    found = Finished(
        weights,
        file_geometry(weights),
        tuple(_shortest(value) for value in described["mean"]),
        tuple(_shortest(value) for value in described["std"]),
        tomllib.loads(recipe.read_text()) if recipe.is_file() else {},
        _head(weights),
    )
    if found.head and found.head.new_norm and isinstance(found.geometry, SwinV2Geometry):
        raise UserError(
            f"{found.head.weights}: head.norm=after_pooling of a SwinV2 has no counterpart in timm or transformers: "
            f"its head cannot be exported; `--format weights` writes the student without it"
        )
    return found


def stored_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a file's header; raises UserError when it is no safetensors file."""
    try:
        with safe_open(weights, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: not a readable student file: {error}") from error


def refuse_dense(run: Path) -> None:
    """Raise UserError for the run of a dense task: what it trained is more than a student, and lies there whole."""
    recipe = RunDirectory(run).recipe
    program = tomllib.loads(recipe.read_text()).get("program") if recipe.is_file() else None
    if (left := WHOLE.get(str(program))) is not None:
        raise UserError(f"{run}: `fdscale {program}` leaves its network whole, {run}/{left} (docs/dense.md); use that")


def _weights_file(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.exists():
        raise UserError(f"{source}: no such run directory or student file")
    run = RunDirectory(source)
    if not run.recipe.is_file() and run.student.is_file():
        return run.student  # an imported student's folder
    if run.completed_steps() is None or not run.student.is_file():
        raise UserError(
            f"{source}: not a completed run: its student.safetensors is written and marked when the last "
            "step is done; start the same command again to finish it, or name a student file"
        )
    return run.student


def _head(student: Path) -> Head | None:
    path = student.with_name(student.name.replace("student", "classifier", 1))
    if path == student or not path.is_file():
        return None
    shapes = stored_shapes(path)
    if f"{HEAD}weight" not in shapes:
        raise UserError(f"{path}: no classifier's file: it has no {HEAD}weight; take it away to export the student")
    return Head(path, shapes[f"{HEAD}weight"][0], any(name.startswith(NEW_NORM) for name in shapes))


def _shortest(value: float) -> float:
    """The shortest decimal of an fp32 number, which the student file widened (0.485 is 0.4850000143)."""
    return float(str(np.float32(value)))
