"""Digits in shards, and students that are not at their start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fdscale.students.geometry import SwinV2Geometry, ViTGeometry
from fdscale.students.student import Student, build_student


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The labelled digits that are held out, in shards."""
    from fdscale.data.packing.digits import pack_digits

    folder = tmp_path_factory.mktemp("shards") / "digits"
    pack_digits(folder, "test")
    return folder


@pytest.fixture(scope="session")
def perturbed() -> Callable[[ViTGeometry | SwinV2Geometry], Student]:
    """A student of a geometry; at its start every SwinV2 block is almost the identity."""

    def make(geometry: ViTGeometry | SwinV2Geometry) -> Student:
        student = build_student(geometry, seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        return student

    return make
