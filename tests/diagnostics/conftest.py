"""Digits in shards, and student files of networks that are not at their start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fdscale.data.packing.digits import pack_digits
from fdscale.students.files import save_student, write_weights
from fdscale.students.student import Student
from tests.diagnostics.networks import subject_of


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The labelled digits that are held out, in shards."""
    folder = tmp_path_factory.mktemp("shards") / "digits"
    pack_digits(folder, "test")
    return folder


@pytest.fixture(scope="session")
def saved() -> Callable[..., Student]:
    """Leaves a family's tiny student in a folder, as a run does, with a classifier where `classes` are wanted."""

    def save(folder: Path, family: str = "beit", classes: int = 0, seed: int = 2) -> Student:
        student = subject_of(family, seed).network
        assert isinstance(student, Student)
        save_student(student, student.backbone.state_dict(), folder)
        if classes:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                head = nn.Linear(student.width, classes)
            held = {f"head.{name}": value.detach() for name, value in head.state_dict().items()}
            write_weights(held, folder / "classifier.safetensors")
        return student

    return save
