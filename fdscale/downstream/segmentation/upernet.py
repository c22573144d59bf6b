"""UperNet on a student's maps: scores, losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fdscale.downstream.segmentation.pixels import IGNORED, accuracy

SLOT = "backbone"  # where transformers' network has its backbone


def scores(model: Any, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """The probabilities (B, K, *size) of the classes, fp32."""
    return _resized(model.decode_head(maps), size).softmax(dim=1)


def losses(model: Any, maps: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
    """`loss`, `loss_auxiliary` (its part of it) and `pixel_accuracy` for labels (B, H, W), 255 ignored."""
    size = (labels.shape[-2], labels.shape[-1])
    logits = _resized(model.decode_head(maps), size)
    auxiliary = pixel_loss(_resized(model.auxiliary_head(maps), size), labels) * model.config.auxiliary_loss_weight
    return {
        "loss": pixel_loss(logits, labels) + auxiliary,
        "loss_auxiliary": auxiliary.detach(),
        "pixel_accuracy": accuracy(logits.detach(), labels),
    }


def sketched(model: Any, maps: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
    """The same: nothing here depends on values."""
    return losses(model, maps, labels)


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of logits (B, K, H, W) over the pixels that are not ignored; of none of them 0.

    That 0 has a graph, and a gradient of zeros: every rank calls the same modules backwards.
    """
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits at the size of the image, fp32 from here on."""
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
