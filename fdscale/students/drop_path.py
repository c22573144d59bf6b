"""Drop path whose draws come from a table, so that every number of ranks computes the same forward.

A rank's own generator would tie the result to how the batch is split. One uniform table per step is drawn for the
whole global batch instead, and each rank is given the rows of its samples. Blocks that ask for it leave out the work
of the samples that a branch drops.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn

Branch = Callable[[Tensor], Tensor]


@lru_cache(maxsize=2)
def drop_path_table(seed: int, step: int, sites: int, global_batch: int) -> Tensor:
    """Uniform draws (sites, global batch), fp32, a pure function of (seed, step); drawn once for all micro batches."""
    state = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0] >> 1))
    return torch.rand(sites, global_batch, generator=generator)


def drop_path_rows(seed: int, step: int, sites: int, global_batch: int, rows: slice) -> Tensor | None:
    """The draws (sites, B) of those rows of the step's global batch, on the host; None without drop path."""
    return drop_path_table(seed, step, sites, global_batch)[:, rows] if sites else None


class Draws:
    """The draws (sites, B) of the micro batch in flight, shared by the drop path sites of one network.

    `skip_dropped`: blocks that can compute a branch for its kept samples alone do so; None: on GPUs, as on CPUs to
    gather them takes about as long as what they save.
    """

    def __init__(self) -> None:
        self.skip_dropped: bool | None = None
        self.skips = False  # in the micro batch in flight
        self.rates: list[float] = []  # of each site
        self.table: Tensor | None = None
        self.kept: list[Tensor] = []  # each site's samples; where it keeps none, the first
        self.counts: list[int] = []
        self.divided = True  # the weights, among ranks, which must then do the same in every block

    def take(self, table: Tensor | None, device: torch.device, divided: bool) -> None:
        """Look at a micro batch's draws on the host and send what the device needs there, without waiting for it."""
        self.table, self.divided = None if table is None else _sent(table, device), divided
        self.skips = self._skips(device.type == "cuda")
        if table is not None and self.skips:
            kept = table.numpy() >= np.array(self.rates, np.float32)[:, None]
            self.counts = kept.sum(axis=1).tolist()
            rows = _sent(torch.from_numpy(np.argsort(~kept, axis=1, kind="stable")), device)
            self.kept = [of_site[: max(count, 1)] for of_site, count in zip(rows, self.counts, strict=True)]

    def _skips(self, cuda: bool) -> bool:
        return cuda if self.skip_dropped is None else self.skip_dropped

    def keep_all(self, cuda: bool, divided: bool, table: Tensor | None, device: torch.device, _: bool) -> None:
        """`take` where draws have shapes alone, for a network on such a device whose weights may be `divided`."""
        self.table, self.divided, self.skips = table, divided, self._skips(cuda)
        if table is not None:
            rows = torch.arange(table.shape[1], device=device)
            self.counts, self.kept = [len(rows)] * len(self.rates), [rows] * len(self.rates)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return values
    return values.contiguous().pin_memory().to(device, non_blocking=True)  # from pageable memory it would wait


class TableDropPath(nn.Module):
    """Stochastic depth per sample: keep with probability 1 - p, scale by 1 / (1 - p), decided by row `site`."""

    def __init__(self, drop_prob: float, site: int, draws: Draws) -> None:
        super().__init__()
        self.drop_prob, self.site, self.draws = drop_prob, site, draws

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> the same shape; the identity in evaluation mode."""
        return x * self._factors(x) if self.training else x

    def _factors(self, x: Tensor) -> Tensor:
        assert self.draws.table is not None, "drop path needs this micro batch's draws"
        kept = self.draws.table[self.site] >= self.drop_prob
        return (kept.to(x.dtype) / (1.0 - self.drop_prob)).view(-1, *[1] * (x.ndim - 1))

    def residual(self, x: Tensor, branch: Branch) -> Tensor:
        """x + drop_path(branch(x)) of (B, ...), where `branch` sees the kept samples alone; it is always called.

        ZeRO-3 needs every rank in every module: where nothing is kept, zeros go in and nothing of them comes out. Nor
        is there a shorter way then where everything is: a recomputation stops once it has what the backward pass asks
        for, which must be the same on every rank.
        """
        if not self.training:
            return x + branch(x)
        if not self.draws.skips:
            return _added(x, branch(x), self._factors(x))
        assert self.draws.table is not None, "drop path needs this micro batch's draws"
        count, scale = self.draws.counts[self.site], 1.0 / (1.0 - self.drop_prob)
        if count == len(x) and not self.draws.divided:
            return torch.add(x, branch(x), alpha=scale)
        rows = self.draws.kept[self.site]
        given = x.index_select(0, rows)
        given, scale = (given, scale) if count else (given * 0, 0.0)
        added = branch(given)
        kind = torch.promote_types(x.dtype, added.dtype)
        return x.to(kind).index_add(0, rows, added.to(kind), alpha=scale)


def _added(x: Tensor, added: Tensor, factors: Tensor) -> Tensor:
    """x + added * factors, in the wider type, in one pass."""
    kind = torch.promote_types(x.dtype, added.dtype)
    return torch.addcmul(x.to(kind), added.to(kind), factors.to(kind))


def divided(network: nn.Module) -> bool:
    """Whether ranks hold the network's weights in parts (ZeRO-3), by DeepSpeed's mark on them."""
    return hasattr(next(network.parameters()), "ds_id")


def use_table(backbone: nn.Module) -> Draws:
    """Replace timm's drop path modules by ones that read a table; returns what holds it, and the rate of each site."""
    draws = Draws()
    for parent in backbone.modules():
        for name, child in parent.named_children():
            if isinstance(child, DropPath):
                setattr(parent, name, TableDropPath(child.drop_prob, len(draws.rates), draws))
                draws.rates.append(child.drop_prob)
    return draws


def add_branch(drop_path: nn.Module, x: Tensor, branch: Branch) -> Tensor:
    """x + drop_path(branch(x)) of a block, whose `drop_path` is nothing (an Identity) where its rate is 0."""
    return drop_path.residual(x, branch) if isinstance(drop_path, TableDropPath) else x + drop_path(branch(x))
