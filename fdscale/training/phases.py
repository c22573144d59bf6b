"""Where a step's time goes on each rank, and which rank the others wait for."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fdscale.cluster import host_memory
from fdscale.training.engine import Connection
from fdscale.training.live import Live
from fdscale.training.run_directory import write_text

logger = logging.getLogger(__name__)

PHASES = ("data", "forward", "backward", "update", "agree")
OWN = (*PHASES, "collective", "device_memory", "device_memory_limit", "host_memory", "probe")  # what each rank tells
HOST_SIZE = 256  # of the square matrices that a CPU multiplies
KEPT = 1000  # pairs of events of a phase that wait to be read, at least: reading one takes a microsecond
SECONDS_APART = 10.0  # at least, between two writings of the file and two probes of the chip
SLOW, ROWS = 1.5, 3  # times the median, in so many rows of metrics one after the other: then it is said


@dataclass(frozen=True)
class Slowest:
    """The rank that the others wait for: how much longer its own work takes than the median rank's, and why."""

    rank: int
    lag: float
    ratio: float
    reason: str


class Phases:
    """Seconds a step spends in each of PHASES on this rank, and among all ranks.

    On a GPU forward, backward and update are measured by events, read when the loop has waited for the device anyway.
    What such a time cannot tell: who is slow. In every collective all ranks wait for the last one, so that under
    ZeRO-3, whose forward gathers weights, the phases of all ranks are alike, and the slow rank waits least. Hence two
    figures that no peer enters: the wait for one's own data, and the time of a small fixed matrix product. They see a
    slow disk or decoder, and a throttled or shared chip; they do not see slow links, memory or host code, nor a chip
    that is slow only now and then. What the first rank of a node notes in its `live` is that node's ranks' own.
    """

    def __init__(self, connection: Connection, hosts: Sequence[str], file: Path, live: Live) -> None:
        self.connection, self.hosts, self.file, self.live = connection, tuple(hosts), file, live
        self._on_gpu = connection.device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: dict[str, deque[tuple[Any, Any]]] = defaultdict(deque)
        self._apart = False
        self._step, self._waited = 0, 0.0
        self._probe, self._probed, self._written = 0.0, float("-inf"), float("-inf")
        self._in_a_row: tuple[int, int] = (-1, 0)
        self._told: set[int] = set()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measure what is done inside as `phase`."""
        if self._apart:
            yield
        elif self._on_gpu and phase != "agree":  # agreeing is the host's alone
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self._events[phase].append((began, ended))
            if len(self._events[phase]) > KEPT:
                self._settle(phase)
        else:
            start = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - start

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is done inside belongs to no step, whatever phases it names."""
        self._apart = True
        yield
        self._apart = False

    def restart(self, step: int, waited: float) -> None:
        """Measure from `step` on; `waited` is the loader's count of seconds by now."""
        self._seconds.clear()
        self._events.clear()
        self._step, self._waited = step, waited

    def row(self, step: int, waited: float) -> dict[str, float]:
        """A step's seconds by phase, the mean over the ranks, and the slowest rank; every rank calls it.

        To be called when the device has been waited for. The main rank keeps the ranks' own figures in the file.
        """
        with self.live.handing_over():
            mine = self._mine(step, waited)
            table = torch.zeros(self.connection.rank.world_size, len(mine), dtype=torch.float64)
            table[self.connection.rank.rank] = torch.tensor(mine)
        dist.all_reduce(table, group=self.connection.control)
        with self.live.handing_over():
            return self._of_all(step, table)

    def _of_all(self, step: int, table: Tensor) -> dict[str, float]:
        ranks, means = table.tolist(), dict(zip(OWN, table.mean(0).tolist(), strict=True))
        slowest = slowest_of(ranks)
        if self.connection.rank.is_main:
            self._keep(step, ranks, slowest)
        self._warn(slowest)
        self._note_node(ranks)
        return {
            **{f"phase_seconds/{phase}": means[phase] for phase in PHASES},
            "collective_seconds": means["collective"],
            "slowest_rank": slowest.rank,
            "slowest_lag_seconds": slowest.lag,
            "straggler_ratio": slowest.ratio,
        }

    def _note_node(self, ranks: Sequence[Sequence[float]]) -> None:
        """What this node's ranks told, for its endpoint."""
        if self.connection.rank.local_rank:
            return
        self.live.look(lambda: {"node_memory_available_bytes": host_memory.available()})
        values: dict[str, float] = {}
        for rank in self._ranks_here():
            own = dict(zip(OWN, ranks[rank], strict=True))
            values |= {f"rank_phase_seconds/{rank}/{phase}": own[phase] for phase in PHASES}
            values |= {f"rank_{name}_seconds/{rank}": own[name] for name in ("collective", "probe")}
            held = ("device_memory", "device_memory_limit", "host_memory") if self._on_gpu else ("host_memory",)
            values |= {f"rank_{name}_bytes/{rank}": own[name] for name in held}
        self.live.note(values)

    def _ranks_here(self) -> Sequence[int]:
        """This node's: those of its host name; where two nodes share one, those that a launcher numbers in a row."""
        me = self.connection.rank
        named = [rank for rank, host in enumerate(self.hosts) if host == self.hosts[me.rank]]
        return named if len(named) == me.local_world_size else range(me.rank, me.rank + me.local_world_size)

    def _mine(self, step: int, waited: float) -> list[float]:
        """What this rank tells: OWN; seconds are those of a step."""
        for phase in list(self._events):
            self._settle(phase)
        sums = {**self._seconds, "data": waited - self._waited}
        steps = max(step - self._step, 1)
        if time.monotonic() - self._probed > SECONDS_APART:
            self._probe, self._probed = probe_seconds(self.connection.device), time.monotonic()
        seconds = [sums.get(phase, 0.0) / steps for phase in (*PHASES, "collective")]
        return [*seconds, *device_memory(self.connection.device), host_memory.resident(), self._probe]

    def _settle(self, phase: str) -> None:
        """Add up what the device is done with, in the order of its beginning; the rest waits."""
        pairs = self._events[phase]
        while pairs and pairs[0][1].query():
            began, ended = pairs.popleft()
            self._seconds[phase] += began.elapsed_time(ended) / 1000

    def _keep(self, step: int, ranks: Sequence[Sequence[float]], slowest: Slowest) -> None:
        if time.monotonic() - self._written < SECONDS_APART:
            return
        self._written = time.monotonic()
        rows = [
            {"rank": rank, "host": host, **dict(zip(OWN, own, strict=True))}
            for rank, (host, own) in enumerate(zip(self.hosts, ranks, strict=True))
        ]
        contents = {"step": step, "time": time.time(), "seconds": rows, "slowest": vars(slowest)}
        try:
            write_text(self.file, json.dumps(contents, indent=1) + "\n")
        except OSError as error:  # what is only told must not end a run, least of all on one rank
            logger.warning("could not write %s: %s", self.file, error)

    def _warn(self, slowest: Slowest) -> None:
        rank, rows = self._in_a_row
        rows = 0 if slowest.ratio <= SLOW else rows + 1 if slowest.rank == rank else 1
        self._in_a_row = (slowest.rank, rows)
        if rows == ROWS and slowest.rank not in self._told:
            self._told.add(slowest.rank)
            if self.connection.rank.is_main:
                logger.warning(
                    "rank %d on %s is slow: its own work takes %.1f times the median rank's, %.3f s a step more; %s",
                    slowest.rank, self.hosts[slowest.rank], slowest.ratio, slowest.lag, slowest.reason,
                )  # fmt: skip


def slowest_of(ranks: Sequence[Sequence[float]]) -> Slowest:
    """The rank whose own work takes longest, of what all ranks told: seconds in PHASES first, those of the probe last.

    Its own work: the wait for its data, and the median rank's computation at the rate that its probe shows.
    """
    busy = statistics.median_low(sum(own[1:4]) for own in ranks)
    usual = statistics.median_low(own[-1] for own in ranks) or 1.0
    works = [own[0] + busy * own[-1] / usual for own in ranks]
    median = statistics.median_low(works)
    rank = max(range(len(works)), key=works.__getitem__)
    waits = ranks[rank][0] - statistics.median_low(own[0] for own in ranks)
    pace = ranks[rank][-1] / usual
    if waits > works[rank] - median - waits:
        reason = f"it waits {waits:.3f} s a step longer for its data"
    else:
        reason = f"its chip takes {pace:.2f} times as long as the median one for the same product"
    return Slowest(rank, works[rank] - median, works[rank] / median if median else 1.0, reason)


def device_memory(device: torch.device) -> tuple[float, float]:
    """Bytes of a GPU in use by anyone, and bytes that it has; nothing of a CPU, whose memory is the host's."""
    if device.type != "cuda":
        return 0.0, 0.0
    free, total = torch.cuda.mem_get_info(device)
    return float(total - free), float(total)


def probe_seconds(device: torch.device) -> float:
    """Seconds of a fixed matrix product, the best of three; a few milliseconds in all."""
    if device.type != "cuda":
        factor = torch.linspace(-1, 1, HOST_SIZE**2).view(HOST_SIZE, HOST_SIZE)
        return min(_host_seconds(factor) for _ in range(4))
    factor = torch.linspace(-1, 1, 2048 * 2048, device=device).view(2048, 2048).bfloat16()
    pairs = [_device_events(factor) for _ in range(4)]
    torch.cuda.synchronize(device)
    return min(began.elapsed_time(ended) for began, ended in pairs[1:]) / 1000


def host_flops_per_second() -> float:
    """What a CPU rank reaches in that product, of fp32: its peak, as far as it can be told here."""
    return 2 * HOST_SIZE**3 / probe_seconds(torch.device("cpu"))


def _host_seconds(factor: Tensor) -> float:
    start = time.perf_counter()
    factor @ factor
    return time.perf_counter() - start


def _device_events(factor: Tensor) -> tuple[Any, Any]:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(10):
        factor @ factor
    ended.record()
    return began, ended
