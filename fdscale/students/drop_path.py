"""Drop path whose draws come from a table, so that every number of ranks computes the same forward.

A rank's own generator would tie the result to how the batch is split. One uniform table per step is drawn for the
whole global batch instead, and each rank is given the rows of its samples.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn


@lru_cache(maxsize=2)
def drop_path_table(seed: int, step: int, sites: int, global_batch: int) -> Tensor:
    """Uniform draws (sites, global batch), fp32, a pure function of (seed, step); drawn once for all micro batches."""
    state = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0] >> 1))
    return torch.rand(sites, global_batch, generator=generator)


class Draws:
    """The draws (sites, B) of the micro batch in flight, shared by the drop path sites of one network."""

    table: Tensor | None = None


class TableDropPath(nn.Module):
    """Stochastic depth per sample: keep with probability 1 - p, scale by 1 / (1 - p), decided by row `site`."""

    def __init__(self, drop_prob: float, site: int, draws: Draws) -> None:
        super().__init__()
        self.drop_prob, self.site, self.draws = drop_prob, site, draws

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> the same shape; the identity in evaluation mode."""
        if not self.training:
            return x
        assert self.draws.table is not None, "drop path needs this micro batch's draws"
        kept = self.draws.table[self.site] >= self.drop_prob
        scale = kept.to(x.dtype) / (1.0 - self.drop_prob)
        return x * scale.view(-1, *[1] * (x.ndim - 1))


def use_table(backbone: nn.Module) -> tuple[Draws, int]:
    """Replace timm's drop path modules by ones that read a table; returns the table's holder and its row count."""
    draws, sites = Draws(), 0
    for parent in backbone.modules():
        for name, child in parent.named_children():
            if isinstance(child, DropPath):
                setattr(parent, name, TableDropPath(child.drop_prob, sites, draws))
                sites += 1
    return draws, sites


def drop_path_rows(
    seed: int, step: int, sites: int, global_batch: int, rows: slice, device: torch.device
) -> Tensor | None:
    """The draws (sites, B) of those rows of the step's global batch; None for a network without drop path."""
    if not sites:
        return None
    draws = drop_path_table(seed, step, sites, global_batch)[:, rows].clone()
    if device.type == "cuda":  # a copy from pageable memory would wait for the device
        return draws.pin_memory().to(device, non_blocking=True)
    return draws
