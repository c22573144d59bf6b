"""DeepSpeed's monitor as a way out: TensorBoard, Weights & Biases, CSV files and Comet, as the DeepSpeed JSON says."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdscale.config.deepspeed_json import MONITORS
from fdscale.training.engine import open_monitor
from fdscale.training.live import Live
from fdscale.training.outage import Outage

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Event = tuple[str, float, int]


class MonitorSink:
    """Hands each row to the writers of `monitored` blocks, over images as DeepSpeed's own events are.

    Opened on the main rank, it becomes the engine's monitor. DeepSpeed writes its events inside of a step, where a full
    disk or a service that is down would end the run: they, too, go through here. After a first failure, be it to open,
    nothing is written any more.
    """

    def __init__(
        self, engine: DeepSpeedEngine, blocks: Mapping[str, Mapping[str, Any]], global_batch: int, live: Live
    ) -> None:
        self._global_batch, self._outage, self._broken = global_batch, Outage(live, "monitor"), False
        try:
            self._write = open_monitor(engine, blocks, self._write_spared)
        except Exception as error:  # a service's client may raise anything
            self._give_up(error)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        images = step * self._global_batch
        self._write_spared([(f"fdscale/{name}", value, images) for name, value in values.items() if name != "images"])

    def close(self) -> None:
        pass  # DeepSpeed's writers have flushed after every row

    def _write_spared(self, events: Sequence[Event]) -> None:
        try:
            if not self._broken:
                self._write(events)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._broken = True
        self._outage.lasts(f"DeepSpeed's monitor cannot write ({error}) and is left out from now on")


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
