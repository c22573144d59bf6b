"""What is trained: the student with its projectors, up to the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fdscale.distill.losses import measure, smooth_l1, smooth_l1_rows
from fdscale.distill.targets import TargetMaker


@dataclass(frozen=True)
class Lesson:
    """What one teacher asks of the student: targets of its width, and the weight of their loss in the sum."""

    teacher: str
    width: int
    targets: TargetMaker
    weight: float = 1.0


class Distiller(nn.Module):
    """Student, projectors and loss in one forward, so that ZeRO-3 gathers each weight where it is used.

    Each teacher has a projector of its own: a linear layer per token, present even between equal widths, with
    torch's default initialisation (the official 1x1 convolution); it is dropped when the student is exported.
    """

    def __init__(self, student: nn.Module, student_width: int, lessons: Sequence[Lesson], beta: float) -> None:
        super().__init__()
        self.student, self.lessons, self.beta = student, tuple(lessons), beta
        self.projectors = nn.ModuleList(nn.Linear(student_width, lesson.width) for lesson in lessons)

    def forward(self, pixels: Tensor, targets: Sequence[Tensor], drop_path: Tensor | None = None) -> dict[str, Tensor]:
        """Pixels (B, 3, H, W) in [0, 1], one target (B, N, C_t) a lesson -> `loss` and what is measured beside it.

        `loss` is the weighted sum over the lessons. In training it is the mean over all elements and carries the
        gradient; in evaluation every entry has one row per image: `loss` (B,) and `features` (B, C), the mean of the
        tokens that have a target of the first teacher's.
        """
        tokens = self.student(pixels, drop_path)
        if not self.training:
            losses = [w * smooth_l1_rows(p, t, self.beta) for w, p, t in self._predicted(tokens, targets)]
            features = self.lessons[0].targets.of_student(tokens)
            return {"loss": torch.stack(losses).sum(0), "features": features.float().mean(dim=1)}
        return self._terms(list(self._predicted(tokens, targets)))

    def _predicted(self, tokens: Tensor, targets: Sequence[Tensor]) -> Iterator[tuple[float, Tensor, Tensor]]:
        """The weight, the prediction and the target of each lesson."""
        for lesson, projector, target in zip(self.lessons, self.projectors, targets, strict=True):
            yield lesson.weight, projector(lesson.targets.of_student(tokens)), target

    def _terms(self, predicted: Sequence[tuple[float, Tensor, Tensor]]) -> dict[str, Tensor]:
        losses = [smooth_l1(p, t, self.beta) for _, p, t in predicted]
        weights = [weight for weight, _, _ in predicted]
        measured = [measure(p, t, self.beta) for _, p, t in predicted]
        return {
            "loss": _weighted(weights, losses),
            "loss_zero": _weighted(weights, [values["loss_zero"] for values in measured]),
            **{name: _mean([values[name] for values in measured]) for name in ("feature_cosine", "target_variance")},
            **(self._each(losses, measured) if len(losses) > 1 else {}),
        }

    def _each(self, losses: Sequence[Tensor], measured: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What each of several teachers is told apart by."""
        each = zip(self.lessons, losses, measured, strict=True)
        return {
            name: value
            for lesson, loss, values in each
            for name, value in (
                (f"teacher_loss/{lesson.teacher}", loss.detach()),
                (f"teacher_cosine/{lesson.teacher}", values["feature_cosine"]),
            )
        }


def _weighted(weights: Sequence[float], losses: Sequence[Tensor]) -> Tensor:
    """The sum of the weighted losses; of a single one of weight 1, that very loss."""
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()
