"""The distiller is all that learns; its training loss is the mean of its evaluation rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fdscale.distill.distiller import Distiller, Lesson
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
    return Distiller(student, student.width, [Lesson("teacher", teacher_width, targets)], BETA)


def targets_of(distiller: Distiller, tokens: Tensor) -> Tensor:
    return distiller.lessons[0].targets(tokens)


def a_batch(seed: int = 3) -> tuple[Tensor, Tensor]:
    """Pixels, and teacher tokens with a gradient that must not be asked for."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(3, 3, 32, 32, generator=generator)
    return pixels, torch.randn(3, 65, TEACHER_WIDTH, generator=generator).requires_grad_()


def test_the_loss_is_that_of_projected_student_tokens() -> None:
    distiller, (pixels, teacher_tokens) = distiller_of(), a_batch()
    target = targets_of(distiller, teacher_tokens)
    predicted = distiller.student(pixels) @ distiller.projectors[0].weight.T + distiller.projectors[0].bias
    terms = distiller(pixels, [target])
    assert predicted.shape == target.shape == (3, 17, TEACHER_WIDTH)
    assert float(terms["loss"].detach()) == pytest.approx(float(smooth_l1(predicted, target, BETA).detach()))
    assert set(terms) == {"loss", "feature_cosine", "target_variance", "loss_zero"}
    assert [name for name, value in terms.items() if value.requires_grad] == ["loss"]
    assert float(terms["target_variance"]) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("prefix_tokens", ["keep", "drop"])
def test_the_training_loss_is_the_mean_of_the_evaluation_rows(prefix_tokens: str) -> None:
    distiller, (pixels, teacher_tokens) = distiller_of(prefix_tokens), a_batch()
    target = targets_of(distiller, teacher_tokens)
    training = distiller.train()(pixels, [target])["loss"]
    rows = distiller.eval()(pixels, [target])
    assert {name: tuple(value.shape) for name, value in rows.items()} == {"loss": (3,), "features": (3, 16)}
    assert float(rows["loss"].mean().detach()) == pytest.approx(float(training.detach()), rel=1e-6)
    for row in range(3):
        alone = distiller(pixels[row : row + 1], [target[row : row + 1]])
        assert float(alone["loss"].detach()) == pytest.approx(float(rows["loss"][row].detach()), rel=1e-5)


@pytest.mark.parametrize(("prefix_tokens", "first"), [("keep", 0), ("drop", 1)])
def test_features_are_the_mean_of_the_tokens_that_have_a_target(prefix_tokens: str, first: int) -> None:
    distiller, (pixels, teacher_tokens) = distiller_of(prefix_tokens).eval(), a_batch()
    found = distiller(pixels, [targets_of(distiller, teacher_tokens)])["features"]
    assert torch.allclose(found, distiller.student(pixels)[:, first:].mean(1), atol=1e-6)


@pytest.mark.parametrize("width", [16, 24])
def test_the_projector_is_a_linear_layer_from_torchs_default_start(width: int) -> None:
    """Uniform in +-1/sqrt(C_s), weight and bias: the official 1x1 convolution's; present between equal widths too."""
    projector = distiller_of(teacher_width=width).projectors[0]
    assert projector.weight.shape == (width, 16)
    for values in (projector.weight.detach(), projector.bias.detach()):
        assert 0.8 / math.sqrt(16) < float(values.abs().max()) <= 1 / math.sqrt(16)
    torch.manual_seed(2)
    convolution = torch.nn.Conv1d(16, width, 1)
    assert torch.equal(projector.weight, convolution.weight.squeeze(-1))
    assert torch.equal(projector.bias, convolution.bias)


def test_the_gradient_reaches_student_and_projector_and_stops_there() -> None:
    distiller, (pixels, teacher_tokens) = distiller_of(), a_batch()
    distiller(pixels, [targets_of(distiller, teacher_tokens)])["loss"].backward()
    assert teacher_tokens.grad is None
    without = [name for name, parameter in distiller.named_parameters() if parameter.grad is None]
    assert without == []
    parts = {name.split(".")[0] for name, parameter in distiller.named_parameters() if parameter.grad.abs().sum() > 0}
    assert parts == {"student", "projectors"}


def test_drop_path_draws_reach_the_student() -> None:
    student = build_student(ViTGeometry(16, 2, 2, patch_size=8, image_size=32), drop_path=0.5)
    layout = TokenLayout(student.grid, student.prefix_tokens)
    distiller = Distiller(student, student.width, [Lesson("teacher", TEACHER_WIDTH, TargetMaker(layout, layout))], BETA)
    pixels, target = a_batch()[0], whiten(torch.randn(3, 17, TEACHER_WIDTH))
    kept, dropped = (
        distiller(pixels, [target], torch.full((student.drop_path_sites, 3), draw))["loss"] for draw in (0.99, 0.0)
    )
    assert float(kept.detach()) != float(dropped.detach())


def test_a_step_downhill_lowers_the_loss() -> None:
    distiller, (pixels, teacher_tokens) = distiller_of(), a_batch()
    target = targets_of(distiller, teacher_tokens)
    optimizer, losses = torch.optim.AdamW(distiller.parameters(), lr=1e-2), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = distiller(pixels, [target])["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def two_teachers(weights: tuple[float, float] = (1.0, 0.5)) -> tuple[Distiller, Tensor, list[Tensor]]:
    """One student, two teachers of other widths and grids, and the targets of three images."""
    student = build_student(ViTGeometry(16, 2, 2, patch_size=8, image_size=32), seed=1)
    layout = TokenLayout(student.grid, student.prefix_tokens)
    pooled, dropped = TargetMaker(TEACHER, layout, "pool"), TargetMaker(layout, layout, prefix_tokens="drop")
    lessons = [Lesson("teacher", TEACHER_WIDTH, pooled, weights[0]), Lesson("dino", 40, dropped, weights[1])]
    torch.manual_seed(2)
    distiller = Distiller(student, student.width, lessons, BETA)
    pixels, tokens = a_batch()
    return distiller, pixels, [pooled(tokens), dropped(torch.randn(3, 17, 40))]


def test_several_teachers_are_the_weighted_sum_of_their_losses_each_through_its_own_projector() -> None:
    distiller, pixels, targets = two_teachers()
    tokens = distiller.student(pixels)
    losses = [
        smooth_l1(projector(lesson.targets.of_student(tokens)), target, BETA)
        for lesson, projector, target in zip(distiller.lessons, distiller.projectors, targets, strict=True)
    ]
    terms = distiller(pixels, targets)
    assert torch.equal(terms["loss"], losses[0] + 0.5 * losses[1])
    told = {name: float(value) for name, value in terms.items() if "/" in name}
    assert told.keys() == {f"teacher_{what}/{name}" for what in ("loss", "cosine") for name in ("teacher", "dino")}
    assert told["teacher_loss/dino"] == float(losses[1].detach())  # not weighted
    assert float(terms["feature_cosine"]) == pytest.approx(
        (told["teacher_cosine/teacher"] + told["teacher_cosine/dino"]) / 2
    )


def test_several_teachers_gradients_are_the_weighted_sum_of_each_ones_alone() -> None:
    def gradient(weights: tuple[float, float], kept: slice) -> Tensor:
        distiller, pixels, targets = two_teachers(weights)
        distiller.lessons, distiller.projectors = distiller.lessons[kept], distiller.projectors[kept]
        distiller(pixels, targets[kept])["loss"].backward()
        return torch.cat([p.grad.flatten() for p in distiller.student.parameters()])

    first, second = gradient((1.0, 1.0), slice(0, 1)), gradient((1.0, 1.0), slice(1, 2))
    assert torch.allclose(gradient((1.0, 0.5), slice(0, 2)), first + 0.5 * second, atol=1e-8)


def test_several_teachers_are_evaluated_by_the_same_sum() -> None:
    distiller, pixels, targets = two_teachers()
    training = distiller.train()(pixels, targets)["loss"]
    rows = distiller.eval()(pixels, targets)
    assert float(rows["loss"].mean().detach()) == pytest.approx(float(training.detach()), rel=1e-6)
    assert rows["features"].shape == (3, 16)
