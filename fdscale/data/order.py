"""The one global sample order: a pure function of (seed, epoch, index), whatever the ranks; no torch."""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fdscale.config.errors import UserError


class Samples(Protocol):
    """A data set as a run sees it: so many samples, and what tells them from others.

    `setting` is the name, in its table of the recipe, of what says where it lies.
    """

    setting: ClassVar[str]

    def __len__(self) -> int: ...

    def fingerprint(self) -> str: ...


class GlobalOrder:
    """Which samples make up each step's global batch; the position in the data is the step, one integer.

    Every epoch is a full permutation drawn from (seed, epoch); its last incomplete global batch is dropped.
    Ranks never enter: rank r of W takes rows r*G/W .. (r+1)*G/W of each global batch of G.
    """

    def __init__(self, n_samples: int, global_batch: int, seed: int) -> None:
        if n_samples < global_batch:
            raise UserError(
                f"data.global_batch is {global_batch}, but the training data holds {n_samples} samples; "
                f"allowed: 1 to {n_samples}; use a smaller global batch or more data"
            )
        self.n_samples = n_samples
        self.global_batch = global_batch
        self.seed = seed
        self.steps_per_epoch = n_samples // global_batch
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.empty(0, np.int64)

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to (0-based); also the view that augmentation draws."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> NDArray[np.int64]:
        """Sample numbers (global_batch,) of a step; O(global_batch) once the epoch's permutation is drawn."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch
        return self._epoch_order(epoch)[start : start + self.global_batch]

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            bits = np.random.Philox(np.random.SeedSequence([self.seed, epoch]))
            self._permutation = np.random.Generator(bits).permutation(self.n_samples)
            self._permutation.flags.writeable = False
            self._epoch = epoch
        return self._permutation


def accumulation_steps(global_batch: int, world_size: int, micro_batch: int) -> int:
    """Micro batches per rank and step: global batch / (ranks x micro batch); UserError where uneven."""
    if world_size > global_batch:
        raise UserError(
            f"data.global_batch {global_batch}: {world_size} ranks are more than the images of one step; start at most "
            f"{global_batch} ranks, or raise data.global_batch"
        )
    together = world_size * micro_batch
    steps, left = divmod(global_batch, together)
    if left or not steps:
        allowed = [multiple for multiple in (steps * together, (steps + 1) * together) if multiple]
        raise UserError(
            f"data.global_batch {global_batch} does not divide: {world_size} ranks x micro batch "
            f"{micro_batch} = {together}, and {global_batch} / {together} = {steps} rest {left}; "
            f"allowed: multiples of {together} (nearest: {' or '.join(map(str, allowed))}), "
            f"or another train_micro_batch_size_per_gpu{_allowed_micro(global_batch, world_size)}"
        )
    return steps


def _allowed_micro(global_batch: int, world_size: int) -> str:
    share, left = divmod(global_batch, world_size)
    if left:
        return ""
    return " from " + ", ".join(str(size) for size in range(1, share + 1) if share % size == 0)
