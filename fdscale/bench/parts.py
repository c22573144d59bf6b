"""The parts of the GPU benchmark, at full size and tiny: recipes, teachers, and what they are overridden by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.recipe import load_recipe
from fdscale.config.settings import DistillSettings, TeacherSettings

CONFIG = "swinv2_g"  # the DeepSpeed JSON of every part: bf16 under ZeRO-3
KEPT = "student.activation_checkpointing=none"
Row = dict[str, Any]  # figures by name
Overrides = tuple[str, ...]


@dataclass(frozen=True)
class Ceiling:
    """Square matrix products in bf16: what the device gives when nothing else is asked of it."""

    sides: tuple[int, ...]


@dataclass(frozen=True)
class TrainingStep:
    """A distillation step of a recipe in bf16 under ZeRO-3 on one rank, the blocks recomputed.

    `plain`: the same in timm alone, by autocast and torch.compile, nothing recomputed.
    """

    recipe: str
    overrides: Overrides
    micro_batch: int
    plain: bool = False

    def settings(self, micro_batch: int) -> DistillSettings:
        """The recipe with so many images a step, and a teacher whose weights are random."""
        always = ("teacher.weights=random", "teacher.placement=replicated", "student.activation_checkpointing=blocks")
        batch = (f"data.global_batch={micro_batch}", "data.shards=digits", f"deepspeed={CONFIG}")
        settings = load_recipe(self.recipe, [*always, *batch, *self.overrides])
        assert isinstance(settings, DistillSettings)
        return settings


@dataclass(frozen=True)
class Forward:
    """A frozen teacher's forward where `placement` puts its weights."""

    teacher: TeacherSettings
    placement: Literal["replicated", "zero3", "fairscale"]
    rows: int


Part = Ceiling | TrainingStep | Forward


def _parts(vit: Overrides, swin: Overrides, clip: dict[str, Any], sides: tuple[int, ...]) -> dict[str, Part]:
    """The same parts at any size: what the recipes' networks are overridden by says which."""
    clip_l = TeacherSettings(name="clip_vit_l14", weights="random", **clip)
    placements: tuple[Literal["replicated", "zero3", "fairscale"], ...] = ("replicated", "zero3", "fairscale")
    return {
        "matmul": Ceiling(sides),
        "step vit_l14": TrainingStep("vit_l_clip_l", vit, 128),
        "step vit_l14, kept": TrainingStep("vit_l_clip_l", (*vit, KEPT), 128),
        "step vit_l14, timm": TrainingStep("vit_l_clip_l", (*vit, KEPT), 128, plain=True),
        "step swinv2_g": TrainingStep("swinv2_g_self", swin, 32),
        **{f"teacher {placement}": Forward(clip_l, placement, 64) for placement in placements},
    }


def _both(*overrides: str) -> Overrides:
    return tuple(f"{network}.{override}" for network in ("student", "teacher") for override in overrides)


_SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
_TINY_VIT = _both("image_size=28", "geometry={embed_dim=32,depth=2,num_heads=2}")
_TINY_SWIN = _both("image_size=64", "geometry={embed_dim=8,depths=[1,1,2,1],num_heads=[1,2,2,4],window_size=2}")
FULL = _parts((), (), {}, (4096, 8192, 16384))
TINY = _parts(_TINY_VIT, _TINY_SWIN, {"image_size": 28, "geometry": _SMALL}, (128, 256))


def config_of(micro_batch: int) -> dict[str, Any]:
    """The DeepSpeed JSON of every part, for so many images."""
    return load_deepspeed_json(CONFIG) | {"train_micro_batch_size_per_gpu": micro_batch}
