"""What is trained: the student with its projector, up to the loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fdscale.distill.losses import measure, smooth_l1
from fdscale.distill.targets import TargetMaker


class Distiller(nn.Module):
    """Student, projector and loss in one forward, so that ZeRO-3 gathers each weight where it is used.

    The projector is a linear layer per token, present even between equal widths, with torch's default
    initialisation (the official 1x1 convolution); it is dropped when the student is exported.
    """

    def __init__(
        self, student: nn.Module, student_width: int, target_width: int, targets: TargetMaker, beta: float
    ) -> None:
        super().__init__()
        self.student, self.targets, self.beta = student, targets, beta
        self.projector = nn.Linear(student_width, target_width)

    def forward(self, pixels: Tensor, target: Tensor, drop_path: Tensor | None = None) -> dict[str, Tensor]:
        """Pixels (B, 3, H, W) in [0, 1] and targets (B, N, C_t) -> `loss` and what is measured beside it.

        In training `loss` is the mean over all elements and carries the gradient; in evaluation every entry has
        one row per image: `loss` (B,) and `features` (B, C), the mean of the tokens that have a target.
        """
        tokens = self.targets.of_student(self.student(pixels, drop_path))
        predicted = self.projector(tokens)
        if self.training:
            return {"loss": smooth_l1(predicted, target, self.beta), **measure(predicted, target, self.beta)}
        losses = F.smooth_l1_loss(predicted.float(), target.float(), beta=self.beta, reduction="none")
        return {"loss": losses.flatten(1).mean(dim=1), "features": tokens.float().mean(dim=1)}
