"""The memory that one step adds to the states: a trace replayed under DeepSpeed's rules; torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from fdscale.planning.engine_rules import FP32, REDUCE_BUCKET, EngineRules
from fdscale.planning.gathering import Coordinator
from fdscale.planning.trace import Moment, Trace


@dataclass(frozen=True)
class Added:
    """Bytes beside the states when the step holds most: inputs, activations, whole weights, gradients, buffers."""

    batch: int = 0
    activations: int = 0
    gathered: int = 0
    gradients: int = 0
    buckets: int = 0

    @property
    def total(self) -> int:
        return self.batch + self.activations + self.gathered + self.gradients + self.buckets


@dataclass
class Gradients:
    """Gradients between the backward pass and the optimizer: `held` beside the resident ones, and their buckets."""

    trace: Trace
    rules: EngineRules
    ranks: int
    accumulation: int
    held: int = 0
    _elements: int = 0
    _began: bool = False
    _waiting: int = 0  # of weights too large for a bucket

    def __post_init__(self) -> None:
        if self.accumulation == 1 or self.rules.keeper == "zero3" or self.rules.at_once:
            return
        whole = self.rules.stage < 2
        self.held = self.trace.parameters * self.rules.backward if whole else self._share()

    @property
    def buckets(self) -> int:
        """Buffers in which gradients travel; ZeRO-3's is a resident one."""
        if self.rules.keeper != "zero12" or not self._began or not self.rules.zero.get("contiguous_gradients", True):
            return 0
        double = 2 if self.rules.zero.get("overlap_comm") else 1
        return double * self.rules.size("reduce_bucket_size") * self.rules.backward

    def follow(self, moment: Moment) -> int:
        """Replay one moment; returns bytes that are needed at it alone."""
        if moment.kind == "backward":
            self._began = True
        if moment.kind != "gradient":
            return 0
        elements = self.trace.weights[moment.index]
        if self.rules.at_once:
            return elements * self.rules.gradient  # cast, then added
        if not self._reduces_early():
            if self.accumulation == 1:
                self.held += elements * self.rules.backward
            return 0
        bucket, needed = self.rules.size("reduce_bucket_size"), 0
        if self._elements and self._elements + elements > bucket:
            needed = self._reduce()
        self._elements += elements
        if elements > bucket:  # stays where it is until it is reduced
            self._waiting += elements * self.rules.backward
            self.held += elements * self.rules.backward
        return needed

    def finish(self) -> int:
        """What the end of the backward pass needs at once."""
        parameters, rules = self.trace.parameters, self.rules
        if self._reduces_early():
            return self._reduce() if self._elements else 0
        if rules.keeper == "zero12":
            self.held += self._share() if self.accumulation == 1 else 0
            return 0
        kind = rules.gradient if rules.keeper == "bf16" else rules.backward
        reduced = rules.reduced if rules.reduced != kind else 0
        return min(parameters, REDUCE_BUCKET) * (kind + reduced) if self.ranks > 1 else 0

    def _reduces_early(self) -> bool:
        """Whether buckets leave during the backward pass; stage 1 does so only in overlap, in its last micro batch."""
        if self.rules.keeper == "zero12" and self.rules.stage == 1:
            return bool(self.rules.zero.get("overlap_comm")) and self.accumulation == 1
        return self.rules.keeper in ("zero12", "zero3")

    def _reduce(self) -> int:
        """Empty the bucket: its elements are lined up for the ranks, this rank's part is cast and kept."""
        elements, rules = self._elements, self.rules
        self._elements = 0
        self.held -= self._waiting
        self._waiting = 0
        cast = rules.gradient if rules.gradient != rules.reduced else 0
        if rules.keeper == "zero12":
            if self.accumulation == 1 and self.held == 0:
                self.held = self._share()
            return elements * rules.reduced if rules.reduced != rules.backward else 0
        return elements * rules.reduced + elements // self.ranks * cast

    def _share(self) -> int:
        return -(-self.trace.parameters // self.ranks) * self.rules.gradient


def step_peak(trace: Trace, rules: EngineRules, ranks: int, accumulation: int) -> Added:
    """What forward and backward hold beside the states when it is most."""
    gradients = Gradients(trace, rules, ranks, accumulation)
    weights = Coordinator(trace, rules) if rules.keeper == "zero3" and ranks > 1 else None
    highest = Added()
    for moment in trace.moments:
        gathered = weights.follow(moment) if weights else 0
        highest = _larger(highest, trace, moment.live, gathered, gradients, gradients.follow(moment))
        gathered = weights.held if weights else 0
        highest = _larger(highest, trace, moment.peak, gathered, gradients, 0)
    gathered = weights.held if weights else 0
    return _larger(highest, trace, trace.moments[-1].live, gathered, gradients, gradients.finish())


def _larger(highest: Added, trace: Trace, live: int, gathered: int, gradients: Gradients, needed: int) -> Added:
    batch = min(trace.batch, live)
    now = Added(batch, live - batch, gathered, gradients.held, gradients.buckets + needed)
    return now if now.total > highest.total else highest


def optimizer_peak(trace: Trace, rules: EngineRules, ranks: int) -> int:
    """What the optimizer's step holds beside the states: this rank's gradients in fp32 (a fused AdamW adds none)."""
    if rules.keeper == "ddp":  # weight by weight; gradients are whole
        return trace.parameters * rules.backward
    share, largest = -(-trace.parameters // ranks), _largest_group(trace, rules, ranks)
    copies = 0 if rules.compact or rules.offload_optimizer else 1  # offloaded they are on the host
    kept = 0 if rules.keeper in ("zero3", "bf16") else share * rules.gradient
    late = rules.keeper == "bf16" and not rules.at_once
    low = trace.parameters * rules.backward if late else 0  # let go of after the step
    return kept + low + copies * FP32 * largest


def _largest_group(trace: Trace, rules: EngineRules, ranks: int) -> int:
    """Elements that the optimizer updates at a time on one rank."""
    limit = rules.size("sub_group_size") if rules.keeper == "zero3" else None
    largest, filled = 0, dict.fromkeys(trace.groups, 0)
    for elements, group in zip(trace.weights, trace.groups, strict=True):
        filled[group] += -(-elements // ranks)
        largest = max(largest, filled[group])
        if limit is not None and filled[group] >= limit:
            filled[group] = 0
    return largest
