"""Heads: a run's classifier from the two files that it left, to the bit; and one fitted to features."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.diagnostics.features import watching_tokens
from fdscale.diagnostics.heads import fitted_head, run_head
from fdscale.diagnostics.subjects import Subject
from fdscale.downstream.classifier import Classifier, save_classifier
from fdscale.students.files import load_weights, save_student, write_weights
from fdscale.students.geometry import TimmGeometry, file_geometry
from fdscale.students.student import Student, build_student
from fdscale.training.linear import Features, best_linear
from tests.diagnostics.networks import GEOMETRIES, pixels, subject_of

CLASSES = 5


def left_by_a_run(family: str, norm: Literal["student", "after_pooling"], folder: Path) -> Classifier:
    """A classifier, every parameter perturbed, and its two files in the folder."""
    classifier = Classifier(build_student(GEOMETRIES[family]), CLASSES, 0.0, norm, init_scale=10).eval()
    drawn = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=drawn) * 0.1)
    save_classifier(classifier.student, classifier.state_dict(), folder)
    return classifier


def student_in(folder: Path) -> Student:
    student = build_student(file_geometry(folder / "student.safetensors")).eval().requires_grad_(False)
    load_weights(student, folder / "student.safetensors")
    return student


@pytest.mark.parametrize("norm", ["student", "after_pooling"])
@pytest.mark.parametrize("family", ["beit", "vit", "swin_v2"])
def test_a_runs_head_is_its_classifier_to_the_bit(
    family: str, norm: Literal["student", "after_pooling"], tmp_path: Path
) -> None:
    classifier = left_by_a_run(family, norm, tmp_path)
    student = student_in(tmp_path)
    subject = Subject("run", student, run_head(student, tmp_path / "classifier.safetensors"))
    assert subject.head is not None
    with torch.no_grad():
        assert torch.equal(subject.head(subject.pooled(pixels(3))), classifier.logits(pixels(3)))
        assert torch.equal(subject.tokens(pixels(3)), student_in(tmp_path)(pixels(3)))  # with the final norm again
    assert not any(parameter.requires_grad for parameter in subject.head.parameters())


@pytest.mark.parametrize("norm", ["student", "after_pooling"])
@pytest.mark.parametrize("family", ["beit", "vit", "swin_v2"])
def test_a_run_that_learned_nothing_has_the_features_that_it_began_with(
    family: str, norm: Literal["student", "after_pooling"], tmp_path: Path
) -> None:
    before = subject_of(family)
    assert isinstance(before.network, Student)
    final = before.backbone.norm.state_dict()  # type: ignore[union-attr, operator]
    student = student_of(before.network, tmp_path / "before")
    classifier = Classifier(student, CLASSES, 0.0, norm)
    if norm == "after_pooling":
        classifier.fc_norm.load_state_dict(final)
    save_classifier(student, classifier.state_dict(), tmp_path)
    after = student_in(tmp_path)
    seen = [layers(before), layers(Subject("after", after, run_head(after, tmp_path / "classifier.safetensors")))]
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one, other)


def student_of(student: Student, folder: Path) -> Student:
    save_student(student, student.backbone.state_dict(), folder)
    return student_in(folder)


def layers(subject: Subject) -> list[Tensor]:
    """The patch tokens of every layer and of the output, as features, attention and alignment see them."""
    seen: list[Tensor] = []
    with torch.no_grad(), watching_tokens(subject, lambda _, tokens: seen.append(tokens)):
        subject.tokens(pixels(5))
    return seen


def test_a_norm_that_is_left_out_comes_back_also_after_a_failure(tmp_path: Path) -> None:
    left_by_a_run("beit", "after_pooling", tmp_path)
    student = student_in(tmp_path)
    subject = Subject("run", student, run_head(student, tmp_path / "classifier.safetensors"))
    before, names = student.backbone.norm, [name for name, _ in student.named_parameters()]
    with pytest.raises(RuntimeError):
        subject.pooled(pixels(1)[:, :2])
    assert student.backbone.norm is before
    assert [name for name, _ in student.named_parameters()] == names


def test_files_of_something_else_are_told(tmp_path: Path) -> None:
    left_by_a_run("beit", "after_pooling", tmp_path)
    student, file = student_in(tmp_path), tmp_path / "classifier.safetensors"
    with pytest.raises(UserError, match=r"student\.safetensors: no classifier's file: it has no head\.weight"):
        run_head(student, tmp_path / "student.safetensors")
    with pytest.raises(UserError, match=r"classifier\.safetensors: not the classifier of a student of width 24"):
        run_head(build_student(GEOMETRIES["vit"]), file)
    with pytest.raises(UserError, match="a final LayerNorm, which this student has not"):
        run_head(build_student(TimmGeometry("test_resnet", 64)), file)
    write_weights({"head.weight": torch.zeros(3, 32)}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match=r"half\.safetensors: not the classifier of a student of width 32"):
        run_head(student, tmp_path / "half.safetensors")


def blobs() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    means = torch.randn(3, 8, generator=drawn) * 2
    return (means[labels] + torch.randn(60, 8, generator=drawn)) * torch.logspace(-2, 2, 8) + 5, labels


def test_a_fitted_head_is_the_best_one_for_standardised_features() -> None:
    rows, labels = blobs()
    with torch.no_grad():  # as one who measures would call it
        head = fitted_head(rows, labels)
    mean, deviation = rows.mean(dim=0), rows.var(dim=0, unbiased=False).sqrt()
    known = Features(rows, labels, torch.arange(60))
    _, penalty = best_linear(known.by(known.standard()), 3)
    theirs = LogisticRegression(C=1 / (2 * penalty * 60), tol=1e-8, max_iter=5000)
    theirs.fit(((rows - mean) / deviation).double().numpy(), labels.numpy())
    expected = theirs.predict_log_proba(((rows - mean) / deviation).double().numpy())
    torch.testing.assert_close(head(rows).log_softmax(dim=1).double(), torch.from_numpy(expected), rtol=0, atol=2e-3)
