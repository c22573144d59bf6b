"""Tokens of any network's output; the one thing that student and teacher rooms both need."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def as_tokens(features: Tensor, width: int) -> Tensor:
    """Tokens (B, N, C) as they are, or of a map (B, h, w, C) or (B, C, h, w) row by row."""
    if features.ndim == 4:
        channels_last = features if features.shape[-1] == width else features.permute(0, 2, 3, 1)
        features = channels_last.flatten(1, 2)
    return features
