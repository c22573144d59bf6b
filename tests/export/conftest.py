"""Completed runs of tiny students and classifiers, every weight perturbed so that no block is the identity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fdscale.downstream.classifier import Classifier, save_classifier
from fdscale.students.files import save_student
from fdscale.students.geometry import Geometry
from fdscale.students.student import Student, build_student

RECIPE = """\
program = "distill"
epochs = 300.0
seed = 3
[student]
name = "vit_s16"
[teacher]
name = "clip_vit_b16"
weights = "/secret/place/ViT-B-16.pt"
[data]
global_batch = 2048
interpolation = "bicubic"
"""


FINETUNED = """\
program = "finetune"
epochs = 100.0
classes = 10
[student]
name = "vit_s16"
[data]
global_batch = 1024
interpolation = "bicubic"
"""


def perturb(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="session")
def completed_run() -> Callable[[Geometry, Path], Student]:
    """`completed_run(geometry, folder)` writes a finished run directory and returns its student."""

    def write(geometry: Geometry, folder: Path) -> Student:
        student = build_student(geometry, seed=1).eval()
        perturb(student)
        save_student(student, student.backbone.state_dict(), folder)
        (folder / "recipe.toml").write_text(RECIPE)
        (folder / "complete.json").write_text(json.dumps({"step": 100}))
        return student

    return write


@pytest.fixture(scope="session")
def completed_finetuning() -> Callable[[Geometry, Path, str], Classifier]:
    """`completed_finetuning(geometry, folder, norm)`: likewise of a classifier of 10 classes, with its student."""

    def write(geometry: Geometry, folder: Path, norm: str) -> Classifier:
        folder.mkdir(parents=True)
        classifier = Classifier(build_student(geometry, seed=1), 10, 0.1, norm, 1.0).eval()
        perturb(classifier)
        save_classifier(classifier.student, classifier.state_dict(), folder)
        (folder / "recipe.toml").write_text(FINETUNED)
        (folder / "complete.json").write_text(json.dumps({"step": 100}))
        return classifier

    return write
