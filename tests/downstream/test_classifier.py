"""The classifier: which norm, how the head starts, what it returns, and the two files it is kept in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.beit import Beit
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.downstream.classifier import Classifier, save_classifier
from fdscale.students.files import load_weights
from fdscale.students.geometry import SwinV2Geometry, ViTGeometry, file_geometry
from fdscale.students.student import Student, build_student

VIT = ViTGeometry(32, 2, 4, patch_size=8, image_size=32)
SWIN = SwinV2Geometry(16, (1, 1), (2, 4), window_size=4, image_size=32)
CLASSES = 6
Perturbed = Callable[[ViTGeometry | SwinV2Geometry], Student]


def pixels(rows: int = 4) -> Tensor:
    return torch.rand(rows, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def of_weights(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same names, other values, far from the start."""
    drawn = torch.Generator().manual_seed(seed)
    return {name: value + 0.3 * torch.randn(value.shape, generator=drawn) for name, value in state.items()}


def test_the_official_vit_is_timms_beit_that_averages(perturbed: Perturbed) -> None:
    """Mean of the patch tokens before any norm, a new norm, the head (method, section 2.2)."""
    student = perturbed(dataclasses.replace(VIT, position_bias="per_block"))
    classifier = Classifier(student, CLASSES, 0.1, "after_pooling").eval()
    classifier.load_state_dict(of_weights(classifier.state_dict(), 3))
    theirs = Beit(
        img_size=32,
        patch_size=8,
        num_classes=CLASSES,
        global_pool="avg",
        embed_dim=32,
        depth=2,
        num_heads=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
    ).eval()
    theirs.load_state_dict({n.removeprefix("student.backbone."): v for n, v in classifier.state_dict().items()})
    images = (pixels() - student.mean) / student.std
    torch.testing.assert_close(classifier.logits(pixels()), theirs(images), rtol=0, atol=2e-6)


def test_the_students_own_norm_comes_before_the_mean(perturbed: Perturbed) -> None:
    for geometry, prefix in ((VIT, 1), (SWIN, 0)):
        student = perturbed(geometry)
        classifier = Classifier(student, CLASSES, 0.0, "student").eval()
        expected = classifier.head(student(pixels())[:, prefix:].mean(dim=1))
        assert torch.equal(classifier.logits(pixels()), expected)


def test_a_dropped_norm_is_not_trained(perturbed: Perturbed) -> None:
    classifier = Classifier(perturbed(VIT), CLASSES, 0.0, "after_pooling")
    names = {name for name, _ in classifier.named_parameters()}
    assert {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"} <= names
    assert not any(name.startswith("student.backbone.norm") for name in names)
    assert torch.equal(classifier.fc_norm.weight, torch.ones(32))
    assert torch.equal(classifier.fc_norm.bias, torch.zeros(32))
    classifier(pixels(), torch.arange(4))["loss"].backward()
    assert [name for name, p in classifier.named_parameters() if p.grad is None] == []


def test_a_student_without_a_final_norm_cannot_have_it_replaced() -> None:
    student = Student(nn.Conv2d(3, 8, 8, 8), width=8, grid=(4, 4), prefix_tokens=0, image_size=32)
    with pytest.raises(UserError, match=r'head\.norm="after_pooling": .*use "student"'):
        Classifier(student, CLASSES, 0.0, "after_pooling")


@pytest.mark.parametrize("scale", [0.001, 1.0])
def test_the_head_starts_at_its_scale(scale: float) -> None:
    classifier = Classifier(build_student(ViTGeometry(256, 1, 4, 8, 32)), 500, 0.0, "student", scale)
    assert float(classifier.head.weight.detach().std()) == pytest.approx(0.02 * scale, rel=0.02)
    assert float(classifier.head.weight.detach().abs().max()) > 0.06 * scale  # not cut at one sigma
    assert not classifier.head.bias.any()


def test_norm_and_head_compute_in_fp32_whatever_the_weights_type(perturbed: Perturbed) -> None:
    classifier = Classifier(perturbed(SWIN), CLASSES, 0.0, "after_pooling").eval()
    expected = classifier.head(classifier.fc_norm(torch.full((1, 32), 1 / 3)))
    for part in (classifier.head, classifier.fc_norm):
        part.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = classifier.head(classifier.fc_norm(torch.full((1, 32), 1 / 3)))
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.01, atol=1e-6)


def test_losses_are_timms(perturbed: Perturbed) -> None:
    classifier, labels = Classifier(perturbed(VIT), CLASSES, 0.1, init_scale=10.0), torch.arange(4)
    logits = classifier.logits(pixels())
    hard = classifier(pixels(), labels)["loss"]
    torch.testing.assert_close(hard, LabelSmoothingCrossEntropy(0.1)(logits, labels))
    shares = torch.rand(4, CLASSES).softmax(dim=1)
    soft = classifier(pixels(), shares)["loss"]
    torch.testing.assert_close(soft, SoftTargetCrossEntropy()(logits, shares * 0.9 + 0.1 / CLASSES))


def test_a_mixed_image_counts_as_its_larger_share(perturbed: Perturbed) -> None:
    classifier = Classifier(perturbed(VIT), CLASSES, 0.1, init_scale=10.0)
    found = classifier.logits(pixels()).argmax(dim=1)
    shares = 0.7 * F.one_hot(found, CLASSES) + 0.3 * F.one_hot((found + 1) % CLASSES, CLASSES)
    assert classifier(pixels(), shares)["accuracy"] == 1
    assert classifier(pixels(), shares.roll(1, dims=1))["accuracy"] == 0
    assert classifier(pixels(), found)["accuracy"] == 1


def test_evaluation_gives_a_row_per_image_and_is_not_smoothed(perturbed: Perturbed) -> None:
    classifier = Classifier(perturbed(VIT), CLASSES, 0.1).eval()
    rows = classifier(pixels(), torch.tensor([0, 1, 2, -2]))
    assert {name: value.shape for name, value in rows.items()} == {"loss": (4,), "accuracy": (4,)}
    expected = F.cross_entropy(classifier.logits(pixels())[:3], torch.arange(3), reduction="none")
    torch.testing.assert_close(rows["loss"][:3], expected)


@pytest.mark.parametrize("norm", ["student", "after_pooling"])
@pytest.mark.parametrize("geometry", [VIT, SWIN], ids=["vit", "swin_v2"])
def test_the_two_files_are_the_classifier(
    geometry: ViTGeometry | SwinV2Geometry, norm: str, perturbed: Perturbed, tmp_path: Path
) -> None:
    classifier = Classifier(perturbed(geometry), CLASSES, 0.0, norm).eval()  # type: ignore[arg-type]
    classifier.load_state_dict(of_weights(classifier.state_dict(), 4))
    save_classifier(classifier.student, classifier.state_dict(), tmp_path)

    kept = load_file(tmp_path / "classifier.safetensors")
    extra = {"fc_norm.weight", "fc_norm.bias"} if norm == "after_pooling" else set()
    assert set(kept) == {"head.weight", "head.bias"} | extra
    student = build_student(file_geometry(tmp_path / "student.safetensors"))
    load_weights(student, tmp_path / "student.safetensors")
    if extra:
        assert torch.equal(student.backbone.norm.weight, kept["fc_norm.weight"])
    again = Classifier(student, CLASSES, 0.0, norm).eval()  # type: ignore[arg-type]
    again.load_state_dict(kept, strict=False)
    assert torch.equal(again.logits(pixels()), classifier.logits(pixels()))


def test_files_that_cannot_be_written_are_named(perturbed: Perturbed, tmp_path: Path) -> None:
    classifier = Classifier(perturbed(VIT), CLASSES, 0.0)
    with pytest.raises(UserError, match=r"absent/classifier\.safetensors could not be written"):
        save_classifier(classifier.student, classifier.state_dict(), tmp_path / "absent")
