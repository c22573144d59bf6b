"""A run that was never run: thirty hours of figures, told by fdscale's own `Live` and its endpoint's own collector.

Hour by hour: 8 two steps of a bad batch are left out · 13 the main node dies, and is started again 24 minutes later ·
25 the chip of rank 5 (of the last one, where there are fewer) gets hot and slow, and stays so.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fdscale.training.live import Live
from fdscale.training.metrics import counters
from fdscale.training.phases import PHASES
from fdscale.training.prometheus import LatestValues

HOUR, MINUTE = 3600, 60
HOURS = 30
GIB = 2**30
Sample = tuple[str, Mapping[str, str], float, float]
STEP, EVERY, PLANNED, BATCH = 4.0, 500, 40_000, 8192
BAD_BATCH, CRASH, SILENT, HOT = 8 * HOUR, 13 * HOUR, 24 * MINUTE, 25 * HOUR
NODES = ("node-a", "node-b")
RANKS = 4  # a node


@dataclass
class Run:
    """What goes on from minute to minute; `began` is the Unix time of its first start."""

    name: str
    began: float
    nodes: tuple[str, ...] = NODES
    step: float = 0.0
    counted: float = 0.0
    committed: int = 0
    committed_at: float = 0.0
    attempt: int = 1
    skipped: int = 0
    draw: random.Random = field(default_factory=lambda: random.Random(3))

    @property
    def hot_rank(self) -> int:
        return min(5, len(self.nodes) * RANKS - 1)

    def samples(self) -> Iterator[Sample]:
        """Everything that Prometheus would have scraped, once a minute."""
        self.committed_at = self.began
        lives = self._lives(1)
        for second in range(0, HOURS * HOUR, MINUTE):
            at = self.began + second
            if silent := CRASH <= second < CRASH + SILENT:
                lives = self._lives(2)
                self.step, self.attempt = self.committed, 2
            else:
                self._go_on(second, lives)
            yield from self._scraped(at, lives, silent)
            yield from self._beside(second, at, silent)

    def _lives(self, attempt: int) -> dict[str, Live]:
        lives = {node: Live({**INFO, "nodes": str(len(self.nodes)), "attempt": str(attempt)}) for node in self.nodes}
        lives[self.nodes[0]].note(counters())
        return lives

    def _go_on(self, second: int, lives: Mapping[str, Live]) -> None:
        hot, main = second >= HOT, lives[self.nodes[0]]
        seconds = STEP * (1.34 if hot else 1) * self.draw.uniform(0.98, 1.03)
        before = self.step
        self.step += MINUTE / seconds
        self.counted += MINUTE / seconds
        if second == BAD_BATCH:
            main.count("skipped_steps_total", 2)
            self.skipped += 2
        main.enter("training")
        if int(self.step) // EVERY > int(before) // EVERY:
            self.committed, self.committed_at = int(self.step) // EVERY * EVERY, self.began + second
            main.note({"checkpoint_seconds": self.draw.uniform(38, 52)})
            main.enter("saving")
            main.count("canary_checks_total")
        main.note(self._of_run(second, seconds, hot))
        main.count("telemetry_seconds_total", 0.004)
        main.count("fetched_bytes_total", MINUTE * 2e9 * self.draw.uniform(0.9, 1.1))
        for number, live in enumerate(lives.values()):
            live.note(self._of_node(number, seconds, hot))

    def _of_run(self, second: int, seconds: float, hot: bool) -> dict[str, float]:
        return {
            **self._progress(second, seconds),
            **self._learned(second),
            **self._pace(seconds, hot),
            **self._kept(),
        }

    def _progress(self, second: int, seconds: float) -> dict[str, float]:
        step = self.step
        return {
            "attempt": self.attempt,
            "attempt_start_timestamp_seconds": self.began + (CRASH + SILENT if self.attempt > 1 else 0),
            "first_start_timestamp_seconds": self.began,
            "attempts_without_commit": float(self.committed_at < self.began + CRASH and self.attempt > 1),
            "goodput": step / max(self.counted + SILENT / STEP * (self.attempt > 1) + 40, 1),
            "step": int(step),
            "steps_planned": PLANNED,
            "epoch": step * BATCH / 12.8e6,
            "images": int(step) * BATCH,
            "eta_seconds": (PLANNED - step) * seconds,
            "last_step_timestamp_seconds": self.began + second - self.draw.uniform(0, seconds),
            **({"previous_end/killed": 1.0} if self.attempt > 1 else {}),
        }

    def _learned(self, second: int) -> dict[str, float]:
        draw, step = self.draw, self.step
        loss = 0.62 * math.exp(-step / 3500) + 0.29 - 0.1 * step / PLANNED + draw.gauss(0, 0.004)
        spike, warm = BAD_BATCH <= second < BAD_BATCH + 4 * MINUTE, min(step / 1000, 1)
        grown = {stage: (6 * 3**stage) * (1 + step / 60_000) * draw.uniform(0.97, 1.03) for stage in range(4)}
        return {
            "loss": loss * (1.9 if spike else 1),
            "loss_zero": 0.93 + draw.gauss(0, 0.004),
            "feature_cosine": 0.86 - 0.78 * math.exp(-step / 4000) + draw.gauss(0, 0.003),
            "target_variance": 1 + draw.gauss(0, 0.01),
            "grad_norm": (0.4 + 2.5 * math.exp(-step / 1500)) * math.exp(draw.gauss(0, 0.12)) * (30 if spike else 1),
            "lr": 1.2e-3 * warm * (0.5 + 0.5 * math.cos(math.pi * step / PLANNED)),
            "eval_loss": 0.62 * math.exp(-step / 3500) + 0.30 - 0.1 * step / PLANNED,
            "eval_knn_accuracy": 0.78 - 0.7 * math.exp(-step / 6000),
            **{f"teacher_loss/{name}": loss * part for name, part in (("clip", 1.1), ("dino", 0.9))},
            "teacher_cosine/clip": 0.86 - 0.8 * math.exp(-step / 4000),
            "teacher_cosine/dino": 0.86 - 0.7 * math.exp(-step / 4000),
            **{f"residual_amplitude/{stage}": value for stage, value in grown.items()},
        }

    def _pace(self, seconds: float, hot: bool) -> dict[str, float]:
        draw, rate = self.draw, BATCH / seconds
        return {
            "images_per_second": rate,
            "step_seconds": seconds,
            "data_wait_seconds": 0.04 * draw.uniform(0.7, 1.4),
            "collective_seconds": 0.9 + (seconds - STEP if hot else 0),
            "model_flops_per_image": 3.3e11,
            "peak_flops_per_second": 8 * 989e12,
            "model_flops_per_second": rate * 3.3e11 * 3,
            "mfu": rate * 3.3e11 * 3 / (8 * 989e12),
            "slowest_rank": self.hot_rank if hot else draw.randrange(len(self.nodes) * RANKS),
            "slowest_lag_seconds": (seconds - STEP) if hot else draw.uniform(0.01, 0.05),
            "straggler_ratio": seconds / STEP if hot else draw.uniform(1.0, 1.03),
            **{f"phase_seconds/{phase}": part for phase, part in _phases(seconds, hot).items()},
        }

    def _kept(self) -> dict[str, float]:
        return {
            "planned_memory_bytes": 61.5 * GIB,
            "measured_memory_bytes": 58.9 * GIB,
            "checkpoint_step": self.committed,
            "checkpoint_timestamp_seconds": self.committed_at,
            "checkpoint_bytes": 41.7 * GIB,
            "checkpoint_every": EVERY,
            "skipped_steps": self.skipped,
            "bad_samples": int(self.step / 900),
        }

    def _of_node(self, number: int, seconds: float, hot: bool) -> dict[str, float]:
        draw = self.draw
        values = {
            "node_memory_available_bytes": (780 - 90 * number + draw.uniform(-8, 8)) * GIB,
            "node_memory_limit_bytes": 1007 * GIB,
        }
        for rank in range(number * RANKS, number * RANKS + RANKS):
            slow = hot and rank == self.hot_rank
            phases = _phases(seconds, hot)
            phases["data"] *= draw.uniform(0.6, 1.5)
            values |= {f"rank_phase_seconds/{rank}/{phase}": part for phase, part in phases.items()}
            values[f"rank_collective_seconds/{rank}"] = (
                0.75 if slow else 0.9 + (seconds - STEP if hot else 0)
            ) * draw.uniform(0.95, 1.05)
            values[f"rank_probe_seconds/{rank}"] = 0.0021 * (1.42 if slow else 1) * draw.uniform(0.99, 1.02)
            values[f"rank_device_memory_bytes/{rank}"] = (62.4 + 0.3 * rank + draw.uniform(-0.2, 0.2)) * GIB
            values[f"rank_device_memory_limit_bytes/{rank}"] = 79.1 * GIB
            values[f"rank_host_memory_bytes/{rank}"] = (31 + rank % 3 + draw.uniform(-0.3, 0.3)) * GIB
        return values

    def _scraped(self, at: float, lives: Mapping[str, Live], silent: bool) -> Iterator[Sample]:
        for number, (node, live) in enumerate(lives.items()):
            target = {"instance": f"{node}:9400", "job": "fdscale", "run": self.name, "node": node}
            yield "up", target, float(not silent or number > 0), at
            for family in () if silent else LatestValues(live, self.name, number == 0).collect():
                for name, labels, value, *_ in family.samples:
                    yield name, {**labels, **target}, value, at

    def _beside(self, second: int, at: float, silent: bool) -> Iterator[Sample]:
        """What others measure: alerts that fire, the DCGM exporter, the pushgateway."""
        firing = {"RunDisappeared": silent and second > CRASH + 4 * MINUTE, "Straggler": second > HOT + 15 * MINUTE}
        for name, fires in firing.items():
            if fires:
                yield "ALERTS", {"alertname": name, "alertstate": "firing", "run": self.name}, 1, at
        for node in self.nodes:
            yield (
                "push_time_seconds",
                {"run": self.name, "node": node, "job": "fdscale"},
                at - self.draw.uniform(0, 10),
                at,
            )
        for rank in range(len(self.nodes) * RANKS):
            hot = second >= HOT and rank == self.hot_rank
            labels = {"Hostname": self.nodes[rank // RANKS], "gpu": str(rank % RANKS), "job": "dcgm"}
            for name, value in _dcgm(hot, silent, self.draw).items():
                yield name, labels, value, at


INFO = {
    "commit": "d979b3c",
    "version": "0.6.0",
    "recipe": "swinv2g",
    "program": "distill",
    "student": "swinv2_giant",
    "teachers": "clip dino",
    "ranks": "8",
    "chip": "H100",
}


def _phases(seconds: float, hot: bool) -> dict[str, float]:
    stretch = 1.34 if hot else 1
    parts = {"data": 0.04, "forward": 1.35 * stretch, "backward": 2.2 * stretch, "update": 0.33, "agree": 0.02}
    return {phase: parts[phase] * seconds / (STEP * stretch) for phase in PHASES}


def _dcgm(hot: bool, silent: bool, draw: random.Random) -> dict[str, float]:
    return {
        "DCGM_FI_DEV_GPU_UTIL": 0 if silent else draw.uniform(95, 99),
        "DCGM_FI_DEV_POWER_USAGE": 90 if silent else draw.uniform(630, 680) * (0.72 if hot else 1),
        "DCGM_FI_DEV_GPU_TEMP": 35 if silent else draw.uniform(61, 66) + (24 if hot else 0),
        "DCGM_FI_DEV_SM_CLOCK": draw.uniform(1930, 1980) * (0.68 if hot else 1),
        "DCGM_FI_DEV_XID_ERRORS": 0,
        "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL": 0,
        "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": 0 if silent else draw.uniform(0.41, 0.45) * (0.97 if hot else 1),
        "DCGM_FI_DEV_ROW_REMAP_FAILURE": 0,
    }
