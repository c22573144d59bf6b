"""The students' geometries: names, widths, grids and parameter counts, without torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fdscale.config.errors import SettingsError, UserError, nearest

OWN = "own"  # as student.name: the network is given by a Python call
STUDENT_FILE = "student_file"  # as student.name: the geometry is the weights file's
POSITION_BIAS_HIDDEN = 512  # hidden width of SwinV2's continuous position bias network
FRACTIONAL = ("mlp_ratio", "init_values")  # the only numbers that need not be whole
MAY_BE_ZERO = ("extra_norm_period",)


@dataclass(frozen=True)
class ViTGeometry:
    """A BEiT-like ViT with one relative position bias shared by all blocks (method: table 7, official `vit.py`)."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    image_size: int = 224
    init_values: float = 0.1
    mlp_ratio: float = 4.0

    family: ClassVar[str] = "vit"
    prefix_tokens: ClassVar[int] = 1
    undecayed: ClassVar[tuple[str, ...]] = ("cls_token", "pos_embed")  # the bias table *is* decayed, officially

    @property
    def width(self) -> int:
        return self.embed_dim

    @property
    def stride(self) -> int:
        return self.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.patch_size
        return side, side

    @property
    def blocks(self) -> int:
        return self.depth

    def parameters(self) -> int:
        """Trainable parameters of the backbone, projector and head not counted."""
        c, hidden = self.embed_dim, int(self.embed_dim * self.mlp_ratio)
        attention = 4 * c * c + 3 * c
        block = attention + 2 * c * hidden + hidden + c + 6 * c  # two norms, two LayerScale vectors
        stem = 3 * self.patch_size**2 * c + 2 * c  # with the CLS token
        bias_table = ((2 * self.grid[0] - 1) * (2 * self.grid[1] - 1) + 3) * self.num_heads
        return stem + bias_table + self.depth * block + 2 * c

    def problems(self) -> list[str]:
        """What does not fit together, one sentence each."""
        found = []
        if self.embed_dim % self.num_heads:
            found.append(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.image_size % self.patch_size:
            found.append(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        return found


@dataclass(frozen=True)
class SwinV2Geometry:
    """A SwinV2; `extra_norm_period` k > 0 adds a LayerNorm after every k-th block of a stage (SwinV2, section 3.5)."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int
    image_size: int = 256
    patch_size: int = 4
    extra_norm_period: int = 0
    mlp_ratio: float = 4.0

    family: ClassVar[str] = "swin_v2"
    prefix_tokens: ClassVar[int] = 0
    undecayed: ClassVar[tuple[str, ...]] = ("cpb_mlp", "logit_scale", "relative_position_bias_table")

    @property
    def width(self) -> int:
        return self.stage_width(len(self.depths) - 1)

    @property
    def stride(self) -> int:
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.stride
        return side, side

    @property
    def blocks(self) -> int:
        return sum(self.depths)

    def stage_width(self, stage: int) -> int:
        return self.embed_dim * 2**stage

    def parameters(self) -> int:
        """Trainable parameters of the backbone, projector and head not counted."""
        c = self.embed_dim
        stem = 3 * self.patch_size**2 * c + 3 * c
        stages = sum(self._stage_parameters(stage) for stage in range(len(self.depths)))
        return stem + stages + 2 * self.width

    def _stage_parameters(self, stage: int) -> int:
        c, heads, depth = self.stage_width(stage), self.num_heads[stage], self.depths[stage]
        hidden = int(c * self.mlp_ratio)
        attention = 4 * c * c + 3 * c + heads + POSITION_BIAS_HIDDEN * (3 + heads)
        block = attention + 2 * c * hidden + hidden + c + 4 * c
        merging = 2 * c * c + 2 * c if stage else 0  # 4(c/2) -> c, then a norm
        extra_norms = depth // self.extra_norm_period if self.extra_norm_period else 0
        return depth * block + merging + extra_norms * 2 * c

    def problems(self) -> list[str]:
        """What does not fit together, one sentence each."""
        if len(self.depths) != len(self.num_heads):
            return [f"depths {list(self.depths)} and num_heads {list(self.num_heads)} differ in length"]
        found = []
        if self.image_size % self.stride:
            found.append(f"image_size {self.image_size} is not a multiple of the stride {self.stride}")
        for stage, heads in enumerate(self.num_heads):
            side = self.image_size // self.patch_size // 2**stage
            if self.stage_width(stage) % heads:
                found.append(f"stage {stage}: width {self.stage_width(stage)} is not a multiple of {heads} heads")
            if side > self.window_size and side % self.window_size:
                found.append(f"stage {stage}: window_size {self.window_size} does not divide its {side}x{side} map")
        return found


@dataclass(frozen=True)
class TimmGeometry:
    """Any network that timm builds by name; width and grid are known once it is built."""

    name: str
    image_size: int | None = None

    family: ClassVar[str] = "timm"
    width: ClassVar[None] = None
    grid: ClassVar[None] = None
    stride: ClassVar[None] = None
    prefix_tokens: ClassVar[None] = None
    blocks: ClassVar[None] = None

    def parameters(self) -> None:
        """Unknown without building the network."""
        return None

    def problems(self) -> list[str]:
        """None that can be told without building the network."""
        return []


@dataclass(frozen=True)
class OwnGeometry:
    """A network of one's own, given by a Python call: nothing is known of it beforehand, nothing is stored."""

    family: ClassVar[str] = OWN
    image_size: ClassVar[None] = None
    width: ClassVar[None] = None
    grid: ClassVar[None] = None
    stride: ClassVar[None] = None
    prefix_tokens: ClassVar[None] = None

    def parameters(self) -> None:
        """Unknown."""
        return None


Geometry = ViTGeometry | SwinV2Geometry | TimmGeometry | OwnGeometry
FAMILIES: dict[str, type[Geometry]] = {g.family: g for g in (ViTGeometry, SwinV2Geometry, TimmGeometry)}

STUDENTS: dict[str, ViTGeometry | SwinV2Geometry] = {
    "vit_s16": ViTGeometry(384, 12, 6, 16),
    "vit_b16": ViTGeometry(768, 12, 12, 16),
    "vit_l14": ViTGeometry(1024, 24, 16, 14),
    "swinv2_t": SwinV2Geometry(96, (2, 2, 6, 2), (3, 6, 12, 24), window_size=8),
    "swinv2_b": SwinV2Geometry(128, (2, 2, 18, 2), (4, 8, 16, 32), window_size=14, image_size=224),
    # SwinV2, table 1: C 512, blocks 2/2/42/4, an extra norm every 6 blocks; heads of 32 channels
    "swinv2_g": SwinV2Geometry(512, (2, 2, 42, 4), (16, 32, 64, 128), window_size=16, extra_norm_period=6),
}


def student_geometry(
    name: str, image_size: int | None, overrides: Mapping[str, Any], weights: str | None = None
) -> Geometry:
    """The geometry of a named student (`timm:NAME`, `student_file`) with single numbers replaced.

    Raises UserError for an unknown student, SettingsError with every unknown key, every number that cannot be, and
    all that do not fit together.
    """
    if name == STUDENT_FILE:
        if not weights:
            raise UserError(f"student.name={STUDENT_FILE}: which file? name it with student.weights=FILE")
        if overrides or image_size:
            raise UserError(
                f"student.name={STUDENT_FILE} takes everything from {weights}; "
                "leave student.geometry and student.image_size out"
            )
        return file_geometry(Path(weights))
    if name == OWN:
        if overrides or image_size:
            raise UserError(
                f"student.name={OWN} brings its own size; leave student.geometry and student.image_size out"
            )
        return OwnGeometry()
    if name.startswith("timm:"):
        if overrides:
            raise UserError("student.geometry: 'timm:' students take only student.image_size")
        return TimmGeometry(name.removeprefix("timm:"), image_size)
    if name not in STUDENTS:
        raise UserError(
            f"student.name: unknown student '{name}'{nearest(name, STUDENTS)}; "
            f"known: {', '.join(STUDENTS)}, {STUDENT_FILE}, timm:NAME, or {OWN} (from Python)"
        )
    changes = dict(overrides) if image_size is None else {**overrides, "image_size": image_size}
    return _replace(STUDENTS[name], changes, name)


def _replace(geometry: ViTGeometry | SwinV2Geometry, changes: Mapping[str, Any], name: str) -> Geometry:
    known = {field.name: getattr(geometry, field.name) for field in dataclasses.fields(geometry)}
    problems = [problem for key, value in changes.items() for problem in _number_problems(key, value, known, name)]
    if problems:
        raise SettingsError(problems)
    frozen: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
    changed = dataclasses.replace(geometry, **frozen)
    if found := changed.problems():
        raise SettingsError([f"student.geometry of {name}: {problem}" for problem in found])
    return changed


def _number_problems(key: str, value: Any, known: Mapping[str, Any], name: str) -> Iterator[str]:
    where, numbers = f"student.geometry.{key}", value if isinstance(value, list | tuple) else [value]
    lowest = 0 if key in MAY_BE_ZERO else 1
    if key not in known:
        yield f"{where}: {name} has no such number{nearest(key, known)}; known: {', '.join(known)}"
    elif isinstance(known[key], tuple) != isinstance(value, list | tuple):
        yield f"{where}: got {value!r}; {name} has {known[key]!r} there"
    elif key in FRACTIONAL:
        if min(numbers) <= 0:
            yield f"{where}: got {value}, allowed: a number above 0"
    elif not numbers or min(numbers) < lowest or any(isinstance(number, float) for number in numbers):
        yield f"{where}: got {value}, allowed: whole numbers, at least {lowest}"


def geometry_to_json(geometry: Geometry) -> dict[str, Any]:
    """A geometry as plain JSON, with its family."""
    return {"family": geometry.family, **dataclasses.asdict(geometry)}


def file_geometry(weights: Path) -> Geometry:
    """The geometry of a student file (`student.json` beside the weights), read without torch."""
    return _from_json(file_description(weights)["geometry"], weights.with_suffix(".json"))


def file_description(weights: Path) -> dict[str, Any]:
    """What stands beside a student file's weights: `geometry`, `mean`, `std`; raises UserError when it does not."""
    path = weights.with_suffix(".json")
    try:
        stored = json.loads(path.read_text())
        return {key: stored[key] for key in ("geometry", "mean", "std")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: a student file has its geometry, mean and std there, but: {error!r}") from error


def _from_json(stored: Mapping[str, Any], source: Path) -> Geometry:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
    family = values.pop("family", None)
    if family not in FAMILIES:
        raise UserError(f"{source}: unknown student family {family!r}; known: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family](**values)
    except TypeError as error:
        raise UserError(f"{source}: not a geometry of family '{family}': {error}") from error
