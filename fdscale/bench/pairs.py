"""The pairs of student and teacher whose steps are compared: a recipe, its numbers, and the same in plain timm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fdscale.bench.plain import CLIP_MEAN, CLIP_STD, Network, Step, clip, plain_step, swin_v2, vit
from fdscale.bench.planned import own_geometry_of, teacher_geometry_of
from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.recipe import load_recipe
from fdscale.config.settings import DistillSettings
from fdscale.students.geometry import SwinV2Geometry, ViTGeometry
from fdscale.teachers.spec import TeacherSpec

Config = dict[str, Any]
WAYS = ("fdscale", "plain", "compiled")
LESS = "student.skip_dropped=true"  # the branches that drop path drops are not computed


@dataclass(frozen=True)
class Pair:
    """A recipe with its teacher's weights random, and the DeepSpeed JSON that is shipped for its scale."""

    recipe: str
    deepspeed: str
    overrides: tuple[str, ...]
    ways: tuple[str, ...] = WAYS
    also: tuple[str, ...] = ()

    def settings(self, images: int, *further: str) -> DistillSettings:
        """The recipe with so many images in its one micro batch; `further` overrides come last."""
        always = ("teacher.weights=random", "teacher.placement=replicated", "data.shards=digits")
        batch = (f"data.global_batch={images}", f"deepspeed={self.deepspeed}")
        settings = load_recipe(self.recipe, [*always, *batch, *self.overrides, *further])
        assert isinstance(settings, DistillSettings)
        return settings

    def shrunk(self, *overrides: str) -> Pair:
        """The same path with tiny networks."""
        return replace(self, overrides=(*self.overrides, *overrides))


def config_of(settings: DistillSettings, micro_batch: int, bf16: bool) -> Config:
    """The DeepSpeed JSON that the settings name, for so many images a rank; without `bf16` in fp32."""
    config = load_deepspeed_json(settings.deepspeed)
    config["train_micro_batch_size_per_gpu"] = micro_batch
    return config if bf16 else {key: value for key, value in config.items() if key not in ("bf16", "data_types")}


def _swin(name: str, drop_path: float) -> tuple[str, ...]:
    window = "{window_size=14}"
    student = (f"student.name={name}", "student.image_size=224", f"student.geometry={window}")
    teacher = (f"teacher.name={name}", "teacher.image_size=224", f"teacher.geometry={window}")
    return *student, *teacher, f"student.drop_path={drop_path}"


PAIRS = {
    "vit_b16": Pair("vit_b_clip_b", "vit_b_one_gpu", (), (*WAYS, "no engine"), (LESS,)),
    # SwinV2's own drop path rate for T; the recipe's for B
    "swinv2_t": Pair(
        "swinv2_b_esvit", "swinv2_b_one_node", _swin("swinv2_t", 0.2), (*WAYS, "compiled as a rank"), (LESS,)
    ),
    "swinv2_b": Pair("swinv2_b_esvit", "swinv2_b_one_node", _swin("swinv2_b", 0.3)),
}
_VIT = ("image_size=32", "geometry={embed_dim=32,depth=2,num_heads=2}")
_SWIN = ("image_size=64", "geometry={embed_dim=8,depths=[1,1,2,1],num_heads=[1,2,2,4],window_size=4}")


def _tiny(name: str) -> Pair:
    numbers = _VIT if name.startswith("vit") else _SWIN
    return PAIRS[name].shrunk(*(f"{network}.{number}" for network in ("student", "teacher") for number in numbers))


TINY = {f"tiny_{name}": _tiny(name) for name in ("vit_b16", "swinv2_b")}


def by_hand(settings: DistillSettings, pixels: Tensor, bf16: bool, compiled: bool) -> Step:
    """The step of these settings in plain timm."""
    return plain_step(*plain_networks(settings), pixels, bf16, compiled)


def plain_networks(settings: DistillSettings) -> tuple[Network, Network]:
    """Student and teacher of these settings in plain timm, at the same sizes and drop rates."""
    student, teacher = own_geometry_of(settings.student), teacher_geometry_of(settings.teacher)
    projector = nn.Linear(student.width, teacher.width)
    taught = Network(_timm(student, settings.student.drop_path), projector=projector)
    return taught, _plain_teacher(teacher)


def _plain_teacher(geometry: Any) -> Network:
    if not isinstance(geometry, TeacherSpec):
        return Network(_timm(geometry, 0.0))
    sizes = (geometry.image_size, geometry.patch_size, geometry.embed_dim, geometry.depth, geometry.num_heads)
    assert geometry.family == "clip", "the pairs' other teachers are students' networks"
    return Network(clip(geometry.model, *sizes), CLIP_MEAN, CLIP_STD)  # type: ignore[arg-type]


def _timm(geometry: Any, drop_path: float) -> nn.Module:
    match geometry:
        case ViTGeometry(width, depth, heads, patch, size):
            return vit(size, patch, width, depth, heads, drop_path)
        case SwinV2Geometry(width, depths, heads, window, size):
            return swin_v2(size, window, width, depths, heads, drop_path)
    raise AssertionError(f"plain timm has no {geometry}")
