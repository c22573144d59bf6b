"""The parts of the GPU benchmark: what each runs and measures, on the product's own networks, engine and placements."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fdscale.build.networks import prepare_student, prepare_teacher
from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.settings import StudentSettings, TeacherSettings
from fdscale.distill.distiller import Distiller, Lesson
from fdscale.distill.layout import TokenLayout
from fdscale.distill.targets import TargetMaker
from fdscale.planning.memory import memory_per_rank
from fdscale.students.geometry import STUDENTS, SwinV2Geometry, ViTGeometry, student_geometry
from fdscale.teachers.table import teacher_geometry
from fdscale.training.engine import Connection, compute_dtype, start_engine
from fdscale.training.optim import adamw, parameter_groups
from fdscale.training.sharding import place

WARM_UP, REPEATS = 3, 7  # DeepSpeed records the order of modules in its first steps
Row = dict[str, Any]


@dataclass(frozen=True)
class Ceiling:
    """Square matrix products in bf16: what the device gives when nothing else is asked of it."""

    sides: tuple[int, ...]


@dataclass(frozen=True)
class TrainingStep:
    """A distillation step in bf16 under ZeRO-3, the blocks recomputed; `bytes_per_image` guesses the activations."""

    student: StudentSettings
    teacher: TeacherSettings
    micro_batch: int
    bytes_per_image: int


@dataclass(frozen=True)
class Forward:
    """A frozen teacher's forward where `placement` puts its weights."""

    teacher: TeacherSettings
    placement: Literal["replicated", "zero3", "fairscale"]
    rows: int


Part = Ceiling | TrainingStep | Forward


def _steps(vit: dict[str, Any], clip: dict[str, Any], swin: dict[str, Any]) -> dict[str, Part]:
    """The same parts at any size: the geometries' changes say which."""
    giant = {"name": "swinv2_g", **swin}
    clip_l = TeacherSettings(name="clip_vit_l14", weights="random", **clip)
    placements: tuple[Literal["replicated", "zero3", "fairscale"], ...] = ("replicated", "zero3", "fairscale")
    vit_l = StudentSettings(name="vit_l14", activation_checkpointing="blocks", **vit)
    swin_g = StudentSettings(activation_checkpointing="blocks", **giant)
    return {
        "step vit_l14": TrainingStep(vit_l, clip_l, 128, 2**27),
        "step swinv2_g": TrainingStep(swin_g, TeacherSettings(weights="random", **giant), 32, 2**30),
        **{f"teacher {placement}": Forward(clip_l, placement, 64) for placement in placements},
    }


_TINY_VIT = {"image_size": 28, "geometry": {"embed_dim": 32, "depth": 2, "num_heads": 2}}
_TINY_SWIN = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 2}
FULL: dict[str, Part] = {"matmul": Ceiling((4096, 8192, 16384)), **_steps({}, {}, {"image_size": 256})}
TINY: dict[str, Part] = {
    "matmul": Ceiling((128, 256)),
    **_steps(_TINY_VIT, _TINY_VIT, {"image_size": 64, "geometry": _TINY_SWIN}),
}


def ceiling(part: Ceiling, device: torch.device) -> Row:
    """TFLOP/s of the best of some square bf16 products, each the median of timings of ten products."""
    by_side = {}
    for side in part.sides:
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        seconds = median_seconds(lambda a=a, b=b, out=out: [torch.mm(a, b, out=out) for _ in range(10)], device)  # type: ignore[misc]
        by_side[str(side)] = 10 * 2 * side**3 / seconds / 1e12
    return {"tflops": max(by_side.values()), "tflops_by_side": by_side}


def median_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median wall-clock of some runs after a warm-up, with nothing of the device's work outstanding around each."""
    times = []
    for _ in range(WARM_UP):
        run()
    for _ in range(REPEATS):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def planned(part: TrainingStep, config: Mapping[str, Any]) -> Row:
    """Parameters, floating point operations and planned bytes of a step's pair, from their geometries alone."""
    student = student_geometry(part.student.name, part.student.image_size, part.student.geometry)
    assert isinstance(student, ViTGeometry | SwinV2Geometry), "the benchmark's students are of the table"
    teacher = _teacher_geometry(part.teacher)
    trained, frozen = student.parameters(), teacher.parameters()
    needed = memory_per_rank(trained, frozen, 1, config)
    return {
        "student_parameters": trained,
        "teacher_parameters": frozen,
        # a backward pass is two forwards; what checkpointing recomputes is no useful work and not counted here
        "flops_per_image": 3 * student.flops() + teacher.flops(),
        "flops_per_image_with_recomputing": 4 * student.flops() + teacher.flops(),
        "planned_state_bytes": needed.resident,
        "planned": str(needed),
    }


def _teacher_geometry(settings: TeacherSettings) -> Any:
    if settings.name in STUDENTS:
        return student_geometry(settings.name, settings.image_size, settings.geometry)
    return teacher_geometry(settings.name, "random", settings.image_size, settings.geometry)


def first_micro_batch(part: TrainingStep, states: int, device_bytes: int) -> int:
    """The largest power of two up to the part's that leaves room for states, a tenth, and guessed activations."""
    free = 0.9 * device_bytes - states
    micro_batch = part.micro_batch
    while micro_batch > 1 and micro_batch * part.bytes_per_image > free:
        micro_batch //= 2
    return micro_batch


def training_step(part: TrainingStep, micro_batch: int | None, connection: Connection) -> Row:
    """Images/s and memory of a distillation step; `{"out_of_memory": micro batch}` where it does not fit."""
    device = connection.device
    config = load_deepspeed_json("swinv2_g")
    plan = planned(part, config)
    if micro_batch is None:
        total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        micro_batch = first_micro_batch(part, plan["planned_state_bytes"], total) if total else 2
    config["train_micro_batch_size_per_gpu"] = micro_batch
    try:
        return {"micro_batch": micro_batch, **plan, **_measured_step(part, config, connection)}
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": micro_batch, "told": str(error).splitlines()[0]}


def _measured_step(part: TrainingStep, config: dict[str, Any], connection: Connection) -> Row:
    device, rows = connection.device, config["train_micro_batch_size_per_gpu"]
    teacher = prepare_teacher(part.teacher, "random", compute_dtype(config)).to(device)
    student = prepare_student(part.student, seed=0)
    targets = TargetMaker(
        TokenLayout(teacher.grid, teacher.prefix_tokens), TokenLayout(student.grid, student.prefix_tokens)
    )
    distiller = Distiller(student, student.width, [Lesson("teacher", teacher.width, targets)], beta=2.0).to(device)
    optimizer = adamw(parameter_groups(distiller, 0.05, set()), 1e-4, (0.9, 0.999), 1e-8)
    engine = start_engine(distiller, optimizer, config, 1, clip=3.0)
    pixels = torch.rand(rows, 3, student.image_size, student.image_size, device=device)
    losses: list[Tensor] = []

    def step() -> None:
        loss = engine(pixels, [targets(teacher(pixels))])["loss"]
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())

    step()  # what building needed at its peak is not what a step needs
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median_seconds(step, device)
    first, last = float(losses[0]), float(losses[-1])
    return {
        "step_seconds": seconds,
        "images_per_second": rows / seconds,
        "first_loss": first,
        "last_loss": last,
        **_memory(device),
    }


def _memory(device: torch.device) -> Row:
    """Bytes between steps and at the peak of one, as torch's CUDA allocator counts them; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "held_bytes": torch.cuda.memory_allocated(device),
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def forward(part: Forward, connection: Connection) -> Row:
    """Time and memory of a placed teacher's forward, and a hash of its tokens: every placement gives the same."""
    device, config = connection.device, load_deepspeed_json("swinv2_g")
    config["train_micro_batch_size_per_gpu"] = part.rows
    teacher = prepare_teacher(part.teacher, "random", torch.bfloat16)
    weights = sum(p.numel() * p.element_size() for p in teacher.parameters())
    pixels = torch.rand(
        part.rows, 3, teacher.image_size, teacher.image_size, generator=torch.Generator().manual_seed(0)
    )
    pixels = pixels.to(device)
    teacher = place(teacher, part.placement, config, connection)
    tokens = teacher(pixels)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median_seconds(lambda: teacher(pixels), device)
    return {
        "images_per_second": part.rows / seconds,
        "forward_seconds": seconds,
        "weight_bytes": weights,
        "tokens_sha256": hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest(),
        **_memory(device),
    }
