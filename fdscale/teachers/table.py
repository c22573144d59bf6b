"""The teachers by name, with their shapes and input statistics; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from fdscale.config.errors import SettingsError, UserError, attempt, nearest

Value = int | float | list[int]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TIMM_PREFIX, STUDENT_FILE, OWN = "timm:", "student_file", "own"
VIT_KEYS = ("embed_dim", "depth", "num_heads", "patch_size", "image_size", "mlp_ratio")
SWIN_KEYS = ("embed_dim", "depths", "num_heads", "patch_size", "image_size", "mlp_ratio", "window_size")


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher whose shape is known before it is built.

    `depth` and `num_heads` are one number (ViT) or one per stage (Swin, where `embed_dim` is the first
    stage's). `pretrained` is the library's tag, empty where no hub has the weights. `checkpoint_key` names
    the network to take from a file that holds a student and a teacher.
    """

    source: Literal["timm", "open_clip"]
    model: str
    pretrained: str
    family: Literal["vit", "clip", "swin"]
    licence: str
    embed_dim: int
    depth: int | tuple[int, ...]
    num_heads: int | tuple[int, ...]
    patch_size: int
    prefix_tokens: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    image_size: int = 224
    pretrained_size: int = 224  # the image side that the weights were trained at
    mlp_ratio: float = 4.0
    window_size: int | None = None
    checkpoint_key: str = "teacher"

    @property
    def stages(self) -> int:
        return len(self.depth) if isinstance(self.depth, tuple) else 1

    @property
    def width(self) -> int:
        """Channels of a token, C: each Swin stage doubles them."""
        return self.embed_dim * 2 ** (self.stages - 1)

    @property
    def stride(self) -> int:
        """Pixels between neighbouring tokens."""
        return self.patch_size * 2 ** (self.stages - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens (h, w) without the prefix tokens; a Swin stage rounds an odd map up."""
        side = -(-self.image_size // self.stride)
        return side, side


@dataclass(frozen=True)
class UnbuiltTeacher:
    """A teacher whose shape only the network tells: `timm:NAME`, a student file, or one's own from Python (`own`)."""

    source: Literal["timm", "student_file", "own"]
    model: str  # timm's name, or the student file's path
    image_size: int | None
    overrides: Mapping[str, Value]
    checkpoint_key: str = "teacher"
    licence: str = "unknown: ask the source"
    width: None = None
    grid: None = None
    prefix_tokens: None = None


def _clip(source: Literal["timm", "open_clip"], model: str, dim: int, depth: int, patch: int) -> TeacherSpec:
    # the quickgelu variants: the plain ones build an exact GELU and change the targets without a word
    heads = dim // 64
    return TeacherSpec(source, model, "openai", "clip", "MIT", dim, depth, heads, patch, 1, CLIP_MEAN, CLIP_STD)


TEACHERS: dict[str, TeacherSpec] = {
    "clip_vit_b16": _clip("timm", "vit_base_patch16_clip_quickgelu_224", 768, 12, 16),
    "clip_vit_l14": _clip("timm", "vit_large_patch14_clip_quickgelu_224", 1024, 24, 14),
    "clip_vit_b16_open_clip": _clip("open_clip", "ViT-B-16-quickgelu", 768, 12, 16),
    "dino_vit_b16": TeacherSpec("timm", "vit_base_patch16_224", "dino", "vit", "Apache-2.0", 768, 12, 12, 16, 1),
    "deit_b16": TeacherSpec("timm", "deit_base_patch16_224", "fb_in1k", "vit", "Apache-2.0", 768, 12, 12, 16, 1),
    "esvit_swin_b": TeacherSpec(
        source="timm",
        model="swin_base_patch4_window7_224",
        pretrained="",
        family="swin",
        licence="MIT",
        embed_dim=128,
        depth=(2, 2, 18, 2),
        num_heads=(4, 8, 16, 32),
        patch_size=4,
        prefix_tokens=0,
        window_size=14,
        checkpoint_key="student",  # as the official implementation; EsViT's own evaluation takes "teacher"
    ),
}


def teacher_geometry(
    name: str,
    weights: str | None = None,
    image_size: int | None = None,
    overrides: Mapping[str, Value] | None = None,
) -> TeacherSpec | UnbuiltTeacher:
    """The teacher's source and shape, with the recipe's overrides applied.

    Raises UserError for an unknown teacher, SettingsError with every unknown geometry key (naming the nearest) and
    every value of the wrong kind, or with all numbers that do not fit each other.
    """
    overrides = dict(overrides or {})
    image_size = _one_image_size(image_size, overrides.pop("image_size", None))
    if name == OWN:
        return UnbuiltTeacher("own", name, image_size, overrides, licence="your own")
    if name == STUDENT_FILE:
        return _student_file(weights, image_size, overrides)
    if name.startswith(TIMM_PREFIX):
        if unknown := _unknown_keys(name, overrides, sorted({*VIT_KEYS, *SWIN_KEYS})):
            raise SettingsError(unknown)
        return UnbuiltTeacher("timm", name.removeprefix(TIMM_PREFIX), image_size, overrides)
    if name not in TEACHERS:
        known = [*TEACHERS, STUDENT_FILE, "timm:NAME", OWN]
        raise UserError(f"teacher.name: unknown teacher {name!r}{nearest(name, known)}; allowed: {', '.join(known)}")
    spec = _overridden(name, overrides)
    spec = spec if image_size is None else replace(spec, image_size=image_size)
    if problems := list(_problems(name, spec)):
        raise SettingsError(problems)
    return spec


def _one_image_size(setting: int | None, override: Any) -> int | None:
    if override is None:
        return setting
    if not _is_count(override):
        raise UserError(f"teacher.geometry.image_size: got {override!r}, allowed: a whole number of pixels")
    if setting not in (None, override):
        raise UserError(
            f"teacher.image_size is {setting} and teacher.geometry.image_size is {override}; keep one of them"
        )
    return int(override)


def _student_file(weights: str | None, image_size: int | None, overrides: Mapping[str, Value]) -> UnbuiltTeacher:
    if weights in (None, "random"):
        raise UserError(
            f"teacher.weights: got {weights!r} for teacher.name={STUDENT_FILE!r}; "
            "give the path of a student.safetensors with its student.json beside it"
        )
    if overrides or image_size is not None:
        given = ", ".join([*overrides, *(["image_size"] if image_size is not None else [])])
        raise UserError(f"teacher.geometry: {given} cannot be set: a student file carries its own geometry")
    return UnbuiltTeacher("student_file", str(weights), None, {}, licence="your own")


def _overridden(name: str, overrides: Mapping[str, Value]) -> TeacherSpec:
    spec = TEACHERS[name]
    allowed = SWIN_KEYS if spec.family == "swin" else VIT_KEYS
    problems = _unknown_keys(name, overrides, allowed)
    values: dict[str, Any] = {}
    for key in [key for key in overrides if key in allowed]:
        per_stage = key == "depths" or (key == "num_heads" and spec.family == "swin")
        field = "depth" if key == "depths" else key
        values[field] = attempt(partial(_value, key, overrides[key], per_stage), problems)
    if problems:
        raise SettingsError(problems)
    return replace(spec, **values)


def _unknown_keys(name: str, overrides: Mapping[str, Value], allowed: Sequence[str]) -> list[str]:
    known = ", ".join(allowed)
    return [
        f"teacher.geometry: unknown key {key!r} for {name}{nearest(key, allowed)}; allowed: {known}"
        for key in overrides
        if key not in allowed
    ]


def _value(key: str, value: Value, per_stage: bool) -> int | float | tuple[int, ...]:
    where = f"teacher.geometry.{key}: got {value!r}, allowed"
    if per_stage:
        if not isinstance(value, list) or not value or not all(_is_count(item) for item in value):
            raise UserError(f"{where}: a list of whole numbers above 0, one per stage")
        return tuple(value)
    if key == "mlp_ratio" and isinstance(value, int | float) and value > 0:
        return float(value)
    if key == "mlp_ratio" or not _is_count(value):
        raise UserError(f"{where}: a {'' if key == 'mlp_ratio' else 'whole '}number above 0")
    assert isinstance(value, int)
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _problems(name: str, spec: TeacherSpec) -> Iterator[str]:
    """What does not fit together, one sentence each."""
    heads = spec.num_heads if isinstance(spec.num_heads, tuple) else (spec.num_heads,)
    if len(heads) != spec.stages:
        yield f"teacher.geometry of {name}: {spec.stages} depths but {len(heads)} num_heads"
    for stage, count in enumerate(heads):
        width = spec.embed_dim * 2**stage
        if width % count:
            yield f"teacher.geometry of {name}: {count} attention heads do not divide {width} channels"
    if spec.image_size % spec.patch_size:
        yield (
            f"teacher.image_size of {name}: {spec.image_size} is not a multiple of its patch size "
            f"{spec.patch_size}; the next below is {spec.image_size // spec.patch_size * spec.patch_size}"
        )
