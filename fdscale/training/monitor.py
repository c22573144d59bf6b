"""DeepSpeed's monitor as a way out: TensorBoard, Weights & Biases, CSV files and Comet, as the DeepSpeed JSON says."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import TYPE_CHECKING, Any

from fdscale.config.deepspeed_json import MONITORS
from fdscale.training.engine import monitor_writer
from fdscale.training.live import Live
from fdscale.training.outage import PATIENCE, Outage

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Events = Sequence[tuple[str, float, int]]
WAITING = 1000
"""Rows that may wait for writers that are slow."""


class MonitorSink:
    """Hands each row to the writers of the monitor's `blocks`, over images as DeepSpeed's own events are.

    Opened on the main rank, it takes these as well: DeepSpeed writes them inside of a step, where a share that hangs
    would hold the run, and a full disk or a service that is down would end it. Here a thread opens and writes; a writer
    that fails is left out from then on.
    """

    def __init__(
        self, engine: DeepSpeedEngine, blocks: Mapping[str, Mapping[str, Any]], global_batch: int, live: Live
    ) -> None:
        self._global_batch = global_batch
        self._outages = {name: Outage(live, "monitor") for name in blocks}
        self._slow = Outage(live, "monitor")
        self._writers: dict[str, Callable[[Events], None]] = {}
        self._blocks = blocks
        self._rows: Queue[Events | None] = Queue(WAITING)
        self._thread = Thread(target=self._write_until_the_end, name="monitor", daemon=True)
        self._thread.start()
        engine.monitor.enabled, engine.monitor.write_events = True, self._put

    def write(self, step: int, values: Mapping[str, float]) -> None:
        images = step * self._global_batch
        self._put([(f"fdscale/{name}", value, images) for name, value in values.items() if name != "images"])

    def close(self) -> None:
        """Wait a moment for what has not been written yet."""
        self._put(None)
        self._thread.join(PATIENCE)

    def _open(self, name: str, block: Mapping[str, Any]) -> None:
        self._writers[name] = monitor_writer(name, block)

    def _put(self, events: Events | None) -> None:
        try:
            self._rows.put_nowait(events)
        except Full:
            self._slow.lasts("the writers of DeepSpeed's monitor are too slow: rows are left out")

    def _write_until_the_end(self) -> None:
        for name, block in self._blocks.items():
            self._spare(name, partial(self._open, name, block))
        while (events := self._rows.get()) is not None:
            for name, write in list(self._writers.items()):
                self._spare(name, partial(write, events))

    def _spare(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a service's client may raise anything
            self._writers.pop(name, None)
            self._outages[name].lasts(f"{name} of the DeepSpeed JSON cannot be written ({error}) and is left out")


def monitored(deepspeed_json: Mapping[str, Any], run_dir: Path) -> dict[str, dict[str, Any]]:
    """The JSON's blocks of ways out that are on, whose files lie in the run directory unless they say where.

    RUN/tensorboard, RUN/csv_monitor, RUN/wandb: of its own accord DeepSpeed writes those of every run to
    `DeepSpeedJobName` in the folder where it was started.
    """
    blocks = {name: dict(deepspeed_json[name]) for name in MONITORS if deepspeed_json.get(name, {}).get("enabled")}
    for name in {"tensorboard", "csv_monitor"} & blocks.keys():
        elsewhere = blocks[name].get("output_path")
        where = {"output_path": elsewhere or str(run_dir / name)}
        blocks[name] = {"job_name": run_dir.name if elsewhere else "", **blocks[name], **where}
    if "wandb" in blocks:
        os.environ.setdefault("WANDB_DIR", str(run_dir))
        os.environ.setdefault("WANDB_NAME", run_dir.name)
    return blocks
