"""The distillation loss and what is measured beside it: pure functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def smooth_l1(predicted: Tensor, target: Tensor, beta: float) -> Tensor:
    """Mean smooth L1 of (B, N, C) over all elements, fp32: d^2 / (2 beta) below beta, |d| - beta/2 above.

    The paper's loss, with beta = 2 (official `feature_distillation.py`).
    """
    return F.smooth_l1_loss(predicted.float(), target.float(), beta=beta)


def smooth_l1_rows(predicted: Tensor, target: Tensor, beta: float) -> Tensor:
    """The same mean for each image of (B, N, C) by itself: (B,)."""
    return F.smooth_l1_loss(predicted.float(), target.float(), beta=beta, reduction="none").flatten(1).mean(dim=1)


@torch.no_grad()
def measure(predicted: Tensor, target: Tensor, beta: float) -> dict[str, Tensor]:
    """What tells whether features are learned: mean cosine, target variance, and the loss of predicting zero."""
    predicted, target = predicted.detach().float(), target.float()
    return {
        "feature_cosine": F.cosine_similarity(predicted, target, dim=-1).mean(),
        "target_variance": target.var(dim=-1, unbiased=False).mean(),
        "loss_zero": smooth_l1(torch.zeros_like(target), target, beta),
    }
