"""From a run's settings to its ways out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdscale.training.exports import Exports, Ways
from fdscale.training.live import Live
from fdscale.training.monitor import MonitorSink, monitored

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from fdscale.build.run import Run


def exports_of(run: Run, live: Live) -> Exports:
    """What this rank's node shows of the attempt."""
    log = run.settings.log
    ways = Ways(
        port=log.prometheus_port,
        host=log.prometheus_host,
        certificate=log.prometheus_certificate,
        key=log.prometheus_key,
        password_file=log.prometheus_password_file,
        targets=log.prometheus_targets,
        pushgateway=log.pushgateway,
    )
    return Exports(ways, live, run.attempt, run.connection.rank)


def monitor_of(run: Run, engine: DeepSpeedEngine, live: Live) -> MonitorSink | None:
    """DeepSpeed's monitor, where the JSON switches it on; on the main rank, which alone writes."""
    blocks = monitored(run.deepspeed_json, run.directory.folder.resolve())
    if not (run.connection.rank.is_main and blocks):
        return None
    return MonitorSink(engine, blocks, run.settings.data.global_batch, live)
