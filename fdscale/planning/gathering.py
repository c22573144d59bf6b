"""Which weights ZeRO-3 holds whole at each moment of a step: DeepSpeed's coordinator, replayed; torch-free.

As in `partitioned_param_coordinator.py` of DeepSpeed 0.19.8, from the second step on, when its trace is complete: a
module's weights are gathered before it runs and the next ones up to `stage3_prefetch_bucket_size` ahead; they stay
while they are needed again within `stage3_max_reuse_distance`. What is gathered together lies in one buffer until
its last weight has been waited for, beside the copies that the modules use.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from fdscale.planning.engine_rules import EngineRules
from fdscale.planning.trace import Moment, Trace

LEAF_KEY = "leaf_module"


@dataclass
class Gather:
    """Weights that travel together: their buffer, and which of them nobody has waited for yet."""

    size: int
    waiting: set[int]
    alone: bool  # one weight's buffer is the weight
    copied: bool = False


@dataclass
class Coordinator:
    """`held` bytes of whole weights (persistent ones not counted) as the moments of a trace are replayed."""

    trace: Trace
    rules: EngineRules
    held: int = 0
    _step: int = 0
    _available: set[int] = field(default_factory=set)
    _elements: int = 0

    def __post_init__(self) -> None:
        threshold = self.rules.size("stage3_param_persistence_threshold")
        sizes = self.trace.weights
        self.persistent = {index for index, size in enumerate(sizes) if size <= threshold}
        self._prefetch = self.rules.size("stage3_prefetch_bucket_size")
        self._max_live = self.rules.size("stage3_max_live_parameters")
        self._reuse = self.rules.size("stage3_max_reuse_distance")
        self.used = modules_that_gather(self.trace, self.rules)
        order = [self.used[m.index] for m in self.trace.moments if _fetches(m) and m.index in self.used]
        self._queue = deque((weight, step) for step, weights in enumerate(order) for weight in weights)
        self._walked = [0, *accumulate(sum(sizes[weight] for weight in weights) for weights in order)]
        self._uses: dict[int, list[int]] = {}
        for step, weights in enumerate(order):
            for weight in weights:
                self._uses.setdefault(weight, []).append(step)
        self._fetched_for = dict.fromkeys(range(len(sizes)), -1)
        self._flying: dict[int, Gather] = {}
        self._active: dict[int, set[int]] = {}

    def follow(self, moment: Moment) -> int:
        """Replay one moment; returns the most bytes of whole weights at it, its end being `held`."""
        if moment.kind == "gradient" or moment.index not in self.used:
            return self.held
        if _fetches(moment):
            return self._fetch(moment.index)
        self._release(moment.index)
        return self.held

    def _fetch(self, module: int) -> int:
        weights = self.used[module]
        self._gather([weight for weight in weights if self._absent(weight)])
        highest = self.held
        for weight in weights:
            self._active.setdefault(weight, set()).add(module)
            highest = max(highest, self._wait(weight))
        self._discard(weights)
        self._gather(self._ahead())
        self._step += 1
        return max(highest, self.held)

    def _absent(self, weight: int) -> bool:
        """Whether a weight is neither here, in full, nor on its way."""
        return weight not in self._available and weight not in self._flying and weight not in self.persistent

    def _gather(self, weights: Sequence[int]) -> None:
        if not weights:
            return
        elements = sum(self.trace.weights[weight] for weight in weights)
        gather = Gather(elements * self.rules.weight, set(weights), alone=len(weights) == 1)
        self._flying.update(dict.fromkeys(weights, gather))
        self._elements += elements
        self.held += gather.size

    def _wait(self, weight: int) -> int:
        """Take a weight out of its buffer; returns the bytes held while buffer and copies are both there."""
        gather = self._flying.pop(weight, None)
        if gather is None:
            return self.held
        if not gather.copied:
            gather.copied = True
            self._available |= gather.waiting
            self.held += 0 if gather.alone else gather.size
        gather.waiting.discard(weight)
        highest = self.held
        if not gather.waiting and not gather.alone:
            self.held -= gather.size
        return highest

    def _discard(self, weights: Sequence[int]) -> None:
        wanted = {weight for weight in weights if self._fetched_for[weight] < self._step}
        seen: set[int] = set()
        while self._queue and len(seen) < len(wanted):
            weight, step = self._queue.popleft()
            self._fetched_for[weight] = step
            seen.add(weight)

    def _ahead(self) -> list[int]:
        room = min(self._max_live - self._elements, self._prefetch) if self._prefetch else 0
        chosen: list[int] = []
        elements = 0
        while self._queue and elements < room:
            weight, step = self._queue.popleft()
            absent = self._absent(weight) and weight not in chosen
            self._fetched_for[weight] = max(self._fetched_for[weight], step)
            if absent:
                chosen.append(weight)
                elements += self.trace.weights[weight]
        return chosen

    def _release(self, module: int) -> None:
        for weight in self.used[module]:
            self._active.get(weight, set()).discard(module)
            if weight in self._available and not self._active.get(weight) and not self._kept(weight):
                self._available.discard(weight)
                self._elements -= self.trace.weights[weight]
                self.held -= self.trace.weights[weight] * self.rules.weight

    def _kept(self, weight: int) -> bool:
        """Whether a weight was counted on by a prefetch, or is used again within the reuse distance."""
        if self._fetched_for[weight] > self._step:
            return True
        uses = self._uses[weight]
        place = bisect_left(uses, self._step)
        return place < len(uses) and self._walked[uses[place]] - self._walked[self._step] < self._reuse


def _fetches(moment: Moment) -> bool:
    return moment.kind in ("forward", "backward")


def modules_that_gather(trace: Trace, rules: EngineRules) -> dict[int, tuple[int, ...]]:
    """The weights that each module gathers: its own, those of a part that is never called itself, a leaf's all.

    A leaf (`leaf_module` in the JSON, by class) gathers everything inside it at once; what is inside has no say.
    """
    leaves = _leaves(trace, rules)
    called = {moment.index for moment in trace.moments if moment.kind == "forward"}
    gathers: dict[int, list[int]] = {}
    for index, module in enumerate(trace.modules):
        owner = index
        while owner >= 0 and (owner not in called or _inside(trace, owner, leaves)):
            owner = trace.modules[owner].parent
        if owner >= 0:
            gathers.setdefault(owner, []).extend(module.own)
    return {index: tuple(dict.fromkeys(weights)) for index, weights in gathers.items() if weights}


def _leaves(trace: Trace, rules: EngineRules) -> set[int]:
    names = {str(name).rpartition(".")[2] for name in (rules.zero.get(LEAF_KEY) or {}).get("classes", ())}
    return {index for index, module in enumerate(trace.modules) if module.name in names}


def _inside(trace: Trace, index: int, leaves: set[int]) -> bool:
    """Whether a module lies in a leaf, being none itself."""
    parent = trace.modules[index].parent
    while parent >= 0:
        if parent in leaves:
            return True
        parent = trace.modules[parent].parent
    return False
