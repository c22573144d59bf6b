"""The one global sample order: a pure function of (seed, step, index), whatever the ranks; no torch.

The position in the data is the step, one integer: every class here answers for any step without what came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fdscale.config.errors import UserError

Numbers = NDArray[np.int64]
LANES = 256  # at most: more nodes than lanes read shards of the same lane
SHARDS_OF_LANE = 8  # at least: those at its ends are read for two lanes


class Order(Protocol):
    """Which samples make up each step's global batch, and which view of each is drawn.

    Ranks never enter: rank r of W takes rows r*G/W .. (r+1)*G/W of each global batch of G.
    """

    global_batch: int
    steps_per_epoch: int

    def batch(self, step: int) -> Numbers:
        """Sample numbers (G,) of a step."""
        ...

    def views(self, step: int) -> Numbers:
        """How often each of these samples (G,) may have been shown before: the epoch of its data set."""
        ...


class DataSet(Protocol):
    """Data as a run sees them: so many samples, and what tells them from others.

    `fingerprints` are by the setting that says where the data lie, in this table of the recipe.
    """

    def __len__(self) -> int: ...

    def fingerprints(self, table: str) -> dict[str, str]: ...


class Samples(DataSet, Protocol):
    """Data that are shown in an order."""

    def order(self, global_batch: int, seed: int) -> Order: ...


class GlobalOrder:
    """All samples shuffled as one.

    Every epoch is a full permutation drawn from (seed, epoch); its last incomplete global batch is dropped.
    Raises UserError for fewer samples than one global batch; `where` names them.
    """

    def __init__(self, n_samples: int, global_batch: int, seed: int, where: str = "the training data") -> None:
        self.steps_per_epoch = _steps_per_epoch(n_samples, global_batch, where)
        self.n_samples = n_samples
        self.global_batch = global_batch
        self.seed = seed
        self._epoch = -1
        self._permutation: Numbers = np.empty(0, np.int64)

    def batch(self, step: int) -> Numbers:
        """Sample numbers (global_batch,) of a step; O(global_batch) once the epoch's permutation is drawn."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch
        return self._epoch_order(epoch)[start : start + self.global_batch]

    def views(self, step: int) -> Numbers:
        """The epoch that a step belongs to, (global_batch,) times."""
        return np.full(self.global_batch, step // self.steps_per_epoch)

    def _epoch_order(self, epoch: int) -> Numbers:
        if epoch != self._epoch:
            self._permutation = _permutation(self.n_samples, self.seed, epoch)
            self._epoch = epoch
        return self._permutation


class WindowedOrder:
    """Samples of many shards, shuffled so that each shard is read by few, once an epoch, in one stretch of steps.

    Each epoch lays the shards in a line, in an order drawn from (seed, epoch), and cuts the line into lanes, pieces of
    as many steps. The rows of a global batch are dealt from the lanes, in order: whoever reads some of the rows reads
    the shards of these lanes alone. A lane shuffles its piece in windows of steps, which hold about `shuffle` samples
    over all lanes; windows of neighbouring lanes begin at other steps: none within an epoch needs all its shards anew.
    `starts` int (S+1,): the first sample of each of S shards, and the number of samples. Raises as `GlobalOrder`.
    """

    def __init__(
        self, starts: NDArray[np.integer], global_batch: int, seed: int, shuffle: int, where: str = "the training data"
    ) -> None:
        self.steps_per_epoch = _steps_per_epoch(int(starts[-1]), global_batch, where)
        self.global_batch = global_batch
        self.seed = seed
        self.window_steps = max(1, shuffle // global_batch)
        self._starts = np.asarray(starts, np.int64)
        lanes = lanes_of(len(starts) - 1, global_batch)
        self._rows = np.arange(lanes + 1) * global_batch // lanes
        self._windows: dict[int, _Window] = {}
        self._line = _Line(-1, self._starts, self._starts, self._starts)

    def batch(self, step: int) -> Numbers:
        """Sample numbers (global_batch,) of a step; O(global_batch) but where a window begins."""
        return np.concatenate([self._of_lane(lane, step) for lane in range(len(self._rows) - 1)])

    def views(self, step: int) -> Numbers:
        """The epoch that a step belongs to, (global_batch,) times."""
        return np.full(self.global_batch, step // self.steps_per_epoch)

    def _of_lane(self, lane: int, step: int) -> Numbers:
        window = self._windows.get(lane)
        if window is None or not window.first <= step < window.last:
            window = self._windows[lane] = self._draw(lane, step)
        rows = int(self._rows[lane + 1] - self._rows[lane])
        start = (step - window.first) * rows
        return window.samples[start : start + rows]

    def _draw(self, lane: int, step: int) -> _Window:
        """The window of a lane that holds a step: the samples of its part of the line, shuffled."""
        epoch, at = divmod(step, self.steps_per_epoch)
        lanes, length = len(self._rows) - 1, self.window_steps
        shift = lane * length // lanes
        number = (at + shift) // length
        first = max(0, number * length - shift)
        last = min(self.steps_per_epoch, (number + 1) * length - shift)
        begins, ends = self._rows[lane], self._rows[lane + 1]
        start = self.steps_per_epoch * begins + first * (ends - begins)
        places = start + _permutation((last - first) * int(ends - begins), self.seed, epoch, 1 + lane, number)
        before = epoch * self.steps_per_epoch
        return _Window(before + first, before + last, self._line_of(epoch).samples(places))

    def _line_of(self, epoch: int) -> _Line:
        if epoch != self._line.epoch:
            drawn = _permutation(len(self._starts) - 1, self.seed, epoch)
            ends = np.diff(self._starts)[drawn].cumsum()
            self._line = _Line(epoch, self._starts[drawn], np.concatenate([[0], ends[:-1]]), ends)
        return self._line


class MixedOrder:
    """Several orders side by side: each global batch has a fixed number of rows of each, spread evenly over it.

    Sample numbers run through the data sets in turn: those of the second begin at `sizes[0]`. An epoch is as long as
    all of them together; each data set has epochs of its own, which its `views` count.
    """

    def __init__(self, orders: Sequence[Order], sizes: Sequence[int]) -> None:
        self.global_batch = sum(order.global_batch for order in orders)
        self.steps_per_epoch = sum(sizes) // self.global_batch
        self._orders = orders
        self._first = np.cumsum([0, *sizes[:-1]])
        self._rows = _spread([order.global_batch for order in orders])

    def batch(self, step: int) -> Numbers:
        """Sample numbers (global_batch,) of a step."""
        return self._joined([first + order.batch(step) for first, order in zip(self._first, self._orders, strict=True)])

    def views(self, step: int) -> Numbers:
        """The epoch of its own data set that each row (global_batch,) belongs to."""
        return self._joined([order.views(step) for order in self._orders])

    def _joined(self, parts: Sequence[Numbers]) -> Numbers:
        whole = np.empty(self.global_batch, np.int64)
        for rows, part in zip(self._rows, parts, strict=True):
            whole[rows] = part
        return whole


class _Window(NamedTuple):
    """The samples of a lane from step `first` to before `last`, in the order in which they are shown."""

    first: int
    last: int
    samples: Numbers


class _Line(NamedTuple):
    """The shards of an epoch in a line: the first sample of each, its place, and the place behind the last one's."""

    epoch: int
    starts: Numbers
    begins: Numbers
    ends: Numbers

    def samples(self, places: Numbers) -> Numbers:
        """The samples at these places of the line."""
        shards = np.searchsorted(self.ends, places, side="right")
        return self.starts[shards] + places - self.begins[shards]


def lanes_of(shards: int, global_batch: int) -> int:
    """How many lanes so many shards are cut into: a power of two, as numbers of nodes are."""
    most = min(LANES, global_batch, shards // SHARDS_OF_LANE)
    return 1 << max(most.bit_length() - 1, 0)


def rows_by_share(global_batch: int, shares: Sequence[float]) -> list[int]:
    """How many rows of a global batch each of these shares gets, by largest remainder; they may be 0."""
    exact = [global_batch * share / sum(shares) for share in shares]
    rows = [int(value) for value in exact]
    by_rest = sorted(range(len(shares)), key=lambda i: (rows[i] - exact[i], i))
    for i in by_rest[: global_batch - sum(rows)]:
        rows[i] += 1
    return rows


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


def _steps_per_epoch(n_samples: int, global_batch: int, where: str) -> int:
    if n_samples < global_batch:
        raise UserError(
            f"data.global_batch is {global_batch}, but {where} holds {n_samples} samples; "
            f"allowed: 1 to {n_samples}; use a smaller global batch or more data"
        )
    return n_samples // global_batch


def _permutation(length: int, *entropy: int) -> Numbers:
    """0 .. length - 1, shuffled by a counter-based generator seeded with these numbers; read-only."""
    bits = np.random.Philox(np.random.SeedSequence(entropy))
    numbers = np.random.Generator(bits).permutation(length)
    numbers.flags.writeable = False
    return numbers


def _spread(counts: Sequence[int]) -> list[Numbers]:
    """For each part of so many rows, which rows are its own: in rising order, and evenly among the others'."""
    part = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    arranged = part[np.lexsort((part, place))]
    return [np.flatnonzero(arranged == number) for number in range(len(counts))]
