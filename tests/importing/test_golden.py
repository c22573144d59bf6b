"""Checkpoints of the official implementation, made of the golden weights, give the recorded tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fdscale.importing.importer import ImportReport, import_checkpoint
from fdscale.students.files import load_weights
from fdscale.students.geometry import SwinV2Geometry, ViTGeometry, file_geometry
from fdscale.students.student import Student, build_student

Checkpoint = Callable[..., Path]
GEOMETRIES = {
    "vit_from_clip": ViTGeometry(64, 3, 4, patch_size=8, image_size=32),
    "vit_from_dino": ViTGeometry(64, 3, 4, patch_size=8, image_size=32),
    "swinv2_from_esvit": SwinV2Geometry(16, (1, 2), (2, 4), window_size=4, image_size=64),
}


def official(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the whole FD module: student with buffers, projector, frozen teacher."""
    names = {"student.": "encoder.", "projector.": "decoder.0.", "teacher.": "feature_model."}
    return {
        new + key.removeprefix(old): value
        for key, value in recorded.items()
        for old, new in names.items()
        if key.startswith(old)
    }


def imported(file: Path, tmp_path: Path) -> tuple[Student, ImportReport]:
    report = import_checkpoint(file, tmp_path / "student")
    student = build_student(file_geometry(report.weights)).eval()
    load_weights(student, report.weights)
    return student, report


@pytest.mark.parametrize("name", GEOMETRIES)
@torch.no_grad()
def test_the_recorded_tokens_come_back(name: str, layouts: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    recorded = load_file(layouts.golden / f"{name}.safetensors")
    student, report = imported(checkpoint(official(recorded)), tmp_path)
    assert (report.geometry, report.family) == (
        GEOMETRIES[name],
        f"feature distillation {'ViT' if name.startswith('vit') else 'SwinV2'}",
    )
    tokens = student.backbone(recorded["x"]).flatten(1, -2)
    # fused attention sums in another order than the official one, and each kind of processor in one of its own
    assert float((tokens - recorded["student_tokens"]).abs().max()) <= 2e-6


def test_everything_but_the_student_is_left_behind_and_counted(
    layouts: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    recorded = load_file(layouts.golden / "vit_from_clip.safetensors")
    file = checkpoint(official(recorded))
    report = import_checkpoint(file, tmp_path / "student")
    assert (report.tensors, report.notes) == (51, ())
    assert report.left_behind == {
        "optimizer": 2, "epoch": 1, "config": 1, "decoder": 2, "teacher": 32, "buffer": 1,
    }  # fmt: skip
    described = json.loads((tmp_path / "student" / "student.json").read_text())
    assert described["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert described["source"]["file"] == "checkpoint.pth"
    assert len(described["source"]["sha256"]) == 64
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == ["student.json", "student.safetensors"]
