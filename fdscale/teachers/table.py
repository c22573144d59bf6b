"""The teachers by name, one row each, and the geometry of a recipe's; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fdscale.config.errors import SettingsError, UserError, attempt, nearest
from fdscale.teachers.spec import Blocks, TeacherSpec, UnbuiltTeacher, Value

__all__ = [
    "OWN",
    "STUDENT_FILE",
    "TEACHERS",
    "TIMM_PREFIX",
    "TeacherSpec",
    "UnbuiltTeacher",
    "Value",
    "teacher_geometry",
]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
SATELLITE_MEAN, SATELLITE_STD = (0.43, 0.411, 0.296), (0.213, 0.156, 0.143)
TIMM_PREFIX, STUDENT_FILE, OWN = "timm:", "student_file", "own"
VIT_KEYS = ("embed_dim", "depth", "num_heads", "patch_size", "image_size", "mlp_ratio")
SWIN_KEYS = ("embed_dim", "depths", "num_heads", "patch_size", "image_size", "mlp_ratio", "window_size")

Size = tuple[int, int, int]  # channels, blocks, attention heads
S, B, L = (384, 12, 6), (768, 12, 12), (1024, 24, 16)
SO400M, H, GIANT, BIG_G, E = (1152, 27, 16), (1280, 32, 16), (1408, 40, 16), (1664, 48, 16), (1792, 64, 16)
H_PLUS, GIANT_OPT, DINOV2_G, SEVEN_B = (1280, 32, 20), (1536, 40, 16), (1536, 40, 24), (4096, 40, 32)


def _timm(name: str, family: Any, licence: str, size: Size, patch: int, prefix_tokens: int) -> TeacherSpec:
    """Weights under timm's full name on the hub, `MODEL.TAG`."""
    model, _, tag = name.partition(".")
    repository = f"timm/{name.replace('_quickgelu', '')}"  # one copy for timm's two networks of one activation each
    spec = TeacherSpec("timm", model, tag, family, licence, *size, patch, prefix_tokens)
    return replace(spec, repository=repository, file="model.safetensors")


def _sized(spec: TeacherSpec, size: int) -> TeacherSpec:
    return replace(spec, image_size=size, pretrained_size=size)


def _vit(name: str, licence: str, size: Size, patch: int) -> TeacherSpec:
    return _timm(name, "vit", licence, size, patch, prefix_tokens=1)


def _clip(name: str, size: Size, patch: int, mlp_ratio: float = 4.0) -> TeacherSpec:
    """OpenAI's are the quickgelu variants: the plain ones build an exact GELU and change the targets without a word."""
    spec = _timm(name, "clip", "MIT", size, patch, prefix_tokens=1)
    return replace(spec, mean=CLIP_MEAN, std=CLIP_STD, mlp_ratio=mlp_ratio, blocks=Blocks(stem_norm=True))


def _eva_clip(name: str, size: Size, mlp_ratio: float, blocks: Blocks) -> TeacherSpec:
    spec = _timm(name, "eva_clip", "MIT", size, 14, prefix_tokens=1)
    return replace(spec, mean=CLIP_MEAN, std=CLIP_STD, mlp_ratio=mlp_ratio, blocks=blocks)


def _siglip2(name: str, size: Size, patch: int, image_size: int, mlp_ratio: float = 4.0) -> TeacherSpec:
    """All were trained with the tanh form of GELU (flax's default), which timm builds for some of the sizes only."""
    spec = _timm(f"{name}.v2_webli", "siglip2", "Apache-2.0", size, patch, prefix_tokens=0)
    blocks = Blocks(activation="gelu_tanh")
    return replace(_sized(spec, image_size), mean=HALF, std=HALF, mlp_ratio=mlp_ratio, blocks=blocks)


def _dinov2(name: str, size: Size, gated: bool = False) -> TeacherSpec:
    """Trained at 518 px; taken at 224 by default, as images are cheap there and the grid is that of CLIP's L/14."""
    registers = "reg4" in name
    spec = _timm(f"{name}.lvd142m", "dinov2", "Apache-2.0", size, 14, prefix_tokens=5 if registers else 1)
    blocks = Blocks(layer_scale=True, positions="patches" if registers else "all", gated=gated)
    if gated:
        return replace(spec, pretrained_size=518, mlp_ratio=8 / 3, blocks=replace(blocks, multiple=8))
    return replace(spec, pretrained_size=518, blocks=blocks)


def _dinov3(name: str, size: Size, mlp_ratio: float = 4.0, swiglu: int = 0) -> TeacherSpec:
    """timm's `_qkvb` networks where the original has biases of q and v: zero or not, none is lost."""
    spec = _timm(name, "dinov3", "DINOv3 License", size, 16, prefix_tokens=5)
    blocks = Blocks(positions="none", rotary=True, biases=2 if "_qkvb" in name else 0, layer_scale=True)
    if swiglu:
        blocks = replace(blocks, gated=True, multiple=swiglu)
    if name.endswith("sat493m"):
        spec = replace(spec, mean=SATELLITE_MEAN, std=SATELLITE_STD)
    return replace(_sized(spec, 256), mlp_ratio=mlp_ratio, blocks=blocks)


CLIP_B16 = _clip("vit_base_patch16_clip_quickgelu_224.openai", B, 16)
EVA02_L = Blocks(biases=2, inner_norms=True, gated=True, rotary=True)

TEACHERS: dict[str, TeacherSpec] = {
    "clip_vit_b32": _clip("vit_base_patch32_clip_quickgelu_224.openai", B, 32),
    "clip_vit_b16": CLIP_B16,
    "clip_vit_l14": _clip("vit_large_patch14_clip_quickgelu_224.openai", L, 14),
    "clip_vit_l14_336": _sized(_clip("vit_large_patch14_clip_quickgelu_336.openai", L, 14), 336),
    "clip_vit_b16_open_clip": replace(
        CLIP_B16, source="open_clip", model="ViT-B-16-quickgelu", file="open_clip_model.safetensors"
    ),
    "laion_clip_vit_b16": _clip("vit_base_patch16_clip_224.laion2b", B, 16),
    "laion_clip_vit_l14": replace(_clip("vit_large_patch14_clip_224.laion2b", L, 14), mean=HALF, std=HALF),
    "laion_clip_vit_h14": _clip("vit_huge_patch14_clip_224.laion2b", H, 14),
    "laion_clip_vit_g14": _clip("vit_giant_patch14_clip_224.laion2b", GIANT, 14, 48 / 11),
    "laion_clip_vit_bigg14": _clip("vit_gigantic_patch14_clip_224.laion2b", BIG_G, 14, 64 / 13),
    "eva02_clip_l14": _eva_clip("eva02_large_patch14_clip_224.merged2b", L, 4 * 2 / 3, EVA02_L),
    "eva02_clip_e14": _eva_clip("eva02_enormous_patch14_clip_224.laion2b", E, 15360 / 1792, Blocks(biases=2)),
    "eva02_clip_e14_plus": _eva_clip("eva02_enormous_patch14_clip_224.laion2b_plus", E, 15360 / 1792, Blocks(biases=2)),
    "siglip2_vit_b16": _siglip2("vit_base_patch16_siglip_gap_224", B, 16, 224),
    "siglip2_vit_l16": _siglip2("vit_large_patch16_siglip_gap_256", L, 16, 256),
    "siglip2_vit_so400m14": _siglip2("vit_so400m_patch14_siglip_gap_224", SO400M, 14, 224, 3.7362),
    "siglip2_vit_so400m16": _siglip2("vit_so400m_patch16_siglip_gap_256", SO400M, 16, 256, 3.7362),
    "siglip2_vit_giantopt16": _siglip2("vit_giantopt_patch16_siglip_gap_256", GIANT_OPT, 16, 256),
    "dino_vit_s16": _vit("vit_small_patch16_224.dino", "Apache-2.0", S, 16),
    "dino_vit_b16": _vit("vit_base_patch16_224.dino", "Apache-2.0", B, 16),
    "dino_vit_b8": _vit("vit_base_patch8_224.dino", "Apache-2.0", B, 8),
    "deit_s16": _vit("deit_small_patch16_224.fb_in1k", "Apache-2.0", S, 16),
    "deit_b16": _vit("deit_base_patch16_224.fb_in1k", "Apache-2.0", B, 16),
    "mae_vit_b16": _vit("vit_base_patch16_224.mae", "CC-BY-NC-4.0", B, 16),
    "mae_vit_l16": _vit("vit_large_patch16_224.mae", "CC-BY-NC-4.0", L, 16),
    "mae_vit_h14": _vit("vit_huge_patch14_224.mae", "CC-BY-NC-4.0", H, 14),
    "dinov2_vit_s14": _dinov2("vit_small_patch14_dinov2", S),
    "dinov2_vit_b14": _dinov2("vit_base_patch14_dinov2", B),
    "dinov2_vit_l14": _dinov2("vit_large_patch14_dinov2", L),
    "dinov2_vit_g14": _dinov2("vit_giant_patch14_dinov2", DINOV2_G, gated=True),
    "dinov2_vit_s14_reg": _dinov2("vit_small_patch14_reg4_dinov2", S),
    "dinov2_vit_b14_reg": _dinov2("vit_base_patch14_reg4_dinov2", B),
    "dinov2_vit_l14_reg": _dinov2("vit_large_patch14_reg4_dinov2", L),
    "dinov2_vit_g14_reg": _dinov2("vit_giant_patch14_reg4_dinov2", DINOV2_G, gated=True),
    "dinov3_vit_s16": _dinov3("vit_small_patch16_dinov3_qkvb.lvd1689m", S),
    "dinov3_vit_b16": _dinov3("vit_base_patch16_dinov3_qkvb.lvd1689m", B),
    "dinov3_vit_l16": _dinov3("vit_large_patch16_dinov3_qkvb.lvd1689m", L),
    "dinov3_vit_l16_sat": _dinov3("vit_large_patch16_dinov3_qkvb.sat493m", L),
    "dinov3_vit_h16_plus": _dinov3("vit_huge_plus_patch16_dinov3_qkvb.lvd1689m", H_PLUS, swiglu=8),
    "dinov3_vit_7b16": _dinov3("vit_7b_patch16_dinov3.lvd1689m", SEVEN_B, mlp_ratio=2.0, swiglu=64),
    "dinov3_vit_7b16_sat": _dinov3("vit_7b_patch16_dinov3.sat493m", SEVEN_B, mlp_ratio=2.0, swiglu=64),
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
    layer: int | None = None,
) -> TeacherSpec | UnbuiltTeacher:
    """The teacher's source and shape, with the recipe's overrides applied, up to `layer` (None: all of it).

    Raises UserError for an unknown teacher, SettingsError with every unknown geometry key (naming the nearest) and
    every value of the wrong kind, or with all numbers that do not fit each other.
    """
    overrides = dict(overrides or {})
    image_size = _one_image_size(image_size, overrides.pop("image_size", None))
    if name == OWN:
        if layer is not None:
            raise UserError(f"teacher.layer: the tokens of teacher.name={OWN} are what its network gives; leave it out")
        return UnbuiltTeacher("own", name, image_size, overrides, licence="your own")
    if name == STUDENT_FILE:
        return _student_file(weights, image_size, overrides, layer)
    if name.startswith(TIMM_PREFIX):
        if unknown := _unknown_keys(name, overrides, sorted({*VIT_KEYS, *SWIN_KEYS})):
            raise SettingsError(unknown)
        return UnbuiltTeacher("timm", name.removeprefix(TIMM_PREFIX), image_size, overrides, layer=layer)
    if name not in TEACHERS:
        raise UserError(
            f"teacher.name: unknown teacher {name!r}{nearest(name, [*TEACHERS, STUDENT_FILE])}; allowed: "
            f"{len(TEACHERS)} names (`fdscale models` lists them), a student's name, {STUDENT_FILE}, timm:NAME, {OWN}"
        )
    spec = replace(_overridden(name, overrides), layer=layer)
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


def _student_file(
    weights: str | None, image_size: int | None, overrides: Mapping[str, Value], layer: int | None
) -> UnbuiltTeacher:
    if weights in (None, "random"):
        raise UserError(
            f"teacher.weights: got {weights!r} for teacher.name={STUDENT_FILE!r}; "
            "give the path of a student.safetensors with its student.json beside it"
        )
    if overrides or image_size is not None:
        given = ", ".join([*overrides, *(["image_size"] if image_size is not None else [])])
        raise UserError(f"teacher.geometry: {given} cannot be set: a student file carries its own geometry")
    return UnbuiltTeacher("student_file", str(weights), None, {}, licence="your own", layer=layer)


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
    if isinstance(spec.depth, tuple) and len(heads) != spec.layers:
        yield f"teacher.geometry of {name}: {spec.layers} depths but {len(heads)} num_heads"
    for stage, count in enumerate(heads):
        width = spec.embed_dim * 2**stage
        if width % count:
            yield f"teacher.geometry of {name}: {count} attention heads do not divide {width} channels"
        elif spec.blocks.rotary and width // count % 4:
            yield (
                f"teacher.geometry of {name}: {width // count} channels per head, "
                "but rotary positions need a multiple of 4"
            )
    if spec.layer is not None and not 0 <= spec.layer < spec.layers:
        what = "stages" if isinstance(spec.depth, tuple) else "blocks"
        yield f"teacher.layer: got {spec.layer}, allowed: 0 to {spec.layers - 1}; {name} has {spec.layers} {what}"
    if spec.image_size % spec.patch_size:
        yield (
            f"teacher.image_size of {name}: {spec.image_size} is not a multiple of its patch size "
            f"{spec.patch_size}; the next below is {spec.image_size // spec.patch_size * spec.patch_size}"
        )
