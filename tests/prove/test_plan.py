"""The plan beside the allocator's own events: real steps on two ranks, from before the networks are built.

What is measured comes from torch.profiler's memory events alone; what is planned from settings and a DeepSpeed JSON.
`python -m pytest -m prove tests/prove/test_plan.py -s` prints the table of docs/scaling.md.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.profiler import record_function

from fdscale.build.foreseen import forecast_of
from fdscale.build.networks import prepare_student, prepare_teacher
from fdscale.build.outline import draws_for, pixels_for, traces_of
from fdscale.build.training import optimizer_groups
from fdscale.config.recipe import load_recipe
from fdscale.config.settings import DistillSettings
from fdscale.distill.distiller import Distiller
from fdscale.students.student import Student
from fdscale.train import lessons_of, outline
from fdscale.training.allocator import live_bytes, memory_profile
from fdscale.training.engine import Connection, compute_dtype, start_engine
from fdscale.training.optim import adamw
from fdscale.training.sharding import place

pytestmark = pytest.mark.prove

MIB = 2**20
STEPS = 3
RANKS = 2
SMALL = {
    "contiguous_gradients": True,
    "reduce_bucket_size": 2_000_000,
    "allgather_bucket_size": 2_000_000,
    "sub_group_size": 10_000_000,
    "stage3_prefetch_bucket_size": 1_000_000,
    "stage3_max_live_parameters": 10_000_000,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 10_000,
}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
TEACHER = ["teacher.weights=random", "teacher.image_size=112", "teacher.geometry.depth=2"]
SMALL_TEACHER = [*TEACHER, "teacher.geometry.embed_dim=256", "teacher.geometry.num_heads=4"]
VIT_S = ["student.name=vit_s16", "student.image_size=112", *SMALL_TEACHER]
VIT_B = ["student.name=vit_b16", "student.image_size=112", *TEACHER]
SWIN_128 = ["student.image_size=128", "student.geometry.window_size=8", *SMALL_TEACHER]  # 8x8 tokens pool to 4x4
SWIN = [
    "student.geometry.embed_dim=96",
    "student.geometry.depths=[2,2,6,2]",
    "student.geometry.num_heads=[3,6,12,24]",
    "student.geometry.extra_norm_period=0",
    *SWIN_128,
]
GIANT = ["student.geometry.depths=[1,1,6,1]", *SWIN_128]


@dataclasses.dataclass(frozen=True)
class Case:
    recipe: str
    overrides: tuple[str, ...]
    stage: int
    micro_batch: int
    accumulation: int = 1
    more: tuple[tuple[str, Any], ...] = ()
    zero: tuple[tuple[str, Any], ...] = ()

    @property
    def deepspeed_json(self) -> dict[str, Any]:
        keys = SMALL if self.stage == 3 else {key: SMALL[key] for key in list(SMALL)[:3]}
        zero = {"stage": self.stage, **keys, **dict(self.zero)}
        return {"train_micro_batch_size_per_gpu": self.micro_batch, "zero_optimization": zero, **dict(self.more)}


def case(
    recipe: str, *overrides: str, stage: int = 3, micro_batch: int = 4, accumulation: int = 1, **more: Any
) -> Case:
    zero = more.pop("zero", {})
    return Case(recipe, overrides, stage, micro_batch, accumulation, tuple(more.items()), tuple(zero.items()))


BLOCKS, NONE = "student.activation_checkpointing=blocks", "student.activation_checkpointing=none"
CASES = {
    "ViT-S, ZeRO-1, fp32": case("vit_b_clip_b", *VIT_S, stage=1, micro_batch=16),
    "ViT-S, ZeRO-2, bf16, accumulation 2": case("vit_b_clip_b", *VIT_S, stage=2, accumulation=2, **BF16),
    "ViT-S, ZeRO-3, fp32, micro batch 32": case("vit_b_clip_b", *VIT_S, micro_batch=32),
    "ViT-B, ZeRO-1, bf16": case("vit_b_clip_b", *VIT_B, stage=1, micro_batch=2, **BF16),
    "ViT-B, ZeRO-3, fp32, all weights live": case(
        "vit_b_clip_b", *VIT_B, zero={"stage3_max_reuse_distance": 10**9, "stage3_max_live_parameters": 10**9}
    ),
    "ViT-S, ZeRO-3, bf16, checkpointing": case("vit_b_clip_b", *VIT_S, BLOCKS, micro_batch=8, **BF16),
    "ViT-S, ZeRO-3, teacher by zero3": case("vit_b_clip_b", *VIT_S, "teacher.placement=zero3", micro_batch=8),
    "SwinV2-T, ZeRO-2, fp32": case("swinv2_g", *SWIN, NONE, stage=2, micro_batch=8),
    "SwinV2-T, ZeRO-3, fp32, checkpointing": case("swinv2_g", *SWIN, BLOCKS, micro_batch=16),
    "SwinV2-G, depths (1,1,6,1), ZeRO-3, fp32": case("swinv2_g", *GIANT, BLOCKS, micro_batch=1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.timeout(1200)
def test_the_plan_is_within_a_tenth_of_the_allocators_events(name: str, two_ranks: Any, tmp_path: Path) -> None:
    chosen = CASES[name]
    measured = max(two_ranks(steps_of, dataclasses.asdict(chosen), timeout=1000))
    planned = planned_peak(chosen)
    print(f"\n| {name} | {planned / MIB:,.0f} | {measured / MIB:,.0f} | {measured / planned - 1:+.1%} |")
    assert measured == pytest.approx(planned, rel=0.1)
    two_ranks.stop()  # nothing of this case may be freed within the next one


def settings_of(chosen: Case) -> DistillSettings:
    global_batch = chosen.micro_batch * RANKS * chosen.accumulation
    settings = load_recipe(chosen.recipe, [*chosen.overrides, f"data.global_batch={global_batch}"])
    assert isinstance(settings, DistillSettings)
    return settings


def placement_of(settings: DistillSettings) -> Literal["replicated", "zero3"]:
    return "zero3" if settings.teacher.placement == "zero3" else "replicated"


def planned_peak(chosen: Case) -> int:
    settings, config = settings_of(chosen), chosen.deepspeed_json
    traces = traces_of(outline(settings), settings, config, chosen.micro_batch, cuda=False)
    foreseen = forecast_of(traces, settings, config, {"teacher": placement_of(settings)}, RANKS)
    return foreseen.peak - foreseen.images  # the loader's, which is not part of this


def steps_of(connection: Connection, plain: dict[str, Any]) -> int:
    """The most bytes live during real distillation steps, networks built inside the profile."""
    torch.set_num_threads(1)
    chosen = Case(**plain)
    settings, config = settings_of(chosen), chosen.deepspeed_json
    with memory_profile() as profiler:
        table = settings.teacher
        teacher = prepare_teacher(table, "random", compute_dtype(config))
        teacher = place(teacher, placement_of(settings), config, connection)
        student = prepare_student(settings.student, settings.seed)
        lessons = lessons_of(settings, student, {"teacher": teacher})
        distiller = Distiller(student, student.width, lessons, settings.loss.beta)
        optimizer = adamw(optimizer_groups(distiller, student, settings.optim), 1e-4, (0.9, 0.999), 1e-8)
        engine = start_engine(distiller, optimizer, config, chosen.accumulation, 3.0)
        del distiller, optimizer
        for _ in range(STEPS):
            with record_function("step"):
                engine.train()
                for _ in range(chosen.accumulation):
                    loss = one_forward(engine, student, teacher, lessons[0].targets, chosen.micro_batch)
                    engine.backward(loss)
                    engine.step()
    return highest_in_steps(profiler)


def one_forward(engine: Any, student: Student, teacher: Any, targets: Any, micro_batch: int) -> torch.Tensor:
    pixels = torch.rand_like(pixels_for(student.image_size, micro_batch))
    draws = draws_for(student, micro_batch)
    return engine(pixels, [targets(teacher(pixels))], None if draws is None else torch.rand_like(draws))["loss"]


def highest_in_steps(profiler: Any) -> int:
    steps = [event for event in profiler.profiler.kineto_results.events() if event.name() == "step"]
    begins = min(event.start_ns() for event in steps)
    return max(live for time, live in live_bytes(profiler) if time >= begins)
