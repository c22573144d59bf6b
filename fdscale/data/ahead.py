"""Which shards of a mixture are brought before their steps: remote ones into a cache, local ones into memory."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fdscale.data.mixture import Mixture
from fdscale.data.order import LANES, lanes_of
from fdscale.data.remote.shards import bytes_at_once

STEPS = 8  # at least
STRETCH_SECONDS = 60.0  # a shard that is asked for again by then is in the stretch of steps for which it was read
BLOCK = 2**20

Shard = tuple[int, int]  # which index of the mixture, and which of its shards


class ShardsAhead:
    """The shards of coming steps, for `fetching.FetchAhead`, which runs `bring` in a process of its own.

    Local shards that are read in windows are read through once, in sequence, so that the node's page cache has them
    when their images are read in the order's: where half of the `free` bytes of memory hold one window of all that the
    node reads, its `share` of the mixture, and where no other node reads the same shards.
    """

    def __init__(self, mixture: Mixture, share: float, free: int) -> None:
        local = [index for index in mixture.indices if index.remote is None and len(index) > mixture.shuffle]
        window = sum(bytes_at_once(index, mixture.shuffle, share) for index in local)
        shared = any(share * lanes_of(len(index.shards), LANES) < 1 for index in local)
        self._local = window < free / 2 and not shared
        self._mixture = mixture
        self._asked: dict[Shard, float] = {}

    def __bool__(self) -> bool:
        """Whether there is anything to bring."""
        return any(self._is_brought(place) for place in range(len(self._mixture.indices)))

    @property
    def fetched_bytes(self) -> int:
        """Bytes that this process and those forked off have brought into the caches of the mixture."""
        caches = {index.remote.cache for index in self._mixture.indices if index.remote is not None}
        return sum(cache.fetched_bytes for cache in caches)

    def steps(self, global_batch: int) -> int:
        """How far ahead: an eighth of a window."""
        return max(STEPS, self._mixture.shuffle // global_batch // 8)

    def of(self, samples: NDArray[np.int64]) -> list[Shard]:
        """Those that hold these samples (B,)."""
        places, own = self._mixture.located(samples)
        return [
            (place, shard)
            for place, index in enumerate(self._mixture.indices)
            if self._is_brought(place)
            for shard in np.unique(np.searchsorted(index.starts, own[places == place], side="right") - 1).tolist()
        ]

    def bring(self, shard: Shard) -> bool:
        """Bring one of them; False where the cache has no room for it yet."""
        place, number = shard
        index = self._mixture.indices[place]
        if index.remote is not None:
            return index.remote.ahead(number)
        before, self._asked[shard] = self._asked.get(shard, -STRETCH_SECONDS), time.monotonic()
        if self._asked[shard] - before >= STRETCH_SECONDS:
            _read_through(index.shard_path(number))
        return True

    def _is_brought(self, place: int) -> bool:
        index = self._mixture.indices[place]
        return index.remote is not None or (self._local and len(index) > self._mixture.shuffle)


def _read_through(path: Path) -> None:
    """What cannot be read is told by the worker that needs it."""
    block = bytearray(BLOCK)
    try:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    except OSError:
        return
