"""A run as Prometheus sees it: fdscale's own endpoint with values that a test chooses, and the run's target file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from fdscale.training.endpoint import Endpoint
from fdscale.training.live import Live
from fdscale.training.prometheus import application, registry_of


class StandIn:
    """One node of a run that makes a step whenever it is told; `targets` is the folder that Prometheus watches."""

    def __init__(self, targets: Path, run: str) -> None:
        self.run, self.file, self.live = run, targets / f"{run}-0001-node1.json", Live()
        self.endpoint: Endpoint | None = Endpoint(application(registry_of(self.live, run, whole=True)), "127.0.0.1", 0)
        self._steps = 0
        now = time.time()
        self.live.note({"attempt_start_timestamp_seconds": now, "checkpoint_timestamp_seconds": now})
        self.live.note({"checkpoint_every": 1000, "attempts_without_commit": 1, "rollbacks_total": 0})
        self.live.enter("training")
        self.step()
        self._tell({})

    def step(self, **values: float) -> None:
        """A step like all others, but for these values."""
        self._steps += 1
        self.live.note(
            {
                "step": self._steps,
                "last_step_timestamp_seconds": time.time(),
                "step_seconds": 0.1 + self._steps / 1e6,  # no two rows are alike
                "images_per_second": 100,
                "loss": 0.5,
                "phase_seconds/data": 0.001,
                "slowest_rank": 1,
                "straggler_ratio": 1.1,
                "slowest_lag_seconds": 0.01,
                **values,
            }
        )

    def crash(self) -> None:
        """As kill -9 leaves it: nobody answers, and its target stays."""
        if self.endpoint is not None:
            self.endpoint.close()
            self.endpoint = None

    def end(self, ended: str = "") -> None:
        """An orderly end: its target goes, or says how it `ended` where somebody is to start it again."""
        if ended:
            self._tell({"ended": ended})
        else:
            self.file.unlink()
        self.crash()

    def _tell(self, labels: dict[str, str]) -> None:
        port = self.endpoint.port if self.endpoint is not None else 0
        group = {"targets": [f"127.0.0.1:{port}"], "labels": {"run": self.run, "node": "node1", **labels}}
        beside = self.file.with_suffix(".new")
        beside.write_text(json.dumps([group]))
        os.replace(beside, self.file)
