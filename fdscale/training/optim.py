"""The optimizer's parameter groups and the learning rate of each step, as in the official implementation."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine, per optimizer step (method, section 3; timm's cosine with warm-up prefix)."""

    total_steps: int
    warmup_steps: int
    peak: float
    start: float = 0.0
    end: float = 0.0

    def at(self, index: int) -> float:
        """The rate at schedule index 0 .. total_steps."""
        if index < self.warmup_steps:
            return self.start + index * (self.peak - self.start) / self.warmup_steps
        progress = (index - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        return self.end + 0.5 * (self.peak - self.end) * (1 + math.cos(math.pi * min(progress, 1.0)))

    def for_step(self, step: int) -> float:
        """The rate of update `step` (from 0): the official scheduler runs one behind, its first two updates agree."""
        return self.at(max(step - 1, 0))


def parameter_groups(module: nn.Module, weight_decay: float, undecayed: Collection[str]) -> list[dict[str, object]]:
    """Two groups: decayed, and not decayed (vectors, `*.bias`, and the full names in `undecayed`)."""
    decayed_parameters: list[nn.Parameter] = []
    other: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim == 1 or name.endswith(".bias") or name in undecayed
        (other if plain else decayed_parameters).append(parameter)
    groups = [
        {"params": decayed_parameters, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": other, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(groups: list[dict[str, object]], lr: float, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """torch's AdamW; fused where the parameters are on a GPU."""
    on_gpu = all(p.is_cuda for group in groups for p in group["params"])  # type: ignore[attr-defined]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=on_gpu or None)
