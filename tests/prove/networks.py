"""What is measured: students at real widths and at real depths, each in a ZeRO-3 engine of the product."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.distill.distiller import Distiller, Lesson
from fdscale.distill.layout import TokenLayout
from fdscale.distill.targets import TargetMaker
from fdscale.students.geometry import STUDENTS, SwinV2Geometry, ViTGeometry
from fdscale.students.student import Student, build_student, set_activation_checkpointing
from fdscale.training.engine import start_engine
from fdscale.training.optim import adamw, parameter_groups

TARGET_WIDTH = 64
GEOMETRIES: dict[str, SwinV2Geometry | ViTGeometry] = {
    "swinv2_t": dataclasses.replace(STUDENTS["swinv2_t"], image_size=64),
    "vit_b16": dataclasses.replace(STUDENTS["vit_b16"], image_size=64),
    # every block of SwinV2-G at a thirty-second of its width
    "swinv2_g depths": dataclasses.replace(
        STUDENTS["swinv2_g"], embed_dim=16, num_heads=(1, 2, 4, 8), window_size=2, image_size=64
    ),
}
PERSISTENT = 100_000  # the threshold of every JSON before anything was measured; DeepSpeed's own default


def shipped_zero(name: str, parameters: int = 0, of: int = 0) -> dict[str, Any]:
    """The `zero_optimization` of a shipped JSON, its sizes in proportion where a smaller network stands for one."""
    zero = copy.deepcopy(load_deepspeed_json(name)["zero_optimization"])
    if of:
        sizes = [key for key, value in zero.items() if key != "stage" and type(value) is int and "hpz" not in key]
        zero |= {key: round(zero[key] * parameters / of) for key in sizes}
    return zero


def untuned(zero: dict[str, Any], **sizes: int) -> dict[str, Any]:
    """The same without leaf modules, and with small tensors whole on every rank."""
    without = {key: value for key, value in zero.items() if key != "leaf_module"}
    return without | {"stage3_param_persistence_threshold": PERSISTENT} | sizes


def distiller_of(name: str, checkpointing: str = "none", seed: int = 1) -> tuple[Distiller, Student]:
    """The trained module of a geometry above, in fp32."""
    student = build_student(GEOMETRIES[name], 0.0, seed=seed)
    set_activation_checkpointing(student, checkpointing)
    layout = TokenLayout(student.grid, student.prefix_tokens)
    torch.manual_seed(3)
    return Distiller(
        student, student.width, [Lesson("teacher", TARGET_WIDTH, TargetMaker(layout, layout))], beta=2.0
    ), student


def engine_of(distiller: Distiller, zero: dict[str, Any], micro_batch: int = 1) -> Any:
    """The product's engine with the product's optimizer."""
    optimizer = adamw(parameter_groups(distiller, 0.05, set()), 1e-3, (0.9, 0.999), 1e-8)
    config = {"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": zero}
    return start_engine(distiller, optimizer, config, 1, clip=3.0)


def one_step(engine: Any, pixels: Tensor, target: Tensor) -> Tensor:
    """Forward, backward and update, as the loop does them; the loss."""
    loss = engine(pixels, [target])["loss"]
    engine.backward(loss)
    engine.step()
    return loss.detach()


def some_batch(student: Student, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pixels and targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens = student.grid[0] * student.grid[1] + student.prefix_tokens
    pixels = torch.rand(rows, 3, student.image_size, student.image_size, generator=generator)
    return pixels, torch.randn(rows, tokens, TARGET_WIDTH, generator=generator)


def parameter_sizes(distiller: Distiller) -> list[int]:
    """Elements of each trained tensor, partitioned or not."""
    return [getattr(p, "ds_numel", p.numel()) for p in distiller.parameters() if p.requires_grad]
