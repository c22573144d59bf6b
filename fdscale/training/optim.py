"""The optimizer's parameter groups, and the learning rate of each in each step, as in the official implementation."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a decay, per optimizer step.

    The cosine begins after the warm-up (method, section 3; timm's cosine with warm-up prefix). The line, and the
    `milestones`, after each of which the peak is a tenth, are counted from the first step, and the warm-up leads up to
    them (mmseg's poly of power 1, detectron2's multi-step). `scaled` is what a parameter group's `lr_scale` multiplies:
    the peak alone (official: all groups start at the same `start` and end at the same `end`), or all three rates.
    """

    total_steps: int
    warmup_steps: int
    peak: float
    start: float = 0.0
    end: float = 0.0
    scaled: Literal["peak", "all"] = "peak"
    decay: Literal["cosine", "linear", "milestones"] = "cosine"
    milestones: tuple[float, ...] = ()  # shares of all steps

    def of_group(self, lr_scale: float) -> Schedule:
        """The schedule of a parameter group with this `lr_scale`."""
        ends = lr_scale if self.scaled == "all" else 1.0
        return replace(self, peak=self.peak * lr_scale, start=self.start * ends, end=self.end * ends)

    def at(self, index: int) -> float:
        """The rate at schedule index 0 .. total_steps."""
        if index < self.warmup_steps:
            top = self.peak if self.decay == "cosine" else self._decayed(index)
            return self.start + index * (top - self.start) / self.warmup_steps
        return self._decayed(index)

    def _decayed(self, index: int) -> float:
        progress = min(index / max(self.total_steps, 1), 1.0)
        if self.decay == "linear":
            return self.peak + progress * (self.end - self.peak)
        if self.decay == "milestones":
            return max(self.peak * 0.1 ** sum(progress >= each for each in self.milestones), self.end)
        progress = (index - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        return self.end + 0.5 * (self.peak - self.end) * (1 + math.cos(math.pi * min(progress, 1.0)))

    def for_step(self, step: int) -> float:
        """The rate of update `step` (from 0).

        The official scheduler of the cosine runs one behind, its first two updates agree; the others' do not.
        """
        return self.at(max(step - 1, 0) if self.decay == "cosine" else step)


def layer_scales(layers: Mapping[str, int], last: int, layer_decay: float) -> dict[str, float]:
    """The `lr_scale` of each parameter, `layer_decay ** (last - layer)`; 1 for the head's layer, `last`."""
    return {name: layer_decay ** (last - layer) for name, layer in layers.items()}


def parameter_groups(
    module: nn.Module, weight_decay: float, undecayed: Collection[str], lr_scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Decayed and not decayed (vectors, `*.bias`, full names in `undecayed`), apart for each `lr_scale`, stem first.

    `lr_scales` is by full name, 1 where a name is absent: without it there are the two groups of distillation.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)  # a divided parameter is empty itself
        plain = len(shape) == 1 or name.endswith(".bias") or name in undecayed
        scale = (lr_scales or {}).get(name, 1.0)
        new = {"params": [], "weight_decay": 0.0 if plain else weight_decay, "lr_scale": scale}
        groups.setdefault((scale, plain), new)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def adamw(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """torch's AdamW, fused: each weight and its moments are read and written once, on a CPU, too."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
