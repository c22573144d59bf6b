"""The distiller is all that learns; its training loss is the mean of its evaluation rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fdscale.distill.distiller import Distiller
from fdscale.distill.layout import TokenLayout
from fdscale.distill.losses import smooth_l1
from fdscale.distill.targets import TargetMaker, whiten
from fdscale.students.geometry import ViTGeometry
from fdscale.students.student import build_student

TEACHER_WIDTH, BETA = 24, 2.0
TEACHER = TokenLayout((8, 8), 1)


def distiller_of(prefix_tokens: str = "keep", teacher_width: int = TEACHER_WIDTH) -> Distiller:
    student = build_student(ViTGeometry(16, 2, 2, patch_size=8, image_size=32), seed=1)
    targets = TargetMaker(TEACHER, TokenLayout(student.grid, student.prefix_tokens), "pool", prefix_tokens)
    torch.manual_seed(2)
    return Distiller(student, student.width, teacher_width, targets, BETA)


def a_batch(seed: int = 3) -> tuple[Tensor, Tensor]:
    """Pixels, and teacher tokens with a gradient that must not be asked for."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(3, 3, 32, 32, generator=generator)
    return pixels, torch.randn(3, 65, TEACHER_WIDTH, generator=generator).requires_grad_()


def test_the_loss_is_that_of_projected_student_tokens() -> None:
    distiller, (pixels, teacher_tokens) = distiller_of(), a_batch()
    target = distiller.targets(teacher_tokens)
    predicted = distiller.student(pixels) @ distiller.projector.weight.T + distiller.projector.bias
    terms = distiller(pixels, target)
    assert predicted.shape == target.shape == (3, 17, TEACHER_WIDTH)
    assert float(terms["loss"].detach()) == pytest.approx(float(smooth_l1(predicted, target, BETA).detach()))
    assert set(terms) == {"loss", "feature_cosine", "target_variance", "loss_zero"}
    assert [name for name, value in terms.items() if value.requires_grad] == ["loss"]
    assert float(terms["target_variance"]) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("prefix_tokens", ["keep", "drop"])
def test_the_training_loss_is_the_mean_of_the_evaluation_rows(prefix_tokens: str) -> None:
    distiller, (pixels, teacher_tokens) = distiller_of(prefix_tokens), a_batch()
    target = distiller.targets(teacher_tokens)
    training = distiller.train()(pixels, target)["loss"]
    rows = distiller.eval()(pixels, target)
    assert {name: tuple(value.shape) for name, value in rows.items()} == {"loss": (3,), "features": (3, 16)}
    assert float(rows["loss"].mean().detach()) == pytest.approx(float(training.detach()), rel=1e-6)
    for row in range(3):
        alone = distiller(pixels[row : row + 1], target[row : row + 1])
        assert float(alone["loss"].detach()) == pytest.approx(float(rows["loss"][row].detach()), rel=1e-5)


@pytest.mark.parametrize(("prefix_tokens", "first"), [("keep", 0), ("drop", 1)])
def test_features_are_the_mean_of_the_tokens_that_have_a_target(prefix_tokens: str, first: int) -> None:
    distiller, (pixels, teacher_tokens) = distiller_of(prefix_tokens).eval(), a_batch()
    found = distiller(pixels, distiller.targets(teacher_tokens))["features"]
    assert torch.allclose(found, distiller.student(pixels)[:, first:].mean(1), atol=1e-6)


@pytest.mark.parametrize("width", [16, 24])
def test_the_projector_is_a_linear_layer_from_torchs_default_start(width: int) -> None:
    """Uniform in +-1/sqrt(C_s), weight and bias: the official 1x1 convolution's; present between equal widths too."""
    projector = distiller_of(teacher_width=width).projector
    assert projector.weight.shape == (width, 16)
    for values in (projector.weight.detach(), projector.bias.detach()):
        assert 0.8 / math.sqrt(16) < float(values.abs().max()) <= 1 / math.sqrt(16)
    torch.manual_seed(2)
    convolution = torch.nn.Conv1d(16, width, 1)
    assert torch.equal(projector.weight, convolution.weight.squeeze(-1))
    assert torch.equal(projector.bias, convolution.bias)


def test_the_gradient_reaches_student_and_projector_and_stops_there() -> None:
    distiller, (pixels, teacher_tokens) = distiller_of(), a_batch()
    distiller(pixels, distiller.targets(teacher_tokens))["loss"].backward()
    assert teacher_tokens.grad is None
    without = [name for name, parameter in distiller.named_parameters() if parameter.grad is None]
    assert without == []
    parts = {name.split(".")[0] for name, parameter in distiller.named_parameters() if parameter.grad.abs().sum() > 0}
    assert parts == {"student", "projector"}


def test_drop_path_draws_reach_the_student() -> None:
    student = build_student(ViTGeometry(16, 2, 2, patch_size=8, image_size=32), drop_path=0.5)
    layout = TokenLayout(student.grid, student.prefix_tokens)
    distiller = Distiller(student, student.width, TEACHER_WIDTH, TargetMaker(layout, layout), BETA)
    pixels, target = a_batch()[0], whiten(torch.randn(3, 17, TEACHER_WIDTH))
    kept, dropped = (
        distiller(pixels, target, torch.full((student.drop_path_sites, 3), draw))["loss"] for draw in (0.99, 0.0)
    )
    assert float(kept.detach()) != float(dropped.detach())


def test_a_step_downhill_lowers_the_loss() -> None:
    distiller, (pixels, teacher_tokens) = distiller_of(), a_batch()
    target = distiller.targets(teacher_tokens)
    optimizer, losses = torch.optim.AdamW(distiller.parameters(), lr=1e-2), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = distiller(pixels, target)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
