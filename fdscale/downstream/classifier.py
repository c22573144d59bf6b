"""A student with a classifier on top, and the two files it is kept in."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fdscale.build.result import BACKBONE, NEW_NORM, save_backbone
from fdscale.config.errors import UserError
from fdscale.students.files import read_weights, write_weights
from fdscale.students.student import Student
from fdscale.students.swin_v2 import Linear32
from fdscale.teachers.teacher import Float32LayerNorm

logger = logging.getLogger(__name__)


class Classifier(nn.Module):
    """Pixels (B, 3, H, W) and labels (B,) -> `loss` and `accuracy`: means in training, one row per image otherwise.

    The mean of the patch tokens, in fp32 as all that follows it, a linear head, cross entropy. `norm` is the student's
    own, before the mean, or a new one `after_pooling` that takes its place (official ViT, which calls it `fc_norm`).
    The head's weights start as a truncated normal 0.02 times `init_scale` (official: 0.001 for ViT, so that it does not
    disturb a distilled student at first; 1 for Swin).
    """

    def __init__(
        self,
        student: Student,
        classes: int,
        label_smoothing: float,
        norm: Literal["student", "after_pooling"] = "student",
        init_scale: float = 0.001,
    ) -> None:
        super().__init__()
        self.student, self.label_smoothing = student, label_smoothing
        self.fc_norm = _take_norm(student) if norm == "after_pooling" else nn.Identity()
        self.head = Linear32(student.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02 * init_scale)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixels: Tensor, labels: Tensor, drop_path: Tensor | None = None) -> dict[str, Tensor]:
        """In training, labels may be shares (B, classes): an image then counts as its largest share's in `accuracy`."""
        logits = self.logits(pixels, drop_path)
        wanted = labels if labels.ndim == 1 else labels.argmax(dim=1)
        correct = (logits.detach().argmax(dim=1) == wanted).float()
        if self.training:
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            return {"loss": loss, "accuracy": correct.mean()}
        known = labels.clamp(min=0)  # padding rows are left out by the caller
        return {"loss": F.cross_entropy(logits, known, reduction="none"), "accuracy": correct}

    def logits(self, pixels: Tensor, drop_path: Tensor | None = None) -> Tensor:
        """Pixels (B, 3, H, W) -> fp32 (B, classes)."""
        tokens = self.student(pixels, drop_path)[:, self.student.prefix_tokens :]
        return self.head(self.fc_norm(tokens.float().mean(dim=1)))


def _take_norm(student: Student) -> Float32LayerNorm:
    """A new norm like the student's final one, which is dropped: it is not used, so it must not be trained."""
    norm = getattr(student.backbone, "norm", None)
    if not isinstance(norm, nn.LayerNorm):
        raise UserError(
            'head.norm="after_pooling": the student has no final LayerNorm that a new one could replace; use "student"'
        )
    student.backbone.norm = nn.Identity()
    return Float32LayerNorm(student.width, eps=norm.eps, bias=norm.bias is not None)


def load_head(classifier: Classifier, file: Path, keep: Literal["all", "norm"]) -> None:
    """Put an earlier fine-tuning's `classifier.safetensors` into a classifier: its norm, and its linear layer with it.

    The log says what was kept. Raises UserError for a file of another student or of other classes.
    """
    held = {name: value for name, value in read_weights(file).items() if keep == "all" or name.startswith(NEW_NORM)}
    parts = sorted({name.partition(".")[0] for name in held})
    wanted = {name for name in classifier.state_dict() if name.startswith(tuple(f"{part}." for part in parts))}
    try:
        unexpected = classifier.load_state_dict(held, strict=False).unexpected_keys
    except RuntimeError as error:  # of another shape
        raise UserError(f"head.weights: {file} is not of this student and these classes: {error}") from error
    if unexpected or not wanted == held.keys() or not held:
        raise UserError(f"head.weights: {file} holds {', '.join(sorted(held)) or 'no norm'}: of another kind of head")
    linear = "" if keep == "all" else f"; the linear layer of {classifier.head.out_features} classes is new"
    logger.info("%s: %s kept%s", file, " and ".join(parts), linear)


def save_classifier(student: Student, state: dict[str, Tensor], folder: Path, ending: str = "") -> None:
    """Write `student.safetensors` and `classifier.safetensors` from a classifier's full state dict.

    The second holds what is not the backbone's: `head.*`, and `fc_norm.*` where the norm is a new one. That norm is
    also the student file's final `norm`, so that the file loads as any other; both together are the classifier.
    """
    rest = {name: value for name, value in state.items() if not name.startswith(BACKBONE)}
    write_weights(rest, folder / f"classifier{ending}.safetensors")
    save_backbone(student, state, folder, ending)
