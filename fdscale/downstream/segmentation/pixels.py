"""What both heads measure of labelled pixels."""

from __future__ import annotations

from torch import Tensor

IGNORED = 255  # a label that is none


def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    """The share of labelled pixels (B, H, W) whose class has the highest score (B, K, H, W); 0 where there are none."""
    known = labels != IGNORED
    correct = (scores.argmax(dim=1) == labels) & known
    return correct.sum().float() / known.sum().clamp(min=1)
