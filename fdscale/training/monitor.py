"""DeepSpeed's monitor as a way out: TensorBoard, Weights & Biases, CSV files and Comet, as the DeepSpeed JSON says."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdscale.config.deepspeed_json import MONITORS
from fdscale.training.engine import monitor_writer
from fdscale.training.live import Live
from fdscale.training.outage import Outage

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Write = Callable[[Sequence[tuple[str, float, int]]], None]


class MonitorSink:
    """Hands each row to the writers of the monitor's `blocks`, over images as DeepSpeed's own events are.

    Opened on the main rank, it takes these as well: DeepSpeed writes them inside of a step, where a full disk or a
    service that is down would end the run. A writer that fails, be it to open, is left out from then on.
    """

    def __init__(
        self, engine: DeepSpeedEngine, blocks: Mapping[str, Mapping[str, Any]], global_batch: int, live: Live
    ) -> None:
        self._global_batch = global_batch
        self._outages = {name: Outage(live, "monitor") for name in blocks}
        self._writers: dict[str, Write] = {}
        for name, block in blocks.items():
            self._spare(name, partial(self._open, name, block))
        engine.monitor.enabled, engine.monitor.write_events = True, self._write

    def write(self, step: int, values: Mapping[str, float]) -> None:
        images = step * self._global_batch
        self._write([(f"fdscale/{name}", value, images) for name, value in values.items() if name != "images"])

    def close(self) -> None:
        pass  # DeepSpeed's writers have flushed after every row

    def _open(self, name: str, block: Mapping[str, Any]) -> None:
        self._writers[name] = monitor_writer(name, block)

    def _write(self, events: Sequence[tuple[str, float, int]]) -> None:
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
        own = {"enabled": True, "output_path": str(run_dir), "job_name": name}
        blocks[name] = {"job_name": run_dir.name, **blocks[name]} if blocks[name].get("output_path") else own
    if "wandb" in blocks:
        os.environ.setdefault("WANDB_DIR", str(run_dir))
        os.environ.setdefault("WANDB_NAME", run_dir.name)
    return blocks
