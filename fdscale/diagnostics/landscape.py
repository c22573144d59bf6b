"""How flat a subject's loss lies around its weights, on a few labelled images that are held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdscale.build.networks import as_pixels
from fdscale.config.errors import UserError
from fdscale.data.batches import Batch
from fdscale.diagnostics.heads import fitted_head
from fdscale.diagnostics.lines import LandscapePlan, Point, landscape_of
from fdscale.diagnostics.rows import Measurement
from fdscale.diagnostics.subjects import Subject


@dataclass(frozen=True)
class LabelledImages:
    """What the loss is computed on: images uint8 (S, 3, H, W) and labels int64 (S,), on the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels fp32 (B, 3, H, W) in [0, 1] and labels (B,), `size` images at a time."""
        for images, labels in zip(self.images.split(size), self.labels.split(size), strict=True):
            yield as_pixels(images.to(device)), labels.to(device)


def first_labelled(batches: Iterable[Batch], most: int) -> LabelledImages:
    """The first `most` images that have a label; raises UserError where none has."""
    images, labels, wanted = [], [], most
    for batch in batches:
        known = (batch.labels >= 0).nonzero()[:wanted, 0]
        images.append(batch.images[known].cpu())
        labels.append(batch.labels[known].cpu())
        wanted -= len(known)
        if wanted == 0:
            break
    if wanted == most:
        raise UserError("the loss landscape needs labels, and no image here has one; pack class folders to have them")
    return LabelledImages(torch.cat(images), torch.cat(labels))


def loss_landscape(
    subject: Subject, labelled: LabelledImages, plan: LandscapePlan, batch: int, advance: Callable[[], object]
) -> list[Measurement]:
    """The rows of `landscape_of` for a subject: cross entropy and accuracy on all labelled images, `batch` at a time.

    A subject's head was trained with its network and moves with it. A subject without one gets a linear classifier
    fitted to its features of these same images, which stays: how long its weights are is the penalty's doing. Weights
    come back bit for bit. Rows say in `classifier` which it was. Raises UserError for weights that are not finite, for
    labels that the head has not, and where a head must be fitted and all images are of one class.
    """
    _refuse_broken(subject)
    head = subject.head if subject.head is not None else _fitted(subject, labelled, batch)
    _refuse_unknown_labels(subject.name, head, subject.network.width, labelled)
    moved = [subject.network] if subject.head is None else [subject.network, subject.head]

    def evaluated() -> Point:
        return _evaluated(subject, head, labelled, batch)

    rows = landscape_of(subject.name, nn.ModuleList(moved), evaluated, len(labelled), plan, advance)
    return [replace(row, classifier="fitted" if subject.head is None else "run") for row in rows]


@torch.no_grad()
def _evaluated(subject: Subject, head: nn.Module, labelled: LabelledImages, batch: int) -> Point:
    """Losses of fp32 logits, taken and averaged in double precision: their differences are what is wanted."""
    loss = right = 0.0
    for pixels, labels in labelled.batches(batch, _device(subject)):
        logits = head(subject.pooled(pixels)).double()
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(dim=1) == labels).sum())
    return Point(loss / len(labelled), right / len(labelled))


def _fitted(subject: Subject, labelled: LabelledImages, batch: int) -> nn.Module:
    if len(labelled.labels.unique()) < 2:
        raise UserError(
            f"{subject.name}: it has no classifier, and none can be fitted to {len(labelled)} images of one class: "
            "their loss would be flat whatever the weights; look at more images, or at a run with its classifier"
        )
    with torch.no_grad():
        features = [subject.pooled(pixels) for pixels, _ in labelled.batches(batch, _device(subject))]
    return fitted_head(torch.cat(features), labelled.labels.to(_device(subject)))


def _device(subject: Subject) -> torch.device:
    return next(subject.network.parameters()).device


def _refuse_broken(subject: Subject) -> None:
    for name, weight in subject.network.named_parameters():
        if not weight.isfinite().all():
            raise UserError(
                f"{subject.name}: its weight {name} holds NaN or infinity: there is no loss landscape around it; "
                "take a checkpoint from before the weights broke"
            )


def _refuse_unknown_labels(name: str, head: nn.Module, width: int, labelled: LabelledImages) -> None:
    example = next(head.parameters())
    with torch.no_grad():
        classes = head(torch.zeros(1, width, device=example.device)).shape[1]
    low, high = int(labelled.labels.min()), int(labelled.labels.max())
    if low < 0 or high >= classes:
        raise UserError(
            f"{name}: its head tells classes 0 to {classes - 1}, these images have labels {low} to {high}; "
            "take the shards that it was trained for"
        )
