"""Several shard folders read as one data set, each with its share of every global batch; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fdscale.config.errors import UserError
from fdscale.data.index import Index
from fdscale.data.order import GlobalOrder, MixedOrder, Order, WindowedOrder, rows_by_share


@dataclass(frozen=True)
class Mixture:
    """One or more indices; sample numbers run through them in turn.

    `names` are the settings that name them. `weights` are their shares of a global batch, relative to each other; None:
    in proportion to what they hold. `shuffle` samples of each are mixed at a time; fewer are shuffled as one.
    """

    indices: tuple[Index, ...]
    names: tuple[str, ...] = ("data.shards",)
    weights: tuple[float, ...] | None = None
    shuffle: int = 2**18

    def __len__(self) -> int:
        return sum(len(index) for index in self.indices)

    def fingerprints(self, table: str) -> dict[str, str]:
        """Each index's, by the setting that names it."""
        return {name: index.fingerprint() for name, index in zip(self.names, self.indices, strict=True)}

    def order(self, global_batch: int, seed: int) -> Order:
        """Which samples each step shows; raises UserError where a data set has no row, or fewer samples than rows."""
        rows = self.rows(global_batch)
        orders = [
            _order(index, own, _seed(seed, place), self.shuffle, name)
            for place, (index, own, name) in enumerate(zip(self.indices, rows, self.names, strict=True))
        ]
        return orders[0] if len(orders) == 1 else MixedOrder(orders, [len(index) for index in self.indices])

    def rows(self, global_batch: int) -> list[int]:
        """How many rows of each global batch are of each index; raises UserError for none, and for more than it has."""
        sizes = [len(index) for index in self.indices]
        rows = rows_by_share(global_batch, self.weights or sizes)
        for name, own, size in zip(self.names, rows, sizes, strict=True) if len(rows) > 1 else ():
            if not own:
                raise UserError(
                    f"{name}: its share of a global batch of {global_batch} images is less than one image; "
                    "raise its weight or data.global_batch"
                )
            if own > size:
                raise UserError(
                    f"{name}: its share of a global batch of {global_batch} is {own} images, but it holds {size}; "
                    "lower its weight or data.global_batch"
                )
        return rows

    def located(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of sample numbers (B,): which index each is in (B,), and its number there (B,)."""
        ends = np.cumsum([len(index) for index in self.indices])
        places = np.searchsorted(ends, samples, side="right")
        return places, samples - np.concatenate([[0], ends])[places]


def mixed(indices: Sequence[Index], names: Sequence[str], weights: Sequence[float | None], shuffle: int) -> Mixture:
    """The mixture that settings ask for: either each data set has a weight there, or none has."""
    given = tuple(weight for weight in weights if weight is not None)
    return Mixture(tuple(indices), tuple(names), given if len(given) == len(indices) else None, shuffle)


def _seed(seed: int, place: int) -> int:
    """The first data set's seed is the run's; the others' are of their own, for no two runs the same."""
    return seed if place == 0 else int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0])


def _order(index: Index, rows: int, seed: int, shuffle: int, name: str) -> Order:
    where = f"{name} ({index.folder})"
    if len(index) <= shuffle:
        return GlobalOrder(len(index), rows, seed, where)
    return WindowedOrder(index.starts, rows, seed, shuffle, where)
