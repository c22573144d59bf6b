"""Parity with the official implementation: tokens, targets, loss, gradients and eight updates, plain and sharded.

The recorded `x` is already normalised, so it enters as pixels `x * std + mean`, below the door for uint8 images.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdscale.data.batches import Batch
from fdscale.distill.distiller import Distiller, Lesson
from fdscale.distill.layout import TokenLayout
from fdscale.distill.targets import TargetMaker
from fdscale.students.geometry import SwinV2Geometry, ViTGeometry
from fdscale.students.student import Student, build_student
from fdscale.teachers.table import teacher_geometry
from fdscale.teachers.teacher import Teacher, build_teacher
from fdscale.training.engine import Connection, start_engine
from fdscale.training.loop import train_step
from fdscale.training.optim import adamw, parameter_groups

GOLDEN = Path(__file__).parent.parent / "golden"
VIT = ViTGeometry(64, 3, 4, patch_size=8, image_size=32)
SWIN = SwinV2Geometry(16, (1, 2), (2, 4), window_size=4, image_size=64)
PAIRS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "vit_from_clip": (VIT, "clip_vit_b16", {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 8}),
    "vit_from_dino": (VIT, "dino_vit_b16", {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}),
    "swinv2_from_esvit": (
        SWIN,
        "esvit_swin_b",
        {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4},
    ),
}
BUFFERS = ("relative_coords_table", "relative_position_index", "attn_mask")
ZERO_3 = {
    "train_micro_batch_size_per_gpu": 2,
    # tiny networks would stay resident and hide what sharding breaks
    "zero_optimization": {
        "stage": 3,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
    },
}


def part(recorded: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in recorded.items() if key.startswith(prefix)}


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official student keys as the student has them."""
    kept = {key: value for key, value in state.items() if not key.endswith(BUFFERS)}
    renamed = {key.replace("rpe_mlp", "cpb_mlp"): value for key, value in kept.items()}
    merging = re.compile(r"^layers\.(\d+)\.downsample")
    return {merging.sub(lambda m: f"layers.{int(m[1]) + 1}.downsample", k): v for k, v in renamed.items()}


def golden_teacher(name: str, recorded: dict[str, Tensor], folder: Path) -> Teacher:
    geometry, teacher, overrides = PAIRS[name]
    path = folder / f"{name}.teacher.safetensors"
    save_file({key: value.contiguous() for key, value in part(recorded, "teacher.").items()}, path)
    return build_teacher(teacher_geometry(teacher, str(path), geometry.image_size, overrides), str(path))


def golden_pair(name: str, folder: Path) -> tuple[Distiller, Student, Teacher, dict[str, Tensor]]:
    recorded = load_file(GOLDEN / f"{name}.safetensors")
    teacher = golden_teacher(name, recorded, folder)
    student = build_student(PAIRS[name][0])
    student.backbone.load_state_dict(timm_names(part(recorded, "student.")))
    targets = TargetMaker(
        TokenLayout(teacher.grid, teacher.prefix_tokens), TokenLayout(student.grid, student.prefix_tokens)
    )
    distiller = Distiller(student, student.width, [Lesson("teacher", teacher.width, targets)], beta=2.0)
    projector = part(recorded, "projector.")
    distiller.projectors[0].load_state_dict({"weight": projector["weight"].squeeze(-1), "bias": projector["bias"]})
    return distiller, student, teacher, recorded


def pixels_of(student: Student, recorded: dict[str, Tensor]) -> Tensor:
    return recorded["x"] * student.std + student.mean


def optimizer_of(distiller: Distiller, student: Student) -> torch.optim.AdamW:
    undecayed = {f"student.backbone.{name}" for name in student.undecayed_parameters()}
    return adamw(parameter_groups(distiller, 0.05, undecayed), 1e-3, (0.9, 0.999), 1e-8)


def recorded_gradient(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    student = {f"student.backbone.{k}": v for k, v in timm_names(part(recorded, "grad.student.")).items()}
    projector = {f"projectors.0.{key}": value for key, value in part(recorded, "grad.projector.").items()}
    return student | {key: value.reshape(value.shape[:2]) for key, value in projector.items()}


def worst_gradient(found: dict[str, Tensor], recorded: dict[str, Tensor]) -> float:
    wanted = recorded_gradient(recorded)
    assert found.keys() == wanted.keys()
    return max(float((found[key] - wanted[key]).norm() / wanted[key].norm()) for key in wanted)


def largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max())


@pytest.mark.parametrize("name", PAIRS)
def test_plain_pytorch_equals_the_recorded_numbers(name: str, tmp_path: Path) -> None:
    distiller, student, teacher, recorded = golden_pair(name, tmp_path)
    pixels = pixels_of(student, recorded)
    target = distiller.lessons[0].targets(teacher(pixels))
    assert largest(student(pixels) - recorded["student_tokens"]) <= 1e-5
    assert largest(target - recorded["target"]) <= 1e-5

    terms = distiller(pixels, [target])
    assert abs(float(terms["loss"]) - float(recorded["loss"])) <= 1e-6
    terms["loss"].backward()
    found = {key: p.grad for key, p in distiller.named_parameters() if p.grad is not None}
    assert worst_gradient(found, recorded) <= 1e-4


@pytest.mark.parametrize("name", PAIRS)
def test_plain_pytorch_follows_the_recorded_trajectory(name: str, tmp_path: Path) -> None:
    distiller, student, teacher, recorded = golden_pair(name, tmp_path)
    pixels = pixels_of(student, recorded)
    optimizer, losses, norms = optimizer_of(distiller, student), [], []
    for _ in range(8):
        optimizer.zero_grad()
        loss = distiller(pixels, [distiller.lessons[0].targets(teacher(pixels))])["loss"]
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(distiller.parameters(), 3.0)))
        losses.append(float(loss.detach()))
        optimizer.step()
    assert largest(torch.tensor(losses) - recorded["trajectory.loss"]) <= 1e-5
    assert largest(torch.tensor(norms) - recorded["trajectory.grad_norm"]) <= 1e-5


def golden_on_a_rank(connection: Connection, name: str, folder: str) -> dict[str, Any]:
    """Two of the four images on each of two ranks, through the product's own step; ZeRO-3."""
    from deepspeed.utils import safe_get_full_grad

    mine = Path(folder) / str(connection.rank.rank)
    mine.mkdir(exist_ok=True)
    distiller, student, teacher, recorded = golden_pair(name, mine)
    engine = start_engine(distiller, optimizer_of(distiller, student), ZERO_3, accumulation_steps=1, clip=3.0)
    rows = slice(2 * connection.rank.rank, 2 * connection.rank.rank + 2)
    pixels = pixels_of(student, recorded)[rows]
    unused = torch.zeros(2)
    batch = Batch(unused, unused, unused, rows, [])

    def terms(engine: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        return engine(pixels, [distiller.lessons[0].targets(teacher(pixels))])

    engine.train()
    engine.backward(terms(engine, batch, 0)["loss"])
    gradient = {key: safe_get_full_grad(p).clone() for key, p in distiller.named_parameters()}
    engine.optimizer.zero_grad()
    engine.destroy()

    distiller, student, teacher, recorded = golden_pair(name, mine)
    engine = start_engine(distiller, optimizer_of(distiller, student), ZERO_3, accumulation_steps=1, clip=3.0)
    losses, norms = [], []
    for step in range(8):
        loss = train_step(engine, terms, [batch], step)["loss"]
        torch.distributed.all_reduce(loss)
        losses.append(float(loss) / 2)
        norms.append(float(engine.get_global_grad_norm()))
    engine.destroy()
    return {"gradient": worst_gradient(gradient, recorded), "losses": losses, "norms": norms}


@pytest.mark.parametrize("name", PAIRS)
def test_zero_3_on_two_ranks_equals_the_recorded_numbers(name: str, tmp_path: Path, two_ranks: Any) -> None:
    recorded = load_file(GOLDEN / f"{name}.safetensors")
    for found in two_ranks(golden_on_a_rank, name, str(tmp_path)):
        assert found["gradient"] <= 1e-4
        assert abs(found["losses"][0] - float(recorded["loss"])) <= 1e-6
        assert largest(torch.tensor(found["losses"]) - recorded["trajectory.loss"]) <= 1e-5
        assert largest(torch.tensor(found["norms"]) - recorded["trajectory.grad_norm"]) <= 1e-5
