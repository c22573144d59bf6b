"""Supervised fine-tuning: a student, the mean of its patch tokens, one linear head, cross entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from fdscale.build.networks import as_pixels, prepare_student, seeded
from fdscale.build.run import open_run
from fdscale.build.training import train
from fdscale.config.errors import UserError
from fdscale.config.settings import FinetuneSettings
from fdscale.data.batches import Batch
from fdscale.data.index import Index
from fdscale.students.drop_path import drop_path_rows

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Classifier(nn.Module):
    """Pixels (B, 3, H, W) and labels (B,) -> `loss` and `accuracy`: means in training, one row per image otherwise.

    The head starts near zero (truncated normal 0.02 times 0.001, as officially), so that it does not disturb a
    distilled student at first.
    """

    def __init__(
        self, student: nn.Module, width: int, prefix_tokens: int, classes: int, label_smoothing: float
    ) -> None:
        super().__init__()
        self.student, self.prefix_tokens, self.label_smoothing = student, prefix_tokens, label_smoothing
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixels: Tensor, labels: Tensor, drop_path: Tensor | None = None) -> dict[str, Tensor]:
        features = self.student(pixels, drop_path)[:, self.prefix_tokens :].mean(dim=1)
        logits = self.head(features).float()
        correct = (logits.detach().argmax(dim=1) == labels).float()
        if self.training:
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            return {"loss": loss, "accuracy": correct.mean()}
        known = labels.clamp(min=0)  # padding rows are left out by the caller
        return {"loss": F.cross_entropy(logits, known, reduction="none"), "accuracy": correct}


def finetune(settings: FinetuneSettings) -> bool:
    """Fine-tune a student with labels; True when the run is complete, False when a signal stopped it."""
    run = open_run(settings, settings.labelled)
    if run.is_complete():
        return True
    for name, index in (("data.shards", run.index), ("eval.shards", run.held_out)):
        _check_labels(name, index, settings.classes)
    student = prepare_student(settings.student, settings.seed)
    with seeded(settings.seed):
        classifier = Classifier(
            student, student.width, student.prefix_tokens, settings.classes, settings.label_smoothing
        )
    sites, global_batch = student.drop_path_sites, settings.data.global_batch

    def labelled_batch(engine: DeepSpeedEngine, batch: Batch, step: int) -> dict[str, Tensor]:
        draws = drop_path_rows(settings.seed, step, sites, global_batch, batch.rows, run.device)
        return engine(as_pixels(batch.images), batch.labels, draws)

    def held_out_batch(engine: DeepSpeedEngine, batch: Batch) -> dict[str, Tensor]:
        return engine(as_pixels(batch.images), batch.labels)

    return train(run, classifier, student, labelled_batch, held_out_batch)


def _check_labels(name: str, index: Index | None, classes: int) -> None:
    """Raise UserError unless every sample has a label in [0, classes)."""
    if index is None:
        return
    labels = index.samples["label"]
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{name}: {index.folder} has labels {labels.min()} to {labels.max()} (-1: no label); "
            f"classes = {classes} allows 0 to {classes - 1}: set `classes` or pack labelled images"
        )
