"""A network that is looked at: a student or a teacher, with its classifier where it has one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from fdscale.diagnostics.heads import PooledNormHead, without_final_norm
from fdscale.students.student import Student
from fdscale.teachers.teacher import Teacher


@dataclass(frozen=True)
class Subject:
    """A network in evaluation mode that needs no gradient, by the name that rows and figures call it.

    `network` maps pixels (B, 3, H, W) in [0, 1] to tokens (B, prefix + h*w, C) after its final norm, whatever its own
    normalisation is; `head` maps the mean of its patch tokens (B, C), fp32, to logits (B, classes). A run that was
    fine-tuned with `head.norm="after_pooling"` had no final norm: its student file has the head's norm in that place,
    and so have the `tokens`, which are then what those of any other network are; only what the head is given, `pooled`,
    comes without.
    """

    name: str
    network: Student | Teacher
    head: nn.Module | None = None

    @property
    def backbone(self) -> nn.Module:
        return self.network.backbone

    @property
    def image_size(self) -> int:
        """The side of the images that it takes, in pixels."""
        return self.network.image_size

    @property
    def prefix_tokens(self) -> int:
        return self.network.prefix_tokens

    def tokens(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] -> tokens (B, prefix + h*w, C)."""
        return self.network(pixels)

    def pooled(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] -> the mean of the patch tokens, fp32 (B, C): what a head is given."""
        own_norm = isinstance(self.head, PooledNormHead)
        with without_final_norm(self.backbone) if own_norm else nullcontext():
            tokens = self.tokens(pixels)
        return tokens[:, self.prefix_tokens :].float().mean(dim=1)
